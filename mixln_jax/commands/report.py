"""Report on runs or a study: one HTML file, figures for a paper, and tables, from the run folders alone.

With --track the folders are entries of a track (docs/track.md): each run is held against the track's rules, and what is
written is the track's board, one HTML file, with its table as CSV.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import jax

from mixln_jax.command_line import CommandLine
from mixln_jax.errors import InputError
from mixln_jax.places import is_url
from mixln_jax.runs.remote import readable_place, writable_place
from mixln_jax.text import printable
from mixln_jax.track import load_track

WEIGHTS = r"checkpoints/\d+/(params|rest)/"  # what a report does not read


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.positional("FOLDER …", "folders, each of a run, of a study, or of runs and studies: work/runs/*, or work/runs")
  line.strings("workdir", "such a folder too; the flag may be given several times")
  line.string("output", "the folder to write report.html, figures/ and tables/ to", required=True)
  line.string("baseline", "the placement that the others are compared with; by default pre, else the first one")
  line.string("track", "the recipe of a track, as configs/tracks/cpu.py: write its board")
  line.boolean("store_noise", "with --track: store the noise of the baseline's runs beside the track's recipe")
  values = line.parse(argv)
  if values.track is None and values.store_noise:
    raise InputError("--store_noise has no meaning without --track; leave it out")
  if values.track is not None and values.baseline is not None:
    raise InputError("--baseline has no meaning with --track: a track has its own; leave it out")
  places = [*line.rest, *(values.workdir or ())]
  if not places:
    raise InputError("no folder is given: name those of the runs, as in `report work/runs/*`, or --workdir; see --help")
  # Reading checkpoints' facts must not take an accelerator from a run that trains on this machine.
  jax.config.update("jax_platforms", "cpu")
  with contextlib.ExitStack() as stack:
    workdirs = [stack.enter_context(readable_place(workdir, "workdir", skip=WEIGHTS)) for workdir in places]
    output = stack.enter_context(writable_place(values.output, "output"))
    if values.track is not None:
      return _board(workdirs, output, values)
    return _report(workdirs, output, values)


def _board(workdirs: list[Path], output: Path, values: Any) -> int:
  from mixln_jax.reporting.board import make_board
  from mixln_jax.reporting.board_page import write_board, write_noise
  from mixln_jax.reporting.loading import load

  track, _ = load_track(values.track)
  board = make_board(track, load([str(workdir) for workdir in workdirs]))
  page = write_board(board, output)
  for problem in board.problems:
    print(printable(f"warning: {problem}"), file=sys.stderr)
  for rejected in board.rejected:
    print(printable(f"NOT COUNTED    {rejected.run.name}: {'; '.join(rejected.violations)}"))
  for entry in board.entries:
    for text in (*entry.faults, *entry.remarks):
      print(printable(f"{'not ranked' if text in entry.faults else 'note':<14} {entry.label}: {text}"))
  print(printable(f"result     {board.answer}"))
  if values.store_noise:
    seeds = 0 if board.noise is None else board.noise.runs
    if board.noise is None or seeds < track.baseline_seeds:
      raise InputError(
        f"--store_noise: {track.baseline} has {seeds} of the {track.baseline_seeds} seeds that the track asks for at "
        "its best rate here; train the others first"
      )
    write_noise(board.noise, track.noise_file)
    print(printable(f"noise      {track.noise_file}: σ {board.noise.std:.4f} nats over {board.noise.runs} seeds"))
  shown = f"{values.output.rstrip('/')}/{page.name}" if is_url(values.output) else page
  print(printable(f"board      {shown}"))
  return 0


def _report(workdirs: list[Path], output: Path, values: Any) -> int:
  # Here, since the drawing libraries take seconds and nothing else needs them.
  from mixln_jax.reporting.loading import load
  from mixln_jax.reporting.page import write_report

  material = load([str(workdir) for workdir in workdirs])
  placements = list(dict.fromkeys(run.placement for run in material.runs))
  if values.baseline is not None and values.baseline not in placements:
    raise InputError(f"--baseline={values.baseline}: no run has this placement; choices: {', '.join(placements)}")
  report = write_report(material, output, values.baseline)
  for problem in [*material.problems, *(text for run in material.runs for text in run.problems)]:
    print(printable(f"warning: {problem}"), file=sys.stderr)
  for finding in report.findings:
    level = "NOT COMPARABLE" if finding.level == "unfair" else finding.level
    print(printable(f"{level:<14} {finding.text}"))
  print(printable(f"result     {report.headline}"))
  print(f"figures    {len(report.figures)} files, {len(report.tables)} tables")
  page = f"{values.output.rstrip('/')}/{report.page.name}" if is_url(values.output) else report.page
  print(printable(f"report     {page}"))
  return 0

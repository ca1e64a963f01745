"""Run a study: every run that its axes make, one after another here, shared among machines that see the same folder.

The same command again resumes it, with what is missing; more machines may run it in one --workdir.
Exit status: 0 all runs are done; 1 a run failed; 75 stopped by a signal, or others still train.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from mixln_jax import config as config_lib
from mixln_jax.command_line import CommandLine
from mixln_jax.commands._search import list_candidates, search_command
from mixln_jax.config import Config
from mixln_jax.data.opening import open_data
from mixln_jax.errors import InputError
from mixln_jax.parallel import processes
from mixln_jax.parallel.compile_cache import use_compile_cache
from mixln_jax.runs.outcome import STOPPED
from mixln_jax.signals import STOPPED_STATUS
from mixln_jax.sweeps import sequence
from mixln_jax.sweeps.joint import check_keeps_two, joint_set, train_together
from mixln_jax.sweeps.progress import StudyProgress
from mixln_jax.sweeps.record import Held, hold_against, write_curves
from mixln_jax.sweeps.study import TOGETHER, Run, Study, load_study, make_study, parse_axes
from mixln_jax.text import printable
from mixln_jax.track import PLACEMENT_FIELD, load_track


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.config(named_by=("search", "track"))
  line.string(
    "track",
    "the recipe of a track, as configs/tracks/cpu.py, instead of --config: run an entry of it, by its protocol. "
    "--axis='model.placement=pre YOURS' says which placements; by default those of its board",
  )
  line.string("workdir", "the study's folder", required=True)
  line.string(
    "search",
    "a recipe with a SEARCH (configs/searches/), instead of --config: search placements (docs/placement_search.md)",
  )
  line.strings(
    "axis",
    "FIELD=VALUE VALUE …, one flag an axis; the runs are their product. Fields that move together: "
    "'num_layers;embed_dim=8;128 16;96'. By default the STUDY that the recipe defines (configs/studies/)",
  )
  line.integer("index", "train only the run of this number (from 1, as --list shows it), as in a job array", minimum=1)
  line.boolean("together", "train all runs as one program; --config.mesh.run divides them over devices")
  line.boolean("list", "only show the runs and their states")
  line.string("export", "only write the curves of the runs to this CSV file")
  line.string(
    "compare",
    "only compare the runs' last validation losses with such a file; status 1 where one is off by over --tolerance",
  )
  line.number("tolerance", "with --compare: nats by which a loss may differ", default=0.05, minimum=0.0)
  values = line.parse(argv)
  base = line.config_value()
  recipe = line.config_path()
  if values.search is not None:
    for name in ("axis", "index", "together", "export", "compare"):
      if line.was_given(name):
        raise InputError(f"--search and --{name} exclude one another: a search makes its own runs")
    if not values.list:
      search_command(recipe, base, values.workdir)
      _say_how_to_report(values.workdir)
    else:
      list_candidates(recipe, base, values.workdir)
    return 0
  if values.track is not None:
    first = _entry(values.track, base, values.axis or ())
  elif values.axis:
    first = make_study(base, [parse_axes(values.axis)])
  else:
    first = load_study(recipe, base)
  study = sequence.with_stages(first, values.workdir)
  runs = study.runs(values.workdir)
  if values.index is not None and values.index > len(runs):
    raise InputError(f"--index={values.index}: the study has {len(runs)} runs; the last one is {len(runs)}")
  if values.index is not None and values.together:
    raise InputError("--index and --together exclude one another: together all runs are one program")
  if not values.together:
    jax.config.update("jax_platforms", "cpu")  # the runs' own processes train: this one must not hold their devices
  if values.export:
    print(f"wrote      {values.export}: {write_curves(runs, values.export)} lines")
    return 0
  if values.compare:
    return _compare(hold_against(runs, values.compare), values.tolerance)
  if values.list:
    _show(runs, runs)
    return 0
  if values.together:
    check_keeps_two(base)  # before anything is written
    processes.join(base.parallel)
  for config in {run.config.data.to_json(): run.config for run in runs}.values():
    data = open_data(config)  # what is not prepared is said before anything is trained
    if values.track is not None:
      _check_records(values.track, data.manifest.fingerprint, data.folder)
  runs = sequence.open_with_stages(first, values.workdir, write=not values.together or processes.is_first())
  mine = runs if values.index is None else [runs[values.index - 1]]
  if values.together:
    return _train_together(first, runs, values.workdir, values.track)
  failed = _train(mine, runs)
  while values.index is None:
    if len(sequence.with_stages(first, values.workdir).planned()) == len(runs):
      break
    print("study      these runs are done; now those of its next stage")
    runs = mine = sequence.open_with_stages(first, values.workdir)
    failed += _train(mine, runs)
  _show(runs, mine)
  print(f"weights    initial, {sequence.weights_line(runs)}")
  _say_how_to_report(values.workdir, values.track)
  if failed:
    print(f"error: {len(failed)} runs failed: {', '.join(failed)}; see their {sequence.LOG}", file=sys.stderr)
    return 1
  return 0 if all(sequence.state_of(run).state == sequence.DONE for run in mine) else STOPPED_STATUS


def _entry(recipe: str, base: Config, axes: Sequence[str]) -> Study:
  """The study of an entry of a track; raises InputError naming each field that is not free."""
  track, _ = load_track(recipe)
  grid = parse_axes(axes)
  others = [TOGETHER.join(fields) for fields in grid if fields != (PLACEMENT_FIELD,)]
  if others:
    raise InputError(
      f"--axis={others[0]}=…: an entry of track {track.name} varies {PLACEMENT_FIELD}; its rates and seeds are those "
      "of the track's protocol, and initial values are given as --config.FIELD"
    )
  placements = [values[0] for values in grid.get((PLACEMENT_FIELD,), ())]
  study = make_study(base, **track.study(placements))
  flat = config_lib.flatten(base)
  wrong: dict[str, None] = {}
  for values in study.planned().values():
    wrong |= dict.fromkeys(track.departures_in_words({**flat, **values}))
  if wrong:
    raise InputError(f"--track={recipe}: not free in track {track.name}: {'; '.join(wrong)}")
  return study


def _check_records(recipe: str, fingerprint: str, folder: Path) -> None:
  """Rejects records that are not those of the track, before anything is trained on them."""
  track, _ = load_track(recipe)
  if track.fingerprint and fingerprint != track.fingerprint:
    raise InputError(
      f"--track={recipe}: the records in {folder} have the fingerprint {fingerprint[:12]}…, the track "
      f"{track.fingerprint[:12]}…: another text, tokenizer or validation set; prepare the track's, with the versions "
      "that requirements.txt and requirements-text.txt pin"
    )


def _train_together(study: Study, runs: list[Run], workdir: str, track: str | None) -> int:
  use_compile_cache()
  with processes.failing_together():
    outcomes = []
    while chosen := joint_set(runs):  # runs that were added to the study since come after those that were begun
      outcomes = train_together(study, chosen)
      if any(outcome.status == STOPPED for outcome in outcomes):
        break
    processes.wait_for_all("the end of the study")
  if processes.is_first():
    if len(sequence.with_stages(study, workdir).planned()) > len(runs):
      print("study      these runs are done; the same command again trains those of the next stage")
    _show(runs, runs)
    print(f"weights    initial, {sequence.weights_line(runs)}")
    _say_how_to_report(workdir, track)
  return STOPPED_STATUS if any(outcome.status == STOPPED for outcome in outcomes) else 0


def _train(mine: list[Run], runs: list[Run]) -> list[str]:
  """Trains what is open; returns the names of the runs that failed."""
  tried: set[str] = set()
  failed = []
  progress = StudyProgress()
  while (run := sequence.next_run(mine, tried)) is not None:
    tried.add(run.name)
    print(f"run        {runs.index(run) + 1}/{len(runs)} {run.name}", flush=True)
    progress.start_run(sum(sequence.steps_left(later) for later in mine if later.name not in tried))
    with tqdm(total=run.config.train.num_steps, unit="step", dynamic_ncols=True, disable=None) as bar:

      def seen(text: str, bar: tqdm = bar) -> None:
        stands = progress.seen(text)
        if stands is None:
          return
        step, _, rest = stands.partition("  ")
        if not bar.disable:
          bar.set_postfix_str(rest, refresh=False)
          bar.update(int(step.removeprefix("step ").split("/")[0]) - bar.n)
        elif progress.is_due():
          print(f"           {printable(stands)}", flush=True)

      status = sequence.train_run(run, seen)
    print(f"           {sequence.state_of(run).describe()}", flush=True)
    if status not in (0, STOPPED_STATUS) and sequence.state_of(run).state == sequence.OPEN:
      failed.append(run.name)
      print(f"           exit status {status}: {printable(_last_line(run))}", flush=True)
    sequence.weights_line(runs)
  return failed


def _say_how_to_report(workdir: str, track: str | None = None) -> None:
  folder = workdir.rstrip("/")
  of_track = [] if track is None else [f"--track={track}"]
  output = f"--output={folder}/{'report' if track is None else 'board'}"
  command = shlex.join(["python", "-m", "mixln_jax", "report", *of_track, folder, output])
  print(printable(f"report     {command}"))


def _compare(held: list[Held], tolerance: float) -> int:
  width = max(len(one.run) for one in held)
  for one in held:
    found = "not there" if one.found is None else f"{one.found:.4f}  {one.found - one.recorded:+.4f}"
    verdict = "" if one.within(tolerance) else f"  more than {tolerance} off"
    print(f"{one.run:<{width}}  step {one.step}  {one.recorded:.4f}  {found}{verdict}")
  return 0 if all(one.within(tolerance) for one in held) else 1


def _last_line(run: Run) -> str:
  lines = (run.folder / sequence.LOG).read_text(errors="replace").strip().splitlines()
  return lines[-1] if lines else "it printed nothing"


def _show(runs: list[Run], shown: list[Run]) -> None:
  """Prints how runs of a study ended, each with its number in the study."""
  width = max(len(run.name) for run in shown)
  for run in shown:
    number = runs.index(run) + 1
    print(f"{number:>4}  {run.name:<{width}}  {sequence.state_of(run).describe()}")

"""Report on runs or a study: one HTML file, figures for a paper, and tables, from the run folders alone."""

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

WEIGHTS = r"checkpoints/\d+/(params|rest)/"  # what a report does not read


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.strings("workdir", "a run's folder, once for each run; or the folder of a study", required=True)
  line.string("output", "the folder to write report.html, figures/ and tables/ to", required=True)
  line.string("baseline", "the placement that the others are compared with", default="pre")
  values = line.parse(argv)
  # Reading checkpoints' facts must not take an accelerator from a run that trains on this machine.
  jax.config.update("jax_platforms", "cpu")
  with contextlib.ExitStack() as stack:
    workdirs = [stack.enter_context(readable_place(workdir, "workdir", skip=WEIGHTS)) for workdir in values.workdir]
    output = stack.enter_context(writable_place(values.output, "output"))
    return _report(workdirs, output, values, line.was_given("baseline"))


def _report(workdirs: list[Path], output: Path, values: Any, baseline_given: bool) -> int:
  # Here, since the drawing libraries take seconds and nothing else needs them.
  from mixln_jax.reporting.loading import load
  from mixln_jax.reporting.page import write_report

  material = load([str(workdir) for workdir in workdirs])
  placements = list(dict.fromkeys(run.placement for run in material.runs))
  if baseline_given and values.baseline not in placements:
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

"""List runs: status, step, placement, best loss, age, size, and which of them are comparable."""

import contextlib
import sys

import jax

from mixln_jax.command_line import CommandLine
from mixln_jax.errors import InputError
from mixln_jax.runs.remote import readable_place
from mixln_jax.text import for_stdout, printable

DEFAULT = "work/runs"
WEIGHTS = r"checkpoints/\d+/(params|rest)/"  # what a list does not read


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.positional("FOLDER …", f"runs, studies, or folders that hold them at any of three levels; by default {DEFAULT}")
  line.parse(argv)
  jax.config.update("jax_platforms", "cpu")  # a list must not take an accelerator from a run that trains
  from mixln_jax.reporting.listing import listing  # it loads pandas
  from mixln_jax.reporting.loading import load

  with contextlib.ExitStack() as stack:
    folders = [stack.enter_context(readable_place(place, "folder", skip=WEIGHTS)) for place in line.rest or [DEFAULT]]
    try:
      material = load([str(folder) for folder in folders], begun=False)
    except InputError as error:
      if line.rest:
        raise
      raise InputError(f"{error}; name a folder, as in `runs work/studies/mine`") from error
    found = listing(material)
  if material.runs:
    print(for_stdout("\n".join(found.lines)))
  if len(found.sets) > 1:
    print("comparable: the runs of one set differ in placement, learning rate and seeds alone")
  for text in found.sets:
    print(printable(f"  {text}"))
  if material.not_started:
    print(printable(f"planned and not started: {len(material.not_started)}, the first is {material.not_started[0]}"))
  for problem in [*material.problems, *(text for run in material.runs for text in run.problems)]:
    print(printable(f"warning: {problem}"), file=sys.stderr)
  return 0

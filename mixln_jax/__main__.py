"""The front door: `python -m mixln_jax COMMAND --config=RECIPE --workdir=DIR --config.a.b=value …`

Exit status: 0 done; 1 the run failed; 2 rejected (bad input, nothing changed); 75 stopped by a signal: run it again.
"""

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from mixln_jax import commands, printing, signals
from mixln_jax.errors import InputError, TryAgainError, advice, bad_path, exhausted, one_line
from mixln_jax.text import printable

CONSOLE_COMMAND = "mixln"  # what an installed package is called by (pyproject.toml)


def usage() -> str:
  typed = CONSOLE_COMMAND if Path(sys.argv[0]).name == CONSOLE_COMMAND else "python -m mixln_jax"
  width = max(map(len, commands.COMMANDS))
  lines = [f"  {name:<{width}}  {commands.help_line(name)}" for name in commands.COMMANDS]
  return "\n".join([f"usage: {typed} COMMAND [flags]; each has --help", "", *lines])


def main(argv: list[str]) -> int:
  """Runs a command; returns the exit status."""
  if not argv or argv[0] in ("--help", "-h", "help"):
    print(usage())
    return 0
  name = argv[0]
  try:
    if name not in commands.COMMANDS:
      close = difflib.get_close_matches(name, commands.COMMANDS, n=1)
      hint = f"did you mean {close[0]!r}? " if close else ""
      raise InputError(f"unknown command {name!r}; {hint}choices: {', '.join(commands.COMMANDS)}")
    command = importlib.import_module(f"mixln_jax.commands.{name}")
    if "jax" in sys.modules:
      importlib.import_module("mixln_jax.parallel.settings").state_settings()
    return command.main(argv[1:])
  except InputError as error:
    print(printable(f"error: {error}"), file=sys.stderr)
    return 2
  except TryAgainError as error:
    sys.stdout.flush()
    print(printable(f"error: {error}"), file=sys.stderr, flush=True)
    if error.at_once:
      os._exit(1)  # JAX would wait for a process that is gone, and orbax and tensorstore for a bucket that is away
    return 1
  except signals.Stopped as stopped:
    print(f"stopped    by {stopped}; run the same command to resume", flush=True)
    return signals.STOPPED_STATUS
  except KeyboardInterrupt:
    print("stopped at once, without a checkpoint", file=sys.stderr)
    return signals.AT_ONCE_STATUS
  except Exception as error:
    path = bad_path(error)
    if path is not None:
      print(printable(f"error: {path}"), file=sys.stderr)
      return 2
    reason = exhausted(error)
    if reason is None:
      raise
    print(printable(f"error: {reason}; {advice(reason)}"), file=sys.stderr)
    return 1


def front_door() -> None:
  """Runs the command of this process's arguments, and ends the process with its status."""
  printing.use_utf8()
  printing.never_fail()
  printing.hush_libraries()
  signals.watch_to_the_end()
  signals.end_with_named_parent()
  status: Any
  try:
    status = main(sys.argv[1:])
  except SystemExit as error:  # --help
    status = error.code
  signals.only_note()
  lost = printing.lost_output()
  if lost is not None and sys.argv[1:2] not in ([name] for name in commands.WRITE_ALL_TO_FOLDERS):
    print(f"error: a part of the output is lost: {one_line(lost)}", file=sys.stderr)
    status = status or 1
  if signals.requested_by() is not None and status in (signals.STOPPED_STATUS, signals.AT_ONCE_STATUS):
    _leave_others()
    signals.leave_at_once(status)
  sys.exit(status)


def _leave_others() -> None:
  """Says goodbye to the other processes of a run, which else would take this one for one that crashed."""
  if "jax" in sys.modules:
    from mixln_jax.parallel import processes

    processes.leave()


if __name__ == "__main__":
  front_door()

"""The front door: `python -m mixln_jax COMMAND --config=configs/X.py --workdir=DIR --config.a.b=value …`

Exit status: 0 done; 1 the run failed; 2 refused (bad input, nothing was changed); 75 stopped by a signal, run it again.
"""

import difflib
import importlib
import os
import sys

from mixln_jax import commands
from mixln_jax.errors import InputError, TryAgainError


def usage() -> str:
  width = max(map(len, commands.COMMANDS))
  lines = [f"  {name:<{width}}  {commands.help_line(name)}" for name in commands.COMMANDS]
  return "\n".join(["usage: python -m mixln_jax COMMAND [flags]; each has --help", "", *lines])


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
    return importlib.import_module(f"mixln_jax.commands.{name}").main(argv[1:])
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except TryAgainError as error:
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    if error.at_once:
      os._exit(1)  # JAX would wait for a process that is gone, and orbax and tensorstore for a bucket that is away
    return 1
  except KeyboardInterrupt:
    print("stopped at once, without a checkpoint", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

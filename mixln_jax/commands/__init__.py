"""The commands: one module each, with `main(argv) -> exit status`. The first line of its docstring is its help line."""

import ast
import importlib.util
from pathlib import Path

COMMANDS = (
  "train",
  "evaluate",
  "diagnose",
  "report",
  "runs",
  "sweep",
  "plan",
  "prepare",
  "generate",
  "finetune",
  "convert",
  "doctor",
)
# What they print stands in their folders too: a log that can't be written is no failure of theirs.
WRITE_ALL_TO_FOLDERS = ("train", "finetune", "sweep")


def help_line(command: str) -> str:
  """The first line of a command's docstring, read without importing it (imports of JAX take seconds)."""
  spec = importlib.util.find_spec(f"{__name__}.{command}")
  docstring = ast.get_docstring(ast.parse(Path(str(spec and spec.origin)).read_text())) or ""
  return docstring.splitlines()[0]

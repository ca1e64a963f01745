"""Directives that write reference pages from the code: config fields, commands and their flags, recipes.

Nothing that they print stands anywhere else, so a page can't contradict the code.
"""

import ast
import contextlib
import importlib
import io
from pathlib import Path
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from mixln_jax import commands, recipes
from mixln_jax import config as config_lib
from mixln_jax.command_line import SECTIONS, CommandLine, section_of


class _Parsed(Exception):
  """Stops a command where it would read its arguments."""

  def __init__(self, line: CommandLine):
    super().__init__()
    self.line = line


def _stop(line: CommandLine, _argv: list[str]) -> None:
  raise _Parsed(line)


def line_of(command: str) -> CommandLine:
  """The command line of a command, with all its flags declared."""
  module = importlib.import_module(f"mixln_jax.commands.{command}")
  # doctor says what it finds before it reads its arguments
  with mock.patch.object(CommandLine, "parse", _stop), contextlib.redirect_stdout(io.StringIO()):
    try:
      module.main([])
    except _Parsed as parsed:
      return parsed.line
  raise AssertionError(f"{command} reads no arguments")


def _cell(text: str) -> str:
  """A text as a cell of a table."""
  return text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")


def _shown_default(value: object) -> str:
  shown = f"{value:g}" if isinstance(value, float) else repr(value)
  return f"`{shown}`"


def config_fields() -> str:
  """A table of fields for each section of the config."""
  lines = []
  for section in SECTIONS:
    lines += [f"### `{section}`", "", "| field | default | meaning | allowed |", "|---|---|---|---|"]
    for name, field in config_lib.FIELDS.items():
      if section_of(name) == section:
        cells = (f"`{name}`", _shown_default(field.default), _cell(field.meaning), _cell(field.allowed()))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
  return "\n".join(lines)


def command_pages() -> str:
  """For each command its description, its flags, and the sections of the config that it reads."""
  lines = []
  for command in commands.COMMANDS:
    line = line_of(command)
    lines += [f"## {command}", "", line.doc.strip(), "", "| flag | meaning |", "|---|---|"]
    lines += [f"| `{flag.shown}` | {_cell(flag.meaning)} |" for flag in line.described()]
    lines.append("")
    if line.sections:
      links = ", ".join(f"[`{section}`](configs.md#{section})" for section in line.sections)
      lines += [f"Config sections that it reads: {links}.", ""]
  return "\n".join(lines)


def recipe_table() -> str:
  """Each recipe with the first line of its docstring."""
  lines = ["| recipe | what |", "|---|---|"]
  for name in recipes.names():
    doc = ast.get_docstring(ast.parse(Path(recipes.resolve(name)).read_text())) or ""
    lines.append(f"| `{name}` | {_cell(doc.splitlines()[0])} |")
  return "\n".join(lines)


class _Generated(SphinxDirective):
  """Markdown that a function of this module makes."""

  text = staticmethod(recipe_table)

  def run(self) -> list[nodes.Node]:
    return self.parse_text_to_nodes(self.text(), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
  for name, text in (("config-fields", config_fields), ("commands", command_pages), ("recipes", recipe_table)):
    app.add_directive(name, type(name, (_Generated,), {"text": staticmethod(text)}))
  return {"parallel_read_safe": True, "parallel_write_safe": True}

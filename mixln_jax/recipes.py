"""Recipes by name: those of `configs/`, which an installed package holds as `mixln_jax/configs`.

In a clone that folder is a link to `configs/`. A recipe is a Python file with `get_config`; `llama_130m`,
`studies/first_norm` and `configs/llama_130m.py` each name one, from whatever folder they are asked for.
"""

import contextlib
import difflib
import os
import runpy
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.errors import InputError, one_line
from mixln_jax.files import local_path

FOLDER = Path(__file__).parent / "configs"


def names() -> list[str]:
  """The names of all recipes, such as `tiny` and `studies/first_norm`."""
  return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("**/*.py"))


def resolve(text: str, parameter: str = "config") -> str:
  """The path of the recipe that `FILE.py[:VARIANT]` or `NAME[:VARIANT]` means, with its variant.

  A file that is there is itself; anything else may be a recipe's name, or its path in a clone.

  Args:
    text: what was written.
    parameter: what it was given as, for messages.

  Raises:
    InputError: it is neither a file nor a recipe's name.
  """
  place, colon, variant = text.partition(":")
  is_address = colon and variant.startswith("//")
  file = local_path(text if is_address else place, parameter, "copy the recipe to this machine")
  if file.is_file():
    return text
  name = place.removeprefix("./").removeprefix("configs/").removesuffix(".py")
  known = names()
  if name in known:
    return f"{FOLDER / name}.py{colon}{variant}"
  close = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {close[0]!r}? " if close else ""
  raise InputError(
    f"{parameter}={place}: no such file; {hint}the recipes lie in configs/ and have names: {', '.join(known)}"
  )


def run(path: str) -> dict[str, Any]:
  """What the file of a recipe defines, by name; raises InputError where its code raises anything."""
  with running(path):
    return runpy.run_path(path)


@contextlib.contextmanager
def running(path: str) -> Iterator[None]:
  """Where a recipe's code runs: it is somebody's Python, and what it raises becomes an InputError with its line."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    line = line_of(error, path)
    where = f"{path}, line {line}" if line else path
    raise InputError(f"{where}: {type(error).__name__}: {one_line(error)}") from error


def line_of(error: BaseException | None, path: str) -> int | None:
  """The line of a recipe at which an error was raised, or one that it came from; None where it was not there."""
  name = os.path.realpath(path) if path else ""
  while error is not None and name:
    if isinstance(error, SyntaxError) and error.filename and os.path.realpath(error.filename) == name:
      return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == name]
    if lines:
      return lines[-1]
    error = error.__cause__ or error.__context__
  return None


def recipe(name: str, changes: Mapping[str, Any] | None = None) -> Config:
  """The config of a recipe.

  Args:
    name: its name or file, and its variant behind a colon: `tiny`, `llama_130m:official`, `mine/recipe.py`.
    changes: config fields to change, by name: `{"model.placement": "pre"}`.

  Raises:
    InputError: there is no such recipe or field, or the config is invalid.
  """
  path, colon, variant = resolve(name).partition(":")
  get_config = run(path).get("get_config")
  if get_config is None:
    raise InputError(f"config={path}: defines no get_config; start from mixln_jax.config.base()")
  with running(path):
    config = get_config(variant) if colon else get_config()
  for field in changes or {}:
    if field not in config_lib.FIELDS:
      raise config_lib.unknown_field(field)
  config.update_from_flattened_dict(dict(changes or {}))
  config_lib.validate(config)
  return config

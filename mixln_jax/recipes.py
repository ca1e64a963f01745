"""Recipes by name: those of `configs/`, which an installed package holds as `mixln_jax/configs`.

In a clone that folder is a link to `configs/`. A recipe is a Python file with `get_config`; `llama_130m`,
`studies/first_norm` and `configs/llama_130m.py` each name one, from whatever folder they are asked for.
"""

import difflib
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.errors import InputError
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


def recipe(name: str, changes: Mapping[str, Any] | None = None) -> Config:
  """The config of a recipe.

  Args:
    name: its name or file, and its variant behind a colon: `tiny`, `llama_130m:official`, `mine/recipe.py`.
    changes: config fields to change, by name: `{"model.placement": "pre"}`.

  Raises:
    InputError: there is no such recipe or field, or the config is invalid.
  """
  path, colon, variant = resolve(name).partition(":")
  get_config = runpy.run_path(path).get("get_config")
  if get_config is None:
    raise InputError(f"config={path}: defines no get_config; start from mixln_jax.config.base()")
  config = get_config(variant) if colon else get_config()
  for field in changes or {}:
    if field not in config_lib.FIELDS:
      raise config_lib.unknown_field(field)
  config.update_from_flattened_dict(dict(changes or {}))
  config_lib.validate(config)
  return config

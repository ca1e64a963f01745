"""The recipes for LLaMA shapes, `configs/llama_NAME.py`, and a TPU topology for each."""

import importlib.util
from pathlib import Path
from typing import Any

from mixln_jax import config as config_lib

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {
  **dict.fromkeys(("9m", "20m", "35m", "40m", "60m", "71m", "100m"), "v5e:2x2"),
  **dict.fromkeys(("130m", "250m"), "v5e:2x4"),
  **dict.fromkeys(("350m", "1b"), "v5e:4x4"),
  "3b": "v5e:8x8",
  "7b": "v5e:16x16",
}


def load(recipe: str) -> Any:
  return load_file(CONFIGS / f"llama_{recipe}.py")


def load_file(path: Path) -> Any:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  assert spec.loader is not None
  spec.loader.exec_module(module)
  return module.get_config()


def case_fields(case: str) -> dict[str, str | int]:
  """Flat config fields of a case PLACEMENT[/FIELD=VALUE…], where FIELD is a field of config.model or has its section.

  An example is `mix:0.25/remat=none/train.micro_batches=2`. Exits if a field is neither text nor a whole number.
  """
  placement, *changes = case.split("/")
  fields: dict[str, str | int] = {"model.placement": placement}
  for change in changes:
    name, _, value = change.partition("=")
    name = name if "." in name else f"model.{name}"
    kind = type(config_lib.FIELDS[name].default) if name in config_lib.FIELDS else None
    if kind not in (str, int):
      raise SystemExit(f"error: {case!r}: {name} must be a config field that holds text or a whole number")
    try:
      fields[name] = kind(value)
    except ValueError:
      raise SystemExit(f"error: {case!r}: {name} must be a whole number, not {value!r}") from None
  return fields

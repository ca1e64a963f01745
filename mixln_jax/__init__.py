"""mixln_jax: norm placement in transformers, built around Mix-LN (arXiv 2412.13795).

The names of `__all__` are what a notebook or a script needs. Each is imported when it is first used: JAX takes seconds
to import, and `import mixln_jax` a fraction of one.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mixln_jax.version import VERSION

if TYPE_CHECKING:
  from mixln_jax.data.prepare import prepare as prepare
  from mixln_jax.errors import InputError as InputError
  from mixln_jax.model import Transformer as Transformer
  from mixln_jax.model import next_token_loss as next_token_loss
  from mixln_jax.model.initial import initial_params as initial_params
  from mixln_jax.opening import OpenRun as OpenRun
  from mixln_jax.opening import open_run as open_run
  from mixln_jax.placement import parse as parse_placement
  from mixln_jax.recipes import recipe as recipe
  from mixln_jax.training.loop import train as train

__version__ = VERSION

# Where each name is defined, and what it is called there.
_HOMES = {
  "open_run": ("mixln_jax.opening", "open_run"),
  "OpenRun": ("mixln_jax.opening", "OpenRun"),
  "recipe": ("mixln_jax.recipes", "recipe"),
  "prepare": ("mixln_jax.data.prepare", "prepare"),
  "train": ("mixln_jax.training.loop", "train"),
  "Transformer": ("mixln_jax.model", "Transformer"),
  "initial_params": ("mixln_jax.model.initial", "initial_params"),
  "next_token_loss": ("mixln_jax.model", "next_token_loss"),
  "parse_placement": ("mixln_jax.placement", "parse"),
  "InputError": ("mixln_jax.errors", "InputError"),
}
__all__ = [
  "InputError",
  "OpenRun",
  "Transformer",
  "initial_params",
  "next_token_loss",
  "open_run",
  "parse_placement",
  "prepare",
  "recipe",
  "train",
]


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module 'mixln_jax' has no attribute {name!r}")
  module, attribute = _HOMES[name]
  return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES])

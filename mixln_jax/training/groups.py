"""How learning rate, weight decay and Adam's epsilon differ by group of parameters, as data in the parameter table.

Two things set them: `config.optimizer.parameterization`, a rule of width and depth, and the three strings
`rate_multipliers`, `decay_multipliers` and `epsilon_multipliers`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mixln_jax.config import Config, head_dim
from mixln_jax.errors import InputError
from mixln_jax.model.columns import Columns
from mixln_jax.model.parameters import GROUPS, Param, parameters
from mixln_jax.text import shown

# Names beside GROUPS: all parameters, and the gains of a sublayer's norms by whether they stand before its branch.
ROLES = ("input_gains", "output_gains")
NAMES = ("all", *GROUPS, *ROLES)
EXPONENTS = {"depth_mup": 0.5, "completep": 1.0}  # a: a branch is times m_L^-a


class Entry(NamedTuple):
  """`mlp@1-4:2`: a group, the layers (counted from 1; None: all of it), and the factor.

  Attributes:
    group: its name.
    layers: the first and the last index, counted from 0.
    factor: what they are multiplied by.
  """

  group: str
  layers: tuple[int, int] | None
  factor: float


def parse_multipliers(text: str, field: str, num_layers: int) -> list[Entry]:
  """The entries of `GROUP[@FIRST[-LAST]]:FACTOR,…`.

  Raises:
    InputError: one can't be read, names no group, or layers that are not there.
  """
  entries = []
  for word in filter(None, (part.strip() for part in text.split(","))):
    match = re.fullmatch(r"(\w+)(?:@(\d+)(?:-(\d+))?)?:([\d.eE+-]+)", word)
    try:
      factor = float(match.group(4)) if match else math.nan
    except ValueError:
      factor = math.nan
    if match is None or not (math.isfinite(factor) and factor >= 0):
      raise InputError(f"config.optimizer.{field}={shown(text)}: {word!r} is not GROUP:FACTOR or GROUP@1-4:FACTOR")
    group, first, last = match.group(1), match.group(2), match.group(3)
    if group not in NAMES:
      raise InputError(f"config.optimizer.{field}={shown(text)}: no group {group!r}; there are {', '.join(NAMES)}")
    layers = None
    if first is not None:
      layers = int(first) - 1, int(last or first) - 1
      if not 0 <= layers[0] <= layers[1] < num_layers or group in ("embedding", "head", "final_norm"):
        raise InputError(
          f"config.optimizer.{field}={shown(text)}: {word!r} names layers that {group} has not; they are numbered 1 to "
          f"{num_layers}"
        )
    entries.append(Entry(group, layers, factor))
  return entries


def of_group(param: Param, entry: Entry, num_layers: int) -> np.ndarray | bool:
  """Which layers' part of a parameter an entry is for, bool [L]; of one outside the layers, whether it is."""
  named = entry.group in ("all", param.group)
  if not param.in_layers:
    return named and entry.layers is None
  mask_L = np.full(num_layers, named)
  if entry.group in ROLES and param.input_L is not None:
    mask_L = param.input_L if entry.group == "input_gains" else ~param.input_L
  if entry.layers is not None:
    first, last = entry.layers
    numbers_L = np.arange(num_layers)
    mask_L = mask_L & (first <= numbers_L) & (numbers_L <= last)
  return mask_L


def with_entries(
  param: Param, first: float | np.ndarray | None, entries: list[Entry], num_layers: int
) -> float | np.ndarray:
  """`first` where no entry is for the parameter, else the last one's factor; [L], or a number where that says it."""
  value = np.full(num_layers if param.in_layers else (), first, float)
  for entry in entries:
    value = np.where(of_group(param, entry, num_layers), entry.factor, value)
  return float(value.flat[0]) if np.all(value == value.flat[0]) else value


class Scale(NamedTuple):
  """How much wider and deeper a model is than the one that its learning rate was tuned for."""

  width: float  # m_N
  depth: float  # m_L
  exponent: float  # a

  @classmethod
  def of(cls, config: Config) -> "Scale | None":
    """None under the standard parameterization."""
    model, c = config.model, config.optimizer
    if c.parameterization == "standard":
      return None
    width = model.embed_dim / (c.base_width or model.embed_dim)
    depth = model.num_layers / (c.base_depth or model.num_layers)
    return cls(width, depth, EXPONENTS[c.parameterization])

  @property
  def branch(self) -> float:
    """What a branch is times."""
    return self.depth**-self.exponent


def scaled(param: Param, scale: Scale, reading: str) -> Param:
  """A parameter with the multipliers of arXiv 2505.01618, table 1 (decay is decoupled, and times the rate)."""
  rate = decay = 1.0
  if param.in_layers:
    rate = scale.depth ** (scale.exponent - 1.0)
  if param.is_layer_matrix:
    rate, decay = rate / scale.width, scale.width
  epsilon = 1.0 / scale.width
  if param.in_layers or reading == "nanogpt_mup":
    epsilon *= scale.branch
  return dataclasses.replace(param, rate=param.rate * rate, decay=param.decay * decay, epsilon=param.epsilon * epsilon)  # pyright: ignore[reportOptionalOperand]


def optimizer_table(config: Config, columns: Columns | None = None) -> dict[str, Param]:
  """The table of parameters with what the optimizer multiplies for each of them.

  Args:
    config: the run's.
    columns: as `parameters` has them.

  Raises:
    InputError: a field of multipliers can't be read.
  """
  c, num_layers = config.optimizer, config.model.num_layers
  entries = {
    name: parse_multipliers(str(c[f"{name}_multipliers"]), f"{name}_multipliers", num_layers)
    for name in ("rate", "decay", "epsilon")
  }
  for entry in entries["epsilon"]:
    if entry.factor == 0:
      raise InputError(f"config.optimizer.epsilon_multipliers={c.epsilon_multipliers!r}: a factor must be above 0")
  scale = Scale.of(config)
  table = {}
  for path, param in parameters(config.model, columns).items():
    found = {name: with_entries(param, getattr(param, name), entries[name], num_layers) for name in entries}
    param = dataclasses.replace(param, **found)
    table[path] = param if scale is None else scaled(param, scale, c.completep_reading)
  return table


def uses_roles(config: Config) -> bool:
  """Whether what a gain's multipliers are depends on the placement: on where the norm stands."""
  c = config.optimizer
  stated = (c.rate_multipliers, c.decay_multipliers, c.epsilon_multipliers)
  return any(role in text for text in stated for role in ROLES)


def implied_by(config: Config) -> Mapping[str, float]:
  """The fields of config.model that the parameterization decides; none under the standard one."""
  scale = Scale.of(config)
  if scale is None:
    return {}
  own_head = head_dim(config.model)
  return {
    "branch_multiplier": scale.branch,
    "attention_multiplier": math.sqrt((config.optimizer.base_head_dim or own_head) / own_head),
    "logit_multiplier": 1.0 / scale.width,
    "matrix_std_multiplier": scale.width**-0.5,
  }

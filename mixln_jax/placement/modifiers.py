"""The modifiers of rows, `+name[:argument]`: MODIFIERS maps each name to what it changes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mixln_jax.placement.rows import Position, Rows
from mixln_jax.placement.table import NO_RAMP, SUBLAYERS, Ramp, Row, ramp_factor
from mixln_jax.text import whole_number


@dataclasses.dataclass(frozen=True)
class Modifier:
  """The meaning of a name in MODIFIERS.

  Attributes:
    rows: a function of a layer's unmodified rows, its position, and the texts after the modifier's colons that returns
      the modified rows.
    arguments: a description of the texts that it takes; "" if it takes none.
  """

  rows: Callable[[Rows, Position, tuple[str, ...]], Rows]
  arguments: str = ""


def _on(sublayers: tuple[str, ...] = SUBLAYERS, **columns: Any) -> Modifier:
  """A modifier that sets columns in the rows of `sublayers`."""

  def rows(rows: Rows, _position: Position, _texts: tuple[str, ...]) -> Rows:
    return rows._replace(**{name: replace(getattr(rows, name), **columns) for name in sublayers})

  return Modifier(rows)


def _scaled_init(rows: Rows, position: Position, _: tuple[str, ...]) -> Rows:
  factor = 1.0 / math.sqrt(2 * position.num_layers)
  return Rows(*(replace(row, output_deviation=row.output_deviation * factor) for row in rows))


def _x0(rows: Rows, _position: Position, _texts: tuple[str, ...]) -> Rows:
  """Before each layer x ← λ_1 x + λ_2 embedding, both learned, initially 1 and 0 (modded-nanogpt, November 2024)."""
  attention = replace(rows.attention.with_streams(2, kept=True), wiring="x0", streams="x0")
  return Rows(attention, rows.mlp)


def _value_residual(rows: Rows, position: Position, texts: tuple[str, ...]) -> Rows:
  """Mixes the first layer's values into those of other layers, with one learned λ or two (arXiv 2410.17897)."""
  if texts == ("2",):
    return Rows(replace(rows.attention, value_residual_two=position.layer > 0), rows.mlp)
  if texts not in ((), ("1",)):
    raise ValueError("takes the number of learned weights, 1 or 2")
  return Rows(replace(rows.attention, value_residual=True), rows.mlp)


# The schedules of ProRes (arXiv 2603.05369): name -> a function of the updates at which the ramps of all layers end
# (T_1 … T_L) and of the layer's index, that returns the layer's ramp. The floors by depth are 1/L, 1/√L and 1/√l.
RAMPS: Mapping[str, Callable[[list[float], int], Ramp]] = {
  "linear": lambda ends, layer: Ramp(0.0, ends[layer], 0.0, 1.0),
  "linear_equal": lambda ends, _: Ramp(0.0, ends[-1], 0.0, 1.0),
  "linear_reverse": lambda ends, layer: Ramp(0.0, ends[-1 - layer], 0.0, 1.0),
  "sqrt": lambda ends, layer: Ramp(0.0, ends[layer], 0.0, 0.5),
  "square": lambda ends, layer: Ramp(0.0, ends[layer], 0.0, 2.0),
  "stagewise_0": lambda ends, layer: Ramp(_stage_start(ends, layer), ends[layer], 0.0, 1.0),
  "stagewise_L": lambda ends, layer: Ramp(_stage_start(ends, layer), ends[layer], 1 / len(ends), 1.0),
  "stagewise_sqrt_L": lambda ends, layer: Ramp(_stage_start(ends, layer), ends[layer], 1 / math.sqrt(len(ends)), 1.0),
  "stagewise_sqrt_l": lambda ends, layer: Ramp(_stage_start(ends, layer), ends[layer], 1 / math.sqrt(layer + 1), 1.0),
}
# Schedules that are constant.
FIXED_FACTORS: Mapping[str, Callable[[Position], float]] = {
  "fix_L": lambda position: 1 / position.num_layers,
  "fix_sqrt_L": lambda position: 1 / math.sqrt(position.num_layers),
  "fix_sqrt_l": lambda position: 1 / math.sqrt(position.layer + 1),
}
DEFAULT_RAMP_STEPS = 1000
MOST_STEPS = 10**9


def _stage_start(ends: list[float], layer: int) -> float:
  return 0.0 if layer == 0 else ends[layer - 1]


def _prores(rows: Rows, position: Position, texts: tuple[str, ...]) -> Rows:
  """Progressive residual warm-up (ProRes, arXiv 2603.05369).

  Both branches are multiplied by a ramp that ends later in deeper layers, at T_l = linspace(T // L, T, L). `@STEP`
  freezes it at its value after that many updates.
  """
  names = [*RAMPS, *FIXED_FACTORS]
  usage = f"takes SCHEDULE[:STEPS[@STEP]], where SCHEDULE is one of {', '.join(names)}, as in 'pre+prores:linear:1000'"
  name = texts[0] if texts else "linear"
  if name not in names or len(texts) > 2:
    raise ValueError(usage)
  if name in FIXED_FACTORS:
    if len(texts) == 2:
      raise ValueError(f"takes no number of steps with {name!r}, which never ends; write '+prores:{name}'")
    factor = FIXED_FACTORS[name](position)
    return Rows(*(replace(row, c_out=row.c_out * factor) for row in rows))
  length_text = texts[1] if len(texts) == 2 else str(DEFAULT_RAMP_STEPS)
  steps_text, at, frozen_text = length_text.partition("@")
  steps, num_layers = whole_number(steps_text, MOST_STEPS), position.num_layers
  frozen = whole_number(frozen_text, MOST_STEPS) if at else None
  if not steps or (at and frozen is None):
    raise ValueError(f"{usage}; both numbers are whole, the first above 0")
  if steps < num_layers:
    raise ValueError(
      f"has {steps} steps for {num_layers} layers, so that a layer's ramp would be empty; use at least {num_layers} "
      "steps"
    )
  ends = [float(end) for end in np.linspace(steps // num_layers, steps, num_layers)]
  ramp = RAMPS[name](ends, position.layer)
  ramped = [replace(row, ramp=ramp) for row in rows]
  if frozen is not None:
    ramped = [_frozen(row, frozen) for row in ramped]
  return Rows(*ramped)


def _frozen(row: Row, step: int) -> Row:
  """The row after `step` finished updates, with a constant factor in place of its ramp."""
  return replace(row, c_out=row.c_out * float(ramp_factor(*row.ramp, step)), ramp=NO_RAMP)


MODIFIERS: Mapping[str, Modifier] = {
  "scaled_init": Modifier(_scaled_init),
  "gpas": _on(gpas=True),
  "qk_norm": _on(("attention",), qk_norm=True),
  "qk_norm_full": _on(("attention",), qk_norm_full=True),
  "x0": Modifier(_x0),
  "value_residual": Modifier(_value_residual, "the number of learned weights, 1 or 2"),
  "prores": Modifier(_prores, "the schedule and its steps"),
}

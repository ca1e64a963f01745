"""The placement table as the model reads it: a column that varies is an array, any other a Python constant.

A column that is the same for all layers, and for all runs that are trained together, is a Python constant when the
model is traced, so that it costs no more than it would in a hand-written layer. A column that varies is scanned.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.errors import InputError
from mixln_jax.model.append_only import Slots
from mixln_jax.placement import NO_RAMP, NORMS, SUBLAYERS, Row, Streams, Table, ramp_factor

Flag = bool | jax.Array  # a Python constant, or this layer's value as a traced scalar
Number = float | jax.Array

COLUMNS = tuple(
  field.name
  for field in dataclasses.fields(Row)
  if not {"initial", "of_model"} & set(field.metadata) and field.name != "wiring"
)
WIRED = "wired_"  # `wired_hc`: whether a sublayer's wiring is hc
GAIN_INDICES = tuple(f"gain_{norm}" for norm in NORMS)
UNUSED = None  # a column's value where nothing depends on it


@dataclasses.dataclass(frozen=True)
class TracedRow(Row):
  """A row of the table inside a traced layer: each field is a Python constant or a traced value.

  `gain_norm_in`, `gain_norm_mid` and `gain_norm_out` say which of the sublayer's gains a norm uses, counted from 0 in
  order of application. `wired` has a flag for each wiring of the model except `fixed`: whether this sublayer has it.
  """

  gain_norm_in: int | jax.Array = 0
  gain_norm_mid: int | jax.Array = 0
  gain_norm_out: int | jax.Array = 0
  wired: Mapping[str, Flag] = dataclasses.field(default_factory=dict)


class TracedRows(NamedTuple):
  """The two rows of one traced layer."""

  attention: TracedRow
  mlp: TracedRow


class Columns(flax.struct.PyTreeNode):
  """The columns of one table, or of R tables of equal depth for `jax.vmap`, split into varying and constant ones.

  Attributes:
    varying: `SUBLAYER.COLUMN` -> array [L], or [R, L] for R tables.
    constant: the other columns as Python constants; they are static under jit, so they are compiled in.
    num_gains: how many gains the parameter tree has for attention and for the MLP: the most that any layer uses.
    num_layers: L.
    streams: the residual streams, which all tables share.
    has_ramp: whether a factor still depends on the step (`at_step` replaces it with a number).
    alone: where tables of one stream and of several are mixed, whether this table has only one, as a scalar or [R];
      else None.
  """

  varying: dict[str, jax.Array | np.ndarray]
  constant: tuple[tuple[str, Any], ...] = flax.struct.field(pytree_node=False)
  num_gains: tuple[int, int] = flax.struct.field(pytree_node=False)
  num_layers: int = flax.struct.field(pytree_node=False)
  streams: Streams = flax.struct.field(pytree_node=False, default=Streams())
  has_ramp: bool = flax.struct.field(pytree_node=False, default=False)
  alone: jax.Array | np.ndarray | None = None

  @classmethod
  def of(cls, table: Table) -> "Columns":
    """The columns of one table."""
    return cls.of_many([table]).of_run(0)

  @classmethod
  def of_many(cls, tables: Sequence[Table]) -> "Columns":
    """The columns of R tables of equal depth, as arrays [R, L]; `jax.vmap` over it runs the R placements at once.

    Raises:
      InputError: the tables have different residual streams.
    """
    streams = _shared_streams(tables)
    varying: dict[str, jax.Array | np.ndarray] = {}
    constant: dict[str, Any] = {}
    for sublayer in SUBLAYERS:
      rows_RL = [_in_streams(table.rows(sublayer), streams) for table in tables]
      wirings = {row.wiring for rows_L in rows_RL for row in rows_L} - {"fixed"}
      for name in (*COLUMNS, *GAIN_INDICES, *(WIRED + wiring for wiring in sorted(wirings))):
        values_RL = _values(rows_RL, name)
        used = set(itertools.chain(*values_RL)) - {UNUSED}
        if len(used) > 1:
          varying[f"{sublayer}.{name}"] = np.array([_filled(values_L) for values_L in values_RL])
        else:
          constant[f"{sublayer}.{name}"] = used.pop() if used else 0
    num_gains = [max(table.num_gains(sublayer) for table in tables) for sublayer in SUBLAYERS]
    return cls(
      varying=varying,
      constant=tuple(sorted(constant.items())),
      num_gains=(num_gains[0], num_gains[1]),
      num_layers=len(tables[0].layers),
      streams=streams,
      has_ramp=any(table.ramp_end > 0.0 for table in tables),
      alone=_which_are_alone(tables),
    )

  def of_run(self, index: int) -> "Columns":
    """The columns of one of the R tables. What varies and what is constant stays as it was, and so does the tree."""
    varying = {name: column_RL[index] for name, column_RL in self.varying.items()}
    return self.replace(varying=varying, alone=None if self.alone is None else self.alone[index])

  def of_runs(self, chosen: slice) -> "Columns":
    """Those of some of the R tables; the split stays, and so does the tree of parameters."""
    varying = {name: column_RL[chosen] for name, column_RL in self.varying.items()}
    return self.replace(varying=varying, alone=None if self.alone is None else self.alone[chosen])

  def of_layer(self, index: int) -> dict[str, Any]:
    """The varying columns of one layer, as Python constants if the table is not traced."""
    values: dict[str, Any] = {}
    for name, column_L in self.varying.items():
      value = column_L[index]
      values[name] = _as_constant(value) if isinstance(column_L, np.ndarray) else value
    return values

  @property
  def only_sources(self) -> bool:
    """Whether all sublayers are attention residuals, whose streams are one append-only buffer."""
    constant = dict(self.constant)
    return all(constant.get(f"{sublayer}.{WIRED}attention") is True for sublayer in SUBLAYERS)

  def slots(self) -> Slots:
    """The sources that each layer adds its outputs to; only where `only_sources`."""
    constant = dict(self.constant)
    slots = []
    for sublayer in SUBLAYERS:
      write = jnp.asarray(self.varying.get(f"{sublayer}.write", constant.get(f"{sublayer}.write")))
      slots.append(jnp.broadcast_to(jnp.argmax(write, axis=-1), (self.num_layers,)))
    # With one source for each sublayer (and one for the embedding), no two layers share a source.
    return Slots(*slots, shared=self.streams.num < 2 * self.num_layers + 1)

  def at_step(self, step: int | jax.Array) -> "Columns":
    """The columns of one table after `step` finished updates; unchanged if no factor depends on the step."""
    if not self.has_ramp:
      return self
    constant, varying = dict(self.constant), dict(self.varying)
    for sublayer in SUBLAYERS:
      ramp = jnp.asarray(varying.pop(f"{sublayer}.ramp", constant.get(f"{sublayer}.ramp")))
      constant[f"{sublayer}.ramp"] = NO_RAMP
      c_out = varying.pop(f"{sublayer}.c_out", constant.pop(f"{sublayer}.c_out", None))
      factor = ramp_factor(*jnp.moveaxis(ramp, -1, 0), step, jnp)
      varying[f"{sublayer}.c_out"] = jnp.broadcast_to(c_out * factor, (self.num_layers,)).astype(jnp.float32)
    return self.replace(varying=varying, constant=tuple(sorted(constant.items())), has_ramp=False)

  def uses(self, sublayer: str, column: str) -> bool:
    """Whether any layer has the flag `column`; if so, the tree has the parameters that go with it."""
    name = f"{sublayer}.{column}"
    return name in self.varying or bool(dict(self.constant).get(name, False))


def traced_rows(constant: Sequence[tuple[str, Any]], varying: Mapping[str, Any]) -> TracedRows:
  """The rows of one layer, from the constant columns and this layer's values of the varying ones."""
  fields: dict[str, dict[str, Any]] = {sublayer: {"wired": {}} for sublayer in SUBLAYERS}
  for name, value in [*constant, *varying.items()]:
    sublayer, column = name.split(".")
    if column.startswith(WIRED):
      fields[sublayer]["wired"][column.removeprefix(WIRED)] = value
    else:
      fields[sublayer][column] = value
  return TracedRows(TracedRow(**fields["attention"]), TracedRow(**fields["mlp"]))


def _values(rows_RL: Sequence[Sequence[Row]], name: str) -> list[list[Any]]:
  """One column of R tables, [R][L]."""
  values_RL = []
  for rows_L in rows_RL:
    values_RL.append([_value(row, name) for row in rows_L])
  return values_RL


def _filled(values_L: Sequence[Any]) -> list[Any]:
  """A column with 0 where its value is not used."""
  return [0 if value is UNUSED else value for value in values_L]


def _value(row: Row, name: str) -> Any:
  """The value of a column in a row; UNUSED for the gain of a norm that is not applied."""
  if name in GAIN_INDICES:
    return row.gain_index(name.removeprefix("gain_"))
  if name.startswith(WIRED):
    return row.wiring == name.removeprefix(WIRED)
  return getattr(row, name)


def _as_constant(value: Any) -> Any:
  """An entry of a NumPy array as a Python constant: a number, or nested tuples of numbers."""
  if np.ndim(value) == 0:
    return value.item()
  return tuple(_as_constant(entry) for entry in value)


def _shared_streams(tables: Sequence[Table]) -> Streams:
  """The streams of all tables that have several; tables of one stream go with any."""
  several = [table.streams for table in tables if table.streams.kind]
  for streams in several:
    if streams != several[0]:
      raise InputError(
        f"placements with different residual streams can't share one program: {several[0]} and {streams}; train them "
        "separately"
      )
  return several[0] if several else Streams()


def _which_are_alone(tables: Sequence[Table]) -> np.ndarray | None:
  """Which tables have one stream where others have several, [R]; their head reads that stream alone."""
  alone_R = np.array([not table.streams.kind for table in tables])
  return alone_R if alone_R.any() and not alone_R.all() else None


def _in_streams(rows: Sequence[Row], streams: Streams) -> list[Row]:
  """The rows in a model of these streams: a row of fewer streams does not use the others."""
  kept = streams.num_carried > 1
  return [row.with_streams(streams.num, kept=kept) for row in rows]

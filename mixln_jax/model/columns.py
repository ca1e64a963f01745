"""The placement table as the model reads it: constants where a column is the same everywhere, else arrays.

There is one way to read a table: the scanned one. A column that is the same for all layers (and for all runs that are
trained together) is a Python constant when the model is traced, so that it costs what a hand-written layer costs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

from mixln_jax.placement import NORMS, SUBLAYERS, Row, Table

Flag = bool | jax.Array  # a Python constant, or this layer's value as a traced scalar
Number = float | jax.Array

COLUMNS = tuple(field.name for field in dataclasses.fields(Row) if "initial" not in field.metadata)
GAIN_INDICES = tuple(f"gain_{norm}" for norm in NORMS)


@dataclasses.dataclass(frozen=True)
class TracedRow(Row):
  """A row of the table inside a traced layer: each field is a Python constant, or a traced scalar.

  `gain_norm_in` and its siblings say which of the sublayer's gains a norm uses (from 0, in order of application).
  """

  gain_norm_in: int | jax.Array = 0
  gain_norm_mid: int | jax.Array = 0
  gain_norm_out: int | jax.Array = 0


class TracedRows(NamedTuple):
  """The rows of one layer, as it is traced."""

  attention: TracedRow
  mlp: TracedRow


class Columns(flax.struct.PyTreeNode):
  """A table, or several of one depth to be mapped over, split by what varies.

  Attributes:
    varying: `SUBLAYER.COLUMN` -> array [L], or [R, L] for R tables.
    constant: the other columns as Python constants; static under jit, so they are compiled in.
    num_gains: gains that the parameter tree has for attention and for the MLP, the most that any layer uses.
  """

  varying: dict[str, jax.Array | np.ndarray]
  constant: tuple[tuple[str, Any], ...] = flax.struct.field(pytree_node=False)
  num_gains: tuple[int, int] = flax.struct.field(pytree_node=False)

  @classmethod
  def of(cls, table: Table) -> "Columns":
    """The columns of one table."""
    return cls.of_many([table]).of_run(0)

  @classmethod
  def of_many(cls, tables: Sequence[Table]) -> "Columns":
    """The columns of R tables of one depth, arrays [R, L]; `jax.vmap` over it runs the R placements side by side."""
    varying: dict[str, jax.Array | np.ndarray] = {}
    constant: dict[str, Any] = {}
    for sublayer in SUBLAYERS:
      rows_RL = [table.rows(sublayer) for table in tables]
      for name in (*COLUMNS, *GAIN_INDICES):
        values_RL = [[_value(row, name) for row in rows_L] for rows_L in rows_RL]
        used = {value for values_L in values_RL for value in values_L} - {None}
        if len(used) > 1:
          # 0 where the value does not matter, as the gain of a norm that is not applied.
          dense_RL = np.array(values_RL, dtype=object)
          dense_RL[dense_RL == None] = 0  # noqa: E711 (elementwise)
          varying[f"{sublayer}.{name}"] = np.array(dense_RL.tolist())
        else:
          constant[f"{sublayer}.{name}"] = used.pop() if used else 0
    most = [max(table.num_gains(sublayer) for table in tables) for sublayer in SUBLAYERS]
    return cls(varying=varying, constant=tuple(sorted(constant.items())), num_gains=(most[0], most[1]))

  def of_run(self, index: int) -> "Columns":
    """Those of one of the R tables; the split stays, and so does the tree of parameters."""
    return self.replace(varying={name: column_RL[index] for name, column_RL in self.varying.items()})

  def of_layer(self, index: int) -> dict[str, Any]:
    """The varying columns of one layer; Python constants where the table itself is not traced."""
    values: dict[str, Any] = {}
    for name, column_L in self.varying.items():
      value = column_L[index]
      values[name] = value.item() if isinstance(column_L, np.ndarray) else value
    return values

  def uses(self, sublayer: str, column: str) -> bool:
    """Whether any layer has a flag: then the tree has the parameters that go with it."""
    return dict(self.constant).get(f"{sublayer}.{column}") is not False


def traced_rows(constant: Sequence[tuple[str, Any]], varying: Mapping[str, Any]) -> TracedRows:
  """The rows of one layer from the constant columns and this layer's varying ones."""
  fields: dict[str, dict[str, Any]] = {sublayer: {} for sublayer in SUBLAYERS}
  for name, value in [*constant, *varying.items()]:
    sublayer, column = name.split(".")
    fields[sublayer][column] = value
  return TracedRows(TracedRow(**fields["attention"]), TracedRow(**fields["mlp"]))


def _value(row: Row, name: str) -> Any:
  """None where the column does not matter: the gain of a norm that is not applied."""
  if name in GAIN_INDICES:
    return row.gain_index(name.removeprefix("gain_"))
  return getattr(row, name)

"""The placement table as the model reads it: constants where a column is the same everywhere, else arrays."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from mixln_jax.placement import NORMS, SUBLAYERS, Row, Table

NUMBERS = ("c_in", "c_out", "c_res")
LEARNED = ("vector_c_res", "vector_c_out", "scalar_c_out")
FLAGS = (*NORMS, "residual_from_normed", *LEARNED, "gpas")
HEAD_NORMS = ("qk_norm", "qk_norm_full", "v_norm")
# What `Columns` holds for each sublayer, besides `num_gains`; gain_* says which of the sublayer's gains a norm uses.
NAMES = (*FLAGS, *HEAD_NORMS, *NUMBERS, *(f"gain_{norm}" for norm in NORMS))


class Columns(flax.struct.PyTreeNode):
  """A table, or several of one depth to be mapped over, split by what varies.

  Attributes:
    varying: `SUBLAYER.NAME` -> array [L], or [R, L] for R tables.
    constant: the other columns as Python constants; static under jit, so they are compiled in.
  """

  varying: dict[str, jax.Array | np.ndarray]
  constant: tuple[tuple[str, Any], ...] = flax.struct.field(pytree_node=False)

  @classmethod
  def of(cls, table: Table) -> "Columns":
    """The columns of one table."""
    stacked = cls.of_many([table])
    return stacked.replace(varying={name: column[0] for name, column in stacked.varying.items()})

  @classmethod
  def of_many(cls, tables: Sequence[Table]) -> "Columns":
    """The columns of R tables of one depth, arrays [R, L]; `jax.vmap` over it runs the R placements side by side."""
    varying: dict[str, jax.Array | np.ndarray] = {}
    constant: dict[str, Any] = {}
    for sublayer in SUBLAYERS:
      rows_RL = [table.rows(sublayer) for table in tables]
      constant[f"{sublayer}.num_gains"] = max(table.num_gains(sublayer) for table in tables)
      for name in NAMES:
        values_RL = [[_value(row, name) for row in rows] for rows in rows_RL]
        used = {value for values in values_RL for value in values if value is not None}
        if len(used) > 1:
          dense_RL = [[0 if value is None else value for value in values] for values in values_RL]
          varying[f"{sublayer}.{name}"] = np.array(dense_RL)
        else:
          constant[f"{sublayer}.{name}"] = used.pop() if used else 0
    return cls(varying=varying, constant=tuple(sorted(constant.items())))

  def of_layer(self, index: int) -> dict[str, Any]:
    """The varying columns of one layer; Python constants where the table itself is not traced."""
    return {
      name: column[index].item() if isinstance(column, np.ndarray) else column[index]
      for name, column in self.varying.items()
    }


def _value(row: Row, name: str) -> Any:
  """None where the column does not matter: the gain of a norm that is not applied."""
  if name.startswith("gain_"):
    return row.gain_index(name.removeprefix("gain_"))
  return getattr(row, name)


def used_by_layer(table: Table) -> dict[str, np.ndarray]:
  """Which layers use each parameter of `layers/` that not every placement has: name -> bool [L]."""
  used = {"gpas": table.column("attention", "gpas") | table.column("mlp", "gpas")}
  for sublayer in SUBLAYERS:
    num_gains_L = np.array([row.num_gains for row in table.rows(sublayer)])
    used |= {f"{sublayer}_norm": num_gains_L >= 1, f"{sublayer}_norm_2": num_gains_L >= 2}
    used |= {f"{sublayer}_{name}": table.column(sublayer, name) for name in LEARNED}
  head_norms = (("qk_norm", ("query_norm", "key_norm")), ("qk_norm_full", ("query_norm_full", "key_norm_full")))
  for column, names in (*head_norms, ("v_norm", ("value_norm",))):
    used |= dict.fromkeys(names, table.column("attention", column))
  return used

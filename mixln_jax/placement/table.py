"""The table of a placement: rows of columns, one row for each layer and sublayer, and the residual streams."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mixln_jax.errors import InputError

SUBLAYERS = ("attention", "mlp")
NORMS = ("norm_in", "norm_mid", "norm_out")  # in order of application; their gains are numbered in this order


class Learned(NamedTuple):
  """A learned factor of the sublayer rule."""

  factor: str  # the coefficient that it multiplies: c_in, c_out or c_res
  shape: str  # "vector" [D] or "scalar" []


def _learned(factor: str, shape: str) -> Any:
  """A column that says whether a coefficient of the rule is multiplied by a learned factor."""
  return dataclasses.field(default=False, metadata={"learned": Learned(factor, shape)})


def _initial(default: Any) -> Any:
  """A column that affects only the initial weights."""
  return dataclasses.field(default=default, metadata={"initial": True})


def _of_model(default: Any) -> Any:
  """A column that has one value for the whole model and that layers do not read (`Table.streams`)."""
  return dataclasses.field(default=default, metadata={"of_model": True})


class StreamSet(NamedTuple):
  """The purpose of the residual streams beyond the first. All rows of a model must agree on it.

  Attributes:
    meaning: the purpose in words, for messages.
    read_out: how the head reads the streams: a key of `model/wiring.py`'s READ_OUTS.
    carried: whether the further streams are carried from layer to layer; if not, they exist only within a layer.
    sums: whether diagnostics treat the sum of all streams as "the residual stream"; if not, it is the first one.
  """

  meaning: str
  read_out: str
  carried: bool = True
  sums: bool = True


STREAM_SETS: Mapping[str, StreamSet] = {
  "hyper": StreamSet("copies of the stream, whose sum the head reads", "sum"),
  "hyper_normed": StreamSet("copies of the stream, which the head reads after a norm each", "sum_of_normed"),
  "ihc_v4": StreamSet("copies of the stream, which the head reads by learned weights", "weighted_sum"),
  "mhc_v4": StreamSet("copies of the stream, which the head reads by learned weights", "weighted_sum"),
  "siamese": StreamSet("a stream without a norm beside the one with norms", "siamese"),
  "dual": StreamSet("the sum of all branches beside the Post-LN stream", "dual"),
  "sources": StreamSet("the outputs of earlier sublayers", "attention"),
  "x0": StreamSet("the embedding", "first", sums=False),
  "span": StreamSet("the layer's input", "first", carried=False, sums=False),
}


class Streams(NamedTuple):
  """The residual streams of a model.

  Attributes:
    kind: a key of STREAM_SETS; "" if there is only one stream.
    num: the number of streams.
    start: each further stream starts as this number times the embedding.
    read_out_weight: the weight of the first stream in the read-out (only for `dual`).
  """

  kind: str = ""
  num: int = 1
  start: float = 1.0
  read_out_weight: float = 1.0

  @property
  def read_out(self) -> str:
    return STREAM_SETS[self.kind].read_out if self.kind else "first"

  @property
  def num_carried(self) -> int:
    """The number of streams that are carried from layer to layer."""
    return self.num if self.kind and STREAM_SETS[self.kind].carried else 1

  @property
  def sums(self) -> bool:
    return bool(self.kind) and STREAM_SETS[self.kind].sums


class Ramp(NamedTuple):
  """floor + (1 − floor) clip((t − start) / (end − start), 0, 1)^power after t finished updates; 1 if end is 0."""

  start: float
  end: float
  floor: float
  power: float


NO_RAMP = Ramp(0.0, 0.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Row:
  """The columns of the sublayer rule for one sublayer of one layer.

  The default of a new column must be what the rule did before, because checkpoints hold tables of earlier versions. To
  add a learned factor, add one line here: the rule, the parameters (`model/parameters.py`) and the columns that the
  model reads (`model/columns.py`) all use these fields.
  """

  norm_in: bool = False
  norm_mid: bool = False
  norm_out: bool = False
  residual_from_normed: bool = False
  c_in: float = 1.0
  c_out: float = 1.0
  c_res: float = 1.0
  vector_c_res: bool = _learned("c_res", "vector")
  vector_c_out: bool = _learned("c_out", "vector")
  scalar_c_out: bool = _learned("c_out", "scalar")
  gpas: bool = False  # g(h) = h - silu(a) * stop_gradient(h), with one learned a for both sublayers; else g(h) = h
  qk_norm: bool = False  # attention: RMSNorm of each head's query and key, before RoPE
  qk_norm_full: bool = False  # attention: RMSNorm over all heads' queries, and keys, together
  v_norm: bool = False  # attention: RMSNorm of each head's value
  read: tuple[float, ...] = (1.0,)  # by stream
  mix: tuple[tuple[float, ...], ...] = ((1.0,),)  # [from][to]
  write: tuple[float, ...] = (1.0,)  # by stream
  wiring: str = "fixed"  # or a key of `model/wiring.py`'s WIRINGS, which computes read, mix and write
  norm_streams: bool = False  # M_0 and M_1 are norms with gains of their own; else the identity
  value_residual: bool = False  # attention: v ← (1 − λ) v + λ v_0, v_0 from the first layer, λ learned
  value_residual_two: bool = False  # attention: v ← λ_1 v_0 + λ_2 v, both learned
  ramp: Ramp = NO_RAMP  # a factor on c_out that depends on the number of finished updates
  streams: str = _of_model("")  # a key of STREAM_SETS
  stream_start: float = _of_model(1.0)
  read_out_weight: float = _of_model(1.0)
  xavier: bool = _initial(False)  # std sqrt(2 / (fan_in + fan_out)) instead of config.model.init_deviation
  branch_gain: float = _initial(1.0)  # factor on the std of value and output, or of all three matrices of the MLP
  output_deviation: float = _initial(1.0)  # factor on the std of the sublayer's last matrix
  initial_c_out: float = _initial(1.0)  # initial value of a learned factor on c_out
  dynamic_std: float = _initial(0.0)  # std of the weights that compute read, mix and write from the streams
  static_size: float = _initial(0.0)  # mHC: initial absolute value of the logits of read and mix

  @property
  def num_gains(self) -> int:
    return sum(getattr(self, norm) for norm in NORMS)

  def gain_index(self, norm: str) -> int | None:
    """Which of the sublayer's gains `norm` uses (0 for the first one applied), or None if it is not applied."""
    if not getattr(self, norm):
      return None
    return sum(getattr(self, earlier) for earlier in NORMS[: NORMS.index(norm)])

  @property
  def num_streams(self) -> int:
    return len(self.read)

  def with_streams(self, num: int, *, kept: bool) -> "Row":
    """The row in a model of `num` streams; the sublayer does not read or write the streams that the row lacks.

    If `kept`, those streams stay as they are. Otherwise they exist only within a layer, and each becomes a copy of the
    first stream before the sublayer. An MLP then finds the layer's input in them, whatever the row of its attention.
    """
    missing = num - self.num_streams
    if missing <= 0:
      return self
    zeros = (0.0,) * missing
    mix = [(*mix_from, *zeros) for mix_from in self.mix]
    if not kept:
      mix[0] = (*self.mix[0], *(1.0,) * missing)
    for index in range(self.num_streams, num):
      mix.append(tuple(float(kept and to == index) for to in range(num)))
    return replace(self, read=(*self.read, *zeros), mix=tuple(mix), write=(*self.write, *zeros))

  def without_initial(self) -> "Row":
    """The row without the columns that affect only initial weights: two rows that are then equal compute the same."""
    defaults = {field.name: field.default for field in dataclasses.fields(Row) if "initial" in field.metadata}
    return replace(self, **defaults)


LEARNED: Mapping[str, Learned] = {
  field.name: field.metadata["learned"] for field in dataclasses.fields(Row) if "learned" in field.metadata
}


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of the table: its word in the layer list, and the rows of its two sublayers."""

  name: str
  attention: Row
  mlp: Row


@dataclasses.dataclass(frozen=True)
class Table:
  """A placement for a model of `len(layers)` layers. Hashable; equal tables mean the same model."""

  layers: tuple[Layer, ...]

  def with_branches_times(self, factor: float) -> "Table":
    """The table with every branch multiplied by a factor (config.model.branch_multiplier)."""
    if factor == 1.0:
      return self
    layers = []
    for layer in self.layers:
      attention = replace(layer.attention, c_out=layer.attention.c_out * factor)
      mlp = replace(layer.mlp, c_out=layer.mlp.c_out * factor)
      layers.append(replace(layer, attention=attention, mlp=mlp))
    return Table(tuple(layers))

  @property
  def layer_list(self) -> str:
    """One word per layer, from the first layer: `post post post pre …`."""
    return " ".join(layer.name for layer in self.layers)

  def rows(self, sublayer: str) -> list[Row]:
    return [getattr(layer, sublayer) for layer in self.layers]

  def column(self, sublayer: str, field: str) -> np.ndarray:
    """One column of the table, [L]."""
    return np.array([getattr(row, field) for row in self.rows(sublayer)])

  def num_gains(self, sublayer: str) -> int:
    """How many gains the sublayer has in the parameter tree: the most that any of its layers uses."""
    return max(row.num_gains for row in self.rows(sublayer))

  @property
  def all_rows(self) -> list[Row]:
    return [row for sublayer in SUBLAYERS for row in self.rows(sublayer)]

  @property
  def streams(self) -> Streams:
    """The residual streams. Rows with one stream are compatible with any; `parse` checks that all others agree."""
    for row in self.all_rows:
      if row.streams:
        return streams_of(row)
    return Streams()

  @property
  def ramp_end(self) -> float:
    """The number of finished updates after which no factor changes any more; 0 if none ever changes."""
    return max(row.ramp.end for row in self.all_rows)

  def to_json(self) -> list[dict[str, Any]]:
    return [dataclasses.asdict(layer) for layer in self.layers]

  @classmethod
  def from_json(cls, layers: list[dict[str, Any]], written_by: str = "another version") -> "Table":
    """The table that `to_json` wrote, perhaps in an earlier version: columns that it lacks take their defaults.

    Args:
      layers: the result of `to_json`.
      written_by: the version that wrote it, for the message.

    Raises:
      InputError: it has a column that this version does not know.
    """
    read = []
    for layer in layers:
      attention, mlp = _row_from_json(layer["attention"], written_by), _row_from_json(layer["mlp"], written_by)
      read.append(Layer(layer["name"], attention, mlp))
    return cls(tuple(read))


def _row_from_json(columns: Mapping[str, Any], written_by: str) -> Row:
  known = {field.name for field in dataclasses.fields(Row)}
  unknown = sorted(set(columns) - known)
  if unknown:
    raise InputError(
      f"placement table: column {unknown[0]}={columns[unknown[0]]!r} is unknown to this version, whose columns are "
      f"{', '.join(sorted(known))}; the table was written by {written_by}; use that version"
    )
  row = Row(**{name: _from_list(value) for name, value in columns.items()})
  return replace(row, ramp=Ramp(*row.ramp))


def _from_list(value: Any) -> Any:
  """A column from JSON, with tuples in place of lists."""
  return tuple(_from_list(entry) for entry in value) if isinstance(value, list) else value


def streams_of(row: Row) -> Streams:
  """The residual streams of a model with this row."""
  return Streams(row.streams, row.num_streams, row.stream_start, row.read_out_weight)


def ramp_factor(start: Any, end: Any, floor: Any, power: Any, step: Any, xp: Any = np) -> Any:
  """The factor of a Ramp on c_out after `step` finished updates: a number, or an array if an argument is one.

  Args:
    start, end, floor, power: the fields of a Ramp, numbers or arrays of one shape.
    step: finished optimizer updates.
    xp: NumPy, or jax.numpy for traced values.
  """
  # Without a ramp the length is not used; 1 avoids a division by 0.
  length = xp.where(end > 0, end - start, 1.0)
  progress = xp.clip((step - start) / length, 0.0, 1.0)
  return xp.where(end > 0, floor + (1.0 - floor) * progress**power, 1.0)

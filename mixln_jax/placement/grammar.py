"""What a placement is: names, grammar, and the table that the model reads (Python and NumPy only).

A placement is data. A string such as `mix:0.25` becomes a table with a row for each layer and sublayer, and each row
holds the columns of the one sublayer rule (`model/residual.py`) over the residual streams H_0 … H_{n-1}:

    x   = Σ_i read_i M_i(H_i)
    b   = c_out N_mid(f(c_in N_in(x)))
    s   = c_res g(Σ_i mix_i0 R_i) + write_0 b            R_0 = N_in(x) if residual_from_normed else M_0(H_0); R_i = H_i
    H_0 ← N_out(s) where there is an N_out, else g(s)
    H_j ← Σ_i mix_ij R_i + write_j b                     for the further streams

Most rows have one stream (n = 1, read = mix = write = 1). `wiring` says where read, mix and write come from: from the
table itself (`fixed`), or from a function with learned weights (`model/wiring.py`).

Grammar:

    placement := segment ("," segment)*            the segments' counts add up to the number of layers
    segment   := row ["/" row] ["*" count] ("+" modifier)*      `post/pre`: Post-LN attention and a Pre-LN MLP
    row       := name (":" argument)*
    name      := a key of ROWS, or `mix`; a single segment without a count stands for all layers
    modifier  := a key of MODIFIERS (":" argument)*; it applies to its own segment only

To add a placement whose columns fit the rule, add one line to ROWS, one line of mathematics to the tests' reference
(`tests/model/reference.py`) and one line to a table of docs/placements.md. A test over all ROWS names what is missing.
A row with an argument also needs an example in `tests/model/cases.py`. `bash tests/run.sh -k NAME` runs all tests of
one placement.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from mixln_jax.errors import InputError, one_line
from mixln_jax.text import shown, whole_number

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
        return _streams_of(row)
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


def _streams_of(row: Row) -> Streams:
  return Streams(row.streams, row.num_streams, row.stream_start, row.read_out_weight)


class Position(NamedTuple):
  """The position of a layer in the model."""

  layer: int  # from 0
  num_layers: int


class Rows(NamedTuple):
  """The rows of one layer."""

  attention: Row
  mlp: Row


@dataclasses.dataclass(frozen=True)
class Argument:
  """A number after a placement's colon, `lns:0.25`."""

  meaning: str
  minimum: float
  maximum: float
  default: float | None = None  # None: the default depends on the depth; the function of the rows computes it
  whole: bool = False


Arguments = tuple[Any, ...]  # the value (float, int or None) of each argument of a placement


@dataclasses.dataclass(frozen=True)
class Placement:
  """The meaning of a name in ROWS.

  Attributes:
    rows: a function of a layer's position and the arguments' values that returns the layer's rows.
    arguments: the arguments that it takes after colons.
  """

  rows: Callable[[Position, Arguments], Rows]
  arguments: tuple[Argument, ...] = ()


def _both(row: Row) -> Placement:
  """The same row for attention and MLP of every layer."""
  return Placement(lambda _position, _arguments: Rows(row, row))


def _lns(position: Position, arguments: Arguments) -> Rows:
  """LayerNorm scaling (arXiv 2502.05795): N_in's output over the root of the layer's number, counted from 1."""
  number, exponent = position.layer + 1, arguments[0]
  # `sqrt` and `**` may differ in the last bit, and checkpoints hold values computed with `sqrt`.
  divisor = math.sqrt(number) if exponent == 0.5 else number**exponent
  row = Row(norm_in=True, c_in=1.0 / divisor)
  return Rows(row, row)


def _deepnorm(position: Position, arguments: Arguments) -> Rows:
  """DeepNet for L decoder layers (arXiv 2203.00555, figure 2): α = (2L)^¼, β = (8L)^-¼."""
  alpha, beta = arguments
  if alpha is None:
    alpha = (2 * position.num_layers) ** 0.25
  if beta is None:
    beta = (8 * position.num_layers) ** -0.25
  row = Row(norm_out=True, c_res=alpha, xavier=True, branch_gain=beta)
  return Rows(row, row)


def _deepnorm_as_published(position: Position, _: Arguments) -> Rows:
  """DeepNorm as in the official Mix-LN code: α is right only for 32 layers, and β's exponent lacks its minus."""
  beta = (8 * position.num_layers) ** 0.25
  row = Row(norm_out=True, c_res=2.8284271247461903, xavier=True, branch_gain=beta)
  return Rows(row, row)


def _keel(position: Position, arguments: Arguments) -> Rows:
  """Keel (arXiv 2601.19895): N_out(α x + f(N_in(x))), α = 2L; layer 1 has Pre-LN attention and an MLP with α = 1."""
  alpha = arguments[0]
  row = Row(norm_in=True, norm_out=True, c_res=2.0 * position.num_layers if alpha is None else alpha)
  if position.layer == 0:
    return Rows(Row(norm_in=True), replace(row, c_res=1.0))
  return Rows(row, row)


def _layerscale(position: Position, arguments: Arguments) -> Rows:
  """LayerScale, whose initial value by default depends on the depth (CaiT, arXiv 2103.17239, §2): 0.1, 1e-5 or 1e-6."""
  initial = arguments[0]
  if initial is None and position.num_layers <= 18:
    initial = 0.1
  elif initial is None and position.num_layers <= 24:
    initial = 1e-5
  elif initial is None:
    initial = 1e-6
  row = Row(norm_in=True, vector_c_out=True, initial_c_out=initial)
  return Rows(row, row)


def _skipinit(_: Position, arguments: Arguments) -> Rows:
  row = Row(norm_in=True, scalar_c_out=True, initial_c_out=arguments[0])
  return Rows(row, row)


def _hybrid(*, first_is_pre: bool) -> Placement:
  """HybridNorm (arXiv 2503.04598): QKV-norm in attention; the MLP's residual is its normalised input."""
  attention = Row(qk_norm=True, v_norm=True)
  mlp = Row(norm_in=True, residual_from_normed=True)
  usual, pre = Rows(attention, mlp), Rows(replace(attention, norm_in=True), Row(norm_in=True))

  def rows(position: Position, _: Arguments) -> Rows:
    return pre if first_is_pre and position.layer == 0 else usual

  return Placement(rows)


# Several streams.


def one_hot(index: int, num: int) -> tuple[float, ...]:
  return tuple(float(i == index) for i in range(num))


def identity(num: int) -> tuple[tuple[float, ...], ...]:
  return tuple(one_hot(index, num) for index in range(num))


MOST_STREAMS = 64


def _hyper(wiring: str, streams: str = "hyper", *, least: int = 1, **columns: Any) -> Placement:
  """Pre-LN sublayers on N copies of the stream. Initially sublayer k reads stream k mod N and writes to all streams."""

  def rows(position: Position, arguments: Arguments) -> Rows:
    num = arguments[0]
    sublayers = []
    for which in range(2):
      read = one_hot((2 * position.layer + which) % num, num)
      row = Row(norm_in=True, read=read, mix=identity(num), write=(1.0,) * num, wiring=wiring, streams=streams)
      sublayers.append(replace(row, **columns))
    return Rows(*sublayers)

  return Placement(rows, (Argument("number of streams", least, MOST_STREAMS, default=4, whole=True),))


def _hyper_connections(wiring: str, streams: str = "hyper") -> Placement:
  """Hyper-connections (arXiv 2409.19606); the sublayers' last matrices are divided by √N initially (§2.4)."""
  plain = _hyper(wiring, streams)

  def rows(position: Position, arguments: Arguments) -> Rows:
    attention, mlp = plain.rows(position, arguments)
    deviation = 1.0 / math.sqrt(arguments[0])
    return Rows(replace(attention, output_deviation=deviation), replace(mlp, output_deviation=deviation))

  return Placement(rows, plain.arguments)


def _attention_residuals(position: Position, arguments: Arguments) -> Rows:
  """Attention residuals (arXiv 2603.15031): a sublayer reads a softmax over the available sources and adds to its own.

  Source 0 is the embedding. Source 1 + k // block is the sum of the outputs of all sublayers k of that block.
  """
  block = arguments[0]
  num = 1 + -(-2 * position.num_layers // block)
  sublayers = []
  for which in range(2):
    number = 2 * position.layer + which
    num_available = 1 + -(-number // block)
    read = tuple(float(source < num_available) for source in range(num))
    row = Row(norm_in=True, read=read, mix=identity(num), write=one_hot(1 + number // block, num))
    sublayers.append(replace(row, wiring="attention", streams="sources", stream_start=0.0))
  return Rows(*sublayers)


def _siamese(position: Position, _: Arguments) -> Rows:
  """SiameseNorm (arXiv 2602.08064): X ← N_X(X); o = f(N_in(X + N_Y(Y))); X ← X + o / √(2 (l + 1)), Y ← Y + o."""
  write = (1.0 / math.sqrt(2 * (position.layer + 1)), 1.0)
  row = Row(norm_in=True, norm_streams=True, read=(1.0, 1.0), mix=identity(2), write=write, streams="siamese")
  return Rows(row, row)


def _residual(_: Position, arguments: Arguments) -> Rows:
  """ResiDual (arXiv 2304.14802): x ← N(x + f(x)) and d ← d + s f(x); the head reads α x + N(d)."""
  scale, weight = arguments
  row = Row(norm_out=True, read=(1.0, 0.0), mix=identity(2), write=(1.0, scale), streams="dual")
  row = replace(row, stream_start=scale, read_out_weight=weight)
  return Rows(row, row)


KEEPS_INPUT = ((1.0, 1.0), (0.0, 0.0))  # a mix: stream 1 becomes a copy of stream 0 before the sublayer


def _span(*, both: bool) -> Placement:
  """The MLP's sum includes the layer's input: in addition to the stream (B2T, arXiv 2206.00330), or instead of it
  (SpanNorm)."""
  attention = Row(norm_out=True, read=(1.0, 0.0), mix=KEEPS_INPUT, write=(1.0, 0.0), streams="span")
  mlp = replace(attention, mix=((1.0 if both else 0.0, 0.0), (1.0, 0.0)))
  return Placement(lambda _position, _arguments: Rows(attention, mlp))


def _parallel() -> Placement:
  """Attention and MLP read the same input (GPT-J; PaLM, arXiv 2204.02311, §2)."""
  attention = Row(norm_in=True, read=(1.0, 0.0), mix=KEEPS_INPUT, write=(1.0, 0.0), streams="span")
  mlp = replace(attention, read=(0.0, 1.0), mix=((1.0, 0.0), (0.0, 0.0)))
  return Placement(lambda _position, _arguments: Rows(attention, mlp))


# Sources: the tables of docs/placements.md.
ROWS: Mapping[str, Placement] = {
  "pre": _both(Row(norm_in=True)),
  "post": _both(Row(norm_out=True)),
  "sandwich": _both(Row(norm_in=True, norm_mid=True)),
  "peri": _both(Row(norm_in=True, norm_mid=True)),
  "reordered": _both(Row(norm_mid=True)),
  "lns": Placement(_lns, (Argument("exponent of the layer's number", 0.0, 4.0, default=0.5),)),
  "deepnorm": Placement(
    _deepnorm, (Argument("weight α of the residual", 0.0, 1e6), Argument("factor β on initial weights", 0.0, 1e6))
  ),
  "deepnorm_as_published": Placement(_deepnorm_as_published),
  "keel": Placement(_keel, (Argument("weight α of the residual", 0.0, 1e6),)),
  "admin": _both(Row(norm_out=True, vector_c_res=True)),
  "layerscale": Placement(_layerscale, (Argument("first value of the learned scales", 0.0, 10.0),)),
  "skipinit": Placement(_skipinit, (Argument("first value of the learned scales", 0.0, 10.0, default=0.0),)),
  "hybrid": _hybrid(first_is_pre=False),
  "hybrid_first": _hybrid(first_is_pre=True),
  "parallel": _parallel(),
  "b2t": _span(both=True),
  "spannorm": _span(both=False),
  "residual": Placement(
    _residual,
    (
      Argument("factor s of the second stream", 1e-6, 1e6, default=1.0),
      Argument("weight α of the first stream in the read-out", 0.0, 1e6, default=1.0),
    ),
  ),
  "siamese": Placement(_siamese),
  "hc": _hyper_connections("hc"),
  "dhc": _hyper_connections("dhc"),
  "dhc_layernorm": _hyper_connections("dhc_layernorm"),
  "dhc_identity": _hyper_connections("dhc_identity", "hyper_normed"),
  "ihc": _hyper("ihc", dynamic_std=0.02),
  "mhc": _hyper("mhc", static_size=8.0),
  "mhc_zero_bias": _hyper("mhc", dynamic_std=0.02),
  "ihc_v4": _hyper("ihc_v4", "ihc_v4", least=2, dynamic_std=0.02),
  "mhc_v4": _hyper("mhc_v4", "mhc_v4", dynamic_std=0.02),
  "attnres": Placement(
    _attention_residuals, (Argument("number of sublayers in a block", 1, 10_000, default=1, whole=True),)
  ),
}


# Modifiers.


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


def _stage_start(ends: list[float], layer: int) -> float:
  return 0.0 if layer == 0 else ends[layer - 1]


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


MOST_STEPS = 10**9


def at_step(placement: str, num_layers: int, step: int) -> str:
  """The placement after `step` finished updates: `pre+prores` -> `pre+prores:linear:1000@40`.

  With this string and the parameters, what a model computes is fully determined; so evaluation, generation, export and
  diagnosis of a checkpoint use the placement at its step. A placement without a ramp is returned unchanged.
  """
  if parse(placement, num_layers).ramp_end == 0.0:
    return placement
  segments = []
  for segment in placement.split(","):
    words = []
    for word in segment.split("+"):
      name, *texts = word.split(":")
      if name == "prores" and "@" not in word and texts[:1] not in [[fixed] for fixed in FIXED_FACTORS]:
        texts = [*texts, *["linear", str(DEFAULT_RAMP_STEPS)][len(texts) :]]
        word = ":".join((name, *texts)) + f"@{step}"
      words.append(word)
    segments.append("+".join(words))
  return ",".join(segments)


def without_step(placement: str) -> str:
  """The placement without the step that `at_step` wrote into it, and without arguments of ramps that are defaults."""
  default = f"+prores:linear:{DEFAULT_RAMP_STEPS}"
  return re.sub(r"@\d+", "", placement).replace(default, "+prores").replace("+prores:linear", "+prores")


MODIFIERS: Mapping[str, Modifier] = {
  "scaled_init": Modifier(_scaled_init),
  "gpas": _on(gpas=True),
  "qk_norm": _on(("attention",), qk_norm=True),
  "qk_norm_full": _on(("attention",), qk_norm_full=True),
  "x0": Modifier(_x0),
  "value_residual": Modifier(_value_residual, "the number of learned weights, 1 or 2"),
  "prores": Modifier(_prores, "the schedule and its steps"),
}

MIX = "mix"
ALPHA = Argument("fraction of Post-LN layers", 0.0, 1.0, default=0.25)
CHOICES = (*ROWS, f"{MIX}:ALPHA")


class _Name(NamedTuple):
  """A name in a segment with its arguments: as written, and parsed."""

  text: str
  name: str
  values: Arguments


@dataclasses.dataclass(frozen=True)
class _Segment:
  text: str
  names: tuple[_Name, ...]  # one for both sublayers, or attention's and the MLP's
  count: int | None
  modifiers: tuple[str, ...]  # with their arguments

  @property
  def is_mix(self) -> bool:
    return self.names[0].name == MIX


def num_post_layers(alpha: float, num_layers: int) -> int:
  """How many leading layers of Mix-LN are Post-LN: ⌊αL + ½⌋ (arXiv 2412.13795, §3; halves round up)."""
  # Exact decimal arithmetic: 0.7 × 45 is 31.5, but as floats it is a little less.
  return math.floor(Fraction(repr(alpha)) * num_layers + Fraction(1, 2))


@functools.lru_cache(maxsize=256)
def parse(placement: str, num_layers: int) -> Table:
  """The table of a placement string for a model of `num_layers` layers. (For a model's own table use `config.table`.)

  Raises:
    InputError: the string is malformed, names an unknown placement or modifier, has counts that do not add up, or has
      rows that use several streams for different purposes.
  """
  segments = [_parse_segment(text, placement) for text in placement.split(",")]
  if len(segments) == 1 and segments[0].count is None:
    layers = _expand_single(segments[0], num_layers, placement)
  else:
    layers = _expand_segments(segments, num_layers, placement)
  _check_streams(layers, placement)
  table = Table(tuple(layers))
  if table.ramp_end > 0 and any(row.vector_c_res for row in table.all_rows):
    raise _error(
      placement,
      "admin's scales are set by a pass before the first update, when +prores switches branches off; leave one of the "
      "two out",
    )
  return table


def _error(placement: str, problem: str) -> InputError:
  return InputError(f"config.model.placement={shown(placement)}: {problem}")


def _suggestion(word: str, choices: list[str]) -> str:
  close = difflib.get_close_matches(word, choices, n=1)
  return f"did you mean {close[0]!r}? " if close else ""


def _parse_segment(text: str, placement: str) -> _Segment:
  text = text.strip()
  body, *modifiers = text.split("+")
  for modifier in modifiers:
    name, *texts = modifier.split(":")
    if name not in MODIFIERS:
      hint = _suggestion(name, list(MODIFIERS))
      raise _error(placement, f"unknown modifier {name!r}; {hint}choices: {', '.join(MODIFIERS)}")
    if texts and not MODIFIERS[name].arguments:
      raise _error(
        placement, f"modifier {name!r} takes no argument, but {':'.join(texts)!r} was given; write '+{name}'"
      )
  body, star, count_text = body.partition("*")
  count = whole_number(count_text, 10**15) if star else None
  if star and not count:
    raise _error(placement, f"the count of {one_line(text, 40)!r} must be a whole number above 0, as in 'post*3'")
  names = tuple(_parse_name(name, text, placement) for name in body.split("/"))
  if len(names) > 2:
    raise _error(placement, f"{text!r} has {len(names)} rows for attention and MLP; write one or two, as in 'post/pre'")
  if len(names) == 2 and any(name.name == MIX for name in names):
    raise _error(placement, f"{text!r}: mix is a whole placement; write it out by segments, as in 'post/pre*3,pre*9'")
  return _Segment(text, names, count, tuple(modifiers))


def _parse_name(body: str, segment: str, placement: str) -> _Name:
  name, *texts = body.split(":")
  if name != MIX and name not in ROWS:
    hint = _suggestion(name, [*ROWS, MIX])
    raise _error(placement, f"unknown placement {name!r}; {hint}choices: {', '.join(CHOICES)}")
  arguments = (ALPHA,) if name == MIX else ROWS[name].arguments
  if texts and not arguments:
    raise _error(placement, f"{name!r} takes no argument, but {':'.join(texts)!r} was given; write just {name!r}")
  if len(texts) > len(arguments):
    meanings = ", ".join(argument.meaning for argument in arguments)
    raise _error(placement, f"{body!r} has {len(texts)} arguments, but {name!r} takes {len(arguments)}: {meanings}")
  values = [argument.default for argument in arguments]
  for index, text in enumerate(texts):
    values[index] = _parse_argument(text, arguments[index], segment, name, placement)
  return _Name(body, name, tuple(values))


def _parse_argument(text: str, argument: Argument, segment: str, name: str, placement: str) -> float:
  try:
    value = whole_number(text) if argument.whole else float(text)
  except ValueError:
    value = None
  if value is None or not argument.minimum <= value <= argument.maximum:
    example = 1.0 if argument.default is None else argument.default
    kind = "whole number" if argument.whole else "number"
    raise _error(
      placement,
      f"the {argument.meaning} in {segment!r} must be a {kind} from {argument.minimum:g} to {argument.maximum:g}, "
      f"as in '{name}:{example:g}'",
    )
  return value


def _layer(segment: _Segment, names: tuple[_Name, ...], position: Position, placement: str) -> Layer:
  """One layer of a segment. `names` are the segment's names or, for `mix`, the one that it stands for in this layer."""
  rows_of_names = [ROWS[name.name].rows(position, name.values) for name in names]
  rows = Rows(rows_of_names[0].attention, rows_of_names[-1].mlp)
  for text in segment.modifiers:
    name, *texts = text.split(":")
    _check_modifier(name, rows, segment, placement)
    try:
      rows = MODIFIERS[name].rows(rows, position, tuple(texts))
    except ValueError as error:
      raise _error(placement, f"modifier {name!r} of {segment.text!r} {error}") from error
  if rows.attention.qk_norm and rows.attention.qk_norm_full:
    raise _error(
      placement, f"{segment.text!r} normalises queries and keys both per head and over all heads; choose one of the two"
    )
  spelled = "/".join(name.text for name in names)
  return Layer("+".join((spelled, *segment.modifiers)), rows.attention, rows.mlp)


def _check_modifier(name: str, rows: Rows, segment: _Segment, placement: str) -> None:
  several = [row.streams for row in rows if row.streams]
  names = [modifier.split(":")[0] for modifier in segment.modifiers]
  if names.count(name) > 1:
    raise _error(placement, f"{segment.text!r} has the modifier {name!r} more than once; write it once")
  if name == "x0" and several:
    raise _error(
      placement,
      f"{segment.text!r}: +x0 needs a second stream for the embedding, but the streams of this row are "
      f"{STREAM_SETS[several[0]].meaning}; leave +x0 out",
    )
  if name == "gpas" and (several or "x0" in names):
    raise _error(
      placement, f"{segment.text!r}: +gpas is defined for one residual stream, and this row has several; leave it out"
    )


def _check_streams(layers: list[Layer], placement: str) -> None:
  """Rows with several streams must use them for the same purpose, because one reads what the other writes."""
  first: tuple[str, Streams] | None = None
  for layer in layers:
    for row in (layer.attention, layer.mlp):
      if not row.streams:
        continue
      streams = _streams_of(row)
      if first is None:
        first = (layer.name, streams)
      elif streams != first[1]:
        raise _error(
          placement,
          f"{first[0]!r} and {layer.name!r} can't be layers of one model: the {first[1].num} streams of the one are "
          f"{STREAM_SETS[first[1].kind].meaning}, the {streams.num} of the other are "
          f"{STREAM_SETS[streams.kind].meaning}{_starts_differ(first[1], streams)}; choose one of the two (rows with "
          "one stream fit both)",
        )


def _starts_differ(one: Streams, other: Streams) -> str:
  if one[:2] != other[:2]:
    return ""
  return f" (they start or are read out in different ways: {one[2:]} and {other[2:]})"


def _expand_single(segment: _Segment, num_layers: int, placement: str) -> list[Layer]:
  names_by_layer = [segment.names] * num_layers
  if segment.is_mix:
    num_post = num_post_layers(segment.names[0].values[0], num_layers)
    post, pre = (_Name("post", "post", ()),), (_Name("pre", "pre", ()),)
    names_by_layer = [post] * num_post + [pre] * (num_layers - num_post)
  return [_layer(segment, names, Position(index, num_layers), placement) for index, names in enumerate(names_by_layer)]


def _expand_segments(segments: list[_Segment], num_layers: int, placement: str) -> list[Layer]:
  counts = [segment.count or 1 for segment in segments]
  for segment in segments:
    if segment.is_mix:
      raise _error(
        placement, f"{segment.text!r} is a whole placement and can't be a segment; write it out, as in 'post*3,pre*9'"
      )
  if sum(counts) != num_layers:
    raise _error(
      placement,
      f"its segments make {sum(counts)} layers but config.model.num_layers={num_layers}; the counts must add up to it",
    )
  layers = []
  for segment, count in zip(segments, counts, strict=True):
    for _ in range(count):
      layers.append(_layer(segment, segment.names, Position(len(layers), num_layers), placement))
  return layers

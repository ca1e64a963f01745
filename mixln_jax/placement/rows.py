"""The named rows: ROWS maps each name of a placement to its columns, with the paper that they are from."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mixln_jax.placement.table import Row


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

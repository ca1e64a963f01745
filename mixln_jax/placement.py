"""What a norm placement is: names, grammar, and the table that the model reads (Python and NumPy only).

A placement is data. A string such as `mix:0.25` becomes a table with a row for each layer and sublayer, and each row
holds the columns of the one sublayer rule (`model/residual.py`):

    r = N_in(x) if residual_from_normed else x
    s = c_res * g(r) + c_out * N_mid(f(c_in * N_in(x)))
    y = N_out(s) where there is an N_out, else g(s)

Grammar:

    placement := segment ("," segment)*            the segments' counts add up to the number of layers
    segment   := name [":" argument] ["*" count] ("+" modifier)*
    name      := a key of ROWS, or `mix`; one name without a count stands for all layers
    modifier  := a key of MODIFIERS; it binds to its own segment

To add a placement whose columns fit the rule, add one line to ROWS, one line of mathematics to the tests' reference
(`tests/model/reference.py`) and one to the README's table; a test that enumerates ROWS names the one that is missing.
A row that takes an argument also gets an example in `tests/model/cases.py`.
`bash tests/run.sh -k NAME` tries one placement everywhere.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from mixln_jax.errors import InputError, one_line
from mixln_jax.text import shown, whole_number

SUBLAYERS = ("attention", "mlp")
NORMS = ("norm_in", "norm_mid", "norm_out")  # in order of application, which is the order of their gains


class Learned(NamedTuple):
  """What a learned column of the table multiplies."""

  factor: str  # c_in, c_out or c_res
  shape: str  # "vector" [D] or "scalar" []


def _learned(factor: str, shape: str) -> Any:
  """A column that says whether a factor of the rule is also times something learned."""
  return dataclasses.field(default=False, metadata={"learned": Learned(factor, shape)})


def _initial(default: Any) -> Any:
  """A column that decides initial weights and nothing else."""
  return dataclasses.field(default=default, metadata={"initial": True})


@dataclasses.dataclass(frozen=True)
class Row:
  """The columns of the sublayer rule for one sublayer of one layer.

  A column that is added here needs a default that is what the rule did before: checkpoints hold tables of earlier
  versions. A learned factor is one line here: the rule multiplies by it, and the parameters (`model/parameters.py`) and
  the columns that the model reads (`model/columns.py`) are made from these fields.
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
  gpas: bool = False  # g(h) = h - silu(a) * stop_gradient(h), a learned and shared by the layer's sublayers; else h
  qk_norm: bool = False  # attention: RMSNorm of each head's query and key, before RoPE
  qk_norm_full: bool = False  # attention: RMSNorm over all heads' queries, and keys, together
  v_norm: bool = False  # attention: RMSNorm of each head's value
  xavier: bool = _initial(False)  # std sqrt(2 / (fan_in + fan_out)) instead of config.model.init_deviation
  branch_gain: float = _initial(1.0)  # factor on the std of value and output, or of all three matrices of the MLP
  output_deviation: float = _initial(1.0)  # factor on the std of the sublayer's last matrix
  initial_c_out: float = _initial(1.0)  # first value of a learned c_out

  @property
  def num_gains(self) -> int:
    return sum(getattr(self, norm) for norm in NORMS)

  def gain_index(self, norm: str) -> int | None:
    """Which of the sublayer's gains `norm` uses (0 for the first one applied), or None where it is not applied."""
    if not getattr(self, norm):
      return None
    return sum(getattr(self, earlier) for earlier in NORMS[: NORMS.index(norm)])

  def without_initial(self) -> "Row":
    """The row without what only decides initial weights: equal rows compute the same."""
    return replace(
      self, **{field.name: field.default for field in dataclasses.fields(Row) if "initial" in field.metadata}
    )


LEARNED: Mapping[str, Learned] = {
  field.name: field.metadata["learned"] for field in dataclasses.fields(Row) if "learned" in field.metadata
}


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer's row of the table."""

  name: str
  attention: Row
  mlp: Row


@dataclasses.dataclass(frozen=True)
class Table:
  """A placement for a model of `len(layers)` layers. Hashable; equal tables mean the same model."""

  layers: tuple[Layer, ...]

  @property
  def layer_list(self) -> str:
    """One word a layer, first layer first: `post post post pre …`."""
    return " ".join(layer.name for layer in self.layers)

  def rows(self, sublayer: str) -> list[Row]:
    return [getattr(layer, sublayer) for layer in self.layers]

  def column(self, sublayer: str, field: str) -> np.ndarray:
    """One column of the table, [L]."""
    return np.array([getattr(row, field) for row in self.rows(sublayer)])

  def num_gains(self, sublayer: str) -> int:
    """How many gains the sublayer has in the parameter tree: the most that any of its layers uses."""
    return max(row.num_gains for row in self.rows(sublayer))

  def to_json(self) -> list[dict[str, Any]]:
    return [dataclasses.asdict(layer) for layer in self.layers]

  @classmethod
  def from_json(cls, layers: list[dict[str, Any]], written_by: str = "another version") -> "Table":
    """The table that `to_json` wrote, perhaps in an earlier version: columns that it lacks have their defaults.

    Args:
      layers: as `to_json` has them.
      written_by: the version that wrote it, for the message.

    Raises:
      InputError: it has a column that this version does not know.
    """
    return cls(
      tuple(
        Layer(layer["name"], _row_from_json(layer["attention"], written_by), _row_from_json(layer["mlp"], written_by))
        for layer in layers
      )
    )


def _row_from_json(columns: Mapping[str, Any], written_by: str) -> Row:
  known = {field.name for field in dataclasses.fields(Row)}
  unknown = sorted(set(columns) - known)
  if unknown:
    raise InputError(
      f"placement table: column {unknown[0]}={columns[unknown[0]]!r} is not one of this version's "
      f"({', '.join(sorted(known))}); the table was written by {written_by}; use that version"
    )
  return Row(**columns)


class Position(NamedTuple):
  """Where a layer stands."""

  layer: int  # from 0
  num_layers: int


class Rows(NamedTuple):
  """The rows of one layer."""

  attention: Row
  mlp: Row


@dataclasses.dataclass(frozen=True)
class Argument:
  """The number after a placement's colon, `lns:0.25`."""

  meaning: str
  minimum: float
  maximum: float
  default: float | None = None  # None: depends on the depth, and the rows' function knows


@dataclasses.dataclass(frozen=True)
class Placement:
  """What a name of ROWS stands for.

  Attributes:
    rows: the rows of a layer, from its position and the argument's value.
    argument: the argument that it takes; None where it takes none.
  """

  rows: Callable[[Position, float | None], Rows]
  argument: Argument | None = None


def _both(row: Row) -> Placement:
  """The same row for attention and MLP of every layer."""
  return Placement(lambda _position, _argument: Rows(row, row))


def _lns(position: Position, exponent: float | None) -> Rows:
  """LayerNorm scaling (arXiv 2502.05795): N_in's output over the root of the layer's number, counted from 1."""
  number = position.layer + 1
  # `sqrt` and `**` round in different ways, and checkpoints hold what `sqrt` gave.
  divisor = math.sqrt(number) if exponent == 0.5 else number ** (exponent or 0.0)
  row = Row(norm_in=True, c_in=1.0 / divisor)
  return Rows(row, row)


def _deepnorm(position: Position, _: float | None) -> Rows:
  """DeepNet for L decoder layers (arXiv 2203.00555, figure 2): α = (2L)^¼, β = (8L)^-¼."""
  num_layers = position.num_layers
  row = Row(norm_out=True, c_res=(2 * num_layers) ** 0.25, xavier=True, branch_gain=(8 * num_layers) ** -0.25)
  return Rows(row, row)


def _deepnorm_as_published(position: Position, _: float | None) -> Rows:
  """What the official Mix-LN code calls DeepNorm: α is right for 32 layers only, and β's exponent lacks its sign."""
  beta = (8 * position.num_layers) ** 0.25
  row = Row(norm_out=True, c_res=2.8284271247461903, xavier=True, branch_gain=beta)
  return Rows(row, row)


def _keel(position: Position, alpha: float | None) -> Rows:
  """Keel (arXiv 2601.19895): N_out(α x + f(N_in(x))), α = 2L; the first attention is Pre-LN, the first MLP has no α."""
  row = Row(norm_in=True, norm_out=True, c_res=2.0 * position.num_layers if alpha is None else alpha)
  if position.layer == 0:
    return Rows(Row(norm_in=True), replace(row, c_res=1.0))
  return Rows(row, row)


def _layerscale(position: Position, first: float | None) -> Rows:
  """LayerScale with the first values of its source by depth (CaiT, arXiv 2103.17239, §2): 0.1, 1e-5, 1e-6."""
  if first is None and position.num_layers <= 18:
    first = 0.1
  elif first is None and position.num_layers <= 24:
    first = 1e-5
  elif first is None:
    first = 1e-6
  row = Row(norm_in=True, vector_c_out=True, initial_c_out=first)
  return Rows(row, row)


def _hybrid(*, first_is_pre: bool) -> Placement:
  """HybridNorm (arXiv 2503.04598): QKV-norm in attention, and an MLP whose residual is normalised too."""
  attention = Row(qk_norm=True, v_norm=True)
  mlp = Row(norm_in=True, residual_from_normed=True)
  usual, pre = Rows(attention, mlp), Rows(replace(attention, norm_in=True), Row(norm_in=True))

  def rows(position: Position, _: float | None) -> Rows:
    return pre if first_is_pre and position.layer == 0 else usual

  return Placement(rows)


# Sources: the README's table.
ROWS: Mapping[str, Placement] = {
  "pre": _both(Row(norm_in=True)),
  "post": _both(Row(norm_out=True)),
  "sandwich": _both(Row(norm_in=True, norm_mid=True)),
  "peri": _both(Row(norm_in=True, norm_mid=True)),
  "reordered": _both(Row(norm_mid=True)),
  "lns": Placement(_lns, Argument("exponent of the layer's number", 0.0, 4.0, default=0.5)),
  "deepnorm": Placement(_deepnorm),
  "deepnorm_as_published": Placement(_deepnorm_as_published),
  "keel": Placement(_keel, Argument("weight α of the residual", 0.0, 1e6)),
  "admin": _both(Row(norm_out=True, vector_c_res=True)),
  "layerscale": Placement(_layerscale, Argument("first value of the learned scales", 0.0, 10.0)),
  "skipinit": _both(Row(norm_in=True, scalar_c_out=True, initial_c_out=0.0)),
  "hybrid": _hybrid(first_is_pre=False),
  "hybrid_first": _hybrid(first_is_pre=True),
}


def _scaled_init(rows: Rows, num_layers: int) -> Rows:
  factor = 1.0 / math.sqrt(2 * num_layers)
  return Rows(replace(rows.attention, output_deviation=factor), replace(rows.mlp, output_deviation=factor))


def _gpas(rows: Rows, _: int) -> Rows:
  return Rows(replace(rows.attention, gpas=True), replace(rows.mlp, gpas=True))


def _qk_norm(rows: Rows, _: int) -> Rows:
  return Rows(replace(rows.attention, qk_norm=True), rows.mlp)


def _qk_norm_full(rows: Rows, _: int) -> Rows:
  return Rows(replace(rows.attention, qk_norm_full=True), rows.mlp)


# name -> (a layer's rows, number of layers of the whole model -> its rows)
MODIFIERS: Mapping[str, Callable[[Rows, int], Rows]] = {
  "scaled_init": _scaled_init,
  "gpas": _gpas,
  "qk_norm": _qk_norm,
  "qk_norm_full": _qk_norm_full,
}

MIX = "mix"
ALPHA = Argument("fraction of Post-LN layers", 0.0, 1.0, default=0.25)
CHOICES = (*ROWS, f"{MIX}:ALPHA")


@dataclasses.dataclass(frozen=True)
class _Segment:
  text: str
  name: str
  argument: float | None  # what stands there, else the default of one that has a default
  spelled_argument: str  # `:0.25`, or nothing
  count: int | None
  modifiers: tuple[str, ...]

  @property
  def is_mix(self) -> bool:
    return self.name == MIX


def num_post_layers(alpha: float, num_layers: int) -> int:
  """How many leading layers of Mix-LN are Post-LN: ⌊αL + ½⌋ (arXiv 2412.13795, §3; halves round up)."""
  # In exact decimals: 0.7 × 45 is 31.5, and in binary a little less.
  return math.floor(Fraction(repr(alpha)) * num_layers + Fraction(1, 2))


@functools.lru_cache(maxsize=256)
def parse(placement: str, num_layers: int) -> Table:
  """The table of a placement string for a model of `num_layers` layers. (`config.table` is the way to a model's own.)

  Raises:
    InputError: the string names an unknown placement or modifier, is malformed, or its counts do not add up.
  """
  segments = [_parse_segment(text, placement) for text in placement.split(",")]
  if len(segments) == 1 and segments[0].count is None:
    layers = _expand_single(segments[0], num_layers, placement)
  else:
    layers = _expand_segments(segments, num_layers, placement)
  return Table(tuple(layers))


def _error(placement: str, problem: str) -> InputError:
  return InputError(f"config.model.placement={shown(placement)}: {problem}")


def _suggestion(word: str, choices: list[str]) -> str:
  close = difflib.get_close_matches(word, choices, n=1)
  return f"did you mean {close[0]!r}? " if close else ""


def _parse_segment(text: str, placement: str) -> _Segment:
  text = text.strip()
  body, *modifiers = text.split("+")
  for modifier in modifiers:
    if modifier not in MODIFIERS:
      hint = _suggestion(modifier, list(MODIFIERS))
      raise _error(placement, f"unknown modifier {modifier!r}; {hint}choices: {', '.join(MODIFIERS)}")
  body, star, count_text = body.partition("*")
  count = whole_number(count_text, 10**15) if star else None
  if star and not count:
    raise _error(placement, f"the count of {one_line(text, 40)!r} must be a whole number above 0, as in 'post*3'")
  name, colon, argument_text = body.partition(":")
  if name != MIX and name not in ROWS:
    hint = _suggestion(name, [*ROWS, MIX])
    raise _error(placement, f"unknown placement {name!r}; {hint}choices: {', '.join(CHOICES)}")
  argument = ALPHA if name == MIX else ROWS[name].argument
  if colon and argument is None:
    raise _error(placement, f"{name!r} takes no argument, but {argument_text!r} was given; write just {name!r}")
  value = None if argument is None else argument.default
  if colon and argument is not None:
    value = _parse_argument(argument_text, argument, text, placement)
  return _Segment(text, name, value, f"{colon}{argument_text}", count, tuple(modifiers))


def _parse_argument(text: str, argument: Argument, segment: str, placement: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not argument.minimum <= value <= argument.maximum:
    example = 1.0 if argument.default is None else argument.default
    raise _error(
      placement,
      f"the {argument.meaning} in {segment!r} must be a number from {argument.minimum:g} to {argument.maximum:g}, "
      f"as in '{segment.split(':')[0]}:{example:g}'",
    )
  return value


def _layer(segment: _Segment, name: str, position: Position, placement: str) -> Layer:
  """One layer of a segment; `name` is the segment's, or what `mix` stands for there."""
  rows = ROWS[name].rows(position, None if segment.is_mix else segment.argument)
  for modifier in segment.modifiers:
    rows = MODIFIERS[modifier](rows, position.num_layers)
  if rows.attention.qk_norm and rows.attention.qk_norm_full:
    raise _error(
      placement, f"{segment.text!r} would normalise queries and keys per head and over all heads; choose one of the two"
    )
  spelled = name if segment.is_mix else name + segment.spelled_argument
  return Layer("+".join((spelled, *segment.modifiers)), rows.attention, rows.mlp)


def _expand_single(segment: _Segment, num_layers: int, placement: str) -> list[Layer]:
  names = [segment.name] * num_layers
  if segment.is_mix:
    num_post = num_post_layers(segment.argument or 0.0, num_layers)
    names = ["post"] * num_post + ["pre"] * (num_layers - num_post)
  return [_layer(segment, name, Position(index, num_layers), placement) for index, name in enumerate(names)]


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
  expanded = [segment for segment, count in zip(segments, counts, strict=True) for _ in range(count)]
  return [
    _layer(segment, segment.name, Position(index, num_layers), placement) for index, segment in enumerate(expanded)
  ]

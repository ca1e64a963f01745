"""What a norm placement is: names, grammar, and the table that the model reads (Python and NumPy only).

A placement is data. A string such as `mix:0.25` becomes a table with one row per layer and sublayer, and each row holds
the columns of the one sublayer rule (`model/residual.py`):

    r = N_in(x) if residual_from_normed else x
    s = c_res * g(r) + c_out * N_mid(f(c_in * N_in(x)))
    y = N_out(s) where there is an N_out, else g(s)

Grammar:

    placement := segment ("," segment)*            the segments' counts add up to the number of layers
    segment   := name [":" argument] ["*" count] ("+" modifier)*
    name      := a key of ROWS, or `mix`; one name without a count stands for all layers
    modifier  := a key of MODIFIERS; it binds to its own segment

To add a placement whose columns fit the rule, add one line to ROWS and one to the README's table.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from mixln_jax.errors import InputError

SUBLAYERS = ("attention", "mlp")
NORMS = ("norm_in", "norm_mid", "norm_out")  # in order of application, which is the order of their gains


@dataclasses.dataclass(frozen=True)
class Row:
  """The columns of the sublayer rule for one sublayer of one layer."""

  norm_in: bool = False
  norm_mid: bool = False
  norm_out: bool = False
  residual_from_normed: bool = False
  c_in: float = 1.0
  c_out: float = 1.0
  c_res: float = 1.0
  vector_c_res: bool = False  # c_res is times a learned vector [D]
  vector_c_out: bool = False  # c_out is times a learned vector [D]
  scalar_c_out: bool = False  # c_out is times a learned scalar
  gpas: bool = False  # g(h) = h - silu(a) * stop_gradient(h), a learned and shared by the layer's sublayers; else h
  qk_norm: bool = False  # attention: RMSNorm of each head's query and key, before RoPE
  qk_norm_full: bool = False  # attention: RMSNorm over all heads' queries, and keys, together
  v_norm: bool = False  # attention: RMSNorm of each head's value
  # Initial weights.
  xavier: bool = False  # deviation sqrt(2 / (fan_in + fan_out)) instead of config.model.init_deviation
  branch_gain: float = 1.0  # factor on the deviation of value and output, or of all three matrices of the MLP
  output_deviation: float = 1.0  # factor on the deviation of the sublayer's last matrix
  initial_c_out: float = 1.0  # first value of a learned c_out

  @property
  def num_gains(self) -> int:
    return sum(getattr(self, norm) for norm in NORMS)

  def gain_index(self, norm: str) -> int | None:
    """Which of the sublayer's gains `norm` uses (0 for the first one applied), or None where it is not applied."""
    if not getattr(self, norm):
      return None
    return sum(getattr(self, earlier) for earlier in NORMS[: NORMS.index(norm)])


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
  def strip(self) -> str:
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
  def from_json(cls, layers: list[dict[str, Any]]) -> "Table":
    return cls(tuple(Layer(d["name"], Row(**d["attention"]), Row(**d["mlp"])) for d in layers))


Rows = tuple[Row, Row]  # of attention and MLP


def _both(row: Row) -> Callable[[int, int], Rows]:
  return lambda _index, _num_layers: (row, row)


def _lns(index: int, _: int) -> Rows:
  row = Row(norm_in=True, c_in=1.0 / math.sqrt(index + 1))
  return row, row


def _deepnorm(_: int, num_layers: int) -> Rows:
  """DeepNet for L decoder layers (arXiv 2203.00555, figure 2): α = (2L)^¼, β = (8L)^-¼."""
  row = Row(norm_out=True, c_res=(2 * num_layers) ** 0.25, xavier=True, branch_gain=(8 * num_layers) ** -0.25)
  return row, row


def _deepnorm_as_published(_: int, num_layers: int) -> Rows:
  """What the official Mix-LN code calls DeepNorm: α is right for 32 layers only, and β's exponent lacks its sign."""
  row = Row(norm_out=True, c_res=2.8284271247461903, xavier=True, branch_gain=(8 * num_layers) ** 0.25)
  return row, row


def _keel(index: int, num_layers: int) -> Rows:
  """Keel (arXiv 2601.19895): N_out(α x + f(N_in(x))), α = 2L; the first attention is Pre-LN, the first MLP has no α."""
  row = Row(norm_in=True, norm_out=True, c_res=2.0 * num_layers)
  return (row, row) if index else (Row(norm_in=True), replace(row, c_res=1.0))


def _layerscale(_: int, num_layers: int) -> Rows:
  """LayerScale with the first values of its source by depth (CaiT, arXiv 2103.17239, §2): 0.1, 1e-5, 1e-6."""
  first = 0.1 if num_layers <= 18 else 1e-5 if num_layers <= 24 else 1e-6
  row = Row(norm_in=True, vector_c_out=True, initial_c_out=first)
  return row, row


def _hybrid(*, first_is_pre: bool) -> Callable[[int, int], Rows]:
  """HybridNorm (arXiv 2503.04598): QKV-norm in attention, and an MLP whose residual is normalised too."""
  attention = Row(qk_norm=True, v_norm=True)
  mlp = Row(norm_in=True, residual_from_normed=True)
  first = (replace(attention, norm_in=True), Row(norm_in=True)) if first_is_pre else (attention, mlp)
  return lambda index, _: (attention, mlp) if index else first


# name -> (0-based layer index, number of layers -> the rows of its attention and MLP). Sources: the README's table.
ROWS: Mapping[str, Callable[[int, int], Rows]] = {
  "pre": _both(Row(norm_in=True)),
  "post": _both(Row(norm_out=True)),
  "sandwich": _both(Row(norm_in=True, norm_mid=True)),
  "peri": _both(Row(norm_in=True, norm_mid=True)),
  "reordered": _both(Row(norm_mid=True)),
  "lns": _lns,
  "deepnorm": _deepnorm,
  "deepnorm_as_published": _deepnorm_as_published,
  "keel": _keel,
  "admin": _both(Row(norm_out=True, vector_c_res=True)),
  "layerscale": _layerscale,
  "skipinit": _both(Row(norm_in=True, scalar_c_out=True, initial_c_out=0.0)),
  "hybrid": _hybrid(first_is_pre=False),
  "hybrid_first": _hybrid(first_is_pre=True),
}


def _scaled_init(attention: Row, mlp: Row, num_layers: int) -> Rows:
  factor = 1.0 / math.sqrt(2 * num_layers)
  return replace(attention, output_deviation=factor), replace(mlp, output_deviation=factor)


# name -> (row of attention, row of the MLP, number of layers of the whole model -> both rows)
MODIFIERS: Mapping[str, Callable[[Row, Row, int], Rows]] = {
  "scaled_init": _scaled_init,
  "gpas": lambda attention, mlp, _: (replace(attention, gpas=True), replace(mlp, gpas=True)),
  "qk_norm": lambda attention, mlp, _: (replace(attention, qk_norm=True), mlp),
  "qk_norm_full": lambda attention, mlp, _: (replace(attention, qk_norm_full=True), mlp),
}

MIX = "mix"
DEFAULT_ALPHA = 0.25
CHOICES = (*ROWS, f"{MIX}:ALPHA")


@dataclasses.dataclass(frozen=True)
class _Segment:
  text: str
  name: str
  argument: str | None
  count: int | None
  modifiers: tuple[str, ...]


def num_post_layers(alpha: float, num_layers: int) -> int:
  """How many leading layers of Mix-LN are Post-LN: ⌊αL + ½⌋ (arXiv 2412.13795, §3; halves round up)."""
  # In exact decimals: 0.7 × 45 is 31.5, and in binary a little less.
  return math.floor(Fraction(repr(alpha)) * num_layers + Fraction(1, 2))


def parse(placement: str, num_layers: int) -> Table:
  """The table of a placement string for a model of `num_layers` layers.

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
  return InputError(f"config.model.placement={placement!r}: {problem}")


def _suggestion(word: str, choices: list[str]) -> str:
  close = difflib.get_close_matches(word, choices, n=1)
  return f"did you mean {close[0]!r}? " if close else ""


def _parse_segment(text: str, placement: str) -> _Segment:
  body, *modifiers = text.strip().split("+")
  for modifier in modifiers:
    if modifier not in MODIFIERS:
      hint = _suggestion(modifier, list(MODIFIERS))
      raise _error(placement, f"unknown modifier {modifier!r}; {hint}choices: {', '.join(MODIFIERS)}")
  body, star, count_text = body.partition("*")
  if star and not (count_text.isdecimal() and int(count_text) > 0):
    raise _error(placement, f"the count of {text.strip()!r} must be a whole number above 0, as in 'post*3'")
  name, colon, argument = body.partition(":")
  if name != MIX and name not in ROWS:
    hint = _suggestion(name, [*ROWS, MIX])
    raise _error(placement, f"unknown placement {name!r}; {hint}choices: {', '.join(CHOICES)}")
  if colon and name != MIX:
    raise _error(placement, f"{name!r} takes no argument, but {argument!r} was given; write just {name!r}")
  return _Segment(text.strip(), name, argument if colon else None, int(count_text) if star else None, tuple(modifiers))


def _layer(segment: _Segment, name: str, index: int, num_layers: int, placement: str) -> Layer:
  attention, mlp = ROWS[name](index, num_layers)
  for modifier in segment.modifiers:
    attention, mlp = MODIFIERS[modifier](attention, mlp, num_layers)
  if attention.qk_norm and attention.qk_norm_full:
    raise _error(
      placement, f"{segment.text!r} would normalise queries and keys per head and over all heads; choose one of the two"
    )
  return Layer("+".join((name, *segment.modifiers)), attention, mlp)


def _expand_single(segment: _Segment, num_layers: int, placement: str) -> list[Layer]:
  if segment.name != MIX:
    return [_layer(segment, segment.name, index, num_layers, placement) for index in range(num_layers)]
  num_post = num_post_layers(_alpha(segment, placement), num_layers)
  names = ["post" if index < num_post else "pre" for index in range(num_layers)]
  return [_layer(segment, name, index, num_layers, placement) for index, name in enumerate(names)]


def _alpha(segment: _Segment, placement: str) -> float:
  if segment.argument is None:
    return DEFAULT_ALPHA
  try:
    alpha = float(segment.argument)
  except ValueError:
    alpha = math.nan
  if not 0.0 <= alpha <= 1.0:
    raise _error(
      placement, f"the share of Post-LN layers in {segment.text!r} must be a number from 0 to 1, as in 'mix:0.25'"
    )
  return alpha


def _expand_segments(segments: list[_Segment], num_layers: int, placement: str) -> list[Layer]:
  for segment in segments:
    if segment.name == MIX:
      raise _error(
        placement, f"{segment.text!r} is a whole placement and can't be a segment; write it out, as in 'post*3,pre*9'"
      )
  counts = [segment.count or 1 for segment in segments]
  if sum(counts) != num_layers:
    raise _error(
      placement,
      f"its segments make {sum(counts)} layers but config.model.num_layers={num_layers}; the counts must add up to it",
    )
  expanded = [segment for segment, count in zip(segments, counts, strict=True) for _ in range(count)]
  return [_layer(segment, segment.name, index, num_layers, placement) for index, segment in enumerate(expanded)]

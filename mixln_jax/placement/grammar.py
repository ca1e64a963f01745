"""From a placement's string to its table: the grammar, and what is wrong with a string that has no table."""

import dataclasses
import difflib
import functools
import math
import re
from fractions import Fraction
from typing import NamedTuple

from mixln_jax.errors import InputError, one_line
from mixln_jax.placement.modifiers import DEFAULT_RAMP_STEPS, FIXED_FACTORS, MODIFIERS
from mixln_jax.placement.rows import ROWS, Argument, Arguments, Position, Rows
from mixln_jax.placement.table import STREAM_SETS, Layer, Streams, Table, streams_of
from mixln_jax.text import shown, whole_number

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
      streams = streams_of(row)
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


# The string of a model after some updates.


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

"""What a search chooses from: tables of placements, their arguments and the learning rate, each from finitely many.

A space is a list of parameters, each with its values, and a function that spells a choice as a placement. Three kinds:

    layers     a name for each layer                              ("pre", "post", "lns")
    segments   a name and a count for each segment                ({"names": ("post",), "counts": (2, 3, 4)}, …)
    alpha      the fraction of leading Post-LN layers (Mix-LN)     (0.0, 0.25, 0.5)

Whatever is chosen, a layer's row is one of `rows`, so that one compiled program serves the whole space.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import parameters

KINDS = ("layers", "segments", "alpha")
PLACEMENT, RATE = "model.placement", "optimizer.learning_rate"
MOST_LISTED = 1024  # points of a space that are counted one by one

Choice = Mapping[str, Any]  # parameter -> the value that was chosen
Spell = Callable[[Choice], str | None]  # the placement; None where the counts don't add up


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One thing that is chosen.

  Attributes:
    name: of the parameter, as Optuna's storage has it.
    values: what it may be; at least one.
    ordered: whether values that stand side by side are similar, as the numbers of a grid are.
  """

  name: str
  values: tuple[Any, ...]
  ordered: bool = False


@dataclasses.dataclass(frozen=True)
class Space:
  """All candidates of a search.

  Attributes:
    num_layers: L.
    choices: the parameters.
    rows: every row that a layer may have, as a placement spells it: `post`, `lns:0.25`.
    spell: the placement of a choice.
  """

  num_layers: int
  choices: tuple[Parameter, ...]
  rows: tuple[str, ...]
  spell: Spell

  def values_of(self, choice: Choice) -> dict[str, Any] | None:
    """The config fields of a choice; None where its counts don't add up to the number of layers."""
    spelled = self.spell(choice)
    if spelled is None:
      return None
    values = {PLACEMENT: spelled}
    if RATE in choice:
      values[RATE] = choice[RATE]
    return values

  def key_of(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes candidates equal: their layers, however they are spelled, and their rate."""
    return placement.parse(values[PLACEMENT], self.num_layers).layer_list, values.get(RATE)

  def layer_list(self, values: Mapping[str, Any]) -> str:
    return placement.parse(values[PLACEMENT], self.num_layers).layer_list

  @property
  def num_points(self) -> int:
    """Choices, those that don't add up among them; some may be the same table."""
    return math.prod(len(parameter.values) for parameter in self.choices)

  def points(self) -> Iterator[dict[str, Any]]:
    """All choices, in order."""
    names = [parameter.name for parameter in self.choices]
    for values in itertools.product(*(parameter.values for parameter in self.choices)):
      yield dict(zip(names, values, strict=True))

  @functools.cached_property
  def num_distinct(self) -> int | None:
    """How many different candidates there are; None where there are too many points to list."""
    if self.num_points > MOST_LISTED:
      return None
    found = set()
    for point in self.points():
      values = self.values_of(point)
      if values is not None:
        found.add(self.key_of(values))
    return len(found)


def make_space(content: Mapping[str, Any], base: Config) -> Space:
  """The space of a recipe's SEARCH.

  Args:
    content: `layers`, `segments` or `alpha`, and perhaps `arguments` and `learning_rates`.
    base: the config that every candidate starts from.

  Raises:
    InputError: the space is empty, counts can't add up, or names have different trees of parameters.
  """
  kinds = [kind for kind in KINDS if kind in content]
  if len(kinds) != 1:
    given = " and ".join(kinds) or "none of them"
    raise InputError(f"SEARCH: the space is given by one of {', '.join(KINDS)}, not by {given}")
  num_layers = base.model.num_layers
  kind, given = kinds[0], content[kinds[0]]
  arguments = _arguments(content.get("arguments", {}))
  if kind == "layers":
    choices, names, spell = _layers(given, num_layers)
  elif kind == "segments":
    choices, names, spell = _segments(given, num_layers)
  else:
    choices, names, spell = _alpha(given)
  unused = sorted(set(arguments) - set(names))
  if unused:
    raise InputError(f"SEARCH: arguments[{unused[0]!r}] belongs to no name of the space; it has {', '.join(names)}")
  choices += [Parameter(_argument_name(name), values, ordered=True) for name, values in arguments.items()]
  rates = content.get("learning_rates")
  if rates is not None:
    choices.append(Parameter(RATE, _numbers(rates, "learning_rates"), ordered=True))
  space = Space(num_layers, tuple(choices), _rows(names, arguments), spell)
  check_one_tree(space.rows, base)
  for rate in rates or ():
    if not config_lib.FIELDS[RATE].admits(rate):
      raise InputError(f"SEARCH: learning_rates has {rate!r}, which must be {config_lib.FIELDS[RATE].allowed()}")
  distinct = space.num_distinct
  if distinct is not None and distinct < 2:
    raise InputError(f"SEARCH: the space has {distinct} candidate; give more names, counts or rates to choose from")
  return space


def check_one_tree(placements: Sequence[str], base: Config) -> None:
  """Rejects placements whose models learn different things: they are not candidates of one program.

  Sublayers may have different numbers of norms; the tree has the most that any of them uses.

  Raises:
    InputError: naming the first two that differ, and a parameter that only one of them has.
  """
  first: tuple[str, set[str]] | None = None
  for spelled in placements:
    model = base.model.copy_and_resolve_references()
    model.placement = spelled
    table = config_lib.table(model)
    if any(row.vector_c_res for row in table.all_rows):
      raise InputError(f"SEARCH: {spelled!r} needs a profiling pass of its own, so it can't be trained with others")
    learned = {path for path, param in parameters(model).items() if not param.norm}
    if first is None:
      first = spelled, learned
      continue
    only = sorted(learned ^ first[1])
    if only:
      raise InputError(
        f"SEARCH: {first[0]!r} and {spelled!r} have different trees of parameters (only one of them has {only[0]}), so "
        "they are not one program; search each tree apart"
      )


# The kinds of spaces: parameters, the names that a layer may have, and how a choice is spelled.

Kind = tuple[list[Parameter], tuple[str, ...], Spell]


def _layers(given: Any, num_layers: int) -> Kind:
  names = _names(given, "layers")
  places = [f"layer_{number:02d}" for number in range(1, num_layers + 1)]

  def spell(choice: Choice) -> str:
    return spelled([_row(choice[place], choice) for place in places])

  return [Parameter(place, names) for place in places], names, spell


def _segments(given: Any, num_layers: int) -> Kind:
  choices: list[Parameter] = []
  all_names: list[str] = []
  all_counts: list[tuple[int, ...]] = []
  if not isinstance(given, (tuple, list)) or not given:
    raise InputError(
      f"SEARCH: segments={given!r} must be a list of {{'names': …, 'counts': …}}; it makes an empty space"
    )
  for number, segment in enumerate(given, start=1):
    where = f"segments[{number}]"
    if not isinstance(segment, Mapping) or set(segment) != {"names", "counts"}:
      raise InputError(f"SEARCH: {where} has names and counts, not {segment!r}")
    names = _names(segment["names"], f"{where}.names")
    counts = tuple(sorted(_numbers(segment["counts"], f"{where}.counts")))
    if any(type(count) is not int or count < 0 for count in counts):
      raise InputError(f"SEARCH: {where}.counts={counts} must be whole numbers of layers")
    choices.append(Parameter(f"segment_{number}", names))
    choices.append(Parameter(f"count_{number}", counts, ordered=True))
    all_names += names
    all_counts.append(counts)
  if num_layers not in _sums(all_counts):
    least, most = sum(map(min, all_counts)), sum(map(max, all_counts))
    raise InputError(
      f"SEARCH: no counts of segments add up to config.model.num_layers={num_layers}; their sums lie between {least} "
      f"and {most}"
    )

  def spell(choice: Choice) -> str | None:
    layers: list[str] = []
    for number in range(1, len(given) + 1):
      layers += [_row(choice[f"segment_{number}"], choice)] * choice[f"count_{number}"]
    return spelled(layers) if len(layers) == num_layers else None

  return choices, tuple(dict.fromkeys(all_names)), spell


def _alpha(given: Any) -> Kind:
  values = _numbers(given, "alpha")
  for value in values:
    if not 0 <= value <= 1:
      raise InputError(f"SEARCH: alpha has {value!r}; the fraction of Post-LN layers lies between 0 and 1")
  return [Parameter("alpha", values, ordered=True)], ("post", "pre"), lambda choice: f"mix:{choice['alpha']!r}"


def _sums(counts: Sequence[Sequence[int]]) -> set[int]:
  """All sums of one number of each."""
  sums = {0}
  for some in counts:
    sums = {total + count for total in sums for count in some}
  return sums


def spelled(layers: Sequence[str]) -> str:
  """The placement with these layers: `post*3,pre*9`, or the name alone where all are the same.

  A count stands before the modifiers of its name: `post*3+gpas`.
  """
  segments = [(name, len(list(same))) for name, same in itertools.groupby(layers)]
  if len(segments) == 1:
    return segments[0][0]
  words = []
  for name, count in segments:
    row, plus, modifiers = name.partition("+")
    words.append(name if count == 1 else f"{row}*{count}{plus}{modifiers}")
  return ",".join(words)


# Arguments: one value for all rows of a name.


def _argument_name(name: str) -> str:
  return f"argument_{name}"


def _arguments(given: Any) -> dict[str, tuple[Any, ...]]:
  if not isinstance(given, Mapping):
    raise InputError(f"SEARCH: arguments={given!r} must be a mapping, as {{'lns': (0.25, 0.5)}}")
  arguments = {}
  for name, values in given.items():
    if name not in placement.ROWS or not placement.ROWS[name].arguments:
      raise InputError(f"SEARCH: arguments[{name!r}]: there is no placement of this name that takes an argument")
    arguments[name] = _numbers(values, f"arguments[{name!r}]")
  return arguments


def _rows(names: Sequence[str], arguments: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
  """Every name with each of its arguments."""
  rows = []
  for name in names:
    rows += [f"{name}:{value!r}" for value in arguments[name]] if name in arguments else [name]
  return tuple(rows)


def _row(name: str, choice: Choice) -> str:
  """A name with the argument that was chosen for it, if one was."""
  argument = choice.get(_argument_name(name))
  return name if argument is None else f"{name}:{argument!r}"


def _names(given: Any, where: str) -> tuple[str, ...]:
  if isinstance(given, str) or not isinstance(given, (tuple, list)) or not given:
    raise InputError(f"SEARCH: {where}={given!r} must be a list of names of placements; it makes an empty space")
  for name in given:
    if not isinstance(name, str) or name.split(":")[0] == placement.MIX or {",", "*"} & set(name):
      raise InputError(f"SEARCH: {where} has {name!r}, which is not the name of a layer's row, as 'post' or 'lns:0.25'")
    placement.parse(name, 1)
  return _each_once(given, where)


def _numbers(given: Any, where: str) -> tuple[Any, ...]:
  if isinstance(given, str) or not isinstance(given, (tuple, list, range)) or not len(given):
    raise InputError(f"SEARCH: {where}={given!r} must be a list of numbers; it makes an empty space")
  for value in given:
    if type(value) not in (int, float) or not math.isfinite(value):
      raise InputError(f"SEARCH: {where} has {value!r}, which is not a finite number")
  return _each_once(given, where)


def _each_once(given: Sequence[Any], where: str) -> tuple[Any, ...]:
  for number, value in enumerate(given):
    if value in given[:number]:
      raise InputError(f"SEARCH: {where} has {value!r} twice")
  return tuple(given)

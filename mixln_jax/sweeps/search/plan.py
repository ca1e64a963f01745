"""What a search is: a space, how many candidates of it are tried, for how long, and what is tried again at the end."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixln_jax import config as config_lib
from mixln_jax import placement, recipes
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.files import OBJECT, read_json, write_whole
from mixln_jax.sweeps.joint import check_keeps_two
from mixln_jax.sweeps.search.space import KINDS, Space, check_one_tree, make_space
from mixln_jax.text import shown
from mixln_jax.training.derived import with_derived

SEARCH_FILE = "search.json"
SAMPLERS = ("tpe", "nsga2", "random")
FREE = ("title", "question", "winners", "seeds", "baselines")  # may change: they decide nothing of what was trained
DEFAULTS: Mapping[str, Any] = {
  "title": "",
  "question": "",
  "sampler": "tpe",
  "sampler_seed": 0,
  "eta": 4,
  "winners": 4,
  "seeds": (1, 2, 3),
  "baselines": ("pre", "post", "mix:0.25"),
}
OF_SPACE = (*KINDS, "arguments", "learning_rates")
NEEDED = ("candidates", "group", "rungs")


@dataclasses.dataclass(frozen=True)
class Rung:
  """A stretch of training after which some of the candidates are given up.

  Attributes:
    number: from 1.
    start, end: steps; candidates are trained from one to the other.
    size: candidates that are trained in it.
  """

  number: int
  start: int
  end: int
  size: int


@dataclasses.dataclass(frozen=True)
class Search:
  """A search, checked.

  Attributes:
    base: the config that every candidate starts from.
    space: what is chosen.
    content: SEARCH as it was given, with defaults filled in: what search.json holds.
    sampler: one of SAMPLERS.
    sampler_seed: what candidates are drawn with, beside the number of the trial.
    candidates: different ones that are trained in the first rung.
    group: R, candidates that are trained at once.
    rungs: their last steps.
    eta: one of so many candidates goes on to the next rung.
    winners: candidates that are tried again with fresh seeds.
    seeds: those seeds.
    baselines: placements that are tried beside them.
  """

  base: Config
  space: Space
  content: Mapping[str, Any]
  title: str
  question: str
  sampler: str
  sampler_seed: int
  candidates: int
  group: int
  rungs: tuple[int, ...]
  eta: int
  winners: int
  seeds: tuple[int, ...]
  baselines: tuple[str, ...]

  @property
  def tries_all(self) -> bool:
    """Whether the space has no more candidates than are tried: then nothing is drawn."""
    return self.space.num_distinct == self.candidates

  def ladder(self) -> list[Rung]:
    """The rungs, the first one first."""
    ladder = []
    start, size = 0, self.candidates
    for number, end in enumerate(self.rungs, start=1):
      ladder.append(Rung(number, start, end, size))
      start, size = end, max(1, size // self.eta)
    return ladder

  @property
  def rates(self) -> tuple[float, ...]:
    """The learning rates of the grid; that of the base where none is searched."""
    return tuple(self.content.get("learning_rates") or (self.base.optimizer.learning_rate,))

  def to_json(self) -> str:
    """What search.json holds."""
    return json.dumps({**self.content, "base": config_lib.flatten(self.base)}, indent=1) + "\n"


def load_search(recipe: str, base: Config) -> Search:
  """The search that a recipe defines beside its `get_config`, as `SEARCH = {"layers": …, "candidates": 64, …}`.

  Raises:
    InputError: the recipe defines no search, or an invalid one.
  """
  content = recipes.run(recipe).get("SEARCH")
  if not isinstance(content, Mapping):
    raise InputError(f"config={recipe}: defines no SEARCH; see docs/placement_search.md for what it has")
  return make_search(base, content)


def make_search(base: Config, content: Mapping[str, Any]) -> Search:
  """A checked search.

  Args:
    base: the config that every candidate starts from.
    content: SEARCH of a recipe.

  Raises:
    InputError: a field is unknown, missing or invalid.
  """
  unknown = sorted(set(content) - {*DEFAULTS, *OF_SPACE, *NEEDED})
  missing = [name for name in NEEDED if name not in content]
  if unknown or missing:
    wrong = f"has no {missing[0]}" if missing else f"has {unknown[0]!r}, which is none of its fields"
    raise InputError(f"SEARCH: {wrong}; the fields are {', '.join([*NEEDED, *OF_SPACE, *DEFAULTS])}")
  content = {**DEFAULTS, **content}
  for name in ("title", "question"):
    if not isinstance(content[name], str):
      raise InputError(f"SEARCH: {name}={shown(content[name])} must be text")
  base = with_derived(base)
  config_lib.validate(base)
  search = Search(
    base=base,
    space=make_space(content, base),
    content=json.loads(json.dumps(content, default=list)),  # as it is after JSON, which has lists alone
    title=content["title"],
    question=content["question"],
    sampler=content["sampler"],
    sampler_seed=_whole(content, "sampler_seed", 0),
    candidates=_whole(content, "candidates", 2),
    group=_whole(content, "group", 1),
    rungs=_steps(content["rungs"], base),
    eta=_whole(content, "eta", 2),
    winners=_whole(content, "winners", 1),
    seeds=_seeds(content["seeds"], base),
    baselines=_baselines(content["baselines"], base.model.num_layers),
  )
  if search.sampler not in SAMPLERS:
    raise InputError(f"SEARCH: sampler={search.sampler!r} must be one of {', '.join(SAMPLERS)}")
  most = search.space.num_points if search.space.num_distinct is None else search.space.num_distinct
  if search.candidates > most:
    raise InputError(f"SEARCH: candidates={search.candidates}, but the space has {most}; set it to at most that")
  if search.group > search.candidates:
    raise InputError(f"SEARCH: group={search.group} is more than candidates={search.candidates}; lower it")
  check_keeps_two(base)
  check_one_tree([*search.space.rows, *search.baselines], base)
  return search


def _whole(content: Mapping[str, Any], name: str, least: int) -> int:
  value = content[name]
  if type(value) is not int or not least <= value < 2**31:
    raise InputError(f"SEARCH: {name}={shown(value)} must be a whole number, at least {least}")
  return value


def _steps(given: Any, base: Config) -> tuple[int, ...]:
  """The last steps of the rungs."""
  if not isinstance(given, (tuple, list)) or not given or any(type(step) is not int for step in given):
    raise InputError(f"SEARCH: rungs={shown(given)} must be the last step of each rung, as in (100, 300, 900)")
  start = 0
  for number, end in enumerate(given, start=1):
    if end <= start:
      raise InputError(
        f"SEARCH: rungs={tuple(given)}: rung {number} has {end - start} steps, from {start} to {end}; each must end "
        "after the one before"
      )
    start = end
  if given[-1] != base.train.num_steps:
    raise InputError(
      f"SEARCH: rungs={tuple(given)} end at step {given[-1]}, but config.train.num_steps={base.train.num_steps}; the "
      "last rung ends with the run, whose schedule of the learning rate all candidates have"
    )
  return tuple(given)


def _baselines(given: Any, num_layers: int) -> tuple[str, ...]:
  """The placements of the finals, each once."""
  if not isinstance(given, (tuple, list)) or not all(isinstance(name, str) for name in given):
    raise InputError(f"SEARCH: baselines={shown(given)} must be a list of placements, as ('pre', 'mix:0.25')")
  for number, name in enumerate(given):
    placement.parse(name, num_layers)
    if name in given[:number]:
      raise InputError(f"SEARCH: baselines has {name!r} twice")
  return tuple(given)


def _seeds(given: Any, base: Config) -> tuple[int, ...]:
  if not isinstance(given, (tuple, list)) or not given or any(type(seed) is not int for seed in given):
    raise InputError(f"SEARCH: seeds={shown(given)} must be whole numbers, as in (1, 2, 3)")
  if len(set(given)) < len(given):
    raise InputError(f"SEARCH: seeds={tuple(given)} has one twice")
  for name, of_search in (("seed", base.seed), ("data.seed", base.data.seed)):
    field = config_lib.FIELDS[name]
    for seed in given:
      if not field.admits(seed):
        raise InputError(f"SEARCH: seeds has {seed}, and config.{name} must be {field.allowed()}")
    if of_search in given:
      raise InputError(
        f"SEARCH: seeds={tuple(given)} has {of_search}, which is config.{name}, so the search itself saw it; give "
        "fresh ones"
      )
  return tuple(given)


def open_search(search: Search, folder: Path) -> None:
  """Makes the folder of a search, or checks that the one there holds the same search.

  Raises:
    InputError: it holds something else, or a search that differs in what was trained; nothing was changed.
  """
  path = folder / SEARCH_FILE
  if path.exists():
    check_same(search, read_json(path, {"base": OBJECT}), folder)
  write_whole(path, search.to_json())


def check_same(search: Search, old: Mapping[str, Any], folder: Path) -> None:
  """Rejects a search that is not the one that the folder holds; raises InputError naming each field that differs."""
  wrong = []
  for name in dict.fromkeys((*search.content, *old)):
    default = json.loads(json.dumps(DEFAULTS.get(name)))
    there, here = old.get(name, default), search.content.get(name, default)
    if name not in FREE and name != "base" and there != here:
      wrong.append(f"SEARCH.{name}: {shown(there, 60)} there, {shown(here, 60)} now")
  for field, there, here in config_lib.refused_differences(old["base"], search.base):
    wrong.append(f"config.{field}: {there!r} there, {here!r} now")
  if wrong:
    raise InputError(
      f"workdir={folder} holds another search: {'; '.join(wrong)}; a search can't change under its candidates: use "
      "another workdir"
    )


def uniform(names: Sequence[str], num_layers: int) -> list[Any]:
  """The table of each name as a whole placement: together they have every row of each layer."""
  return [placement.parse(name, num_layers) for name in names]

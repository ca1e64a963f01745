"""What a study is: a base config, axes, the runs that they make, and whether those are comparable."""

import itertools
import json
import re
import runpy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.files import COUNT, NUMBERS, TEXT, check_kinds, json_object, local_path
from mixln_jax.model.parameters import parameters
from mixln_jax.runs.facts import read_config
from mixln_jax.runs.folder import INITIAL_WEIGHTS, RunFolder
from mixln_jax.text import integer_of

STUDY_PLACE = "a study lies in a folder, which several machines can share over a network file system"

STUDY, RUNS = "study.json", "runs"
NAMED_BY_VALUE = {"model.placement": ""}  # fields whose value alone names them

Grid = Mapping[str, Sequence[Any]]  # field -> its values; a grid is their product


class Run(NamedTuple):
  """One run of a study."""

  name: str
  values: dict[str, Any]  # of the axes
  config: Config
  folder: RunFolder


class Study(NamedTuple):
  """A base config, the grids whose runs it has, and what it is to decide.

  Attributes:
    base: the config that every run starts from.
    grids: each the product of its axes; a study is all their runs, each once.
    question: what it is to decide, in words.
    title: what its report is called; by default its axes.
    claims: what will be judged, `{"id", "claim", "judged_by"}` each, written down before it runs.
  """

  base: Config
  grids: tuple[Grid, ...]
  question: str = ""
  claims: tuple[Mapping[str, str], ...] = ()
  title: str = ""

  @property
  def axes(self) -> dict[str, list[Any]]:
    """Every field that runs may differ in, with all its values, in the order in which the grids name them."""
    axes: dict[str, list[Any]] = {}
    for grid in self.grids:
      for field, values in grid.items():
        known = axes.setdefault(field, [])
        known += [value for value in values if value not in known]
    return axes

  def runs(self, workdir: str | Path) -> list[Run]:
    """All runs, those of the first grid first; an axis that a grid does not name keeps the base's value.

    Raises:
      InputError: a config is invalid, or two runs would share a name.
    """
    folder = local_path(workdir, "workdir", STUDY_PLACE)
    flat, fields = config_lib.flatten(self.base), sorted(self.axes, key=_order)
    runs: dict[str, Run] = {}
    for values in self._points():
      values = {field: values.get(field, flat[field]) for field in fields}
      name = run_name(values)
      config = config_lib.from_flat(flat | values | dict.fromkeys(("mesh.run", "mesh.dcn_run"), 1))
      config_lib.validate(config)
      run = Run(name, values, config, RunFolder(folder / RUNS / name))
      if name in runs and runs[name].values != values:
        raise InputError(
          f"the runs {runs[name].values} and {values} would share the folder {name!r}; spell one otherwise"
        )
      runs.setdefault(name, run)
    return list(runs.values())

  def _points(self) -> Iterator[dict[str, Any]]:
    for grid in self.grids:
      for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))

  def to_json(self, runs: Iterable[Run]) -> str:
    """What `study.json` holds."""
    value = {
      "title": self.title,
      "question": self.question,
      "claims": [dict(claim) for claim in self.claims],
      "axes": self.axes,
      "base": config_lib.flatten(self.base),
      "runs": [{"name": run.name, "values": run.values} for run in runs],
    }
    return json.dumps(value, indent=1) + "\n"


def _order(field: str) -> tuple[bool, int]:
  """The order of fields in names: that of the config, seeds last."""
  return field.split(".")[-1] == "seed", list(config_lib.FIELDS).index(field)


def run_name(values: Mapping[str, Any]) -> str:
  """A folder's name of a run's values: `mix_0.25-learning_rate0.003-seed0`."""
  parts = [NAMED_BY_VALUE.get(field, field.split(".")[-1]) + str(value) for field, value in values.items()]
  return re.sub(r"[^\w.+-]", "_", "-".join(parts)) or "base"


def make_study(
  base: Config,
  grids: Sequence[Grid],
  question: str = "",
  claims: Sequence[Mapping[str, str]] = (),
  title: str = "",
) -> Study:
  """A checked study.

  Raises:
    InputError: an axis is no field, has no value, a value twice, or one that the field does not admit.
  """
  for field, values in itertools.chain.from_iterable(grid.items() for grid in grids):
    if field not in config_lib.FIELDS:
      raise config_lib.unknown_field(field)
    if not values:
      raise InputError(f"axis {field}: no values; give one or more")
    for number, value in enumerate(values):
      if not config_lib.FIELDS[field].admits(value):
        raise InputError(f"axis {field}: {value!r} must be {config_lib.FIELDS[field].allowed()}")
      if value in values[:number]:
        raise InputError(f"axis {field}: {value!r} stands there twice; each value makes one run")
  return Study(base, tuple(grids), question, tuple(claims), title)


def load_study(recipe: str, base: Config) -> Study:
  """The study that a recipe defines beside its `get_config`, as `STUDY = {"grids": [...], "title": …, …}`.

  Args:
    recipe: path of the recipe.
    base: its config, overrides applied.

  Raises:
    InputError: the recipe defines no study, or an invalid one.
  """
  content = runpy.run_path(recipe).get("STUDY")
  if content is None:
    raise InputError(f"config={recipe}: defines no STUDY; give axes, as in 'model.placement=pre mix:0.25'")
  unknown = set(content) - {"grids", "title", "question", "claims"}
  if unknown or not content.get("grids"):
    raise InputError(
      f"config={recipe}: STUDY has grids, title, question and claims, not {', '.join(unknown) or 'no grids'}"
    )
  return make_study(base, **content)


def parse_axes(axes: Sequence[str]) -> Grid:
  """The grid of `FIELD=VALUE VALUE …`, one string an axis; a field without its section where it is the only one.

  Raises:
    InputError: an axis can't be read.
  """
  grid: dict[str, Sequence[Any]] = {}
  for axis in axes:
    field, equals, text = axis.partition("=")
    matches = [name for name in config_lib.FIELDS if name.split(".")[-1] == field]
    if field not in config_lib.FIELDS and len(matches) == 1:
      field = matches[0]
    if not equals or field not in config_lib.FIELDS:
      raise config_lib.unknown_field(field) if equals else InputError(f"axes={axis!r}: write FIELD=VALUE VALUE …")
    if field in grid:
      raise InputError(f"axes={axis!r}: config.{field} is an axis already; give all its values at once")
    grid[field] = [_parse(field, word) for word in text.split()]
  return grid


def _parse(field: str, word: str) -> Any:
  """A value of a field's type."""
  default = config_lib.FIELDS[field].default
  if isinstance(default, bool):
    choices = {"true": True, "false": False}
    if word.lower() not in choices:
      raise InputError(f"axis {field}: {word!r} must be true or false")
    return choices[word.lower()]
  try:
    whole = integer_of(word) if isinstance(default, int) else None
    return type(default)(word) if whole is None else whole
  except ValueError as error:
    raise InputError(f"axis {field}: {word!r} must be {config_lib.FIELDS[field].allowed()}") from error


def check_comparable(runs: Sequence[Run]) -> None:
  """Refuses runs that are there already and differ from what the study means in more than how they are computed.

  Raises:
    InputError: naming each run and each field.
  """
  wrong = []
  for run in runs:
    if not run.folder.has_run:
      continue
    wrong += [
      f"{run.name}: config.{field} is {there!r}, the study has {here!r}"
      for field, there, here in config_lib.differences(read_config(run.folder), run.config)
      if config_lib.FIELDS[field].on_resume != config_lib.FREE
    ]
  if wrong:
    raise InputError(
      "runs of one study may differ only in its axes: "
      + "; ".join(wrong)
      + "; use another workdir, or remove those runs"
    )


def _drawn(run: Run) -> dict[str, Any]:
  """The tensors of a run that are drawn, by name."""
  return {name: param for name, param in parameters(run.config.model).items() if param.drawn}


def check_initial_weights(runs: Sequence[Run]) -> dict[str, str]:
  """Checks that runs which should start from the same numbers did; returns the hash of each run that has started.

  Two runs have a tensor in common where seed, shape and std are the same; its exact sum of bits must then be too.

  Raises:
    InputError: naming the runs and the tensor.
  """
  hashes: dict[str, str] = {}
  seen: dict[tuple[Any, ...], tuple[str, int]] = {}
  for run in runs:
    if not (run.folder / INITIAL_WEIGHTS).exists():
      continue
    where = f"{run.folder.address}/{INITIAL_WEIGHTS}"
    facts = json_object(run.folder.read(INITIAL_WEIGHTS), where, {"hash": TEXT, "bit_sums": NUMBERS})
    check_kinds(facts["bit_sums"], f"{where}: bit_sums", dict.fromkeys(_drawn(run), COUNT))
    hashes[run.name] = facts["hash"]
    for tensor, param in _drawn(run).items():
      same = (tensor, run.config.seed, param.logical_shape, str(param.std), run.config.model.param_dtype)
      other, total = seen.setdefault(same, (run.name, facts["bit_sums"][tensor]))
      if total != facts["bit_sums"][tensor]:
        raise InputError(
          f"{other} and {run.name} should start from the same {tensor}, but its bits differ; they were made "
          "by different versions or on different platforms: remove one and run it again"
        )
  return hashes

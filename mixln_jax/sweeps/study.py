"""What a study is: a base config, axes, the runs that they make, and whether those are comparable."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax import config as config_lib
from mixln_jax import recipes
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.files import COUNT, NUMBERS, TEXT, check_kinds, json_object, local_path
from mixln_jax.model.parameters import parameters
from mixln_jax.runs.facts import read_config
from mixln_jax.runs.folder import INITIAL_WEIGHTS, RunFolder
from mixln_jax.sweeps.stages import KEYS, Families, Near, Stage, Tried, check_stages, fields_of
from mixln_jax.text import integer_of
from mixln_jax.track import check_claims
from mixln_jax.training.derived import with_derived

STUDY_PLACE = "a study lies in a folder, which several machines can share over a network file system"

STUDY, RUNS = "study.json", "runs"
NAMED_BY_VALUE = {"model.placement": ""}  # fields whose value alone names them
LONGEST_NAME = 200  # bytes of a folder's name

# An axis is a field and its values, or fields that move together (a tuple of them, or one string with TOGETHER between)
# and their values together. A grid is the product of its axes.
Grid = Mapping[Any, Sequence[Any]]
TOGETHER = ";"


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
    then: what is run where all of that is done, stage by stage.
  """

  base: Config
  grids: tuple[Grid, ...]
  question: str = ""
  claims: tuple[Mapping[str, str], ...] = ()
  title: str = ""
  then: tuple[Stage, ...] = ()

  @property
  def axes(self) -> dict[str, list[Any]]:
    """Every field that runs may differ in, with all its values, in the order in which the grids name them."""
    axes: dict[str, list[Any]] = {}
    widened = [{(stage.best,): [(value,) for value in stage.widen]} for stage in self.then if stage.widen]
    for grid in (*self.grids, *(stage.grid for stage in self.then), *widened):
      for fields, points in grid.items():
        for field, values in zip(fields, zip(*points, strict=True), strict=True):
          known = axes.setdefault(field, [])
          for value in values:
            if value not in known:
              known.append(value)
    return axes

  def runs(self, workdir: str | Path) -> list[Run]:
    """All runs, those of the first grid first; an axis that a grid does not name keeps the base's value.

    Raises:
      InputError: a config is invalid, or two runs would share a name.
    """
    return [self.run_of(name, values, workdir) for name, values in self.planned().items()]

  def run_of(self, name: str, values: Mapping[str, Any], workdir: str | Path) -> Run:
    """One of the planned runs; raises InputError where its config is invalid."""
    folder = local_path(workdir, "workdir", STUDY_PLACE)
    flat = config_lib.flatten(self.base) | dict(values) | dict.fromkeys(("mesh.run", "mesh.dcn_run"), 1)
    config = with_derived(config_lib.from_flat(flat))
    config_lib.validate(config)
    return Run(name, dict(values), config, RunFolder(folder / RUNS / name))

  def planned(self) -> dict[str, dict[str, Any]]:
    """The name of each run and its values on the axes; a config of each, which takes milliseconds, is not made.

    Raises:
      InputError: two runs would share a name.
    """
    flat, fields = config_lib.flatten(self.base), sorted(self.axes, key=_order)
    planned: dict[str, dict[str, Any]] = {}
    for values in self._points():
      values = {field: values.get(field, flat[field]) for field in fields}
      name = run_name(values)
      if planned.setdefault(name, values) != values:
        raise InputError(f"the runs {planned[name]} and {values} would share the folder {name!r}; spell one otherwise")
    return planned

  def _points(self) -> Iterator[dict[str, Any]]:
    for grid in self.grids:
      for points in itertools.product(*grid.values()):
        fields = itertools.chain.from_iterable(grid)
        yield dict(zip(fields, itertools.chain.from_iterable(points), strict=True))

  def with_stages(self, losses: Mapping[str, float]) -> "Study":
    """The study with the runs of each stage before which every run is done.

    Args:
      losses: final loss of each run that is done, by name; one that is not finite is never the best.
    """
    varied = set(itertools.chain.from_iterable(fields_of(stage.grid) for stage in self.then))
    study = chosen_among = self
    for stage in self.then:
      while True:
        planned = study.planned()
        if any(name not in losses for name in planned):
          return study
        done = [Tried(values, losses[name]) for name, values in planned.items()]
        tried = [Tried(values, losses[name]) for name, values in chosen_among.planned().items()]
        grids = tuple(Families(stage.best, varied, tried, done).grids(stage))
        study = study._replace(grids=(*study.grids, *grids))
        if not stage.widen or not grids:
          break
        chosen_among = chosen_among._replace(grids=(*chosen_among.grids, *grids))
    return study

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
  name = re.sub(r"[^\w.+-]", "_", "-".join(parts)) or "base"
  if len(name.encode()) <= LONGEST_NAME:
    return name
  rest = "-".join(parts[1:])  # placements of deep models can be longer than a file system's names
  digest = hashlib.sha256(name.encode()).hexdigest()[:12]
  return re.sub(r"[^\w.+-]", "_", f"{parts[0][:100]}-{digest}-{rest[-60:]}")


def make_study(
  base: Config,
  grids: Sequence[Grid],
  question: str = "",
  claims: Sequence[Mapping[str, str]] = (),
  then: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
  title: str = "",
) -> Study:
  """A checked study.

  Args:
    base: the config that every run starts from.
    grids: each a mapping of axes, as `Grid` says.
    question: what it is to decide.
    claims: what will be judged.
    then: a stage, `{"best": FIELD, "grid": GRID}`, or several: once all earlier runs are done, those of the grid at the
      value of FIELD with the lowest final loss, for all else that was varied. `stages.Stage` has the other keys.

  Raises:
    InputError: an axis is no field, has no value, a value twice, or one that the field does not admit.
  """
  together = tuple(_grid(grid) for grid in grids)
  stages = tuple(_stage(stage) for stage in ([then] if isinstance(then, Mapping) else then))
  check_stages(stages, together)
  check_claims(claims, "STUDY")
  return Study(base, together, question, tuple(claims), title, stages)


def _stage(content: Mapping[str, Any]) -> Stage:
  """A stage as a recipe writes it, checked as far as it can be alone."""
  unknown = set(content) - set(KEYS)
  if unknown or "best" not in content:
    wrong = ", ".join(unknown) or "no best"
    raise InputError(f"STUDY: a stage of 'then' has {', '.join(KEYS)}, not {wrong}")
  near = content.get("near")
  if near is not None and set(near) != set(Near._fields):
    raise InputError(f"STUDY: then.near has {', '.join(Near._fields)}, not {', '.join(near) or 'nothing'}")
  return Stage(
    str(content["best"]),
    _grid(content.get("grid", {})),
    tuple(content.get("widen", ())),
    {str(field): tuple(values) for field, values in content.get("only", {}).items()},
    None if near is None else Near(**near),
  )


def _grid(grid: Grid) -> Grid:
  """A checked grid whose axes all are tuples of fields, and their values tuples."""
  checked: dict[tuple[str, ...], tuple[tuple[Any, ...], ...]] = {}
  for axis, values in grid.items():
    fields = _fields_of(axis)
    points = tuple(values) if _moves_together(axis) else tuple((value,) for value in values)
    name = TOGETHER.join(fields)
    if known := set(fields) & set(itertools.chain.from_iterable(checked)):
      raise InputError(f"axis {name}: config.{known.pop()} is an axis already; give all its values at once")
    if not points:
      raise InputError(f"axis {name}: no values; give one or more")
    for number, point in enumerate(points):
      _check_point(fields, point)
      if point in points[:number]:
        shown = point if len(point) > 1 else point[0]
        raise InputError(f"axis {name}: {shown!r} stands there twice; each value makes one run")
    checked[fields] = tuple(tuple(point) for point in points)
  return checked


def _moves_together(axis: str | Sequence[str]) -> bool:
  return not isinstance(axis, str) or TOGETHER in axis


def _fields_of(axis: str | Sequence[str]) -> tuple[str, ...]:
  """The fields of an axis; raises InputError for one that is none, or stands there twice."""
  fields = tuple(axis.split(TOGETHER)) if isinstance(axis, str) else tuple(axis)
  for field in fields:
    if field not in config_lib.FIELDS:
      raise config_lib.unknown_field(field)
  if len(set(fields)) < len(fields) or not fields:
    raise InputError(f"axis {TOGETHER.join(fields)}: a field stands there twice; each moves once")
  return fields


def _check_point(fields: tuple[str, ...], point: Any) -> None:
  if not isinstance(point, (tuple, list)) or len(point) != len(fields):
    name, number = TOGETHER.join(fields), len(fields)
    raise InputError(f"axis {name}: {point!r} must have a value for each of the {number} fields that move together")
  for field, value in zip(fields, point, strict=True):
    if not config_lib.FIELDS[field].admits(value):
      raise InputError(f"axis {field}: {value!r} must be {config_lib.FIELDS[field].allowed()}")


def load_study(recipe: str, base: Config) -> Study:
  """The study that a recipe defines beside its `get_config`, as `STUDY = {"grids": [...], "title": …, …}`.

  Args:
    recipe: path of the recipe.
    base: its config, overrides applied.

  Raises:
    InputError: the recipe defines no study, or an invalid one.
  """
  content = recipes.run(recipe).get("STUDY")
  if content is None:
    raise InputError(f"config={recipe}: defines no STUDY; give axes, as in 'model.placement=pre mix:0.25'")
  unknown = set(content) - {"grids", "title", "question", "claims", "then"}
  if unknown or not content.get("grids"):
    wrong = ", ".join(unknown) or "no grids"
    raise InputError(f"config={recipe}: STUDY has grids, title, question, claims and then, not {wrong}")
  return make_study(base, **content)


def parse_axes(axes: Sequence[str]) -> Grid:
  """The grid of `FIELD=VALUE VALUE …`, one string an axis; a field without its section where it is the only one.

  Fields that move together stand together, and so do their values: `num_layers;embed_dim=8;128 16;96`.

  Raises:
    InputError: an axis can't be read.
  """
  grid: dict[tuple[str, ...], Sequence[Any]] = {}
  for axis in axes:
    names, equals, text = axis.partition("=")
    if not equals:
      raise InputError(f"axes={axis!r}: write FIELD=VALUE VALUE …, or FIELD;FIELD=VALUE;VALUE VALUE;VALUE …")
    fields = tuple(_whole_name(name.strip()) for name in names.split(TOGETHER))
    for field in fields:
      if any(field in others for others in grid):
        raise InputError(f"axes={axis!r}: config.{field} is an axis already; give all its values at once")
    points = []
    for word in text.split():
      parts = word.split(TOGETHER) if len(fields) > 1 else [word]
      if len(parts) != len(fields):
        raise InputError(
          f"axes={axis!r}: {word!r} must have a value for each of the {len(fields)} fields, with {TOGETHER!r} between"
        )
      points.append(tuple(_parse(field, part) for field, part in zip(fields, parts, strict=True)))
    grid[fields] = points
  return grid


def _whole_name(name: str) -> str:
  """A field's name with its section."""
  matches = [field for field in config_lib.FIELDS if field.split(".")[-1] == name]
  if name not in config_lib.FIELDS and len(matches) == 1:
    return matches[0]
  if name not in config_lib.FIELDS:
    raise config_lib.unknown_field(name)
  return name


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

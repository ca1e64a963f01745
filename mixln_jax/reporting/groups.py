"""Which runs belong together: a group is runs that differ only in their seeds."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mixln_jax.config import FIELDS, FREE
from mixln_jax.reporting.loading import Material, ReportedRun
from mixln_jax.reporting.panels import Style

PLACEMENT_FIELD, LEARNING_RATE_FIELD = "model.placement", "optimizer.learning_rate"
SEED_FIELDS = ("seed", "data.seed")
TELLING_FIELDS = ("data.source", "model.num_layers", "train.num_steps")  # these name a setting where any field would
START_FIELDS = ("train.start_from", "train.start_checkpoint")  # the run that a fine-tuned run starts from
SHORT_NAMES = {
  LEARNING_RATE_FIELD: "lr",
  "model.num_layers": "layers",
  "train.num_steps": "steps",
  "optimizer.name": "optimizer",
}
ABSENT = "absent"

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ only in their seeds.

  Attributes:
    label: unique in the report, and as short as it can be: see `named_fields`.
    placement: their placement.
    setting: the other fields in which the report's groups differ, with this group's values.
    runs: indices into the report's runs.
    style: how they are drawn.
    named: the fields of the setting that its label names.
  """

  label: str
  placement: str
  setting: Mapping[str, Any]
  runs: Sequence[int]
  style: Style
  named: Sequence[str] = ()

  def setting_but(self, without: str) -> dict[str, Any]:
    """The setting without one field."""
    return {field: value for field, value in self.setting.items() if field != without}

  def label_but(self, without: str) -> str:
    """The label without one field: what groups that differ only in it have in common."""
    named = {field: self.setting[field] for field in self.named if field != without}
    return ", ".join([self.placement, *words(named)])


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
  """The items by their key, in the order in which the keys first occur."""
  groups: dict[Key, list[Item]] = {}
  for item in items:
    groups.setdefault(key(item), []).append(item)
  return groups


def seeds_of(run: ReportedRun) -> tuple[Any, ...]:
  """Runs of two groups with equal seeds are a pair: the same initial numbers, the same order of samples."""
  return tuple(value_of(run, field) for field in SEED_FIELDS)


def value_of(run: ReportedRun, field: str) -> Any:
  """A field's value in a run's config, or `absent`. It can be hashed, also where another version stored a list."""
  value = run.config.get(field, ABSENT)
  return value if isinstance(value, (str, int, float, bool)) else repr(value)


def differing_fields(runs: Sequence[ReportedRun]) -> list[str]:
  """Config fields that are not the same in all runs, in the order of FIELDS, then those that this version lacks."""
  unknown = {field for run in runs for field in run.config if field not in FIELDS}
  differing = []
  for field in (*FIELDS, *sorted(unknown)):
    if len({value_of(run, field) for run in runs}) > 1:
      differing.append(field)
  return differing


def changes_the_run(field: str) -> bool:
  """Whether a field decides what is computed. The others change how it is computed, or how often it is looked at."""
  return field not in FIELDS or FIELDS[field].on_resume != FREE


def starts_follow_placements(runs: Sequence[ReportedRun]) -> bool:
  """Whether all runs are tuned from other runs, one for each placement and seed: which one is then no setting."""
  if not all(run.config.get(START_FIELDS[0]) for run in runs):
    return False
  starts: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
  for run in runs:
    start = tuple(value_of(run, field) for field in START_FIELDS)
    starts.setdefault((run.placement, *seeds_of(run)), set()).add(start)
  return all(len(of_one) == 1 for of_one in starts.values())


def show(value: Any) -> str:
  """A config value for a person."""
  return f"{value:g}" if isinstance(value, float) else str(value)


def sort_key(value: Any) -> tuple[bool, Any]:
  """Sorts numbers by size, then text."""
  return (False, value) if isinstance(value, (int, float)) else (True, str(value))


def sort_keys(values: Iterable[Any]) -> tuple[tuple[bool, Any], ...]:
  """Sorts tuples of such values."""
  return tuple(sort_key(value) for value in values)


def make_groups(material: Material) -> list[Group]:
  """The groups of a report.

  Placements come in the order of the study, else from `pre` over mixtures to `post` and then all others; the settings
  of one placement are sorted, that of a study's base first where labels name what differs from it.
  """
  runs = material.runs
  no_setting = {PLACEMENT_FIELD, *SEED_FIELDS}
  if starts_follow_placements(runs):
    no_setting.update(START_FIELDS)
  fields = [field for field in differing_fields(runs) if changes_the_run(field) and field not in no_setting]

  def setting_of(run: ReportedRun) -> tuple[Any, ...]:
    return tuple(value_of(run, field) for field in fields)

  placements = _ordered_placements(material)
  settings = sorted({setting_of(run) for run in runs}, key=sort_keys)
  named = named_fields(fields, settings, material.study.axes if material.study else ())
  by_field = {values: dict(zip(fields, values, strict=True)) for values in settings}
  usual = _usual_values(material, named, list(by_field.values()))

  def changes_base(values: tuple[Any, ...]) -> bool:
    return any(by_field[values][field] != value for field, value in usual.items())

  settings.sort(key=changes_base)
  members = grouped(range(len(runs)), lambda index: (runs[index].placement, setting_of(runs[index])))
  groups = []
  for kind, placement in enumerate(placements):
    for variant, values in enumerate(settings):
      if (placement, values) in members:
        setting = by_field[values]
        told = [field for field in named if field not in usual or setting[field] != usual[field]]
        label = ", ".join([placement, *words({field: setting[field] for field in told})])
        groups.append(Group(label, placement, setting, members[placement, values], Style(kind, variant), told))
  return groups


def _usual_values(material: Material, named: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """The values that labels need not name, by field: those of the base, of a study that changes it one thing at a time.

  Six conditions of which each changes one thing would otherwise be told apart by all that any of them changes.
  """
  if material.study is None:
    return {}
  base = {field: material.study.base.get(field) for field in named if field != LEARNING_RATE_FIELD}
  changes = set()
  for setting in settings:
    changes.add(frozenset(field for field, value in base.items() if setting[field] != value))
  changed = [field for change in changes for field in change]
  one_at_a_time = len(changes) > 2 and frozenset() in changes and len(set(changed)) == len(changed)
  return base if one_at_a_time else {}


def named_fields(fields: Sequence[str], settings: Sequence[tuple[Any, ...]], axes: Iterable[str] = ()) -> list[str]:
  """The fields that tell settings apart: a study's axes and the learning rate, and as few more as will do.

  Runs of two corpora differ in vocabulary, tokenizer and budget too, but the name of the corpus says which is which;
  the table of what differs has the others.

  Args:
    fields: in which the settings differ.
    settings: all different, each the values of the fields.
    axes: of the study that the runs belong to.
  """
  named = [field for field in fields if field in axes or field == LEARNING_RATE_FIELD]

  def num_apart(chosen: Sequence[str]) -> int:
    places = [number for number, field in enumerate(fields) if field in chosen]
    return len({tuple(setting[place] for place in places) for setting in settings})

  while num_apart(named) < len(settings):
    left = [field for field in (*TELLING_FIELDS, *fields) if field in fields and field not in named]
    named.append(max(left, key=lambda field: num_apart([*named, field])))  # of equal ones the first
  return [field for field in fields if field in named]


def words(setting: Mapping[str, Any]) -> list[str]:
  """A setting in words, `lr 0.001` each."""
  return [f"{SHORT_NAMES.get(field, field.split('.')[-1])} {show(value)}" for field, value in setting.items()]


def _ordered_placements(material: Material) -> list[str]:
  fractions = {run.placement: post_fraction(run) for run in reversed(material.runs)}
  listed = material.study.axes.get(PLACEMENT_FIELD, ()) if material.study else ()
  by_fraction = sorted((found[0], name) for name, found in fractions.items() if found)
  ordered = [name for name in listed if name in fractions]
  ordered += [name for _, name in by_fraction]
  ordered += reversed(fractions)
  return list(dict.fromkeys(ordered))


def post_fraction(run: ReportedRun) -> tuple[float, str] | None:
  """Where a run stands between Pre-LN and Post-LN.

  Returns:
    The fraction of leading layers that are Post-LN (`pre` 0, `post` 1), all others being Pre-LN, and the modifiers that
    all layers have. None for any other placement.
  """
  table = run.placement_table
  if table is None:
    return None
  names, modifiers = [], set()
  for layer in table.layers:
    name, _, modifier = layer.name.partition("+")
    names.append(name)
    modifiers.add(modifier)
  num_post = names.count("post")
  if len(modifiers) > 1 or names != ["post"] * num_post + ["pre"] * (len(names) - num_post):
    return None
  return num_post / len(names), modifiers.pop()

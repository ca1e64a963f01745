"""Which runs are compared with which, and by how much they differ.

Runs that differ only in their seeds are one group. Groups are compared only where all but the placement is equal, and
run by run: a pair has the same initial numbers and the same order of samples.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from mixln_jax import placement as placement_lib
from mixln_jax.config import FIELDS, FREE
from mixln_jax.errors import InputError
from mixln_jax.reporting.loading import Material, Run
from mixln_jax.reporting.panels import Style

PLACEMENT, LEARNING_RATE = "model.placement", "optimizer.learning_rate"
SEEDS = ("seed", "data.seed")
CONFIDENCE = 0.95
ABSENT = "absent"


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ only in their seeds.

  Attributes:
    label: unique in the report.
    placement: their placement.
    setting: the other fields in which the report's groups differ, with this group's values.
    runs: by index.
    style: how they are drawn.
  """

  label: str
  placement: str
  setting: Mapping[str, Any]
  runs: Sequence[int]
  style: Style


@dataclasses.dataclass(frozen=True)
class Spread:
  """Mean and standard deviation (n − 1 in the denominator; None where n < 2)."""

  n: int
  mean: float
  deviation: float | None


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean of paired differences, with Student's confidence interval (None where n < 2, or where all are equal)."""

  n: int
  mean: float
  low: float | None
  high: float | None

  @property
  def interval(self) -> tuple[float, float] | None:
    return None if self.low is None or self.high is None else (self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Standing:
  """One group's row of the perplexity table.

  Attributes:
    group: whose.
    planned: its runs.
    diverged: how many stopped at numbers that are not finite, or sit at the unigram entropy.
    losses: final validation loss by seeds, of the runs that have done their whole budget with a finite loss.
    loss: validation loss, in nats a token.
    perplexity: its exponential, run by run.
    baseline: label of the group that it is compared with, or None.
    loss_difference, perplexity_difference: this group minus the baseline, paired by seeds.
  """

  group: Group
  planned: int
  diverged: int
  losses: Mapping[tuple[Any, ...], float]
  loss: Spread | None
  perplexity: Spread | None
  baseline: str | None = None
  loss_difference: Difference | None = None
  perplexity_difference: Difference | None = None

  @property
  def counted(self) -> int:
    return len(self.losses)


@dataclasses.dataclass(frozen=True)
class BestRate:
  """The best of groups that differ in nothing but the learning rate.

  Attributes:
    row: the best group.
    place: where its rate stands among those that finished or diverged: `lower edge`, `upper edge`, `only rate`, or
      `inside`.
    seeds: on how many it was chosen.
  """

  row: Standing
  place: str
  seeds: int


def spread(values: Sequence[float]) -> Spread:
  """Of at least one value."""
  array = np.asarray(values, float)
  return Spread(len(array), float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None)


def paired_difference(differences: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
  """Mean of at least one paired difference and its interval, mean ± t(n − 1) · s / √n (the paired t-test's)."""
  array = np.asarray(differences, float)
  mean = float(array.mean())
  if len(array) < 2 or np.ptp(array) == 0:
    return Difference(len(array), mean, None, None)
  low, high = stats.t.interval(confidence, len(array) - 1, loc=mean, scale=stats.sem(array))
  return Difference(len(array), mean, float(low), float(high))


def perplexity(loss: float) -> float:
  return math.exp(loss) if loss < 700 else math.inf


def pair_key(run: Run) -> tuple[Any, ...]:
  return tuple(run.config.get(field) for field in SEEDS)


def differing_fields(runs: Sequence[Run]) -> list[str]:
  """Config fields that are not the same in all runs, in the order of FIELDS, then those that this version lacks."""
  names = [*FIELDS, *sorted({name for run in runs for name in run.config} - set(FIELDS))]
  return [name for name in names if len(set(values_of(runs, name))) > 1]


def values_of(runs: Iterable[Run], field: str) -> list[Any]:
  """A field's value in each run, or `absent`."""
  return [_hashable(run.config.get(field, ABSENT)) for run in runs]


def _hashable(value: Any) -> Any:
  return value if isinstance(value, (str, int, float, bool)) else repr(value)


def changes_the_run(field: str) -> bool:
  """Whether a field decides what is computed; the others change only how, or how often it is looked at."""
  return field not in FIELDS or FIELDS[field].on_resume != FREE


def show(value: Any) -> str:
  """A config value for a person."""
  return f"{value:g}" if isinstance(value, float) else str(value)


def make_groups(material: Material) -> list[Group]:
  """The groups of a report: placements as the study lists them, or from `pre` over mixtures to `post`, then others."""
  runs = material.runs
  fields = [
    field for field in differing_fields(runs) if changes_the_run(field) and field not in SEEDS and field != PLACEMENT
  ]
  placements = _ordered_placements(material)
  settings = sorted({_setting(run, fields) for run in runs}, key=lambda key: tuple(map(sort_key, key)))
  groups = []
  for kind, name in enumerate(placements):
    for variant, setting in enumerate(settings):
      members = [index for index, run in enumerate(runs) if run.placement == name and _setting(run, fields) == setting]
      if members:
        values = dict(zip(fields, setting, strict=True))
        label = ", ".join([name, *(f"{field.split('.')[-1]} {show(value)}" for field, value in values.items())])
        groups.append(Group(label, name, values, members, Style(kind, variant)))
  return groups


def _setting(run: Run, fields: Sequence[str]) -> tuple[Any, ...]:
  return tuple(values_of([run], field)[0] for field in fields)


def sort_key(value: Any) -> tuple[bool, Any]:
  """Numbers by size, then text."""
  return (False, value) if isinstance(value, (int, float)) else (True, str(value))


def _ordered_placements(material: Material) -> list[str]:
  found = {run.placement: post_share(run) for run in reversed(material.runs)}
  listed = [name for name in (material.study.axes.get(PLACEMENT, ()) if material.study else ()) if name in found]
  by_share = sorted((share[0], name) for name, share in found.items() if share)
  return list(dict.fromkeys([*listed, *(name for _, name in by_share), *reversed(found)]))


def standings(runs: Sequence[Run], groups: Sequence[Group], baseline: str) -> list[Standing]:
  """The perplexity table; each group is compared with that of placement `baseline` and the same setting."""
  return [_standing(runs, group, _baseline_of(group, groups, baseline)) for group in groups]


def _baseline_of(group: Group, groups: Sequence[Group], baseline: str) -> Group | None:
  if group.placement == baseline:
    return None
  return next((other for other in groups if other.placement == baseline and other.setting == group.setting), None)


def losses_by_pair(runs: Sequence[Run], group: Group) -> dict[tuple[Any, ...], float]:
  """Final validation loss by seeds; of runs with equal seeds the first counts."""
  losses: dict[tuple[Any, ...], float] = {}
  for run in (runs[index] for index in group.runs):
    if run.final_loss is not None:
      losses.setdefault(pair_key(run), run.final_loss)
  return losses


def _standing(runs: Sequence[Run], group: Group, baseline: Group | None) -> Standing:
  losses = losses_by_pair(runs, group)
  facts = (group, len(group.runs), sum(runs[index].diverged for index in group.runs), losses)
  if not losses:
    return Standing(*facts, None, None)
  loss = spread(list(losses.values()))
  perplexities = {key: perplexity(value) for key, value in losses.items()}
  base = losses_by_pair(runs, baseline) if baseline else {}
  pairs = [key for key in losses if key in base]
  if not baseline or not pairs:
    return Standing(*facts, loss, spread(list(perplexities.values())))
  return Standing(
    *facts,
    loss,
    spread(list(perplexities.values())),
    baseline.label,
    paired_difference([losses[key] - base[key] for key in pairs]),
    paired_difference([perplexities[key] - perplexity(base[key]) for key in pairs]),
  )


def best_by_learning_rate(rows: Sequence[Standing]) -> list[BestRate]:
  """Of groups that differ in nothing but the learning rate, the one of lowest mean loss over the seeds that all of them
  have a loss of. Groups whose rates share no such seed have no best one."""
  families: dict[tuple[Any, ...], list[Standing]] = {}
  for row in rows:
    if LEARNING_RATE in row.group.setting and (row.losses or row.diverged):
      rest = tuple(value for field, value in row.group.setting.items() if field != LEARNING_RATE)
      families.setdefault((row.group.placement, *rest), []).append(row)
  return [best for family in families.values() if (best := _best_rate(family))]


def _best_rate(family: Sequence[Standing]) -> BestRate | None:
  by_rate = sorted(family, key=lambda row: sort_key(row.group.setting[LEARNING_RATE]))
  finished = [row for row in by_rate if row.losses]
  common = set.intersection(*(set(row.losses) for row in finished)) if finished else set()
  if not common:
    return None
  best = min(finished, key=lambda row: math.fsum(row.losses[key] for key in common))
  # A rate beyond that was tried and diverged is no less tried.
  edges = {0: "lower edge", len(by_rate) - 1: "upper edge"}
  place = "only rate" if len(by_rate) == 1 else edges.get(by_rate.index(best), "inside")
  return BestRate(best, place, len(common))


def featured(groups: Sequence[Group], rows: Sequence[Standing], most: int = 8) -> list[Group]:
  """The groups whose layers are drawn: all, or where there are more than `most` the best one of each placement."""
  if len(groups) <= most:
    return list(groups)
  means = {row.group.label: row.loss.mean if row.loss else math.inf for row in rows}
  best: dict[str, Group] = {}
  for group in groups:
    held = best.setdefault(group.placement, group)
    if means[group.label] < means[held.label]:
      best[group.placement] = group
  return list(best.values())


def post_share(run: Run) -> tuple[float, str] | None:
  """The share of leading Post-LN layers of a run whose other layers are Pre-LN (`pre` 0, `post` 1), and the modifiers
  that all its layers have; None for any other placement."""
  try:
    table = placement_lib.parse(run.placement, run.config["model.num_layers"])
  except InputError:
    return None
  names, _, modifiers = zip(*(layer.name.partition("+") for layer in table.layers), strict=True)
  count = names.count("post")
  alike = len(set(modifiers)) == 1
  if not alike or names != ("post",) * count + ("pre",) * (len(names) - count):
    return None
  return count / len(names), modifiers[0]

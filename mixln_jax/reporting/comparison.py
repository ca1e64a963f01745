"""By how much groups differ, and which learning rate is the best.

Groups are compared only where everything but the placement is equal, and run by run: a pair has the same initial
numbers and the same order of samples.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mixln_jax.reporting.groups import LEARNING_RATE_FIELD, SEED_FIELDS, Group, grouped, seeds_of, sort_key
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.text import perplexity

CONFIDENCE = 0.95
POWER = 0.8  # the usual one, of which numbers of seeds are computed
MOST_SEEDS = 1000  # more than so many are not counted
LOWER, HIGHER, NOT_SHOWN, EQUAL, ONE_SEED = "lower", "higher", "no difference shown", "all pairs equal", "one seed"
NATS_A_TOKEN, NATS_A_PAIR = "nats a token", "nats a pair"
ROUNDING = 1e-12  # relative; losses that differ by less are equal: far above fp64's rounding, far below any effect


@dataclasses.dataclass(frozen=True)
class Spread:
  """Mean and standard deviation (n − 1 in the denominator; None where n < 2)."""

  n: int
  mean: float
  std: float | None


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean of n paired differences, and where n > 1 and they are not all equal Student's interval and their std."""

  n: int
  mean: float
  interval: tuple[float, float] | None
  std: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What the pairs of two groups show.

  Attributes:
    difference: ours minus theirs.
    pairs: the single differences, by seeds.
    verdict: LOWER, HIGHER, NOT_SHOWN, EQUAL or ONE_SEED.
    needed: pairs with which such a difference would be shown with a power of 80 %, if it is what it seems; None where
      it is shown, its std is not known, or more than a thousand are needed.
  """

  difference: Difference
  pairs: pd.Series
  verdict: str
  needed: int | None

  @property
  def is_open(self) -> bool:
    """Whether the pairs show nothing, and more of them might."""
    return self.verdict in (NOT_SHOWN, ONE_SEED)


def _no_values() -> pd.Series:
  return pd.Series(dtype=float)


@dataclasses.dataclass(frozen=True)
class Standing:
  """One group's row of the perplexity table.

  Attributes:
    group: whose.
    planned: number of its runs; those that repeat one, with equal seeds, are one.
    diverged: how many of them stopped at numbers that are not finite, or are at the unigram entropy.
    of_pairs: whether its runs are trained on pairs of answers.
    losses: final validation loss in `unit`, indexed by the seeds, of the runs that did all their steps and have a
      finite loss.
    bits: bits a byte of the same runs; of those that have it.
    accuracies, margins, chosen_rewards, rejected_rewards: of the same runs, where they are of_pairs; else empty.
    loss: their mean and std; None where there are none.
    perplexity: of exp(loss), run by run; None where they are of_pairs.
    baseline: label of the group that it is compared with, or None.
    loss_difference, perplexity_difference: this group minus the baseline, paired by seeds.
  """

  group: Group
  planned: int
  diverged: int
  losses: pd.Series
  of_pairs: bool = False
  bits: pd.Series = dataclasses.field(default_factory=_no_values)
  accuracies: pd.Series = dataclasses.field(default_factory=_no_values)
  margins: pd.Series = dataclasses.field(default_factory=_no_values)
  chosen_rewards: pd.Series = dataclasses.field(default_factory=_no_values)
  rejected_rewards: pd.Series = dataclasses.field(default_factory=_no_values)
  loss: Spread | None = None
  perplexity: Spread | None = None
  baseline: str | None = None
  loss_difference: Difference | None = None
  perplexity_difference: Difference | None = None

  @property
  def counted(self) -> int:
    return len(self.losses)

  @property
  def unit(self) -> str:
    """Of its losses."""
    return NATS_A_PAIR if self.of_pairs else NATS_A_TOKEN


@dataclasses.dataclass(frozen=True)
class BestRate:
  """The best of groups that differ only in the learning rate.

  Attributes:
    row: the best group.
    place: where its rate is among those that finished or diverged: `lower edge`, `upper edge`, `only rate`, or
      `inside`.
    seeds: on how many it was chosen.
  """

  row: Standing
  place: str
  seeds: int


def spread(values: Any) -> Spread:
  """Mean and standard deviation of at least one value."""
  array = np.asarray(values, float)
  std = float(array.std(ddof=1)) if len(array) > 1 else None
  return Spread(len(array), float(array.mean()), std)


def paired_difference(ours: Any, baseline: Any, confidence: float = CONFIDENCE) -> Difference:
  """Mean of ours − baseline over at least one pair, and the paired t-test's interval, mean ± t(n − 1) · s / √n."""
  ours, baseline = np.asarray(ours, float), np.asarray(baseline, float)
  differences = ours - baseline
  mean = float(differences.mean())
  # The variance of equal differences is rounding alone: an interval of it would claim what no seeds have shown.
  rounding = ROUNDING * max(abs(ours).max(), abs(baseline).max())
  if len(differences) < 2 or np.ptp(differences) <= rounding:
    return Difference(len(differences), mean, None)
  interval = stats.ttest_rel(ours, baseline).confidence_interval(confidence)
  return Difference(len(differences), mean, (float(interval.low), float(interval.high)), float(differences.std(ddof=1)))


def paired(ours: pd.Series, baseline: pd.Series) -> pd.DataFrame:
  """The values of the seeds that both have, side by side."""
  if ours.empty or baseline.empty:
    return pd.DataFrame({"ours": [], "baseline": []}, dtype=float)
  return pd.concat({"ours": ours, "baseline": baseline}, axis="columns", join="inner")


def compare(ours: pd.Series, baseline: pd.Series, std: float | None = None) -> Comparison | None:
  """Compares two groups over the seeds that both have; None where there are none.

  Args:
    ours, baseline: a value for each seed.
    std: of paired differences, where one pair alone can't tell it: what the seeds that are needed are computed with.
  """
  values = paired(ours, baseline)
  if values.empty:
    return None
  difference = paired_difference(values["ours"], values["baseline"])
  verdict = _verdict(difference)
  needed = None
  known_std = std if difference.std is None else difference.std
  if verdict in (NOT_SHOWN, ONE_SEED) and known_std is not None:
    needed = seeds_needed(difference.mean, known_std)
  pairs = pd.Series(values["ours"] - values["baseline"])
  return Comparison(difference, pairs, verdict, needed)


def _verdict(difference: Difference) -> str:
  if difference.n == 1:
    return ONE_SEED
  if difference.interval is None:
    return EQUAL
  low, high = difference.interval
  if low <= 0 <= high:
    return NOT_SHOWN
  return LOWER if high < 0 else HIGHER


def seeds_needed(mean: float, std: float, power: float = POWER, most: int = MOST_SEEDS) -> int | None:
  """The pairs with which a paired t-test shows a difference of this mean and std with this power.

  Args:
    mean: of the differences, if it is what it seems.
    std: of the differences.
    power: the probability that the interval excludes 0.
    most: None is returned where more than so many are needed.
  """
  if mean == 0:
    return None

  def power_of(n: int) -> float:
    limit = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    noncentrality = abs(mean) * math.sqrt(n) / std
    return float(stats.nct.sf(limit, n - 1, noncentrality))

  low, high = 1, 2  # power rises with n: the smallest n is found by halving
  while power_of(high) < power:
    if high >= most:
      return None
    low, high = high, min(2 * high, most)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if power_of(middle) < power else (low, middle)
  return high


def final_losses(runs: Sequence[ReportedRun], group: Group) -> pd.Series:
  """Final validation losses of a group's runs, indexed by their seeds; of runs with equal seeds the first counts."""
  return final_values(runs, group, "loss")


def final_values(runs: Sequence[ReportedRun], group: Group, name: str) -> pd.Series:
  """As `final_losses`, of any metric of the last validation."""
  values: dict[tuple[Any, ...], float] = {}
  for index in group.runs:
    value = runs[index].at_end(name)
    if value is not None:
      values.setdefault(seeds_of(runs[index]), value)
  index = pd.MultiIndex.from_tuples(list(values), names=SEED_FIELDS)
  return pd.Series(list(values.values()), index, dtype=float)


def standings(runs: Sequence[ReportedRun], groups: Sequence[Group], baseline: str) -> list[Standing]:
  """The rows of the perplexity table; each group is compared with that of placement `baseline` and the same setting."""
  rows = []
  for group in groups:
    planned = {seeds_of(runs[index]) for index in group.runs}
    diverged = {seeds_of(runs[index]) for index in group.runs if runs[index].diverged}
    row = Standing(
      group=group,
      planned=len(planned),
      diverged=len(diverged),
      losses=final_losses(runs, group),
      of_pairs=runs[group.runs[0]].of_pairs,
      bits=final_values(runs, group, "bits_per_byte"),
      accuracies=final_values(runs, group, "accuracy"),
      margins=final_values(runs, group, "margin"),
      chosen_rewards=final_values(runs, group, "chosen_reward"),
      rejected_rewards=final_values(runs, group, "rejected_reward"),
    )
    rows.append(_compared(row, baseline_of(group, groups, baseline), runs))
  return rows


def baseline_of(group: Group, groups: Sequence[Group], baseline: str) -> Group | None:
  """The group of placement `baseline` that another group is compared with; None where it is one itself."""
  if group.placement == baseline:
    return None
  return next((other for other in groups if other.placement == baseline and other.setting == group.setting), None)


def _compared(row: Standing, baseline: Group | None, runs: Sequence[ReportedRun]) -> Standing:
  """The row with its means, and with its differences from the baseline where there are pairs."""
  if row.losses.empty:
    return row
  row = dataclasses.replace(row, loss=spread(row.losses))
  if not row.of_pairs:
    row = dataclasses.replace(row, perplexity=spread(row.losses.map(perplexity)))
  if baseline is None:
    return row
  pairs = pd.concat({"ours": row.losses, "baseline": final_losses(runs, baseline)}, axis="columns", join="inner")
  if pairs.empty:
    return row
  row = dataclasses.replace(
    row, baseline=baseline.label, loss_difference=paired_difference(pairs["ours"], pairs["baseline"])
  )
  if row.of_pairs:
    return row
  perplexities = pairs.map(perplexity)
  difference = paired_difference(perplexities["ours"], perplexities["baseline"])
  return dataclasses.replace(row, perplexity_difference=difference)


def best_by_learning_rate(rows: Sequence[Standing]) -> list[BestRate]:
  """The best learning rate of each placement and setting: the lowest mean loss over the seeds that all its rates share.

  Placements whose rates share no seed with a loss have no best rate.
  """
  tried = [row for row in rows if LEARNING_RATE_FIELD in row.group.setting]
  best = [best_rate(family) for family in families(tried)]
  return [one for one in best if one is not None]


def families(rows: Sequence[Standing]) -> list[list[Standing]]:
  """The rows that differ only in the learning rate."""

  def but_the_rate(row: Standing) -> tuple[Any, ...]:
    return row.group.placement, *row.group.setting_but(LEARNING_RATE_FIELD).items()

  return list(grouped(rows, but_the_rate).values())


def tried_rates(family: Sequence[Standing]) -> list[Any]:
  """The learning rates at which something was trained to an end, sorted; a family without rates has none."""
  rates = {row.group.setting.get(LEARNING_RATE_FIELD) for row in family if row.counted or row.diverged}
  return sorted(rates - {None}, key=sort_key)


def best_rate(family: Sequence[Standing]) -> BestRate | None:
  """The best of rows that differ only in the learning rate, or not at all; None where they share no seed."""
  tried = [row for row in family if row.counted or row.diverged]
  by_rate = sorted(tried, key=lambda row: sort_key(row.group.setting.get(LEARNING_RATE_FIELD, 0)))
  losses = {number: row.losses for number, row in enumerate(by_rate) if row.counted}
  if not losses:
    return None
  shared = pd.concat(losses, axis="columns", join="inner")
  if shared.empty:
    return None
  best = list(losses)[int(np.argmin(shared.mean()))]
  # The edges are those of all rates that were tried: one beyond the best that diverged was tried too.
  if len(by_rate) == 1:
    place = "only rate"
  elif best == 0:
    place = "lower edge"
  elif best == len(by_rate) - 1:
    place = "upper edge"
  else:
    place = "inside"
  return BestRate(by_rate[best], place, len(shared))


def featured(groups: Sequence[Group], rows: Sequence[Standing], most: int = 8) -> list[Group]:
  """The groups whose curves and layers are drawn: all, or of more than `most` the best one of each placement."""
  if len(groups) <= most:
    return list(groups)
  mean_loss = {row.group.label: row.loss.mean if row.loss else math.inf for row in rows}
  by_placement = grouped(groups, lambda group: group.placement)
  return [min(some, key=lambda group: mean_loss[group.label]) for some in by_placement.values()]

"""How many steps a placement saves, and what they cost: from the curves and the step times of runs, pair by pair.

One number says both ways round how a pair of runs with equal seeds compares. Where ours ends lower than the baseline,
it is the baseline's number of steps over the steps at which ours has the baseline's final loss, so above 1. Where it
ends higher, it is the step at which the baseline has our final loss over the number of steps, so below 1. Under a
schedule that decays to its end this is cautious: ours had not decayed when it reached that loss.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mixln_jax.reporting.comparison import Difference, paired, paired_difference
from mixln_jax.reporting.groups import SEED_FIELDS, seeds_of
from mixln_jax.reporting.loading import ReportedRun

WARM_STEPS = 20  # of each process's run, which may compile, and whose times are left out


@dataclasses.dataclass(frozen=True)
class Ratio:
  """The geometric mean of ratios over pairs of runs.

  Attributes:
    value: the mean.
    interval: Student's of the logarithms, or None where the pairs show no spread.
    n: pairs.
  """

  value: float
  interval: tuple[float, float] | None
  n: int


@dataclasses.dataclass(frozen=True)
class Speed:
  """How a placement compares with the baseline in steps and in time.

  Attributes:
    steps: the baseline's steps over ours to one loss; above 1 where ours needs fewer.
    step_time: seconds of a step, ours over the baseline's; None where it was not measured on equal devices.
    effective: steps over step_time: how much sooner ours is there.
    num_steps: of a run.
  """

  steps: Ratio
  step_time: Ratio | None
  effective: Ratio | None
  num_steps: int

  @property
  def steps_to_baseline(self) -> float | None:
    """The step at which ours has the baseline's final loss; None where it does not get there."""
    return self.num_steps / self.steps.value if self.steps.value >= 1 else None


def speed_of(ours: Sequence[ReportedRun], baseline: Sequence[ReportedRun]) -> Speed | None:
  """Compares runs over equal seeds; None where no pair has curves that end."""
  pairs = _pairs(ours, baseline)
  if not pairs:
    return None
  log_steps = _by_seeds({seeds: _log_steps(one, other) for seeds, (one, other) in pairs.items()})
  log_times = _log_times(pairs)
  return Speed(
    _ratio(log_steps, log_steps * 0),
    None if log_times is None else _ratio(log_times, log_times * 0),
    None if log_times is None else _ratio(log_steps, log_times),
    ours[0].num_steps,
  )


def step_time_of(ours: Sequence[ReportedRun], baseline: Sequence[ReportedRun]) -> Ratio | None:
  """Seconds of a step, ours over the baseline's, over equal seeds; None where no pair, or not every pair, says it."""
  log_times = _log_times(_pairs(ours, baseline))
  return None if log_times is None else _ratio(log_times, log_times * 0)


def _log_times(pairs: Mapping[tuple[object, ...], tuple[ReportedRun, ReportedRun]]) -> pd.Series | None:
  """The logarithm of the ratio of step times by seeds.

  A step's time is that of a machine: it says something only of pairs that were all measured on equal ones.
  """
  times = {seeds: _log_step_times(one, other) for seeds, (one, other) in pairs.items()}
  known = {seeds: value for seeds, value in times.items() if value is not None}
  return _by_seeds(known) if known and len(known) == len(pairs) else None


def _pairs(
  ours: Sequence[ReportedRun], baseline: Sequence[ReportedRun]
) -> dict[tuple[object, ...], tuple[ReportedRun, ReportedRun]]:
  """The pairs of runs with equal seeds that both have a final loss; of runs with equal seeds the first counts."""
  theirs: dict[tuple[object, ...], ReportedRun] = {}
  for run in baseline:
    if run.final_loss is not None:
      theirs.setdefault(seeds_of(run), run)
  pairs: dict[tuple[object, ...], tuple[ReportedRun, ReportedRun]] = {}
  for run in ours:
    if run.final_loss is not None and seeds_of(run) in theirs:
      pairs.setdefault(seeds_of(run), (run, theirs[seeds_of(run)]))
  return pairs


def _by_seeds(values: dict[tuple[object, ...], float]) -> pd.Series:
  if not values:
    return pd.Series(dtype=float)
  return pd.Series(list(values.values()), pd.MultiIndex.from_tuples(list(values), names=SEED_FIELDS), dtype=float)


def _log_steps(ours: ReportedRun, baseline: ReportedRun) -> float:
  """The logarithm of the number that the top of this file defines."""
  assert ours.final_loss is not None
  assert baseline.final_loss is not None
  if ours.final_loss <= baseline.final_loss:
    return math.log(ours.num_steps / steps_to(ours, baseline.final_loss))
  return math.log(steps_to(baseline, ours.final_loss) / baseline.num_steps)


def steps_to(run: ReportedRun, loss: float) -> float:
  """The step at which a run's validation loss first is at most `loss`, between two evaluations on a straight line.

  The first evaluation's step where it is there by then, and the last one's where it never is.
  """
  steps = run.validation["step"].to_numpy(float)
  losses = run.validation["loss"].to_numpy(float)[steps > 0]
  steps = steps[steps > 0]  # no number of steps is a multiple of none
  there = np.flatnonzero(losses <= loss)
  if not there.size:
    return float(steps[-1])
  place = int(there[0])
  if place == 0 or not math.isfinite(losses[place - 1]):
    return float(steps[place])
  before, after = losses[place - 1], losses[place]
  fraction = (before - loss) / (before - after)
  return float(steps[place - 1] + fraction * (steps[place] - steps[place - 1]))


def _log_step_times(ours: ReportedRun, baseline: ReportedRun) -> float | None:
  """None where one of them has no times, or they had other kinds of devices."""
  one, other = step_seconds(ours), step_seconds(baseline)
  if one is None or other is None or ours.devices != baseline.devices:
    return None
  return math.log(one / other)


def step_seconds(run: ReportedRun) -> float | None:
  """The median time of a step as the run measured it; None where it says none."""
  if "tokens_per_second" not in run.train or "tokens" not in run.train:
    return None
  tokens = run.train["tokens"].to_numpy(float)
  seconds = (tokens / run.train["tokens_per_second"].to_numpy(float))[WARM_STEPS:]
  seconds = seconds[np.isfinite(seconds) & (seconds > 0)]
  return float(np.median(seconds)) if len(seconds) else None


def _ratio(ours: pd.Series, baseline: pd.Series) -> Ratio:
  """The ratio whose logarithms differ so, pair by pair."""
  values = paired(ours, baseline)
  difference: Difference = paired_difference(values["ours"], values["baseline"])
  interval = None
  if difference.interval is not None:
    low, high = difference.interval
    interval = (math.exp(low), math.exp(high))
  return Ratio(math.exp(difference.mean), interval, difference.n)

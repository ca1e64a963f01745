"""How much the final loss of one placement differs between seeds, and what that lets an experiment show."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from mixln_jax.errors import InputError
from mixln_jax.files import COUNT, NUMBER, OBJECT, TEXT, check_kinds
from mixln_jax.reporting.comparison import CONFIDENCE, POWER, seeds_needed, spread

DIFFERENCES = (0.01, 0.02, 0.05)  # nats; what the seeds that are needed are stated for
KINDS = {"placement": TEXT, "runs": COUNT, "mean": NUMBER, "std": NUMBER, "seeds_needed": OBJECT}


@dataclasses.dataclass(frozen=True)
class Noise:
  """The spread of the final loss over seeds.

  Attributes:
    placement: whose.
    runs: how many seeds.
    mean, std: of their final losses, nats (n − 1 in the std's denominator).
  """

  placement: str
  runs: int
  mean: float
  std: float

  @property
  def std_interval(self) -> tuple[float, float]:
    """Of the std, if the losses are normal: √((n − 1) s² / χ²)."""
    freedom = self.runs - 1
    small, large = stats.chi2.ppf(((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2), freedom)
    return self.std * math.sqrt(freedom / large), self.std * math.sqrt(freedom / small)

  @property
  def pairs_std(self) -> float:
    """The std that a paired difference of two placements has at most, unless equal seeds pull them apart: √2 σ.

    It is that of independent runs of this std. What equal seeds have in common makes it smaller, and only the pairs of
    two placements can tell by how much.
    """
    return math.sqrt(2) * self.std

  def seeds_needed(self) -> dict[float, int | None]:
    """Pairs with which a difference of each of DIFFERENCES is shown with POWER; None: more than a thousand."""
    return {difference: seeds_needed(difference, self.pairs_std) for difference in DIFFERENCES}

  def to_json(self) -> dict[str, Any]:
    """What is stored of it."""
    low, high = self.std_interval
    return {
      "placement": self.placement,
      "runs": self.runs,
      "mean": self.mean,
      "std": self.std,
      "std_interval": [low, high],
      "pairs_std": self.pairs_std,
      "power": POWER,
      "seeds_needed": {str(difference): needed for difference, needed in self.seeds_needed().items()},
    }


def noise_of(placement: str, losses: Sequence[float]) -> Noise | None:
  """The noise that final losses show; None of fewer than two, or where all are equal."""
  if len(losses) < 2:
    return None
  over_seeds = spread(losses)
  if not over_seeds.std:
    return None
  return Noise(placement, over_seeds.n, over_seeds.mean, over_seeds.std)


def stored_noise(content: Mapping[str, Any], where: str) -> Noise | None:
  """The noise that a track has stored; None where it has none. Raises InputError where it is damaged."""
  if not content:
    return None
  check_kinds(content, where, KINDS)
  if content["runs"] < 2 or not content["std"] > 0:
    raise InputError(f"{where}: a std of {content['std']} from {content['runs']} runs is none; measure it again")
  return Noise(content["placement"], content["runs"], float(content["mean"]), float(content["std"]))

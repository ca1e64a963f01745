"""Whether a loss stands out from those before it."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 128
FEWEST = 16  # losses, under which their standard deviation says little


class LossWindow:
  """The last losses of a run.

  The score of a loss is its distance from the mean of the last WINDOW losses, in their standard deviations. A score
  over 6 is what OLMo 2's training code (allenai/OLMo-core, its stability monitor) calls a spike.
  """

  def __init__(self, losses: Iterable[float] = ()):
    self._losses: deque[float] = deque(filter(math.isfinite, losses), maxlen=WINDOW)

  def score(self, loss: float) -> float | None:
    """The score of the next loss; None where there are fewer than FEWEST before it, or all of them are equal."""
    if len(self._losses) < FEWEST:
      return None
    mean, std = statistics.fmean(self._losses), statistics.pstdev(self._losses)
    return (loss - mean) / std if std > 0 else None

  def add(self, loss: float) -> None:
    """Adds a loss to the window; one that is not finite is left out."""
    if math.isfinite(loss):
      self._losses.append(loss)

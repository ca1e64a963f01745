"""How far a loss is from the losses before it, to detect spikes."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 128
FEWEST = 16  # with fewer losses, their standard deviation is too uncertain


class LossWindow:
  """The last losses of a run.

  The score of a loss is its distance from the mean of the last WINDOW losses, in units of their standard deviation. The
  stability monitor of OLMo 2's training code (allenai/OLMo-core) calls a score above 6 a spike.
  """

  def __init__(self, losses: Iterable[float] = ()):
    self._losses: deque[float] = deque(filter(math.isfinite, losses), maxlen=WINDOW)

  def score(self, loss: float) -> float | None:
    """The score of the next loss; None if there are fewer than FEWEST before it, or if all of them are equal."""
    if len(self._losses) < FEWEST:
      return None
    mean, std = statistics.fmean(self._losses), statistics.pstdev(self._losses)
    return (loss - mean) / std if std > 0 else None

  def add(self, loss: float) -> None:
    """Adds a loss to the window; one that is not finite is left out."""
    if math.isfinite(loss):
      self._losses.append(loss)

"""Whether a run has collapsed to what a model that ignores its input would predict.

A run that collapsed does not blow up: the official code's logs show it at the unigram entropy of its data to the end.
A run that has not learned yet lies above it too, and falls. So a run has diverged that was below the entropy and came
back to it, or that is not below it and no longer falls.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.data.loader import unigram_entropy
from mixln_jax.opening import Setup, make_loader

MARGIN = 0.1  # nats under the entropy, from which on a model uses its input
FALL = 0.02  # nats: a loss that falls by less is stuck
WINDOW = 100  # training steps whose mean loss is compared with the mean of those before; single batches are noisy
BELOW, NOT_YET, BACK, STUCK = "below", "not_yet", "back", "stuck"
MEANING = {
  BELOW: "the validation loss is below the unigram entropy of its data",
  NOT_YET: "the validation loss is not below the unigram entropy of its data yet, and falls",
  BACK: "the validation loss was below the unigram entropy of its data and is back at it: a model without input",
  STUCK: "the validation loss is at the unigram entropy of its data and no longer falls: a model without input",
}


def is_below(loss: float, entropy: float) -> bool:
  """Whether a validation loss is below the unigram entropy of its labels, both in nats."""
  return loss <= entropy - MARGIN


class Divergence:
  """Where a run stands beside the unigram entropy of its data.

  Attributes:
    state: BELOW, NOT_YET, BACK or STUCK, after the last evaluation; None before the first.
    consecutive: evaluations after the warm-up at which it was BACK or STUCK, up to the last one.
  """

  def __init__(self, config: Config, lines: Sequence[Mapping[str, Any]], step: int):
    """Follows a run up to `step` (updates done); `lines`: of its metrics.jsonl, which may hold later ones."""
    self._warmup = config_lib.warmup_steps(config)
    self._spacing = max(1, config.train.num_steps // 20)
    self._was_below = False
    self._evaluations: list[tuple[int, float]] = []
    self._losses: deque[float] = deque(maxlen=2 * WINDOW)  # of training
    self.state: str | None = None
    self.consecutive = 0
    for line in lines:
      if line["step"] > step:
        continue
      if line["split"] == "train":
        self.trained(float(line["loss"]))
      elif line["split"] == "validation" and "unigram_entropy" in line:
        self.evaluated(line["step"], float(line["loss"]), float(line["unigram_entropy"]))

  @property
  def diverged(self) -> bool:
    return self.consecutive > 0

  def trained(self, loss: float) -> None:
    """Takes note of an update."""
    self._losses.append(loss)

  def evaluated(self, step: int, loss: float, entropy: float) -> None:
    """Takes note of an evaluation; `entropy`: in nats, of the labels that it is over."""
    if is_below(loss, entropy):
      self.state, self._was_below = BELOW, True
    elif self._was_below:
      self.state = BACK
    else:
      self.state = NOT_YET if self._falls(step, loss) else STUCK
    after_warmup = step > self._warmup
    self.consecutive = self.consecutive + 1 if after_warmup and self.state in (BACK, STUCK) else 0
    self._evaluations.append((step, loss))

  def _falls(self, step: int, loss: float) -> bool:
    """Whether the loss has fallen since an evaluation some time before; without one, over the last training steps."""
    earlier = [before for at, before in self._evaluations if at <= step - self._spacing]
    if earlier:
      return not loss > min(earlier) - FALL
    losses = list(self._losses)
    half = len(losses) // 2
    if not half:
      return True  # nothing is known of it
    return not sum(losses[-half:]) / half > sum(losses[:half]) / half - FALL


def validation_entropy(setup: Setup) -> float:
  """Entropy in nats of the labels of the validation set: the loss of the best model that ignores its input."""
  rows = make_loader(setup, setup.config.evaluate.batch_size, all_rows=True)
  return unigram_entropy(rows.validation(setup.config.evaluate.max_tokens))

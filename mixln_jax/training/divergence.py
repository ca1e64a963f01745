"""Whether a run has collapsed to what a model that ignores its input would predict."""

from mixln_jax import config as config_lib
from mixln_jax.data.loader import unigram_entropy
from mixln_jax.opening import Setup, make_loader
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics

MARGIN = 0.1  # nats: a run that collapsed sits at the unigram entropy of its data and stays there


class Divergence:
  """Whether a run sits at the unigram entropy of its data: that of a model that ignores its input.

  A run that collapsed does not blow up: the official code's logs show it at that plateau to the end.

  Attributes:
    consecutive: evaluations at the plateau, after the warm-up, up to the last one.
  """

  def __init__(self, setup: Setup, folder: RunFolder, step: int):
    """`step`: updates done. (Process 0 cuts what the file has of later ones, at a time of its own.)"""
    self._setup = setup
    self._warmup = config_lib.warmup_steps(setup.config)
    self._entropy: float | None = None
    self.consecutive = 0
    for line in read_metrics(folder / folder_lib.METRICS):
      if line["split"] == "validation" and "unigram_entropy" in line and line["step"] <= step:
        self._count(line["step"], float(line["loss"]), float(line["unigram_entropy"]))

  def seen(self, step: int, loss: float) -> float:
    """Takes note of an evaluation; returns the entropy, in nats, of the labels that it is over."""
    if self._entropy is None:
      rows = make_loader(self._setup, self._setup.config.evaluate.batch_size, all_rows=True)
      self._entropy = unigram_entropy(rows.validation(self._setup.config.evaluate.max_tokens))
    self._count(step, loss, self._entropy)
    return self._entropy

  def _count(self, step: int, loss: float, entropy: float) -> None:
    at_plateau = step > self._warmup and loss > entropy - MARGIN
    self.consecutive = self.consecutive + 1 if at_plateau else 0

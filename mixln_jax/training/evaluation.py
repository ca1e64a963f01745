"""Validation loss, perplexity and bits per byte over a fixed set."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mixln_jax.data.loader import Batch
from mixln_jax.parallel.mesh import global_batch


class Evaluation(NamedTuple):
  """Result of an evaluation.

  Attributes:
    loss: nats a counted token, each token weighing the same.
    bits_per_byte: bits for each byte of text that the counted labels stand for.
    tokens: counted labels.
    official_loss: what the official evaluator reports: the mean of batch means times n / (n + 1), n the number of
      batches (it starts its count of batches at 1). It depends on the batch size.
  """

  loss: float
  bits_per_byte: float
  tokens: int
  official_loss: float

  @property
  def perplexity(self) -> float:
    return _exp(self.loss)

  def describe(self, *, official_compat: bool) -> str:
    """One line for a person."""
    line = (
      f"loss {self.loss:.4f}  perplexity {self.perplexity:.3f}  bits/byte {self.bits_per_byte:.4f}  "
      f"tokens {self.tokens:,}"
    )
    if official_compat:
      line += f"  | official evaluator: loss {self.official_loss:.4f}  perplexity {_exp(self.official_loss):.3f}"
    return line

  def metrics(self, *, official_compat: bool) -> dict[str, float]:
    """What metrics.jsonl holds of it."""
    values = {
      "loss": self.loss,
      "perplexity": self.perplexity,
      "bits_per_byte": self.bits_per_byte,
      "tokens": self.tokens,
    }
    if official_compat:
      values |= {"official_loss": self.official_loss, "official_perplexity": _exp(self.official_loss)}
    return values


def _exp(loss: float) -> float:
  return math.exp(loss) if loss < 700 else math.inf


def evaluate(
  evaluate_step: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array, jax.Array]],
  params: Any,
  batches: Iterable[Batch],
  mesh: Mesh,
) -> Evaluation:
  """Runs the batches and adds up.

  Args:
    evaluate_step: compiled `make_evaluate_step`; its sums are over the global batch.
    params: parameters on the mesh.
    batches: this process's rows of each batch; rows of weight 0 fill up the last one.
    mesh: where the batches go.
  """
  pending = [evaluate_step(params, global_batch(batch, mesh)) for batch in batches]
  return add_up(*np.array(jax.device_get(pending), np.float64).T)


def add_up(sums: np.ndarray, counts: np.ndarray, num_bytes: np.ndarray) -> Evaluation:
  """The evaluation of batches from what each of them gave, float64 arrays of one length."""
  loss = sums.sum() / counts.sum()
  bits_per_byte = sums.sum() / math.log(2) / num_bytes.sum()
  official = (sums / counts).sum() / (len(sums) + 1)
  return Evaluation(float(loss), float(bits_per_byte), int(counts.sum()), float(official))

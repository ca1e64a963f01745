"""Validation loss, perplexity and bits per byte over a fixed set."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.opening import Setup, make_loader
from mixln_jax.parallel.mesh import global_batch
from mixln_jax.parallel.rules import on_mesh
from mixln_jax.text import perplexity
from mixln_jax.training.program import Program


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
    return perplexity(self.loss)

  def describe(self, *, official_compat: bool) -> str:
    """One line for a person."""
    line = (
      f"loss {self.loss:.4f}  perplexity {self.perplexity:.3f}  bits/byte {self.bits_per_byte:.4f}  "
      f"tokens {self.tokens:,}"
    )
    if official_compat:
      line += f"  | official evaluator: loss {self.official_loss:.4f}  perplexity {perplexity(self.official_loss):.3f}"
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
      values |= {"official_loss": self.official_loss, "official_perplexity": perplexity(self.official_loss)}
    return values


class Evaluator:
  """Evaluates parameters on the validation set of a setup."""

  def __init__(self, program: Program, setup: Setup):
    self._program, self._setup = program, setup
    self._loader = make_loader(setup, setup.config.evaluate.batch_size)
    self._step = program.evaluate_step(bytes_per_token(setup))

  def __call__(self, params: Any, step: int) -> list[Evaluation]:
    """The evaluation of each member of the program; `params` are those of its joint state after `step` updates."""
    mesh = self._setup.mesh
    with on_mesh(mesh):
      batches = self._loader.validation(self._setup.config.evaluate.max_tokens)
      pending = [self._step(params, global_batch(batch, mesh), jnp.int32(step)) for batch in batches]
    # [number of batches, (loss sum, count, bytes), R]; one run has scalars.
    sums_N3R = np.array(jax.device_get(pending), np.float64).reshape(len(pending), 3, -1)
    return [add_up(*sums_N3R[:, :, index].T) for index in range(sums_N3R.shape[2])]


def bytes_per_token(setup: Setup) -> np.ndarray:
  """Bytes of text that each token stands for, [V]; 0 for rows of the embedding that no token has."""
  table_V = np.zeros(setup.config.model.vocab_size, np.float32)
  table_V[: setup.corpus.manifest.vocab_size] = setup.corpus.manifest.bytes_per_token
  return table_V


def add_up(sums: np.ndarray, counts: np.ndarray, num_bytes: np.ndarray) -> Evaluation:
  """The evaluation of batches from what each of them gave, float64 arrays of one length."""
  loss = sums.sum() / counts.sum()
  bits_per_byte = sums.sum() / math.log(2) / num_bytes.sum()
  official = (sums / counts).sum() / (len(sums) + 1)
  return Evaluation(float(loss), float(bits_per_byte), int(counts.sum()), float(official))

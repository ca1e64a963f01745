"""Evaluation over a fixed set: loss, perplexity and bits per byte of text; accuracy and rewards of pairs of answers."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.model.preference import PairSums
from mixln_jax.opening import Setup, make_loader
from mixln_jax.parallel.mesh import global_batch
from mixln_jax.parallel.rules import on_mesh
from mixln_jax.text import perplexity
from mixln_jax.training.program import Program
from mixln_jax.training.step import pair_means


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


class PairEvaluation(NamedTuple):
  """Result of an evaluation on pairs, as TRL defines it. A reward is what the loss makes of an answer
  (`model/preference.py`).

  Attributes:
    loss: nats a pair, each pair weighing the same.
    accuracy: fraction of the pairs whose chosen answer has the larger reward.
    chosen_reward, rejected_reward: the mean rewards.
    margin: the mean of their difference.
    pairs: how many they are.
    tokens: of both answers.
  """

  loss: float
  accuracy: float
  chosen_reward: float
  rejected_reward: float
  margin: float
  pairs: int
  tokens: int

  def describe(self, *, official_compat: bool) -> str:
    """One line for a person; `official_compat` is of no meaning here."""
    del official_compat
    return (
      f"loss {self.loss:.4f}  accuracy {self.accuracy:.1%}  margin {self.margin:.4f}  chosen reward "
      f"{self.chosen_reward:.4f}  rejected reward {self.rejected_reward:.4f}  pairs {self.pairs:,}"
    )

  def metrics(self, *, official_compat: bool) -> dict[str, float]:
    """What metrics.jsonl holds of it."""
    del official_compat
    return dict(self._asdict())


class Evaluator:
  """Evaluates parameters on the validation set of a setup."""

  def __init__(self, program: Program, setup: Setup):
    self._program, self._setup = program, setup
    self._loader = make_loader(setup, setup.config.evaluate.batch_size)
    self._step = program.evaluate_step(bytes_per_token(setup))

  def __call__(self, params: Any, step: int) -> list[Evaluation] | list[PairEvaluation]:
    """The evaluation of each member of the program; `params` are those of its joint state after `step` updates."""
    mesh = self._setup.mesh
    with on_mesh(mesh):
      batches = self._loader.validation(self._setup.config.evaluate.max_tokens)
      pending = [self._step(params, global_batch(batch, mesh), jnp.int32(step)) for batch in batches]
    # [number of batches, what the step gives, R]; one run has scalars.
    sums_NKR = np.array(jax.device_get(pending), np.float64).reshape(len(pending), len(pending[0]), -1)
    members = range(sums_NKR.shape[2])
    if self._setup.config.preference.loss != "none":
      return [add_up_pairs(sums_NKR[:, :, index]) for index in members]
    return [add_up(*sums_NKR[:, :, index].T) for index in members]


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


def add_up_pairs(sums_NK: np.ndarray) -> PairEvaluation:
  """The evaluation of N batches from the `PairSums` of each, a row of K numbers, float64."""
  total = PairSums(*sums_NK.sum(axis=0))
  means = {name: float(value) for name, value in pair_means(total._asdict(), total.pairs).items()}
  return PairEvaluation(loss=float(total.loss / total.pairs), pairs=int(total.pairs), tokens=int(total.tokens), **means)

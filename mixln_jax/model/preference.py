"""Losses over pairs of answers to one prompt, of which the first is preferred: DPO, SimPO and ORPO.

A row of a batch holds whole sequences (prompt and answer), each a document of its own: the chosen and the rejected one
of its first pair, those of its second pair, and so on. A loss reads no more of them than the log-probabilities of the
answers' tokens.

Dimensions (B, T as in the model):
  S  sequences of a row, an even number that no row exceeds
  P  pairs of a row, P = S / 2
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax.config import PreferenceConfig
from mixln_jax.model.columns import Columns
from mixln_jax.model.loss import next_token_losses
from mixln_jax.model.transformer import Transformer

# A probability is at most one minus this much where its odds are formed: those of 1 are infinite, their gradient too.
SMALLEST_DOUBT = 1e-6


class Answer(NamedTuple):
  """One side of each pair. The arrays are of one shape, fp32.

  Attributes:
    log_probability: of all tokens of the answer together, its end among them, in nats.
    num_tokens: how many they are.
    reference: what the reference model's log probability is; zeros where a loss has no reference.
  """

  log_probability: jax.Array
  num_tokens: jax.Array
  reference: jax.Array

  @property
  def mean(self) -> jax.Array:
    """Log probability of a token, in nats."""
    return self.log_probability / self.num_tokens


class PairLoss(NamedTuple):
  """What a loss makes of each pair; the arrays are of one shape."""

  loss: jax.Array
  chosen_reward: jax.Array
  rejected_reward: jax.Array


class PairSums(NamedTuple):
  """Sums over the pairs of a batch, fp32 scalars.

  Attributes:
    loss: of their losses.
    pairs: how many they are.
    tokens: of both answers.
    accuracy: pairs whose chosen answer has the larger reward.
    chosen_reward, rejected_reward: of the rewards, as the loss defines them.
  """

  loss: jax.Array
  pairs: jax.Array
  tokens: jax.Array
  accuracy: jax.Array
  chosen_reward: jax.Array
  rejected_reward: jax.Array


def dpo(preference: PreferenceConfig, chosen: Answer, rejected: Answer) -> PairLoss:
  """Direct preference optimization, arXiv 2305.18290, eq. 7: −log σ(r_w − r_l) with r = β (log π − log π_ref)."""
  chosen_reward = preference.dpo_beta * (chosen.log_probability - chosen.reference)
  rejected_reward = preference.dpo_beta * (rejected.log_probability - rejected.reference)
  loss = _smoothed_loss(chosen_reward - rejected_reward, preference.label_smoothing)
  return PairLoss(loss, chosen_reward, rejected_reward)


def simpo(preference: PreferenceConfig, chosen: Answer, rejected: Answer) -> PairLoss:
  """SimPO, arXiv 2405.14734, eq. 6: −log σ(r_w − r_l − γ) with r = β log π of a mean token, without a reference."""
  chosen_reward, rejected_reward = preference.simpo_beta * chosen.mean, preference.simpo_beta * rejected.mean
  margin = chosen_reward - rejected_reward - preference.simpo_gamma
  return PairLoss(_smoothed_loss(margin, preference.label_smoothing), chosen_reward, rejected_reward)


def orpo(preference: PreferenceConfig, chosen: Answer, rejected: Answer) -> PairLoss:
  """ORPO, arXiv 2403.07691, eq. 6 and 7: −log p_w − λ log σ(log odds(p_w) − log odds(p_l)), p of a mean token.

  Its rewards are λ log p, as TRL reports them.
  """
  log_odds_ratio = _log_odds(chosen.mean) - _log_odds(rejected.mean)
  loss = -chosen.mean - preference.orpo_lambda * jax.nn.log_sigmoid(log_odds_ratio)
  return PairLoss(loss, preference.orpo_lambda * chosen.mean, preference.orpo_lambda * rejected.mean)


LOSSES: Mapping[str, Callable[[PreferenceConfig, Answer, Answer], PairLoss]] = {
  "dpo": dpo,
  "simpo": simpo,
  "orpo": orpo,
}


def _smoothed_loss(margin: jax.Array, label_smoothing: float) -> jax.Array:
  """−log σ of the margin, where a fraction of the pairs is presumed to be labelled the wrong way round."""
  flipped = label_smoothing * jax.nn.log_sigmoid(-margin) if label_smoothing else 0.0
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - flipped


def _log_odds(log_probability: jax.Array) -> jax.Array:
  """log(p / (1 − p))."""
  log_probability = jnp.minimum(log_probability, -SMALLEST_DOUBT)
  return log_probability - jax.nn.log1mexp(-log_probability)


def num_sequences(length: int) -> int:
  """S of rows of `length` tokens: a sequence has at least two."""
  return 2 * (length // 4)


def sum_by_sequence(x_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
  """Sums over the positions of each sequence, [B, S].

  A masked sum rather than a scatter: its order of additions is fixed on every platform, and nothing larger than its
  result is stored.
  """
  number_S = 1 + jnp.arange(num_sequences(x_BT.shape[1]))
  of_sequence_BTS = segment_ids_BT[:, :, None] == number_S
  return jnp.sum(jnp.where(of_sequence_BTS, x_BT[:, :, None], 0.0), axis=1)


def answers_of(log_probabilities_BT: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Answer, Answer, jax.Array]:
  """The chosen and the rejected answers of a batch, each [B, P], and which pairs there are.

  Args:
    log_probabilities_BT: of each label, in nats.
    batch: as `preference_loss`.

  Returns:
    (chosen, rejected, is_pair_BP); where there is no pair, both answers are one token of probability 1/e.
  """
  segment_ids_BT, weights_BT = batch["segment_ids_BT"], batch["weights_BT"]
  log_probability_BS = sum_by_sequence(log_probabilities_BT * weights_BT, segment_ids_BT)
  num_tokens_BS = sum_by_sequence(weights_BT, segment_ids_BT)
  reference_BS = jnp.zeros_like(log_probability_BS)
  if "references_BT" in batch:
    reference_BS = sum_by_sequence(batch["references_BT"], segment_ids_BT)
  is_pair_BP = num_tokens_BS[:, 0::2] > 0

  def side(first: int) -> Answer:
    return Answer(
      jnp.where(is_pair_BP, log_probability_BS[:, first::2], -1.0),
      jnp.where(is_pair_BP, num_tokens_BS[:, first::2], 1.0),
      jnp.where(is_pair_BP, reference_BS[:, first::2], 0.0),
    )

  return side(0), side(1), is_pair_BP


def preference_loss(
  preference: PreferenceConfig,
  model: Transformer,
  params: Any,
  batch: Mapping[str, jax.Array],
  *,
  columns: Columns | None = None,
) -> tuple[PairSums, dict[str, Any]]:
  """The loss over the pairs of a batch, and what the model saw on the way.

  Args:
    preference: config.preference.
    model: the model; with its `observe`, the taps are what that makes of them.
    params: its parameters.
    batch: `tokens_BT`, `labels_BT`, `weights_BT` (1 at the tokens of answers), `segment_ids_BT`, `positions_BT`, and
      for dpo `references_BT`: of each sequence, what `sequence_log_probabilities` of the reference model is, at one of
      its positions and 0 at the others.
    columns: the placement as data.

  Returns:
    The sums, and the taps (as `Transformer.hidden`).
  """
  log_probabilities_BT, taps = _log_probabilities(model, params, batch, columns)
  return pair_sums(preference, log_probabilities_BT, batch), taps


def pair_sums(
  preference: PreferenceConfig, log_probabilities_BT: jax.Array, batch: Mapping[str, jax.Array]
) -> PairSums:
  """As `preference_loss`, of the log-probabilities of a batch's labels, in nats."""
  chosen, rejected, is_pair_BP = answers_of(log_probabilities_BT, batch)
  pair = LOSSES[preference.loss](preference, chosen, rejected)

  def total(x_BP: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(is_pair_BP, x_BP, 0.0))

  return PairSums(
    loss=total(pair.loss),
    pairs=jnp.sum(is_pair_BP, dtype=jnp.float32),
    tokens=jnp.sum(batch["weights_BT"], dtype=jnp.float32),
    accuracy=total((pair.chosen_reward > pair.rejected_reward).astype(jnp.float32)),
    chosen_reward=total(pair.chosen_reward),
    rejected_reward=total(pair.rejected_reward),
  )


def sequence_log_probabilities(
  model: Transformer, params: Any, batch: Mapping[str, jax.Array], *, columns: Columns | None = None
) -> jax.Array:
  """Log probability, in nats, of the answer of each sequence, [B, S]; 0 where there is none. Arguments as above."""
  log_probabilities_BT, _ = _log_probabilities(model, params, batch, columns)
  return sum_by_sequence(log_probabilities_BT * batch["weights_BT"], batch["segment_ids_BT"])


def _log_probabilities(
  model: Transformer, params: Any, batch: Mapping[str, jax.Array], columns: Columns | None
) -> tuple[jax.Array, dict[str, Any]]:
  """Log probability of each label, [B, T] fp32, and the taps."""

  def apply(model: Transformer) -> tuple[jax.Array, dict[str, Any]]:
    hidden_BTD, taps = model.hidden(
      batch["tokens_BT"],
      columns=columns,
      segment_ids_BT=batch["segment_ids_BT"],
      positions_BT=batch["positions_BT"],
      weights_BT=None if model.observe is None else batch["weights_BT"],
    )
    return -next_token_losses(hidden_BTD, model.head_weights(), batch["labels_BT"]), taps

  return nn.apply(apply, model)({"params": params})

"""The language-modelling loss, as a sum and a count."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax.model.columns import Columns
from mixln_jax.model.transformer import Transformer, project_to_logits


def next_token_loss(
  hidden_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy, summed over counted positions; the division happens once, at the end of all sums.

  Args:
    hidden_BTD: final hidden states.
    head_DV: output projection.
    labels_BT: the token to predict at each position.
    weights_BT: 1 where a position counts, else 0.

  Returns:
    (sum of the losses in nats, number of counted positions), fp32 scalars.
  """
  logits_BTV = project_to_logits(hidden_BTD, head_DV)
  label_logits_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
  losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - label_logits_BT
  weights_BT = weights_BT.astype(jnp.float32)
  return jnp.sum(losses_BT * weights_BT), jnp.sum(weights_BT)


def batch_loss(
  model: Transformer,
  params: Any,
  batch: Mapping[str, jax.Array],
  *,
  columns: Columns | None = None,
  keep_L: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
  """The loss of a batch, and what the model saw on the way.

  Args:
    model: the model; with its `observe`, the taps are what that makes of them.
    params: its parameters.
    batch: `tokens_BT`, `labels_BT`, `weights_BT`, and with documents kept apart `segment_ids_BT`, `positions_BT`.
    columns: the placement as data.
    keep_L: 0 where a layer is removed.

  Returns:
    The summed loss, the number of counted positions (as `next_token_loss`), and the taps (as `Transformer.hidden`).
  """

  def apply(model: Transformer) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    hidden_BTD, taps = model.hidden(
      batch["tokens_BT"],
      columns=columns,
      keep_L=keep_L,
      segment_ids_BT=batch.get("segment_ids_BT"),
      positions_BT=batch.get("positions_BT"),
      weights_BT=None if model.observe is None else batch["weights_BT"],
    )
    return *next_token_loss(hidden_BTD, model.head_weights(), batch["labels_BT"], batch["weights_BT"]), taps

  return nn.apply(apply, model)({"params": params})

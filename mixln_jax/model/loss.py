"""The language-modelling loss, as a sum and a count."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mixln_jax.model.columns import Columns
from mixln_jax.model.transformer import Transformer
from mixln_jax.model.tuned.loss import chunked_loss, chunked_losses
from mixln_jax.parallel.rules import constrain


def next_token_loss(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  labels_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy, summed over counted positions; the division happens once, at the end of all sums.

  `all_logits_loss` defines it. Every platform uses the chunked form: where all logits fit in one chunk, the TPU
  compiler produces the same program for both forms, and where they don't, the plain form holds all logits in memory
  (docs/tuned.md). The result can be differentiated once, in reverse mode.

  Args:
    hidden_BTD: final hidden states.
    head_DV: output projection; multiplied in the hidden states' type, with fp32 logits.
    labels_BT: the token to predict at each position.
    weights_BT: 1 where a position counts, else 0.
    chunk: positions per row whose logits exist at the same time; by default what `tuned/loss.py` allows.

  Returns:
    (sum of the losses in nats, number of counted positions), fp32 scalars.
  """
  weights_BT = weights_BT.astype(jnp.float32)
  head_DV = head_DV.astype(hidden_BTD.dtype)
  return chunked_loss(hidden_BTD, head_DV, labels_BT, weights_BT, chunk), jnp.sum(weights_BT)


def next_token_losses(hidden_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array) -> jax.Array:
  """Cross entropy of each position, [B, T] fp32, in nats; arguments as `next_token_loss`.

  For what is not a weighted sum of them, such as a loss over pairs of answers: their gradients cost the head a fourth
  product.
  """
  return chunked_losses(hidden_BTD, head_DV.astype(hidden_BTD.dtype), labels_BT)


def all_logits_loss(
  hidden_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
  """The weighted sum of the losses, with all logits [B, T, V] in memory; arguments as in `chunked_loss`."""
  head_DV = constrain(head_DV, "activation_embed", "vocab")
  logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
  logits_BTV = constrain(logits_BTV, "batch", "length", "vocab")
  losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, labels_BT)
  return jnp.sum(losses_BT * weights_BT)


def batch_loss(
  model: Transformer,
  params: Any,
  batch: Mapping[str, jax.Array],
  *,
  columns: Columns | None = None,
  keep_L: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
  """The loss of a batch, and the taps of the model.

  Args:
    model: the model; if it has an `observe`, the taps are what that returns.
    params: its parameters.
    batch: `tokens_BT`, `labels_BT`, `weights_BT`, and with document masks `segment_ids_BT`, `positions_BT`.
    columns: the placement as data.
    keep_L: 0 removes a layer, 1 keeps it.

  Returns:
    The summed loss and the number of counted positions, as in `next_token_loss`, and the taps of `Transformer.hidden`.
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
    total, count = next_token_loss(hidden_BTD, model.head_weights(), batch["labels_BT"], batch["weights_BT"])
    return total, count, taps

  return nn.apply(apply, model)({"params": params})

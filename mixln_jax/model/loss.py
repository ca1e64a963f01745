"""The language-modelling loss, as a sum and a count."""

import jax
import jax.numpy as jnp

from mixln_jax.model.transformer import project_to_logits


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

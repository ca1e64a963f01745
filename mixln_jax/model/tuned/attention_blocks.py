"""Causal attention in plain JAX, one block of queries at a time against the keys up to the block's end.

It suits a CPU: the only logits above the diagonal are those inside a block of queries, and the blocks fit the caches.
"""

import functools
import math

import jax
import jax.numpy as jnp

# On a CPU at a length of 256, of blocks of 32 to 256 queries, 64 took the least time. More than 8 blocks would make the
# program long.
SMALLEST_BLOCK, MOST_BLOCKS = 64, 8


def attention_in_blocks(
  q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, mask_BTT: jax.Array | None
) -> jax.Array:
  """See `attention_kernels.self_attention`; R query heads share each of the G key-value heads."""
  batch, length, heads, width = q_BTHK.shape
  groups = k_BTGK.shape[2]
  q_BTHK = (q_BTHK.astype(jnp.float32) / math.sqrt(width)).astype(q_BTHK.dtype)
  # Heads before positions: on a CPU, products are faster if each matrix is contiguous.
  q_BGRTK = jnp.moveaxis(q_BTHK.reshape(batch, length, groups, heads // groups, width), 1, 3)
  k_BGTK, v_BGTK = jnp.moveaxis(k_BTGK, 1, 2), jnp.moveaxis(v_BTGK, 1, 2)
  block = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
  outs = []
  for start in range(0, length, block):
    stop = min(start + block, length)
    if mask_BTT is None:
      allowed = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
    else:
      allowed = mask_BTT[:, None, None, start:stop, :stop]
    outs.append(_block(q_BGRTK[:, :, :, start:stop], k_BGTK[:, :, :stop], v_BGTK[:, :, :stop], allowed))
  out_BGRTK = jnp.concatenate(outs, axis=3)
  return jnp.moveaxis(out_BGRTK, 3, 1).reshape(q_BTHK.shape)


def _block(q_BGRTK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, allowed: jax.Array) -> jax.Array:
  """The T queries of one block against S keys; `allowed` broadcasts to [B, G, R, T, S]."""
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits_BGRTS = jnp.where(allowed, product("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK), -jnp.inf)
  largest_BGRT1 = jax.lax.stop_gradient(jnp.max(logits_BGRTS, axis=-1, keepdims=True))
  powers_BGRTS = jnp.exp(logits_BGRTS - largest_BGRT1)
  out_BGRTK = product("bgrts,bgsk->bgrtk", powers_BGRTS.astype(v_BGSK.dtype), v_BGSK)
  # Dividing after the product touches K numbers per query instead of S.
  return (out_BGRTK / jnp.sum(powers_BGRTS, axis=-1, keepdims=True)).astype(q_BGRTK.dtype)

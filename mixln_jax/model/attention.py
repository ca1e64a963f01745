"""Rotary position embedding, attention, and its key-value cache."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig


def rope_frequencies(model: ModelConfig) -> jax.Array:
  """RoPE's angle for one position, [head_dim / 2], fp32 (arXiv 2104.09864, eq. 15).

  With `rope_scaling="llama3"` a frequency is scaled by how many turns it makes within `rope_original_length`: below
  `rope_low_frequency_factor` turns it is divided by `rope_factor`, above `rope_high_frequency_factor` it is unchanged,
  and in between the two are blended (Llama 3.1, arXiv 2407.21783, as in its released code).
  """
  width = config_lib.head_dim(model)
  frequencies = model.rope_base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  if model.rope_scaling == "none":
    return frequencies
  low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
  turns = model.rope_original_length * frequencies / (2 * math.pi)
  unchanged = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # the fraction of the blend that is not divided
  return frequencies * (unchanged + (1 - unchanged) / model.rope_factor)


def rope_table(positions_BT: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of RoPE's angles, fp32, each [B, T, 1, head_dim / 2]."""
  angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (x[i], x[i + K/2]) by the angles of `rope`, in fp32: LLaMA's pairing of the two halves."""
  cosine, sine = rope
  first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
  return rotated.astype(x_BTHK.dtype)


def attention(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  mask_BTS: jax.Array | None,
  implementation: Literal["xla", "cudnn"] = "xla",
) -> jax.Array:
  """Softmax attention, scale 1/√K, logits and softmax in fp32; H query heads share G key-value heads.

  Args:
    q_BTHK: queries.
    k_BSGK: keys.
    v_BSGK: values.
    mask_BTS: True where query t may read key s; None = causal, with S = T.
    implementation: of `jax.nn.dot_product_attention`.

  Returns:
    [B, T, H, K] in the queries' type.
  """
  mask = None if mask_BTS is None else mask_BTS[:, None]
  return jax.nn.dot_product_attention(
    q_BTHK, k_BSGK, v_BSGK, mask=mask, is_causal=mask is None, implementation=implementation
  )


def attention_statistics(q_BTHK: jax.Array, k_BSGK: jax.Array, mask_BTS: jax.Array | None) -> dict[str, jax.Array]:
  """Statistics of the softmax of `attention`; same arguments. Materialises the logits [B, H, T, S] in fp32.

  Returns:
    `largest_logit_BT`: the largest q·k/√K of each query, over its heads and the keys that it may read;
    `entropy_BT`: the entropy of its attention in nats, the mean over its heads.
  """
  length, num_keys, groups = q_BTHK.shape[1], k_BSGK.shape[1], k_BSGK.shape[2]
  q_BTGRK = q_BTHK.reshape(*q_BTHK.shape[:2], groups, -1, q_BTHK.shape[-1])
  logits_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
  logits_BGRTS = logits_BGRTS / math.sqrt(q_BTHK.shape[-1])
  allowed = jnp.tril(jnp.ones((length, num_keys), bool)) if mask_BTS is None else mask_BTS[:, None, None]
  logits_BGRTS = jnp.where(allowed, logits_BGRTS, -jnp.inf)
  logarithms = jax.nn.log_softmax(logits_BGRTS, axis=-1)
  entropy_BGRT = -jnp.sum(jnp.exp(logarithms) * jnp.where(allowed, logarithms, 0.0), axis=-1)
  return {
    "largest_logit_BT": jnp.max(logits_BGRTS, axis=(1, 2, 4)),
    "entropy_BT": jnp.mean(entropy_BGRT, axis=(1, 2)),
  }


def attention_mask(
  positions_BT: jax.Array,
  segment_ids_BT: jax.Array | None,
  cache: dict[str, jax.Array] | None,
  *,
  bidirectional: bool = False,
) -> jax.Array | None:
  """The keys that each query may read, [B, T, S] (or [1, T, S] for all rows); None = causal over the row itself.

  An encoder's query reads the whole row, or with segment ids all of its own segment.

  With a cache, the key of position p is in slot p, so a query reads the slots up to its own position. Later slots may
  hold the padding of a shorter prompt, which is overwritten before any query reads it.
  """
  if cache is not None:
    num_slots = cache["k"].shape[2]
    return jnp.arange(num_slots)[None, None, :] <= positions_BT[:, :, None]
  if bidirectional:
    return _whole_rows(positions_BT, segment_ids_BT)
  if segment_ids_BT is None:
    return None
  length = segment_ids_BT.shape[1]
  causal_TS = jnp.tril(jnp.ones((length, length), bool))
  return causal_TS[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def _whole_rows(positions_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
  if segment_ids_BT is None:
    length = positions_BT.shape[1]
    return jnp.ones((1, length, length), bool)
  return segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]


def init_cache(
  num_layers: int, batch: int, num_slots: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> dict[str, jax.Array]:
  """An empty cache: keys and values [L, B, S, G, K]."""
  shape = (num_layers, batch, num_slots, num_kv_heads, head_dim)
  return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def update_cache(
  cache: dict[str, jax.Array], layer: jax.Array | int, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
  """Writes keys and values at (layer, row, position).

  Returns:
    The cache, and the keys and values of this layer, each [B, S, G, K].
  """
  indices_BT2 = jnp.stack(jnp.broadcast_arrays(layer, jnp.broadcast_to(positions_BT, k_BTGK.shape[:2])), axis=-1)
  # `.at[].set` would index the rows as well: where they are sharded, each device would gather the keys of all of them.
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 2),
    scatter_dims_to_operand_dims=(0, 2),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
  )

  def write(cache_LBSGK: jax.Array, new_BTGK: jax.Array) -> jax.Array:
    new_BTGK = new_BTGK.astype(cache_LBSGK.dtype)
    return jax.lax.scatter(cache_LBSGK, indices_BT2, new_BTGK, numbers, unique_indices=True)

  k, v = write(cache["k"], k_BTGK), write(cache["v"], v_BTGK)
  return {"k": k, "v": v}, k[layer], v[layer]

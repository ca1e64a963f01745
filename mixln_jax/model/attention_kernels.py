"""Causal self-attention behind one name, each platform with the implementation that does best there.

All compute softmax(q·k / √K) · v with fp32 logits and softmax, H query heads sharing G key-value heads; query t reads
the keys up to t, and with segment ids those of its own segment:

  xla      all logits [B, H, T, T] as one array, by `jax.nn.dot_product_attention`: runs on everything
  blocks   the same arithmetic in plain JAX, blocks of queries against the keys up to their end: what a CPU does best
  cudnn    cuDNN's fused attention by `jax.nn.dot_product_attention`: NVIDIA GPUs, bfloat16, no segment ids
  splash   JAX's Pallas kernel for TPUs; elsewhere it is interpreted, which only a test wants
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.errors import InputError
from mixln_jax.model.attention import attention
from mixln_jax.parallel.rules import RULES, platform, shards

# On a CPU, of blocks of 32 to 256 queries at a length of 256, 64 took the least time; more than 8 make a long program.
SMALLEST_BLOCK, MOST_BLOCKS = 64, 8
# Shorter rows stay in a TPU's fast memory without a kernel (compiled for v5e: 1 MB of temporaries at a length of 256,
# 806 MB at 1,024, where the kernel moves a third of the bytes).
SPLASH_FROM_LENGTH = 1024
SPLASH_BLOCK = 512
SPLASH_LANES = 128  # its blocks are multiples of them


def choose_attention(model: ModelConfig, length: int, *, segments: bool = False) -> str:
  """The implementation that config.model.attention stands for, on the mesh in use.

  Args:
    model: config.model.
    length: tokens a row, as the model sees them.
    segments: whether there are segment ids.

  Raises:
    InputError: the one that is asked for can't do this.
  """
  obstacles = {
    "blocks": {"config.mesh.sequence > 1": shards("length") > 1},
    "cudnn": {
      "config.mesh.sequence > 1": shards("length") > 1,
      "config.model.dtype other than bfloat16": model.dtype != "bfloat16",
      "config.data.document_mask": segments,
      "head_dim that is not a multiple of 8, or above 128": config_lib.head_dim(model) % 8 != 0
      or config_lib.head_dim(model) > 128,
      f"platform {platform()}": platform() != "gpu",
    },
    "splash": {
      "config.mesh.sequence > 1": shards("length") > 1,
      f"length {length}, no multiple of {SPLASH_LANES}": length % SPLASH_LANES != 0,
    },
  }
  wanted = model.attention
  if wanted == "auto":
    best = {"cpu": "blocks", "gpu": "cudnn", "tpu": "splash"}.get(platform(), "xla")
    short = best == "splash" and length < SPLASH_FROM_LENGTH
    return "xla" if short or any(obstacles[best].values()) else best
  if found := [name for name, stands in obstacles.get(wanted, {}).items() if stands]:
    raise InputError(f"config.model.attention={wanted!r} does not go with {', '.join(found)}; use auto or xla")
  return wanted


def self_attention(
  implementation: str,
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGK: jax.Array,
  mask_BTT: jax.Array | None,
  segment_ids_BT: jax.Array | None,
) -> jax.Array:
  """Attention of a row to itself, [B, T, H, K] in the queries' type.

  Args:
    implementation: as `choose_attention` names them.
    q_BTHK: queries.
    k_BTGK: keys.
    v_BTGK: values.
    mask_BTT: True where query t may read key s; None = all keys up to its own.
    segment_ids_BT: what the mask was made of, or None.
  """
  if implementation == "blocks":
    return _in_blocks(q_BTHK, k_BTGK, v_BTGK, mask_BTT)
  if implementation == "splash":
    return _splash(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)
  return attention(q_BTHK, k_BTGK, v_BTGK, mask_BTT, "cudnn" if implementation == "cudnn" else "xla")


def _in_blocks(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, mask_BTT: jax.Array | None) -> jax.Array:
  batch, length, heads, width = q_BTHK.shape
  groups = k_BTGK.shape[2]
  q_BTHK = (q_BTHK.astype(jnp.float32) / math.sqrt(width)).astype(q_BTHK.dtype)
  # Heads before positions: a CPU's products want each matrix in one piece.
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
  return jnp.moveaxis(jnp.concatenate(outs, axis=3), 3, 1).reshape(q_BTHK.shape)


def _block(q_BGRTK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, allowed: jax.Array) -> jax.Array:
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  logits_BGRTS = jnp.where(allowed, product("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK), -jnp.inf)
  largest_BGRT1 = jax.lax.stop_gradient(jnp.max(logits_BGRTS, axis=-1, keepdims=True))
  powers_BGRTS = jnp.exp(logits_BGRTS - largest_BGRT1)
  out_BGRTK = product("bgrts,bgsk->bgrtk", powers_BGRTS.astype(v_BGSK.dtype), v_BGSK)
  return (out_BGRTK / jnp.sum(powers_BGRTS, axis=-1, keepdims=True)).astype(q_BGRTK.dtype)


def _splash(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
  from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

  length, heads, width = q_BTHK.shape[1:]
  q_BTHK = (q_BTHK.astype(jnp.float32) / math.sqrt(width)).astype(q_BTHK.dtype)  # the kernel doesn't scale
  axes = (RULES["batch"], RULES["length"])

  def on_device(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    ids = None if segment_ids is None else SegmentIds(segment_ids, segment_ids)
    kernel = jax.vmap(_splash_kernel(length, heads // shards("heads")))
    out = kernel(*(jnp.moveaxis(x, 1, 2) for x in (q, k, v)), ids)
    return jnp.moveaxis(out, 2, 1)

  if (mesh := jax.sharding.get_abstract_mesh()).empty:
    return on_device(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)
  queries, keys = (PartitionSpec(*axes, RULES[name]) for name in ("heads", "kv_heads"))
  specs: Any = (queries, keys, keys, PartitionSpec(*axes))
  # A Pallas call can't say how it varies over a mesh, hence no check of that.
  run = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
  return run(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)


def _splash_kernel(length: int, heads: int) -> Any:
  # Here and not above: only who uses it depends on what JAX calls experimental.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

  block = next(size for size in range(min(SPLASH_BLOCK, length), 0, -SPLASH_LANES) if length % size == 0)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=block,
    block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
    block_q_dq=block, block_kv_dq=block,
  )  # fmt: skip
  mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
  return splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=platform() != "tpu")

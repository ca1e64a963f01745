"""Causal attention by splash, JAX's Pallas kernel for TPUs; on other platforms the kernel is interpreted."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mixln_jax.parallel.rules import RULES, platform, shards

BLOCK = 512
LANES = 128  # blocks are multiples of this


def splash_attention(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGK: jax.Array,
  segment_ids_BT: jax.Array | None,
  *,
  length_minor: bool = False,
) -> jax.Array:
  """See `attention_kernels.self_attention`. Each device computes its own rows and heads.

  The length must be a multiple of LANES.

  Args:
    q_BTHK: queries.
    k_BTGK: keys.
    v_BTGK: values.
    segment_ids_BT: a query reads only keys of its own segment; None: there are no segments.
    length_minor: pass the kernel arrays whose last dimension is the length. With heads narrower than LANES, RoPE and
      the products before the kernel then fill a TPU's lanes, and the kernel transposes its tiles.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

  length, heads, width = q_BTHK.shape[1:]
  q_BTHK = (q_BTHK.astype(jnp.float32) / math.sqrt(width)).astype(q_BTHK.dtype)  # the kernel does not scale
  axes = (RULES["batch"], RULES["length"])

  def on_device(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    ids = None if segment_ids is None else SegmentIds(segment_ids, segment_ids)
    kernel = jax.vmap(_kernel(length, heads // shards("heads"), length_minor))
    out = kernel(*(jnp.moveaxis(x, 1, 2) for x in (q, k, v)), ids)
    return jnp.moveaxis(out, 2, 1)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return on_device(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)
  queries = PartitionSpec(*axes, RULES["heads"])
  keys = PartitionSpec(*axes, RULES["kv_heads"])
  specs: Any = (queries, keys, keys, PartitionSpec(*axes))
  # A Pallas call does not declare how its result varies over the mesh, so that check is switched off.
  run = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
  return run(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)


def _kernel(length: int, heads: int, length_minor: bool) -> Any:
  # Imported here so that only programs that use the kernel depend on an experimental part of JAX.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

  block = next(size for size in range(min(BLOCK, length), 0, -LANES) if length % size == 0)
  layout = splash.QKVLayout.SEQ_MINOR if length_minor else splash.QKVLayout.HEAD_DIM_MINOR
  sizes = splash.BlockSizes(
    q_layout=layout, k_layout=layout, v_layout=layout,
    block_q=block, block_kv=block, block_kv_compute=block,
    block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
    block_q_dq=block, block_kv_dq=block,
  )  # fmt: skip
  mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
  return splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=platform() != "tpu")

"""The one entry point to self-attention, with the implementation that is fastest on each platform.

All compute softmax(q·k / √K) · v with fp32 logits and softmax, H query heads sharing G key-value heads; query t reads
the keys up to t, and with segment ids those of its own segment:

  xla      the plain form, `jax.nn.dot_product_attention` with all logits [B, H, T, T] as one array: runs everywhere,
           and is the only implementation that supports encoders, which are not causal
  blocks   for CPUs: the same arithmetic, one block of queries at a time against the keys up to the block's end
           (`tuned/attention_blocks.py`)
  cudnn    cuDNN's fused attention through `jax.nn.dot_product_attention`: NVIDIA GPUs, bfloat16, no segment ids
  splash   JAX's Pallas kernel for TPUs (`tuned/attention_splash.py`); on other platforms it is interpreted, which is
           slow and only for tests
  splash_length_minor   the same kernel on arrays whose last dimension is the length, for heads narrower than 128. The
           TPU compiler estimates a faster step, but it cannot see into the kernel; so `auto` does not pick it until it
           has been timed on a chip (docs/tpu_programs.md)
"""

import jax

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.errors import InputError
from mixln_jax.model.attention import attention
from mixln_jax.model.tuned import attention_splash
from mixln_jax.model.tuned.attention_blocks import attention_in_blocks
from mixln_jax.parallel.rules import platform, shards

BEST = {"cpu": "blocks", "gpu": "cudnn", "tpu": "splash"}
# The logits of shorter rows fit a TPU's fast memory without a kernel. Compiled for v5e, `xla` has 1 MB of temporaries
# at a length of 256 and 806 MB at 1,024, where the kernel moves a third of the bytes.
SPLASH_FROM_LENGTH = 1024
CUDNN_MOST_WIDTH = 128


def choose_attention(model: ModelConfig, length: int, *, segments: bool = False) -> str:
  """The implementation to use: config.model.attention, or for `auto` the best one for the platform and the mesh in use.

  Args:
    model: config.model.
    length: tokens a row, as the model sees them.
    segments: whether there are segment ids.

  Raises:
    InputError: config.model.attention names an implementation that does not support this model, length or mesh.
  """
  if model.attention != "auto":
    obstacles = _obstacles(model.attention, model, length, segments)
    if obstacles:
      raise InputError(
        f"config.model.attention={model.attention!r} does not support {', '.join(obstacles)}; use auto or xla"
      )
    return model.attention
  best = BEST.get(platform(), "xla")
  if best == "splash" and length < SPLASH_FROM_LENGTH:
    return "xla"
  return "xla" if _obstacles(best, model, length, segments) else best


def _obstacles(implementation: str, model: ModelConfig, length: int, segments: bool) -> list[str]:
  """The reasons why an implementation can't run this model, worded for an error message."""
  width = config_lib.head_dim(model)
  encoder = {"config.model.bidirectional": model.bidirectional}
  conditions = {
    "blocks": {"config.mesh.sequence > 1": shards("length") > 1, **encoder},
    "cudnn": {
      **encoder,
      "config.mesh.sequence > 1": shards("length") > 1,
      "config.model.dtype other than bfloat16": model.dtype != "bfloat16",
      "config.data.document_mask": segments,
      f"head_dim that is not a multiple of 8, or above {CUDNN_MOST_WIDTH}": width % 8 != 0 or width > CUDNN_MOST_WIDTH,
      f"platform {platform()}": platform() != "gpu",
    },
    "splash": {
      **encoder,
      "config.mesh.sequence > 1": shards("length") > 1,
      f"length {length}, which is not a multiple of {attention_splash.LANES}": length % attention_splash.LANES != 0,
    },
  }
  conditions["splash_length_minor"] = conditions["splash"]
  return [name for name, holds in conditions.get(implementation, {}).items() if holds]


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
    implementation: one that `choose_attention` returns.
    q_BTHK: queries.
    k_BTGK: keys.
    v_BTGK: values.
    mask_BTT: True where query t may read key s; None = causal.
    segment_ids_BT: the segment ids that the mask was made from, or None.
  """
  if implementation == "blocks":
    return attention_in_blocks(q_BTHK, k_BTGK, v_BTGK, mask_BTT)
  if implementation in ("splash", "splash_length_minor"):
    length_minor = implementation == "splash_length_minor"
    return attention_splash.splash_attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, length_minor=length_minor)
  return attention(q_BTHK, k_BTGK, v_BTGK, mask_BTT, "cudnn" if implementation == "cudnn" else "xla")

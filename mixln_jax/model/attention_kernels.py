"""Self-attention behind one door, each platform with the implementation that does best there.

All compute softmax(q·k / √K) · v with fp32 logits and softmax, H query heads sharing G key-value heads; query t reads
the keys up to t, and with segment ids those of its own segment:

  xla      the plain form, `jax.nn.dot_product_attention` with all logits [B, H, T, T] as one array: runs everywhere,
           and is the only one that is not causal, for encoders
  blocks   the same arithmetic, blocks of queries against the keys up to their end, for a CPU
           (`tuned/attention_blocks.py`)
  cudnn    cuDNN's fused attention by `jax.nn.dot_product_attention`: NVIDIA GPUs, bfloat16, no segment ids
  splash   JAX's Pallas kernel for TPUs (`tuned/attention_splash.py`); elsewhere it is interpreted, which only a test
           wants
  splash_length_minor   the same with the length as the last dimension of what the kernel gets, for heads narrower than
           128. The TPU compiler promises a faster step and does not see into the kernel, so it must be asked for until
           a chip has timed it (docs/tpu_programs.md)
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
# Shorter rows stay in a TPU's fast memory without a kernel (compiled for v5e: 1 MB of temporaries at a length of 256,
# 806 MB at 1,024, where the kernel moves a third of the bytes).
SPLASH_FROM_LENGTH = 1024
CUDNN_MOST_WIDTH = 128


def choose_attention(model: ModelConfig, length: int, *, segments: bool = False) -> str:
  """The implementation that config.model.attention stands for, on the mesh in use.

  Args:
    model: config.model.
    length: tokens a row, as the model sees them.
    segments: whether there are segment ids.

  Raises:
    InputError: the implementation that is asked for can't do this.
  """
  if model.attention != "auto":
    if found := _obstacles(model.attention, model, length, segments):
      raise InputError(
        f"config.model.attention={model.attention!r} does not go with {', '.join(found)}; use auto or xla"
      )
    return model.attention
  best = BEST.get(platform(), "xla")
  if best == "splash" and length < SPLASH_FROM_LENGTH:
    return "xla"
  return "xla" if _obstacles(best, model, length, segments) else best


def _obstacles(implementation: str, model: ModelConfig, length: int, segments: bool) -> list[str]:
  """What keeps an implementation from running this model, in the words of an error message."""
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
      f"length {length}, no multiple of {attention_splash.LANES}": length % attention_splash.LANES != 0,
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
    implementation: as `choose_attention` names them.
    q_BTHK: queries.
    k_BTGK: keys.
    v_BTGK: values.
    mask_BTT: True where query t may read key s; None = all keys up to its own.
    segment_ids_BT: what the mask was made of, or None.
  """
  if implementation == "blocks":
    return attention_in_blocks(q_BTHK, k_BTGK, v_BTGK, mask_BTT)
  if implementation in ("splash", "splash_length_minor"):
    length_minor = implementation == "splash_length_minor"
    return attention_splash.splash_attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, length_minor=length_minor)
  return attention(q_BTHK, k_BTGK, v_BTGK, mask_BTT, "cudnn" if implementation == "cudnn" else "xla")

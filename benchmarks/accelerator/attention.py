"""Each implementation of attention on this device against the plain one in float32; its argument is JSON.

    {"rows": 8, "length": 1024, "heads": 16, "width": 64, "repeats": 20, "only": "cudnn"}

It prints the time of a forward and backward pass in bfloat16, and the largest error of the output and of the three
gradients, in parts of the largest entry of the reference. `pallas` is JAX's own kernel for GPUs
(jax.experimental.pallas.ops.gpu.attention), `tokamax` the package of that name where it is installed.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.model.attention import attention
from mixln_jax.model.attention_kernels import self_attention

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
OWN = ("xla", "blocks", "cudnn")
NAMES = (*OWN, "pallas", "tokamax")


def implementation(name: str) -> Attention:
  """q, k, v, each [B, T, H, K], to [B, T, H, K], causal."""
  if name in OWN:
    return lambda q, k, v: self_attention(name, q, k, v, None, None)
  if name == "pallas":
    from jax.experimental.pallas.ops.gpu import attention as pallas

    width = 128
    blocks = pallas.BlockSizes(width, width, width, width, width, width)
    return lambda q, k, v: pallas.mha(
      q, k, v, segment_ids=None, sm_scale=q.shape[-1] ** -0.5, causal=True, block_sizes=blocks
    )
  import tokamax  # pyright: ignore[reportMissingImports]

  return lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True)


def outputs(work: Attention) -> Callable[..., Any]:
  """A compiled function of q, k, v and the output's gradient: the output and the gradients of q, k and v."""

  def forward_and_back(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array) -> Any:
    result, backward = jax.vjp(work, q, k, v)
    return result, *backward(weight.astype(result.dtype))

  return jax.jit(forward_and_back)


def main() -> None:
  request = json.loads(sys.argv[1])
  shape = tuple(request[name] for name in ("rows", "length", "heads", "width"))
  drawn = [jax.random.normal(jax.random.key(seed), shape) for seed in range(4)]
  arguments = [array.astype(jnp.bfloat16) for array in drawn]
  with jax.default_matmul_precision("highest"):
    plain = outputs(lambda q, k, v: attention(q, k, v, None))
    reference = plain(*[array.astype(jnp.float32) for array in arguments])
  work = outputs(implementation(request["only"]))
  found = jax.block_until_ready(work(*arguments))
  seconds = []
  for _ in range(request["repeats"]):
    started = time.perf_counter()
    jax.block_until_ready(work(*arguments))
    seconds.append(time.perf_counter() - started)
  errors = {}
  for name, exact, near in zip(("output", "dq", "dk", "dv"), reference, found, strict=True):
    largest = jnp.max(jnp.abs(exact))
    errors[name] = float(jnp.max(jnp.abs(exact - near.astype(jnp.float32))) / largest)
  print(json.dumps({"milliseconds": statistics.median(seconds) * 1e3, "errors": errors}))


if __name__ == "__main__":
  main()

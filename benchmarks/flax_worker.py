"""One trainer of `benchmarks.train_speed`: FlaxLlamaForCausalLM, run by a Python that has transformers 4 and JAX.

Its argument is JSON: `{"shape": LlamaConfig's fields, "batch": [B, T], "dtype": "float32"}`. It has the protocol of
`benchmarks.speed_worker`. It uses optax's AdamW, clipping at 1 and donated buffers; bfloat16 computes over fp32
weights.
"""

import json
import sys
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
import process_memory
import transformers


def answer(**values: Any) -> None:
  print(json.dumps(values), flush=True)


def peak_gb() -> float:
  if statistics := jax.local_devices()[0].memory_stats():
    return statistics["peak_bytes_in_use"] / 1e9
  return process_memory.peak_gb()


def main() -> None:
  request = json.loads(sys.argv[1])
  shape = transformers.LlamaConfig(**request["shape"])
  model = transformers.FlaxLlamaForCausalLM(shape, input_shape=(1, 1), dtype=jnp.dtype(request["dtype"]))
  params = model.params
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.0))
  opt_state = jax.jit(optimizer.init)(params)
  ids = jax.random.randint(jax.random.key(0), request["batch"], 0, shape.vocab_size)

  def loss(params: Any, ids: jax.Array) -> jax.Array:
    logits = model(ids, params=params, train=True).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:]).mean()

  def train_step(params: Any, opt_state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
    value, grads = jax.value_and_grad(loss)(params, ids)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  started = time.perf_counter()
  step = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, opt_state, ids).compile()
  compile_seconds = time.perf_counter() - started
  params, opt_state, value = step(params, opt_state, ids)
  jax.block_until_ready((params, opt_state, value))
  if jax.default_backend() == "cpu":
    process_memory.forget_peak()
  answer(
    compile_seconds=compile_seconds,
    device=jax.devices()[0].device_kind,
    versions={"jax": jax.__version__, "flax": flax.__version__, "transformers": transformers.__version__},
    parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
  )
  for line in sys.stdin:
    seconds = []
    for _ in range(json.loads(line)["steps"]):
      started = time.perf_counter()
      params, opt_state, value = step(params, opt_state, ids)
      jax.block_until_ready((params, opt_state, value))
      seconds.append(time.perf_counter() - started)
    answer(seconds=seconds, peak_gb=peak_gb(), loss=float(value))


if __name__ == "__main__":
  main()

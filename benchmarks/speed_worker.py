"""One trainer of `benchmarks.train_speed`, in a process of its own: this repository's training step.

Its argument is JSON, `{"recipe": "71m", "fields": {"model.placement": "pre", …}}`. It speaks JSON, a line each: says
when it is ready, then answers `{"steps": n}` with the seconds of each, and `{"matmul": size}` with FLOPs a second.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import process_memory
from benchmarks.recipes import load
from mixln_jax import config as config_lib
from mixln_jax.model.attention_kernels import choose_attention
from mixln_jax.model.flops import train_flops_per_token
from mixln_jax.parallel.devices import peak_flops
from mixln_jax.parallel.mesh import global_batch, make_mesh
from mixln_jax.parallel.rules import on_mesh
from mixln_jax.training import step as step_lib
from mixln_jax.training.program import SingleProgram


def random_batch(config: Any) -> dict[str, np.ndarray]:
  shape = (config.train.batch_size, config.data.sequence_length + 1)
  ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
  return {"tokens_BT": ids[:, :-1], "labels_BT": ids[:, 1:], "weights_BT": np.ones(ids[:, 1:].shape, np.float32)}


def matmul(size: int, dtype: str) -> float:
  """FLOPs a second of one square product, the best of five."""
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  multiply = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(6):
    started = time.perf_counter()
    jax.block_until_ready(multiply(a, a))
    seconds.append(time.perf_counter() - started)
  return 2 * size**3 / min(seconds)


def answer(**values: Any) -> None:
  print(json.dumps(values), flush=True)


def peak_gb() -> float:
  """The most memory that the device, or where that is the CPU this process, has held."""
  if statistics := jax.local_devices()[0].memory_stats():
    return statistics["peak_bytes_in_use"] / 1e9
  return process_memory.peak_gb()


def main() -> None:
  request = json.loads(sys.argv[1])
  config = load(request["recipe"])
  config.update_from_flattened_dict(request["fields"])
  mesh = make_mesh(config.mesh)
  shardings = step_lib.state_shardings(config, mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings)()
  batch = global_batch(random_batch(config), mesh)
  started = time.perf_counter()
  program = SingleProgram(config, mesh)
  step = program.lower_step().compile()
  compile_seconds = time.perf_counter() - started
  with on_mesh(mesh):
    attention = choose_attention(config.model, config.data.sequence_length)
  state, metrics = program.run_step(step, state, batch)
  jax.block_until_ready((state, metrics))
  process_memory.forget_peak()
  answer(
    compile_seconds=compile_seconds,
    device=jax.devices()[0].device_kind,
    versions={"jax": jax.__version__, "jaxlib": jax.lib.__version__},
    tokens=batch["tokens_BT"].size,
    flops_per_token=train_flops_per_token(config.model, config.data.sequence_length),
    peak_flops=peak_flops(jax.devices()[0]),
    attention=attention,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    config=config_lib.flatten(config.model),
  )
  for line in sys.stdin:
    request = json.loads(line)
    if "matmul" in request:
      answer(flops_per_second=matmul(request["matmul"], config.model.dtype))
      continue
    seconds = []
    for _ in range(request["steps"]):
      started = time.perf_counter()
      state, metrics = program.run_step(step, state, batch)
      jax.block_until_ready((state, metrics))
      seconds.append(time.perf_counter() - started)
    answer(seconds=seconds, peak_gb=peak_gb(), loss=float(metrics["loss"]))


if __name__ == "__main__":
  main()

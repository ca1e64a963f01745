"""Cost of generation: tokens per second by batch size, and time per token as the cache grows.

    python -m benchmarks.generation [--out=benchmarks/results/generation.json]

The model has the shape of configs/tiny.py and random weights; sampling is greedy and prompts have 16 tokens. A row of
the table is one compiled loop with a cache of the given number of slots, to which 100 tokens are added. Attention reads
all slots, so the time shows the cost of the cache's size. `temporary` is the memory that the compiled program needs
besides its arguments, according to XLA: one cache, and not two, if the cache is updated in place.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks.output import output_file
from configs.tiny import get_config
from mixln_jax.inference.generate import generate_batch
from mixln_jax.model.initial import initial_params
from mixln_jax.model.transformer import empty_cache

PROMPT, NEW, REPEATS = 16, 100, 3
CASES = ((1, 128), (4, 128), (16, 128), (4, 512), (4, 2048))  # rows, slots


def seconds(run: Callable[[], Any]) -> float:
  """Median of REPEATS runs, after one that is not counted."""
  times = []
  for _ in range(REPEATS + 1):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return statistics.median(times[1:])


def measure(model: Any, params: Any, rows: int, slots: int) -> dict[str, float]:
  tokens_BT = np.full((rows, PROMPT), 7, np.int32)
  lengths_B, none = np.full(rows, PROMPT, np.int32), np.full(4, -1, np.int32)
  data = (params, tokens_BT, lengths_B, np.arange(rows), np.int32(NEW), none, (np.float32(0), None, np.uint32(0)))
  compiled = generate_batch.lower(model, slots, model.vocab_size, *data).compile()
  memory: Any = compiled.memory_analysis()
  cache = jax.eval_shape(lambda: empty_cache(model, rows, slots))
  taken = seconds(lambda: compiled(*data))
  return {
    "rows": rows,
    "slots": slots,
    "tokens_per_second": rows * NEW / taken,
    "ms_per_token": taken / NEW * 1e3,
    "cache_mb": sum(part.size * part.dtype.itemsize for part in cache.values()) / 1e6,
    "temporary_mb": memory.temp_size_in_bytes / 1e6,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=output_file)
  out = parser.parse_args().out
  model: Any = FrozenConfigDict(get_config().model)
  params = jax.tree.map(jnp.asarray, jax.jit(lambda: initial_params(model, seed=0))())
  results = []
  print(f"{'rows':>5} {'slots':>6} {'tok/s':>8} {'ms/token':>9} {'cache MB':>9} {'temporary MB':>13}")
  for rows, slots in CASES:
    one = measure(model, params, rows, slots)
    results.append(one)
    print(
      f"{rows:5} {slots:6} {one['tokens_per_second']:8.0f} {one['ms_per_token']:9.2f} "
      f"{one['cache_mb']:9.1f} {one['temporary_mb']:13.1f}",
      flush=True,
    )
  if out:
    out.write_text(json.dumps({"device": str(jax.devices()[0].device_kind), "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
  main()

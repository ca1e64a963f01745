"""Compile time of the training step by depth, with a scan and with a plain Python loop.

    python -m benchmarks.compile_time [--repeats=5] [--out=benchmarks/results/compile_time.json]

With the scan, the program of one layer is compiled once, so the time should hardly depend on the depth. Depths are
interleaved and repeated; the table has medians, and ratios to the smallest depth of the same kind. It also has
processor seconds, which are meaningful on a busy machine, where wall time is not.

--optimization_level=1 saves about a seventh of the compile time on a CPU. For configs/tiny.py, compiling took 7.4 and
6.8 processor seconds instead of 8.4 and 8.1, and a step 0.89 s instead of 0.85 s; after three steps every parameter was
bit-equal (measured on a busy machine).
"""

import argparse
import json
import os
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.output import output_file
from mixln_jax import config as config_lib
from mixln_jax.training.step import abstract_state, make_train_step

CASES = [("scan", 12), ("scan", 24), ("scan", 96), ("loop", 12), ("loop", 24)]


def compile_seconds(kind: str, num_layers: int, placement: str, options: dict[str, Any]) -> tuple[float, float]:
  """Wall and processor seconds to trace, lower and compile the step of a model of width 96, without a cache."""
  config = config_lib.base()
  config.model.update(vocab_size=2048, embed_dim=96, mlp_dim=256, num_heads=4, num_layers=num_layers)
  config.model.update(placement=placement, unroll=1 if kind == "scan" else 0)
  rows: Any = jax.ShapeDtypeStruct((16, 128), jnp.int32)
  batch = {"tokens_BT": rows, "labels_BT": rows, "weights_BT": jax.ShapeDtypeStruct((16, 128), jnp.float32)}
  jax.clear_caches()
  started, processor_started = time.perf_counter(), time.process_time()
  lowered = jax.jit(make_train_step(config), donate_argnums=0).lower(abstract_state(config), batch)
  lowered.compile(compiler_options=options)
  return time.perf_counter() - started, time.process_time() - processor_started


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--placement", default="mix:0.25")
  parser.add_argument("--cases", nargs="+", default=[f"{kind} {depth}" for kind, depth in CASES])
  parser.add_argument("--optimization_level", type=int, help="XLA's, of its back end; by default its own")
  parser.add_argument("--out", type=output_file)
  arguments = parser.parse_args()
  options = {}
  if arguments.optimization_level is not None:
    options = {"xla_backend_optimization_level": arguments.optimization_level}
  seconds: dict[str, list[float]] = {case: [] for case in arguments.cases}
  processor: dict[str, list[float]] = {case: [] for case in arguments.cases}
  for _ in range(arguments.repeats):
    for case in arguments.cases:
      kind, depth = case.split()
      by_clock, of_processor = compile_seconds(kind, int(depth), arguments.placement, options)
      seconds[case].append(by_clock)
      processor[case].append(of_processor)
  print(f"{'case':<10}{'median s':>10}{'min':>8}{'max':>8}{'ratio':>8}{'processor s':>13}")
  medians = {case: statistics.median(times) for case, times in seconds.items()}
  for case, times in seconds.items():
    smallest = medians.get(f"{case.split()[0]} 12", medians[case])
    ratio, of_processor = medians[case] / smallest, statistics.median(processor[case])
    print(f"{case:<10}{medians[case]:>10.2f}{min(times):>8.2f}{max(times):>8.2f}{ratio:>8.2f}{of_processor:>13.2f}")
  if arguments.out:
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "jax": jax.__version__}
    result = {"placement": arguments.placement, "options": options, "machine": machine, "load": os.getloadavg()}
    result |= {"seconds": seconds, "medians": medians, "processor_seconds": processor}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()

"""Cost of a diagnostic step compared with an ordinary one, on configs/tiny.py.

    python -m benchmarks.diagnostics_cost [--repeats=20] [--out=benchmarks/results/diagnostics_cost.json]

The two programs run alternately on the same state and batch. The table has medians of the wall time, which other work
on the machine lengthens, and of the processor time of all threads, which it hardly affects. Memory is what each program
needs besides its arguments and results, according to the compiler. All other steps run the ordinary program, which is
the same with and without diagnostics (a test compares them), so they cost nothing.
"""

import argparse
import json
import os
import platform
import statistics
import time
from typing import Any

import jax

from benchmarks.output import output_file
from configs import tiny
from mixln_jax.data.prepare import data_directory, prepare
from mixln_jax.opening import make_loader, set_up
from mixln_jax.parallel.mesh import global_batch
from mixln_jax.training import step as step_lib
from mixln_jax.training.program import SingleProgram

PROGRAMS = ("ordinary", "diagnostic")


def measure(placement: str, repeats: int) -> dict[str, Any]:
  """Wall and processor seconds of each program's steps, and its temporary bytes."""
  config = tiny.get_config()
  config.model.placement = placement
  config.data.directory = str(data_directory(config))
  prepare(config, progress=False)
  setup = set_up(config)
  shardings = step_lib.state_shardings(config, setup.mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings)()
  batches = make_loader(setup, config.train.batch_size).train()
  batch = global_batch(next(batches), setup.mesh)
  batches.close()
  program = SingleProgram(setup.config, setup.mesh)
  steps = {name: program.lower_step(diagnose=name == "diagnostic").compile() for name in PROGRAMS}
  result: dict[str, Any] = {name: {"wall": [], "processor": []} for name in PROGRAMS}
  for repeat in range(repeats + 1):
    for name, step in steps.items():
      wall, processor = time.perf_counter(), time.process_time()
      state, metrics = program.run_step(step, state, batch)
      jax.block_until_ready((state, metrics))
      if repeat:  # the first one warms up
        result[name]["wall"].append(time.perf_counter() - wall)
        result[name]["processor"].append(time.process_time() - processor)
  for name, step in steps.items():
    memory: Any = step.memory_analysis()
    result[name]["temporary_bytes"] = memory.temp_size_in_bytes
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--placements", nargs="+", default=["pre", "mix:0.25"])
  parser.add_argument("--out", type=output_file)
  arguments = parser.parse_args()
  results = {placement: measure(placement, arguments.repeats) for placement in arguments.placements}
  print(f"{'placement':<12}{'program':<12}{'wall s':>9}{'processor s':>13}{'temporary MB':>14}{'ratios':>24}")
  for placement, result in results.items():
    base = _medians(result["ordinary"])
    for name in PROGRAMS:
      values = _medians(result[name])
      ratios = "  ".join(f"{value / of:.2f}" for value, of in zip(values, base, strict=True))
      wall, processor, memory = values
      print(f"{placement:<12}{name:<12}{wall:>9.3f}{processor:>13.3f}{memory / 1e6:>14.1f}{ratios:>24}")
  if arguments.out:
    machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "jax": jax.__version__}
    arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def _medians(result: dict[str, Any]) -> tuple[float, float, float]:
  return statistics.median(result["wall"]), statistics.median(result["processor"]), result["temporary_bytes"]


if __name__ == "__main__":
  main()

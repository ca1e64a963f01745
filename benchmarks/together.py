"""Cost of training many runs as one program compared with training them separately, at configs/tiny.py's width.

    python -m benchmarks.together [--repeats=5] [--layers=4] [--out=benchmarks/results/together.json]

Five placements × two seeds: the joint step (`sweep --together`) and the ten separate steps run alternately on the same
batch. The table has medians of the wall time and of the processor time of all threads. Compilation is counted
separately: one program compared with one per placement. One run keeps a CPU busy already, so no gain is expected there;
an accelerator that a small model does not fill should gain.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.output import output_file
from configs import tiny
from mixln_jax.config import Config
from mixln_jax.parallel.mesh import global_batch, make_mesh
from mixln_jax.sweeps.study import make_study
from mixln_jax.training import step as step_lib
from mixln_jax.training.program import JointProgram, SingleProgram

PLACEMENTS, SEEDS = ("pre", "post", "mix:0.25", "lns", "sandwich"), (0, 1)


def measure(
  base: Config, repeats: int, placements: Sequence[str] = PLACEMENTS, seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
  """Seconds of the joint step, of all separate steps, and of their compilation."""
  runs = make_study(base, [{"model.placement": placements, "seed": seeds}]).runs(tempfile.gettempdir())
  program = JointProgram({run.name: run.config for run in runs}, base.mesh)
  mesh = make_mesh(base.mesh)
  started = time.perf_counter()
  joint_step = program.lower_step().compile()
  seconds = {"compile together": time.perf_counter() - started}
  started = time.perf_counter()
  programs = {run.config.model.placement: SingleProgram(run.config, mesh) for run in runs}
  steps = {placement: program.lower_step().compile() for placement, program in programs.items()}
  seconds["compile apart"] = time.perf_counter() - started
  tokens = np.random.default_rng(0).integers(
    0, base.model.vocab_size, (base.train.batch_size, base.data.sequence_length)
  )
  columns = {"tokens_BT": tokens.astype(np.int32), "labels_BT": np.roll(tokens, -1, 1).astype(np.int32)}
  batch = global_batch(columns | {"weights_BT": np.ones(tokens.shape, np.float32)}, mesh)
  states = [jax.jit(lambda config=run.config: step_lib.init_state(config))() for run in runs]
  joint = program.initial_state()
  times: dict[str, list[tuple[float, float]]] = {"together": [], "apart": []}
  for _ in range(repeats + 1):
    clock = time.perf_counter(), time.process_time()
    joint, _ = program.run_step(joint_step, joint, batch)
    jax.block_until_ready(joint)
    times["together"].append((time.perf_counter() - clock[0], time.process_time() - clock[1]))
    clock = time.perf_counter(), time.process_time()
    for number, run in enumerate(runs):
      placement = run.config.model.placement
      states[number], _ = programs[placement].run_step(steps[placement], states[number], batch)
    jax.block_until_ready(states)
    times["apart"].append((time.perf_counter() - clock[0], time.process_time() - clock[1]))
  for name, taken in times.items():
    seconds[name], seconds[f"{name}, processor"] = (
      statistics.median(column) for column in zip(*taken[1:], strict=True)
    )
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--out", type=output_file)
  arguments = parser.parse_args()
  base = tiny.get_config()
  base.model.num_layers = arguments.layers
  seconds = measure(base, arguments.repeats)
  for name, value in seconds.items():
    print(f"{name:<22}{value:9.3f} s")
  ratio = seconds["together, processor"] / seconds["apart, processor"]
  print(f"together / apart      {seconds['together'] / seconds['apart']:9.2f} wall, {ratio:.2f} processor time")
  if arguments.out:
    facts = {"machine": platform.machine(), "cpus": os.cpu_count(), "jax": jax.__version__}
    facts |= {"device": jax.devices()[0].device_kind, "layers": arguments.layers, "runs": len(PLACEMENTS) * len(SEEDS)}
    arguments.out.write_text(json.dumps(facts | {"seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
  main()

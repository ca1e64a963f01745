"""Cost of the parts of a training step and of the training loop on this machine.

    python -m benchmarks.parts [--only head placements checkpoint start] [--repeats=7] [--out=FILE]

  head        the head, its loss and their gradient, in chunks of several sizes
  placements  the training step of configs/llama_9m.py under each placement, against `pre`
  checkpoint  llama_130m: how long a save blocks the loop, how long until it is on disk, and a restore
  start       from the shell to the end of one step of configs/tiny.py, freshly compiled and from the cache

`benchmarks/tuned.py` compares code that is tuned for a platform with its plain form.

Cases are interleaved, and the table has medians of the wall time and of the processor time of all threads, which other
work on the machine hardly affects. Ratios are of processor time, to the first case of a group.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.output import output_file
from benchmarks.recipes import load
from benchmarks.speed_worker import random_batch
from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.model import next_token_loss
from mixln_jax.parallel.mesh import attach, global_batch, make_mesh
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.training import step as step_lib
from mixln_jax.training.program import SingleProgram

BATCH, LENGTH = 8, 256
Group = dict[str, Callable[[], Any]]  # case -> what is timed


def on_cpu(recipe: str, **fields: Any) -> Config:
  """A recipe changed to fp32, no remat and 8 rows."""
  config = load(recipe)
  config.model.update(**fields)
  return for_cpu(config)


def for_cpu(config: Config) -> Config:
  """Changes a config, in place, to fp32, no remat and 8 rows."""
  config.model.update(dtype="float32", remat="none")
  config.train.update(batch_size=BATCH, micro_batches=1)
  config.data.sequence_length = LENGTH
  return config


def normal(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def head() -> dict[str, Group]:
  groups = {}
  for recipe in ("9m", "71m"):
    model = load(recipe).model
    hidden_BTD, head_DV = normal(0, BATCH, LENGTH, model.embed_dim), normal(1, model.embed_dim, model.vocab_size) * 0.02
    labels_BT = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, model.vocab_size)

    def chunked(hidden_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, chunk: int | None) -> jax.Array:
      return next_token_loss(hidden_BTD, head_DV, labels_BT, jnp.ones_like(labels_BT), chunk=chunk)[0]

    losses = {"chunks, as chosen": partial(chunked, chunk=None)}
    losses |= {f"chunks of {chunk}": partial(chunked, chunk=chunk) for chunk in (256, 128, 64, 32, 16, 8)}
    groups[f"head and loss, llama_{recipe}"] = {
      name: partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), hidden_BTD, head_DV, labels_BT)
      for name, loss in losses.items()
    }
  return groups


class Step:
  """A training step that continues from its own state."""

  def __init__(self, config: Config):
    mesh = make_mesh(config.mesh)
    self.shardings = step_lib.state_shardings(config, mesh)
    self.state = jax.jit(lambda: step_lib.init_state(config), out_shardings=self.shardings)()
    self.batch = global_batch(random_batch(config), mesh)
    self.program = SingleProgram(config, mesh)
    self.compiled = self.program.lower_step().compile()

  def __call__(self) -> Any:
    self.state, metrics = self.program.run_step(self.compiled, self.state, self.batch)
    return self.state, metrics


def placements() -> dict[str, Group]:
  names = ("pre", "mix:0.25", *(name for name in placement.ROWS if name not in ("pre", "admin")))
  return {"training step, llama_9m": {name: Step(on_cpu("9m", placement=name)) for name in names}}


GROUPS = {"head": head, "placements": placements}


def turns(group: Group, repeats: int) -> dict[str, dict[str, list[float]]]:
  """Wall and processor seconds of each repetition of each case; cases are interleaved, after one warm-up."""
  found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in group}
  for repeat in range(repeats + 1):
    for name, work in group.items():
      wall, processor = time.perf_counter(), time.process_time()
      jax.block_until_ready(work())
      if repeat:
        found[name]["wall"].append(time.perf_counter() - wall)
        found[name]["processor"].append(time.process_time() - processor)
  return found


def times(group: Group, repeats: int) -> dict[str, dict[str, float]]:
  """Medians of each case."""
  medians = {}
  for name, kinds in turns(group, repeats).items():
    medians[name] = {kind: statistics.median(seconds) for kind, seconds in kinds.items()}
  return medians


def checkpoint(repeats: int) -> dict[str, Any]:
  """Median seconds of a step, of the part of a save that blocks the loop, of a whole save, and of a restore."""
  step = Step(on_cpu("130m"))
  abstract = attach(jax.eval_shape(lambda s: s, step.state), step.shardings)
  seconds: dict[str, list[float]] = {name: [] for name in ("step", "stall", "save", "restore")}

  def timed(name: str, work: Callable[[], Any], since: float | None = None) -> float:
    started = time.perf_counter() if since is None else since
    jax.block_until_ready(work())
    seconds[name].append(time.perf_counter() - started)
    return started

  jax.block_until_ready(step())
  for _ in range(repeats):
    timed("step", step)
    folder = tempfile.mkdtemp()
    checkpoints = Checkpoints(folder)
    started = timed("stall", partial(checkpoints.save, 1, {"state": step.state}, {}))
    timed("save", checkpoints.wait, since=started)
    timed("restore", partial(checkpoints.restore, 1, {"state": abstract}))
    checkpoints.close()
    shutil.rmtree(folder)
  gigabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(step.state)) / 1e9
  return {"gigabytes": gigabytes} | {name: statistics.median(found) for name, found in seconds.items()}


def start(repeats: int) -> dict[str, Any]:
  """Median seconds of a whole run of one step in a new process, without and with a compile cache."""
  seconds: dict[str, list[float]] = {"compiled": [], "cached": []}
  command = [sys.executable, "-m", "mixln_jax", "train", "--config=configs/tiny.py"]
  fields = ("train.num_steps=1", "train.sample_tokens=0", "evaluate.max_tokens=256", "logging.tensorboard=False")
  for _ in range(repeats):
    with tempfile.TemporaryDirectory() as folder:
      for name in seconds:
        arguments = [*command, f"--workdir={folder}/{name}", *(f"--config.{field}" for field in fields)]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        started = time.perf_counter()
        subprocess.run(arguments, env=environment, check=True, capture_output=True)
        seconds[name].append(time.perf_counter() - started)
  return {name: statistics.median(found) for name, found in seconds.items()}


ALONE = {"checkpoint": checkpoint, "start": start}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", nargs="+", choices=[*GROUPS, *ALONE], default=[*GROUPS, *ALONE])
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--out", type=output_file, help="parts that it has already are kept unless measured again")
  arguments = parser.parse_args()
  stored = json.loads(arguments.out.read_text())["parts"] if arguments.out and arguments.out.is_file() else {}
  for name in arguments.only:
    if name in ALONE:
      stored[name] = ALONE[name](min(arguments.repeats, 3))
      print(f"\n{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in stored[name].items()), flush=True)
    else:
      stored[name] = {title: times(group, arguments.repeats) for title, group in GROUPS[name]().items()}
      for title, cases in stored[name].items():
        show(title, cases)
    if arguments.out:
      machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "jax": jax.__version__}
      arguments.out.write_text(json.dumps({"machine": machine, "parts": stored}, indent=1) + "\n")


def show(title: str, cases: dict[str, dict[str, float]]) -> None:
  """One line per case."""
  print(f"\n{title:<40}{'wall ms':>10}{'processor ms':>14}{'ratio':>8}")
  first = next(iter(cases.values()))["processor"]
  for name, found in cases.items():
    values = f"{found['wall'] * 1e3:>10.1f}{found['processor'] * 1e3:>14.1f}{found['processor'] / first:>8.3f}"
    print(f"{name:<40}{values}", flush=True)


if __name__ == "__main__":
  main()

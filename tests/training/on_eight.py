"""Trains with the optimizer that it is given on eight devices and on one; run as a script, in a process of its own."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from helpers import EXACT, small_model

from mixln_jax import config as config_lib
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.parallel.rules import batch_sharding
from mixln_jax.training import step as step_lib
from mixln_jax.training.program import SingleProgram

MESHES = {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}


def config_of(name, mesh):
  config = config_lib.base()
  # Two heads, which the axis tensor divides; wide enough that Adafactor keeps sums of rows and columns of some.
  config.model.update(small_model(vocab_size=64, embed_dim=160, mlp_dim=128, num_layers=2))
  config.optimizer.update(name=name, warmup_steps=0, schedule="constant", weight_decay=0.1)
  config.train.update(num_steps=10, batch_size=8)
  config.data.sequence_length = 8
  config.mesh.update(mesh)
  return config


def run(name, mesh):
  config = config_of(name, mesh)
  sizes = [1, 8]["tensor" in mesh]
  mesh = make_mesh(config.mesh, jax.devices()[:sizes])
  shardings = step_lib.state_shardings(config, mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings)()
  program = SingleProgram(config, mesh)
  step = program.lower_step().compile(EXACT)
  losses = []
  for seed in range(4):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.model.vocab_size, (8, 8)).astype(np.int32)
    batch = {"tokens_BT": tokens, "labels_BT": np.roll(tokens, -1, 1), "weights_BT": np.ones((8, 8), np.float32)}
    state, metrics = program.run_step(step, state, jax.device_put(batch, batch_sharding(mesh)))
    losses.append(float(metrics["loss"]))
  held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state.opt_state) for shard in leaf.addressable_shards[:1])
  return losses, jax.device_get(state.params), held / sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))


def main(name):
  runs = {label: run(name, mesh) for label, mesh in MESHES.items()}
  apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), runs["one"][1], runs["eight"][1])
  found = {
    "losses": {label: losses for label, (losses, _, _) in runs.items()},
    "furthest": max(jax.tree.leaves(apart)),
    "state_of_one_device": runs["eight"][2],
  }
  print(json.dumps(found))


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  main(sys.argv[1])

"""Run in a process of its own: trains the same small model on several meshes of 8 virtual devices; prints JSON."""

import json
import sys
import tempfile

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)

from mixln_jax import config as config_lib
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.training import step as step_lib
from mixln_jax.training.setup import Evaluator, compile_train_step, make_loader, set_up

MESHES = {
  "data 8": {"data": -1},
  "fsdp 8": {"data": 1, "fsdp": 8},
  "fsdp 4, tensor 2": {"data": 1, "fsdp": -1, "tensor": 2},
  "data 2, fsdp 2, sequence 2": {"data": 2, "fsdp": 2, "sequence": 2},
}


def run(config_json, mesh):
  from mixln_jax.parallel.mesh import attach, global_batch

  config = config_lib.from_json(config_json)
  config.mesh.update(mesh)
  setup = set_up(config)
  shardings = step_lib.state_shardings(config, setup.mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings)()
  initial = {
    jax.tree_util.keystr(path): np.asarray(leaf).view(np.uint32).sum(dtype=np.uint64).item()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  }
  device = jax.devices()[0]
  shards = [s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == device]
  train_step = compile_train_step(setup, shardings)
  losses = []
  for batch in make_loader(setup, config.train.batch_size).train():
    state, metrics = train_step(state, global_batch(batch, setup.mesh))
    losses.append(float(metrics["loss"]))
    if len(losses) == 4:
      break
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(folder, keep_last=1, keep_best=0)
    checkpoints.save(4, {"params": state.params}, {})
    fsdp = config_lib.from_json(config_json)
    fsdp.mesh.update(data=1, fsdp=8)
    other = step_lib.state_shardings(fsdp, set_up(fsdp).mesh).params
    abstract = attach(jax.eval_shape(lambda p: p, state.params), other)
    restored = checkpoints.restore(4, {"params": abstract})["params"]
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(restored), strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    checkpoints.close()
  return {
    "initial": initial,
    "losses": losses,
    "validation": Evaluator(setup)(state.params).loss,
    "bytes_on_one_device": sum(shards),
    "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    "restored_on_fsdp_8": same,
  }


if __name__ == "__main__":
  text = sys.stdin.read()
  print(json.dumps({name: run(text, mesh) for name, mesh in MESHES.items()}))

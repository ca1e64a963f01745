"""One program, any mesh: the same initial bits, the same samples, the same losses, really sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.training import step as step_lib
from mixln_jax.training.setup import Evaluator, compile_train_step, make_loader, set_up

SCRIPT = Path(__file__).with_name("eight_devices.py")


@pytest.fixture(scope="module")
def config(make_config):
  # Widths that 8 devices divide, some not by chance.
  return make_config(**{"model.vocab_size": 264, "model.mlp_dim": 24, "train.micro_batches": 1, "train.batch_size": 8})


@pytest.fixture(scope="module")
def on_eight(config):
  result = subprocess.run(
    [sys.executable, str(SCRIPT)],
    input=config_lib.to_json(config),
    capture_output=True,
    text=True,
    timeout=300,
    env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
    check=False,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_one(config):
  from mixln_jax.parallel.mesh import global_batch

  setup = set_up(config)
  shardings = step_lib.state_shardings(config, setup.mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings)()
  initial = {
    jax.tree_util.keystr(path): np.asarray(leaf).view(np.uint32).sum(dtype=np.uint64).item()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  }
  step, losses = compile_train_step(setup, shardings), []
  for batch in make_loader(setup, config.train.batch_size).train():
    state, metrics = step(state, global_batch(batch, setup.mesh))
    losses.append(float(metrics["loss"]))
    if len(losses) == 4:
      break
  return {"initial": initial, "losses": losses, "validation": Evaluator(setup)(state.params).loss}


MESHES = ["data 8", "fsdp 8", "fsdp 4, tensor 2", "data 2, fsdp 2, sequence 2"]


@pytest.mark.parametrize("mesh", MESHES)
def test_equal_to_one_device(on_eight, on_one, mesh):
  assert on_eight[mesh]["initial"] == on_one["initial"]
  np.testing.assert_allclose(on_eight[mesh]["losses"], on_one["losses"], rtol=1e-5)
  np.testing.assert_allclose(on_eight[mesh]["validation"], on_one["validation"], rtol=1e-5)
  assert on_eight[mesh]["restored_on_fsdp_8"]


def test_the_state_is_really_sharded(on_eight):
  share = {name: result["bytes_on_one_device"] / result["bytes"] for name, result in on_eight.items()}
  assert share["data 8"] == 1
  assert share["fsdp 8"] < 0.14  # an eighth, and the gains
  assert share["fsdp 4, tensor 2"] < 0.14
  assert share["data 2, fsdp 2, sequence 2"] < 0.52


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ({"data": 3}, "the axes make 3 devices|a multiple of 3 devices, but there are 1"),
    ({"data": 1, "fsdp": 2}, "a multiple of 2 devices, but there are 1"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, words):
  mesh = config_lib.base().mesh
  mesh.update(sizes)
  with pytest.raises(InputError, match=words):
    make_mesh(mesh)


def test_a_logical_axis_without_a_rule_is_refused():
  import flax.linen as nn

  from mixln_jax.parallel.rules import shardings

  boxed = {"w": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), "float32"), ("embde",))}
  with pytest.raises(ValueError, match="logical axis 'embde' has no rule"):
    shardings(boxed, make_mesh(config_lib.base().mesh))

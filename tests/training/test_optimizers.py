"""Every optimizer: optax's update of each matrix alone, exact resumption, meshes, runs together, types, memory."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import EXACT, random_params, small_model

from mixln_jax import config as config_lib
from mixln_jax.model.parameters import parameters
from mixln_jax.planning import plan as planning
from mixln_jax.planning import topology
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.training import optimizer as optimizer_lib
from mixln_jax.training.checkpoints import split
from mixln_jax.training.optimizer import folded_shape
from mixln_jax.training.program import JointProgram
from mixln_jax.training.step import init_state, make_train_step
from training import on_eight

OPTIMIZERS = config_lib.OPTIMIZERS
OTHERS = ("adafactor", "adamw", "lion", "sgd")
ROOT = Path(__file__).parents[2]


def config_with(name, **fields):
  config = config_lib.base()
  # Grouped queries, an MLP stored wider than it is, a mixture, and biases.
  config.model.update(small_model(num_layers=2, num_kv_heads=1, mlp_pad_to=16, placement="post*1,pre*1"))
  config.model.qkv_bias = True
  config.optimizer.update(name=name, clip_norm=0.0, warmup_steps=0, schedule="constant")
  config.train.update(num_steps=10, batch_size=4)
  config.data.sequence_length = 8
  config.update_from_flattened_dict(fields)
  return config


def batch_of(config, seed=0):
  rng = np.random.default_rng(seed)
  shape = (config.train.batch_size, config.data.sequence_length)
  tokens, labels = (jnp.asarray(rng.integers(0, config.model.vocab_size, shape), jnp.int32) for _ in range(2))
  return {"tokens_BT": tokens, "labels_BT": labels, "weights_BT": jnp.ones(shape, jnp.float32)}


def unstacked(config, tree):
  """Each layer's tensor alone, matrices with two dimensions and without padding; the others as they are."""
  single = {}
  for path, param in parameters(config.model).items():
    leaf = tree["layers"][param.name] if param.in_layers else tree[path]
    if not param.in_layers:
      single[path] = leaf
      continue
    leaf = leaf.reshape(folded_shape(param))
    wide = [math.prod(param.logical_shape[axis] for axis in axes) for axes in param.folded_axes]
    for layer in range(config.model.num_layers):
      single[f"{path}.{layer}"] = leaf[(layer, *(slice(size) for size in wide[1:]))]
  return single


def of_optax(config):
  """The same optimizer on a tree of plain matrices, vectors and scalars."""
  if config.optimizer.name == "adafactor":
    return optax.adafactor(1.0)

  def numbers(params):
    matrices = {path for path, param in parameters(config.model).items() if param.is_layer_matrix}
    known = optax.contrib.MuonDimensionNumbers(0, 1)
    return {name: known if name.split(".")[0] in matrices else None for name in params}

  rms = config.optimizer.muon_rms or None
  return optax.contrib.muon(1.0, muon_weight_dimension_numbers=numbers, consistent_rms=rms)


@pytest.mark.parametrize(("name", "rms"), [("muon", 0.2), ("muon", 0.0), ("adafactor", 0.2)])
def test_a_stacked_tensor_is_updated_as_its_matrices_alone(name, rms):
  """Catches layers that share a norm or a sum, heads on the wrong side, padding that counts, and a wrong sign.

  In fp64: Muon's iterations enlarge the rounding of fp32 a few hundred times, which two programs round differently.
  """
  config = config_with(name, **{"optimizer.muon_rms": rms})
  if name == "adafactor":
    # Wide enough for sums of rows and columns; without padding, which the root mean square of a whole matrix sees.
    config.model.update(embed_dim=136, mlp_dim=130, mlp_pad_to=1)
  with jax.enable_x64(True):
    params, *gradients = (
      jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(config.model, seed)) for seed in range(3)
    )
    ours, plain = optimizer_lib.OPTIMIZERS[name](config, parameters(config.model)), of_optax(config)
    state, single = ours.init(params), unstacked(config, params)
    plain_state, update_plain = plain.init(single), jax.jit(plain.update)
    update_ours = jax.jit(lambda *a: ours.update(*a, accept=jnp.bool_(True)))
    for grads in gradients:
      updates, state = update_ours(grads, state, params)
      expected, plain_state = update_plain(unstacked(config, grads), plain_state, single)
      for path, update in unstacked(config, updates).items():
        np.testing.assert_allclose(update, -expected[path], atol=1e-10, rtol=1e-10, err_msg=path)


@pytest.fixture(scope="module")
def compiled_step():
  """`compiled_step(name) -> (config, step(state, batch, columns, rate))`, compiled once for all tests."""

  @functools.cache
  def make(name):
    config = config_with(name, **{"optimizer.moment_dtype": "bfloat16", "optimizer.weight_decay": 0.1})
    return config, jax.jit(make_train_step(config), compiler_options=EXACT)

  return make


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_types_are_kept_a_rate_of_zero_changes_nothing_and_so_does_a_rejected_update(name, compiled_step):
  """Catches a state that changes its type in the second step, decay or noise that is not times the rate, and moments
  that take a gradient which is not finite."""
  config, step = compiled_step(name)
  state = init_state(config)
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
  assert {leaf.dtype for leaf in moments} == {jnp.dtype("bfloat16")}
  first, _ = step(state, batch_of(config), None, jnp.float32(0.0))
  for before, after in zip(jax.tree.leaves(state.params), jax.tree.leaves(first.params), strict=True):
    np.testing.assert_array_equal(before, after)
  for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(first), strict=True):
    assert (before.shape, before.dtype) == (after.shape, after.dtype)
  broken = batch_of(config) | {"weights_BT": jnp.full((4, 8), jnp.nan)}
  second, metrics = step(first, broken, None, jnp.float32(1e-2))
  assert metrics["skipped_in_a_row"] == 1
  for before, after in zip(jax.tree.leaves(first.opt_state), jax.tree.leaves(second.opt_state), strict=True):
    np.testing.assert_array_equal(before, after)
  third, _ = step(second, batch_of(config), None, jnp.float32(1e-2))
  changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), second.params, third.params)
  assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_was_saved_continues_to_the_same_bits(name, compiled_step, tmp_path):
  """Catches a part of the state that a checkpoint lacks or restores as something else, after any of three steps."""
  config, step = compiled_step(name)
  rate = jnp.float32(1e-2)
  states = [init_state(config)]
  for seed in range(3):
    states.append(step(states[-1], batch_of(config, seed), None, rate)[0])
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=9, keep_best=0, keep_steps=())
  for number, state in enumerate(states):
    checkpoints.save(number, split(state), {"config": {}}, None)
  checkpoints.wait()
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), split(states[0]))
  for number in range(3):
    trees = checkpoints.restore(number, abstract)
    state = states[0].replace(params=trees["params"], **trees["rest"])
    for seed in range(number, 3):
      state, _ = step(state, batch_of(config, seed), None, rate)
    for expected, actual in zip(jax.tree.leaves(states[3]), jax.tree.leaves(state), strict=True):
      np.testing.assert_array_equal(expected, actual)
  checkpoints.close()


@pytest.mark.parametrize("name", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_eight_devices_train_as_one(name):
  """Catches a matrix of which each device orthogonalises its own piece, and moments that every device has whole."""
  script = Path(on_eight.__file__)
  environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
  result = subprocess.run(
    [sys.executable, str(script), name], capture_output=True, text=True, timeout=600, env=environment, check=False
  )
  assert result.returncode == 0, result.stderr[-3000:]
  found = json.loads(result.stdout.splitlines()[-1])
  np.testing.assert_allclose(found["losses"]["eight"], found["losses"]["one"], rtol=1e-5)
  if name != "lion":  # the sign of a gradient that rounds to either side of 0 is an update of twice the rate
    assert found["furthest"] < 1e-5
  # A fourth of all: four ways; every device has the gains, Adafactor's sums of rows and columns, and counts.
  assert found["state_of_one_device"] < (0.5 if name == "adafactor" else 0.27)


@pytest.mark.parametrize("name", ["muon", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_runs_together_are_the_runs_alone(name):
  """Catches a state whose leaves two placements can't share, and a transformation that mixes the runs."""
  configs = {}
  for placement, rate in (("post*1,pre*1+gpas", 1e-3), ("pre", 1e-2)):
    configs[placement] = config_with(name, **{"model.placement": placement, "optimizer.learning_rate": rate})
  program = JointProgram(configs, config_lib.base().mesh)
  state, compiled = program.initial_state(), program.lower_step().compile()
  sharding = jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec())
  alone = [init_state(config) for config in configs.values()]
  steps = [jax.jit(make_train_step(config)) for config in configs.values()]
  for seed in range(2):
    batch = batch_of(program.config, seed)
    alone = [step(own, batch)[0] for step, own in zip(steps, alone, strict=True)]
    state, _ = program.run_step(compiled, state, jax.device_put(batch, sharding))
  for index, expected in enumerate(alone):
    own = program.own(state, index)
    assert jax.tree.structure(own) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def test_a_plan_counts_what_the_optimizer_holds_and_does():
  """Catches a plan that takes every optimizer for Adam: moments by hand, in bytes, and Muon's products."""
  d, hidden, vocab, layers = 128, 256, 512, 3

  def plan(name):
    config = config_with(name)
    config.model.update(
      vocab_size=vocab, embed_dim=d, mlp_dim=hidden, mlp_pad_to=1, num_layers=layers, num_heads=4, num_kv_heads=2
    )
    config.model.update(placement="pre", qkv_bias=False)
    config.evaluate.batch_size = 4
    config.mesh.data = 1
    return planning.arithmetic(config, topology.parse("cpu", config))

  query, value, wide = d * d, d * d // 2, d * hidden
  matrices = layers * (2 * query + 2 * value + 3 * wide)
  gains = layers * 2 * d + d
  ends = 2 * vocab * d
  assert plan("adamw").counted.moments == 4 * 2 * (matrices + ends + gains)
  assert plan("lion").counted.moments == plan("sgd").counted.moments == 4 * (matrices + ends + gains)
  coefficients = 3  # of Muon's polynomial, which optax keeps in its state
  assert plan("muon").counted.moments == 4 * (matrices + 2 * (ends + gains) + coefficients)
  # Sums of rows and columns where both sides have 128 or more, and a number for what is not there.
  rows_and_columns = layers * (2 * (d + d) + 3 * (d + hidden) + 5) + 2 * (d + vocab + 1)
  narrow = layers * 2 * (value + 2)
  vectors = gains + 2 * (2 * layers + 1)
  counts = layers  # one a layer
  assert plan("adafactor").counted.moments == 4 * (rows_and_columns + narrow + vectors + counts)

  def iterations(short, long):
    return 5 * (4 * short**2 * long + 2 * short**3)

  by_hand = layers * (2 * iterations(d, d) + 2 * iterations(d // 2, d) + 3 * iterations(d, hidden))
  assert plan("muon").update_flops == by_hand
  assert plan("adamw").update_flops == 0


def test_every_name_has_an_optimizer():
  """Catches a name that the config offers and nobody built."""
  assert set(OPTIMIZERS) == set(optimizer_lib.OPTIMIZERS)

"""The step: accumulation weighs tokens, the update is AdamW, bf16 parameters and moments are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_params, random_tokens
from model.rounding import NETWORK

from mixln_jax.model import Columns
from mixln_jax.parallel.mesh import global_batch, make_mesh
from mixln_jax.placement import parse
from mixln_jax.training.program import SingleProgram, program_hash
from mixln_jax.training.step import (
  TrainState,
  init_moments,
  init_state,
  make_optimizer,
  make_train_step,
)


def unequal_batch(config, rows=8, length=12, seed=1):
  """Rows of very different numbers of counted positions; one has none."""
  tokens = random_tokens(config.model, rows, length, seed)
  lengths = np.array([12, 1, 3, 7, 2, 11, 0, 5])[:rows]
  weights = (np.arange(length)[None] + 1 < lengths[:, None]).astype(np.float32)
  return {"tokens_BT": tokens, "labels_BT": jnp.roll(tokens, -1, 1), "weights_BT": jnp.asarray(weights)}


def state_of(config, params):
  moments = init_moments(make_optimizer(config), params, config.optimizer.moment_dtype)
  return TrainState(jnp.int32(3), params, moments, jnp.int32(0), jnp.int32(0))  # past the warm-up's first, empty update


def run_step(config, params, batch, **arguments):
  return jax.jit(make_train_step(config))(state_of(config, params), batch, **arguments)


# Adam divides a gradient by its own size: its relative error is one of the update, which is at most the learning rate,
# 1e-3 here. A thousandth of it, since a gradient's entry may be a hundredth of the largest one. Moments are at most a
# tenth of a gradient, whose entries are under 1.
UPDATE = 1e-6


def close(actual, expected, tolerance=UPDATE):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulation_equals_the_whole_batch_with_unequal_padding(make_config, micro_batches):
  config = make_config()
  params, batch = random_params(config.model), unequal_batch(config)
  whole, metrics = run_step(config, params, batch)
  config.train.micro_batches = micro_batches
  cut, cut_metrics = run_step(config, params, batch)
  close(cut.params, whole.params)
  close(cut.opt_state, whole.opt_state)
  for name in ("loss", "gradient_norm", "tokens"):
    np.testing.assert_allclose(cut_metrics[name], metrics[name], rtol=NETWORK)
  assert metrics["tokens"] == 11 + 0 + 2 + 6 + 1 + 10 + 0 + 4


def test_the_loss_is_the_mean_over_counted_tokens(make_config):
  config = make_config()
  params, batch = random_params(config.model), unequal_batch(config)
  _, metrics = run_step(config, params, batch)
  from mixln_jax.model import Transformer

  logits = Transformer(config.model).apply({"params": params}, batch["tokens_BT"])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels_BT"])
  counted = batch["weights_BT"] > 0
  np.testing.assert_allclose(metrics["loss"], losses[counted].mean(), rtol=NETWORK)


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_the_update_is_optax_adamw_with_decay_on_matrices_only(make_config, clip_norm):
  config = make_config(
    **{"optimizer.weight_decay": 0.3, "optimizer.clip_norm": clip_norm, "optimizer.schedule": "constant"}
  )
  params, batch = random_params(config.model), unequal_batch(config)
  after, metrics = run_step(config, params, batch)

  from mixln_jax.model import Transformer
  from mixln_jax.training.step import loss_sum

  def mean(p):
    total, count = loss_sum(Transformer(config.model), p, batch)
    return total / count

  grads = jax.jit(jax.grad(mean))(params)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=NETWORK)
  assert norm > 0.05  # so that the clip really cuts
  grads = jax.tree.map(lambda g: g * min(1.0, clip_norm / norm), grads) if clip_norm else grads
  mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)
  adamw = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.3, mask=mask)
  updates, _ = adamw.update(grads, adamw.init(params), params)
  close(after.params, optax.apply_updates(params, updates), 2 * UPDATE)  # optax's order of the formula too
  assert metrics["learning_rate"] == np.float32(1e-3)


@pytest.mark.slow  # tests/sweeps/test_together.py compares runs trained together by default
def test_five_placements_as_one_program_equal_five_runs(make_config):
  names, rates = ("pre", "post", "mix:0.5", "deepnorm", "lns"), (1e-3, 4e-3, 2e-3, 1e-3, 3e-3)
  config = make_config(**{"model.placement": "pre", "train.num_steps": 20})
  batches = [unequal_batch(config, seed=seed) for seed in range(10)]

  def ten_steps(config, state, **data):
    step, losses = jax.jit(make_train_step(config)), []
    for batch in batches:
      state, metrics = step(state, batch, **data)
      losses.append(metrics["loss"])
    return state, np.array(losses)

  alone, starts = [], []
  for name, rate in zip(names, rates, strict=True):
    one = make_config(**{"model.placement": name, "optimizer.learning_rate": rate, "train.num_steps": 20})
    starts.append(jax.jit(lambda one=one: init_state(one))())
    alone.append(ten_steps(one, starts[-1]))

  columns = Columns.of_many([parse(name, 2) for name in names])
  step = jax.jit(jax.vmap(make_train_step(config), in_axes=(0, None, 0, 0)))
  states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
  losses = []
  for batch in batches:
    states, metrics = step(states, batch, columns, jnp.array(rates))
    losses.append(metrics["loss"])
  for index, (state, expected) in enumerate(alone):
    np.testing.assert_allclose(np.array(losses)[:, index], expected, rtol=NETWORK, err_msg=names[index])
    close(jax.tree.map(lambda leaf, index=index: leaf[index], states.params), state.params, 10 * UPDATE)  # ten updates
  assert len({round(float(losses[-1][index]), 4) for index in range(5)}) == 5


def test_the_first_update_of_a_warm_up_is_empty_and_the_count_grows(make_config):
  config = make_config()
  state = jax.jit(lambda: init_state(config))()
  after, metrics = jax.jit(make_train_step(config))(state, unequal_batch(config))
  close(after.params, state.params, 0)
  assert metrics["learning_rate"] == 0
  assert int(after.step) == 1
  assert any(np.any(leaf) for leaf in jax.tree.leaves(after.opt_state))


@pytest.mark.parametrize(
  ("param_dtype", "moment_dtype"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_parameters_and_moments_keep_their_types(make_config, param_dtype, moment_dtype):
  config = make_config(
    **{"model.param_dtype": param_dtype, "model.dtype": "bfloat16", "optimizer.moment_dtype": moment_dtype}
  )
  state = jax.jit(lambda: init_state(config))()
  step = jax.jit(make_train_step(config))
  for _ in range(3):
    state, _ = step(state, unequal_batch(config))
  assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {param_dtype}
  adam = optax.tree.get(state.opt_state, "ScaleByAdamState")
  assert {str(x.dtype) for x in jax.tree.leaves((adam.mu, adam.nu))} == {moment_dtype}


def test_runs_of_two_rates_are_one_program_that_takes_the_rate(make_config):
  """Would catch a rate that is compiled in, which a study pays for once a rate, and one that is not the config's."""
  hashes, rates = set(), {}
  for rate in (1e-3, 3e-2):
    config = make_config(**{"optimizer.learning_rate": rate, "optimizer.schedule": "constant"})
    program = SingleProgram(config, make_mesh(config.mesh))
    lowered = program.lower_step()
    hashes.add(program_hash(lowered))
    state = program.initial_state().replace(step=jnp.int32(5))
    batch = {name: np.asarray(column) for name, column in unequal_batch(config, length=32).items()}
    _, metrics = program.run_step(lowered.compile(), state, global_batch(batch, program.mesh))
    rates[rate] = float(metrics["learning_rate"])
  assert len(hashes) == 1
  assert rates == {rate: pytest.approx(rate, rel=1e-7) for rate in rates}

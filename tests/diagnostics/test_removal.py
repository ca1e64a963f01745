"""Layer removal by flag: nothing lost by a layer that does nothing, equal to surgery on the weights, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
from diagnostics.test_depth import batch_of
from helpers import random_params, small_model
from model.rounding import NETWORK

from mixln_jax.diagnostics.removal import make_removal_step, removal, without_blocks
from mixln_jax.model import Columns, Transformer
from mixln_jax.model.loss import batch_loss
from mixln_jax.placement import Table, parse


def test_a_layer_that_does_nothing_costs_nothing():
  model = small_model(placement="post*1,pre*3")
  params = random_params(model)
  for name in ("output", "down"):
    params["layers"][name] = params["layers"][name].at[2].set(0)
  batch = batch_of(model)
  result = removal(jax.jit(make_removal_step(model)), params, [batch, batch], 4, [1])
  drops = np.array(result["blocks"]["1"]) - result["loss"]
  assert drops[2] == 0
  assert (np.abs(np.delete(drops, 2)) > 1e-3).all()
  total, count, _ = batch_loss(Transformer(model), params, batch)
  np.testing.assert_allclose(result["loss"], total / count, rtol=NETWORK)


def test_a_flag_equals_surgery_and_all_blocks_are_one_program():
  """Layers are cut out of the stacked weights and of the table; with Post-LN, two norms and 1/√l in the middle."""
  name = "lns*1,post*1,sandwich*1,lns*1,post*1"
  model = small_model(placement=name, num_layers=5)
  params, batch = random_params(model), batch_of(model)
  table = parse(name, 5)

  def surgery(first, size):
    kept = [index for index in range(5) if not first <= index < first + size]
    shorter = small_model(placement="pre", num_layers=len(kept), unroll=0)
    columns = Columns.of(Table(tuple(table.layers[index] for index in kept)))
    cut = {**params, "layers": jax.tree.map(lambda leaf: leaf[jnp.array(kept)], params["layers"])}
    total, count, _ = batch_loss(Transformer(shorter), cut, batch, columns=columns)
    return float(total / count)

  step = jax.jit(make_removal_step(model))
  result = removal(step, params, [batch], 5, [1, 2, 4])
  assert step._cache_size() == 1
  assert {size: len(losses) for size, losses in result["blocks"].items()} == {"1": 5, "2": 4, "4": 2}
  for first, size in ((0, 1), (1, 1), (2, 1), (4, 1), (1, 2)):
    np.testing.assert_allclose(result["blocks"][str(size)][first], surgery(first, size), rtol=NETWORK)


def test_which_flags_a_block_has_and_a_task_is_scored_with_them():
  np.testing.assert_array_equal(without_blocks(4, 3), [[0, 0, 0, 1], [1, 0, 0, 0]])
  model = small_model(placement="pre")
  params, batch = random_params(model), batch_of(model)

  def score(given, keep_L):
    assert given is params
    return float(keep_L @ jnp.array([1, 2, 4, 8]))

  result = removal(jax.jit(make_removal_step(model)), params, [batch], 4, [2], {"bits": score})
  assert result["scores"] == {"bits": {"score": 15.0, "blocks": {"2": [12.0, 9.0, 3.0]}}}

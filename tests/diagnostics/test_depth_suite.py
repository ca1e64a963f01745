"""The depth suite: the golden arrays, cases solved by hand, and every wiring against surgery on the weights."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnostics.test_depth import batch_of
from helpers import random_params, random_tokens, small_model
from model import test_golden
from model.rounding import NETWORK

from mixln_jax.diagnostics import depth_suite as suite_lib
from mixln_jax.diagnostics import jacobian, swaps
from mixln_jax.diagnostics.depth_suite import as_batches, depth_suite, fractions
from mixln_jax.diagnostics.removal import make_removal_step, removal
from mixln_jax.errors import InputError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "topology"
TOLERANCE = 1e-4  # of a float32 implementation, by the files' own account


@pytest.fixture(scope="module", params=["mix_1_of_4", pytest.param("pre", marks=pytest.mark.slow)])
def golden(request):
  """The arrays of a golden file; its model's, all of them; and the random estimate of the Jacobian."""
  name = request.param
  _, config, params, _ = test_golden.load(name)
  with np.load(GOLDEN / f"depth_metrics_{name}.npz", allow_pickle=False) as file:
    expected = dict(file)
  calibration, heldout = expected.pop("calibration_ids"), expected.pop("heldout_ids")
  sequences = json.loads(bytes(expected.pop("meta")))["formulas"]["jacobian/summed_*"]
  assert "first 4 calibration sequences" in sequences
  run = functools.partial(depth_suite, config.model, params, calibration, heldout, jacobian_sequences=4)
  return expected, run(jacobian_exact=True), run(measurements=["jacobian"], jacobian_vectors=24)


def test_every_golden_array(golden):
  """Any formula read in another way: the other mean, another position, another layer's norm that moves."""
  expected, found, _ = golden
  for name, array in expected.items():
    np.testing.assert_allclose(found[name], array, atol=TOLERANCE, rtol=0, err_msg=name)


def test_the_estimated_jacobian_lies_within_three_standard_errors(golden):
  """A biased estimate: the noise of crossing positions squared, or a mean over the wrong positions."""
  expected, _, found = golden
  for name in ("summed", "same_position"):
    error = found[f"jacobian/{name}_standard_error"]
    exact = expected[f"jacobian/{name}_deviation"]
    assert (np.abs(found[f"jacobian/{name}_deviation"] - exact) < 3 * error).all(), name
    assert (error < 0.1 * exact).all()


def still(params, layers):
  """The parameters with sublayers of some layers that add nothing."""
  changed = dict(params["layers"])
  for name in ("output", "down"):
    changed[name] = changed[name].at[jnp.asarray(layers)].set(0.0)
  return params | {"layers": changed}


def test_a_layer_that_does_nothing_and_layers_that_are_equal():
  """A causal score that compares states, not changes; an exchange that leaves something behind."""
  model = small_model(placement="pre", num_layers=4)
  params = still(random_params(model), [1])
  params["layers"] = {name: leaf.at[3].set(leaf[2]) for name, leaf in params["layers"].items()}
  found = depth_suite(
    model, params, random_tokens(model), measurements=["causal", "permutation"], readings=["row_moves"]
  )
  np.testing.assert_allclose(found["causal/mean_of_ratios"][1, 2:], 0, atol=1e-6)
  assert (found["causal/mean_of_ratios"][0, 2:] > 1e-3).all()
  assert found["removal/loss_calibration"][1] == pytest.approx(found["loss/calibration"], rel=1e-6)
  assert found["permutation/row_moves"][2, 3] == pytest.approx(0, abs=1e-6)
  assert found["permutation/row_moves"][0, 2] > 1e-5


def test_a_layer_that_is_affine():
  """Streams that a map mixes up or leaves out: hyper-connections whose sublayers add nothing are two matrices."""
  model = small_model(placement="hc:2", num_layers=2)
  params = still(random_params(model), [1])
  wanted = ["causal", "usefulness", "jacobian"]
  tokens, others = random_tokens(model, batch=8, length=16), random_tokens(model, batch=3, length=16, seed=2)
  found = depth_suite(model, params, tokens, others, measurements=wanted, jacobian_exact=True)
  for part in ("same", "heldout"):
    useful, affine = found[f"usefulness/ratio_{part}"]
    assert affine == pytest.approx(1, abs=1e-5)
    assert abs(useful - 1) > 5e-5
  assert abs(found["removal/loss_heldout"][1] / found["loss/heldout"] - 1) > 1e-5  # rounding is 1e-7
  matrices = [np.asarray(params["layers"][f"{name}_hc_alpha"][1])[:, 1:] for name in ("attention", "mlp")]
  # [from, to], each entry for all channels; the streams lie side by side.
  exact = np.kron(matrices[0] @ matrices[1], np.eye(model.embed_dim))
  for name in ("summed_mean", "same_position_mean"):
    np.testing.assert_allclose(found[f"jacobian/{name}"][1], exact, atol=1e-5)


def test_a_layer_that_doubles_and_one_whose_gradient_is_hidden():
  """x ↦ 2x is off the identity by 1, whatever the vectors; that of gpas is what it computes, not what it trains by."""
  model = small_model(placement="hc:1*1,pre*1+gpas", num_layers=2)
  params = still(random_params(model), [0, 1])
  alpha = jnp.asarray([[1.0, 2.0]])  # read 1, mix 2
  params["layers"]["attention_hc_alpha"] = params["layers"]["attention_hc_alpha"].at[0].set(alpha)
  params["layers"]["mlp_hc_alpha"] = params["layers"]["mlp_hc_alpha"].at[0].set(alpha.at[0, 1].set(1.0))
  found = depth_suite(model, params, random_tokens(model), measurements=["jacobian"], jacobian_vectors=2)
  factor = (1 - float(jax.nn.silu(params["layers"]["gpas"][1]))) ** 2
  for name in ("summed", "same_position"):
    np.testing.assert_allclose(found[f"jacobian/{name}_deviation"], [1, abs(factor - 1)], rtol=1e-4)


WIRINGS = ("hc:2*1,post*1,lns*1", "pre+gpas", "siamese", "attnres", "attnres:3", "b2t", "pre+value_residual")


@pytest.mark.parametrize(
  "placement", [WIRINGS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in WIRINGS[1:])]
)
def test_every_wiring_removed_and_exchanged(placement):
  """A wiring whose streams the variants carry wrongly; weights that stay behind; a source read before it is there."""
  model = small_model(placement=placement, num_layers=3)
  params, batches = random_params(model), [batch_of(model)]
  heldout = as_batches(random_tokens(model, seed=5))
  found = depth_suite(model, params, batches, heldout, readings=["row_moves", "row_stays"], jacobian_vectors=4)
  assert all(np.isfinite(array[~np.isnan(array)]).all() for array in found.values())
  step = jax.jit(make_removal_step(model))
  expected = removal(step, params, batches, 3, [1])
  assert found["loss/calibration"] == pytest.approx(expected["loss"], rel=NETWORK)
  np.testing.assert_allclose(found["removal/loss_calibration"], expected["blocks"]["1"], rtol=NETWORK)
  np.testing.assert_allclose(found["lens/cross_entropy"][-1], expected["loss"], rtol=NETWORK)
  exchanged = params | {"layers": {name: leaf[jnp.asarray([2, 1, 0])] for name, leaf in params["layers"].items()}}
  loss, count = step(exchanged, batches[0], jnp.ones(3, jnp.int32))
  score = abs(float(loss / count) - expected["loss"]) / expected["loss"]
  assert found["permutation/row_stays"][0, 2] == pytest.approx(score, abs=1e-5)


def test_the_row_moves_with_its_layer_and_positions_stay():
  """Post-LN and Pre-LN exchanged whole are the other mixture; a table that moved in part would be neither."""
  model, other = small_model(placement="post*1,pre*3"), small_model(placement="pre*3,post*1")
  params = random_params(model)
  found = depth_suite(model, params, random_tokens(model), measurements=["permutation"], readings=["row_moves"])
  exchanged = {name: leaf[jnp.asarray([3, 1, 2, 0])] for name, leaf in params["layers"].items()}
  losses = []
  for own, weights in ((model, params), (other, params | {"layers": exchanged})):
    total, count = make_removal_step(own)(weights, as_batches(random_tokens(model))[0], jnp.ones(4, jnp.int32))
    losses.append(float(total / count))
  expected = abs(losses[1] - losses[0]) / losses[0]
  assert found["permutation/row_moves"][0, 3] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_mesh_measures_what_one_device_does():
  """A sum over the rows of one device; a factor or a map that lies on one of them."""
  script = Path(__file__).parent / "suite_on_mesh.py"
  done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=Path(__file__).parents[2])
  assert done.returncode == 0, done.stderr[-2000:]
  gaps = json.loads(done.stdout.splitlines()[-1])
  assert len(gaps) == 22
  assert max(gaps.values()) < 1e-4, gaps


def test_one_program_serves_all_layers():
  """A layer or a pair that is compiled in: L, or L(L − 1)/2, compilations of a large model."""
  model = small_model(num_layers=4, placement="post*2,lns*2")
  params, (batch,) = random_params(model), as_batches(random_tokens(model))
  step = jax.jit(swaps.make_swap_step(model))
  for orders in swaps.all_swaps(model, swaps.READINGS).values():
    for order in orders:
      step(params, batch, np.ones(3, np.float32), order)
  assert step._cache_size() == 1


def test_orthogonal_vectors_as_many_as_the_width_are_exact():
  """An estimate whose error does not vanish: vectors of another length, or not orthogonal."""
  matrix = np.random.default_rng(0).normal(size=(1, 6, 6))
  vectors = jacobian.random_vectors(0, 12, 2, 3)
  products = np.einsum("lab,kb->lka", matrix, vectors.reshape(12, 6)).reshape(1, 12, 2, 3)
  found = jacobian.deviation(products, products, vectors)
  np.testing.assert_allclose(found.value, jacobian.exact_deviation(matrix), rtol=1e-6)
  assert (found.standard_error > 0).all()


def test_the_published_fractions():
  """Early layers counted in, or a threshold's own value."""
  causal = np.full((8, 8), np.nan)
  causal[np.triu_indices(8, 1)] = 0.9
  causal[2, 3:], causal[3, 4:] = 0.45, 0.46
  found = fractions({"causal/mean_of_ratios": causal, "usefulness/ratio_same": np.array([1.2, 1.0, np.nan, 1.0])})
  assert found["causal/mean_of_ratios"] == 10 / 15  # 5 of the 15 pairs of layers 2 to 7 are at the threshold
  assert found["usefulness/ratio_same"] == 0.25


def test_a_sample_is_split_into_parts_that_have_records():
  """Would catch records in both parts, or a held-out part without any, whose removals were measured for nothing."""

  def batch(rows, first=0):
    return {"weights_BT": np.ones((rows, 2), np.float32), "first": first}

  many = [batch(2, first) for first in range(7)]
  calibration, heldout = suite_lib.split(many)
  assert [one["first"] for one in calibration] == [0, 1, 2, 3, 4]
  assert [one["first"] for one in heldout] == [5, 6]
  (calibration,), (heldout,) = suite_lib.split([batch(4)])
  np.testing.assert_array_equal(calibration["weights_BT"][:, 0], [1, 1, 0, 1])
  np.testing.assert_array_equal(heldout["weights_BT"][:, 0], [0, 0, 1, 0])
  assert suite_lib.split(many[:1]) == (many[:1], [])


@pytest.mark.parametrize("field", ["measurements", "readings"])
def test_what_is_not_known_is_named(field):
  """A misspelt measurement that is left out in silence."""
  model = small_model()
  with pytest.raises(InputError, match=f"{field}=causl: must be one or more of"):
    depth_suite(model, {}, [], **{field: ["causl"]})
  assert set(suite_lib.DEFINITIONS) >= set(suite_lib.MEASUREMENTS)

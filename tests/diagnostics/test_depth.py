"""The stream by depth: cases solved by hand, plain float64 arithmetic, and hidden states of the official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, small_model
from model.rounding import NETWORK
from model.test_golden import load

from mixln_jax.diagnostics import depth
from mixln_jax.model import Transformer

# fp32 leaves √(2 · 2^-24) / π = 1.1e-4 of the angle of two vectors whose cosine rounds to 1.
ANGLE = 2e-4
# The exponential of an entropy of six to 25 singular values, each within a few 1e-6 of the largest one.
RANK = 1e-4


def batch_of(model, lengths=(12, 5, 1, 0)):
  """A batch whose rows have so many tokens; one fewer counts."""
  tokens = random_tokens(model, len(lengths), 12)
  weights = (np.arange(12)[None] + 1 < np.array(lengths)[:, None]).astype(np.float32)
  return {"tokens_BT": tokens, "labels_BT": jnp.roll(tokens, -1, 1), "weights_BT": jnp.asarray(weights)}


def sums_of(model, params, *batches):
  step, sums = jax.jit(depth.make_depth_step(model)), depth.DepthSums.zeros(model)
  for batch in batches:
    sums = step(params, sums, batch)
  return jax.device_get(sums)


def plain_distance(a, b):
  """Of two vectors, in float64."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.arccos(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)) / np.pi


def test_equal_orthogonal_opposite_and_zero_vectors():
  x = jnp.asarray(np.random.default_rng(0).normal(size=96), jnp.float32)
  turned = jnp.concatenate([-x[48:], x[:48]])  # by 90 degrees
  streams = jnp.stack([x, x, turned, -3 * x, 0 * x])[:, None, None]
  distances = jax.jit(depth.angular_distances)(streams)[0, 0]
  assert distances[0, 1] == 0
  np.testing.assert_allclose(distances[0, 2:], [0.5, 1, 0.5], atol=1e-6)  # cosines of 96 products
  rounded = depth.angular_distances(jnp.stack([x, 1.001 * x])[:, None, None].astype(jnp.bfloat16))
  assert np.isfinite(rounded).all()


def test_a_layer_that_does_nothing_and_one_that_turns_the_stream():
  """A Pre-LN layer whose last matrices are 0; one whose MLP adds what turns every token's stream by 90 degrees."""
  model = small_model(placement="pre", num_layers=2, embed_dim=4, mlp_dim=2, vocab_size=2)
  params = jax.tree.map(jnp.zeros_like, random_params(model))
  # The stream is ±e₀. Gate and up read its sign into one unit: silu(5 x) · x is over 0 for both, so two units are used.
  params["embedding"] = params["embedding"].at[0, 0].set(1).at[1, 0].set(-1)
  layers = params["layers"]
  layers["mlp_norm"] = jnp.ones((2, 4))
  layers["gate"] = layers["gate"].at[1, 0].set(jnp.array([5.0, -5.0]))
  layers["up"] = layers["up"].at[1, 0].set(1.0)
  opened = float(jax.nn.silu(jnp.float32(10)) * 2 + jax.nn.silu(jnp.float32(-10)) * 2)  # RMSNorm makes ±2 of ±e₀
  # y = x + down · units: -e₀ cancels x for both signs, and e₁ takes its place.
  layers["down"] = layers["down"].at[1, :, 0].set(-1 / opened).at[1, :, 1].set(1 / opened)
  tokens = jnp.array([[0, 1, 1, 0]])
  batch = {"tokens_BT": tokens, "labels_BT": tokens, "weights_BT": jnp.ones((1, 4))}
  sums = sums_of(model, params, batch)
  for mean in (sums.angle_all_PP / 4, sums.angle_last_PP):
    assert mean[0, 1] == 0
    np.testing.assert_allclose([mean[1, 2], mean[0, 2]], 0.5, atol=NETWORK)


@pytest.mark.parametrize("name", ["mix_1_of_4", "post"])
def test_the_papers_formula_on_hidden_states_of_the_official_code(name):
  golden, config, params, batch = load(name)
  sums = sums_of(config.model, params, batch)
  weights = np.asarray(batch["weights_BT"])
  hidden = [golden[f"hidden/{index}"] for index in range(4)]  # the last one is given after the final norm only
  counted = [(int(row), int(at)) for row, at in np.argwhere(weights > 0)]
  last = dict(counted)
  for first in range(4):
    for second in range(first, 4):
      distance = {at: plain_distance(hidden[first][at], hidden[second][at]) for at in counted}
      expected_all = np.mean(list(distance.values()))
      expected_last = np.mean([distance[at] for at in last.items()])
      np.testing.assert_allclose(sums.angle_all_PP[first, second] / sums.tokens, expected_all, atol=ANGLE)
      np.testing.assert_allclose(sums.angle_last_PP[first, second] / sums.rows, expected_last, atol=ANGLE)
  # The lens of the last depth is the model itself.
  np.testing.assert_allclose(sums.lens_P[-1] / sums.tokens, golden["loss"], rtol=NETWORK)


def test_padding_and_the_cut_into_batches_change_nothing_and_the_ranks_are_those_of_all_rows():
  model = small_model(placement="post*2,sandwich*2", num_layers=4)
  params, batch = random_params(model), batch_of(model)
  whole = sums_of(model, params, batch)
  halves = [jax.tree.map(lambda x, at=at: x[at : at + 2], batch) for at in (0, 2)]
  halves[1]["tokens_BT"] = jnp.where(halves[1]["weights_BT"] > 0, halves[1]["tokens_BT"], 3)  # what lies under padding
  cut = sums_of(model, params, *halves)
  assert (whole.tokens, whole.rows) == (cut.tokens, cut.rows) == (15, 2)
  for name in ("angle_all_PP", "angle_last_PP", "lens_P"):  # sums over 15 tokens
    np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=NETWORK, atol=15 * ANGLE, err_msg=name)

  _, taps = Transformer(model).apply({"params": params}, batch["tokens_BT"], method="hidden")
  counted = np.asarray(batch["weights_BT"]) > 0
  for level, stream in enumerate([taps["embedded_BTD"], *taps["stream_LBTD"]]):
    rows = np.asarray(stream, np.float64)[counted]
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    shares = values / values.sum()
    expected = np.exp(-(shares[shares > 1e-12] * np.log(shares[shares > 1e-12])).sum())
    for sums in (whole, cut):
      np.testing.assert_allclose(depth.effective_rank(sums.triangle_PEE[level]), expected, rtol=RANK)


def test_effective_ranks_known_beforehand():
  rng = np.random.default_rng(0)

  def rank(rows, weights=None):
    triangle = jnp.zeros((rows.shape[1] + 1,) * 2)
    for part in np.array_split(np.arange(len(rows)), 3):
      weights_N = jnp.ones(len(part)) if weights is None else jnp.asarray(weights[part])
      triangle = depth.add_rows(triangle, jnp.asarray(rows[part], jnp.float32), weights_N)
    return depth.effective_rank(triangle)

  corners = np.array([[sign * (axis == at) for axis in range(6)] for at in range(6) for sign in (1, -1)], np.float32)
  np.testing.assert_allclose(rank(corners + 7), 6, rtol=RANK)  # all directions alike, around any mean
  # Five of its values are rounding, of up to 1e-6 of the first: e^(5 · 1e-6 · log 1e6) is 1.00007.
  np.testing.assert_allclose(rank(np.outer(rng.normal(size=40), rng.normal(size=6)) + 3), 1, atol=1e-3)
  two = np.concatenate([corners[:4], 1e3 * rng.normal(size=(5, 6)).astype(np.float32)])
  np.testing.assert_allclose(rank(two, np.array([1.0] * 4 + [0.0] * 5)), 2, rtol=RANK)
  assert rank(np.zeros((9, 6))) is None

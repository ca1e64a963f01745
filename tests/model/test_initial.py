"""Initial weights: drawn by name and layer, whatever the placement, the padding or the order of declaration."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model

from mixln_jax.model.initial import count_params, initial_params


def draw(model, seed=0):
  return jax.jit(lambda: initial_params(model, seed))()


def flat(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_each_leaf_is_drawn_from_its_name_and_layer():
  params = flat(draw(small_model(), seed=7))
  key = jax.random.key(7)
  for path, layer in (("layers/query", 0), ("layers/down", 3)):
    leaf_key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), layer)
    expected = jax.random.normal(leaf_key, params[path].shape[1:]) * 0.02
    np.testing.assert_allclose(params[path][layer], expected, rtol=1e-6)
  expected = jax.random.normal(jax.random.fold_in(key, zlib.crc32(b"head")), params["head"].shape) * 0.02
  np.testing.assert_allclose(params["head"], expected, rtol=1e-6)


def test_placements_start_from_the_same_numbers():
  base = flat(draw(small_model(placement="pre")))
  for name in ("post", "mix:0.5", "lns", "sandwich"):
    for path, leaf in flat(draw(small_model(placement=name))).items():
      if path in base:
        np.testing.assert_array_equal(leaf, base[path], err_msg=f"{name} {path}")
  assert not np.array_equal(flat(draw(small_model(), seed=1))["head"], base["head"])


def test_neither_depth_nor_padding_moves_a_draw():
  base, deep = flat(draw(small_model())), flat(draw(small_model(num_layers=6)))
  padded = flat(draw(small_model(mlp_pad_to=32)))
  for path, leaf in base.items():
    if path.startswith("layers/"):
      np.testing.assert_array_equal(deep[path][:4], leaf)
  for path, axis in (("layers/gate", 2), ("layers/up", 2), ("layers/down", 1)):
    inside, outside = np.split(padded[path], [40], axis)
    np.testing.assert_array_equal(inside, base[path])
    assert not outside.any()
  assert count_params(small_model()) == count_params(small_model(mlp_pad_to=32)) == sum(x.size for x in base.values())


@pytest.mark.parametrize(
  ("name", "factors"), [("pre+scaled_init", [8**-0.5] * 4), ("post*2,pre*2+scaled_init", [1, 1, 8**-0.5, 8**-0.5])]
)
def test_scaled_init_scales_the_output_matrices_of_its_layers_only(name, factors):
  plain, scaled = flat(draw(small_model(placement="pre"))), flat(draw(small_model(placement=name)))
  for path, leaf in plain.items():
    expected = leaf
    if path in ("layers/output", "layers/down"):
      expected = leaf * np.array(factors, np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
    np.testing.assert_allclose(scaled[path], expected, rtol=1e-6, err_msg=path)


def test_a_gain_that_no_norm_uses_is_not_counted():
  counts = {name: count_params(small_model(placement=name)) for name in ("pre", "sandwich", "sandwich*2,post*2")}
  assert counts["sandwich"] - counts["pre"] == 4 * 2 * 24
  assert counts["sandwich*2,post*2"] - counts["pre"] == 2 * 2 * 24


def test_deviations_gains_and_types():
  model = small_model(
    vocab_size=4000, embed_dim=96, num_heads=4, embedding_deviation=0.632, qkv_bias=True, param_dtype="bfloat16"
  )
  params = flat(draw(model))
  assert all(leaf.dtype == jnp.bfloat16 for leaf in params.values())
  np.testing.assert_allclose(params["embedding"].astype(np.float32).std(), 0.632, rtol=0.01)
  np.testing.assert_allclose(params["head"].astype(np.float32).std(), 0.02, rtol=0.01)
  np.testing.assert_allclose(params["layers/gate"].astype(np.float32).std(), 0.02, rtol=0.02)
  assert (params["layers/attention_norm"] == 1).all()
  assert (params["final_norm"] == 1).all()
  assert not params["layers/query_bias"].any()

"""Initial weights: drawn by name and layer, whatever the placement, the padding or the order of declaration."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model

from mixln_jax.model.initial import initial_params
from mixln_jax.model.parameters import count_params
from mixln_jax.parallel.bits import bit_sums, hash_of_sums

# A draw is the same bits as one by itself but for the product with its std, which a program may round once more.
ROUNDED = 1e-6


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
    np.testing.assert_allclose(params[path][layer], expected, rtol=ROUNDED)
  expected = jax.random.normal(jax.random.fold_in(key, zlib.crc32(b"head")), params["head"].shape) * 0.02
  np.testing.assert_allclose(params["head"], expected, rtol=ROUNDED)


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
    np.testing.assert_allclose(scaled[path], expected, rtol=ROUNDED, err_msg=path)


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
  # The std of n draws has a standard error of 1 / √(2n): 0.1 % of 384,000 draws, 0.2 % of 153,600. bfloat16's
  # roundings are independent of one another and move it less.
  np.testing.assert_allclose(params["embedding"].astype(np.float32).std(), 0.632, rtol=0.01)
  np.testing.assert_allclose(params["head"].astype(np.float32).std(), 0.02, rtol=0.01)
  np.testing.assert_allclose(params["layers/gate"].astype(np.float32).std(), 0.02, rtol=0.02)
  assert (params["layers/attention_norm"] == 1).all()
  assert (params["final_norm"] == 1).all()
  assert not params["layers/query_bias"].any()


@pytest.mark.parametrize(("name", "sign"), [("deepnorm", -1), ("deepnorm_as_published", 1)])
def test_deepnets_gains_are_xavier_with_beta_on_value_output_and_mlp(name, sign):
  model = small_model(placement=name, embed_dim=96, mlp_dim=200, num_heads=4, num_kv_heads=2)
  params, beta = flat(draw(model)), 32.0 ** (sign * 0.25)
  widths = {"query": 96 + 96, "key": 96 + 48, "value": 96 + 48, "output": 96 + 96} | dict.fromkeys(
    ("gate", "up", "down"), 96 + 200
  )
  for matrix, fans in widths.items():
    expected = (1.0 if matrix in ("query", "key") else beta) * np.sqrt(2 / fans)
    # A matrix has 96 × 48 entries at least: a standard error of 1 %.
    np.testing.assert_allclose(
      params[f"layers/{matrix}"].std(axis=(1, 2, 3)[: params[f"layers/{matrix}"].ndim - 1]), expected, rtol=0.06
    )
  np.testing.assert_allclose(params["head"].std(), 0.02, rtol=0.06)


@pytest.mark.parametrize(("num_layers", "first"), [(12, 0.1), (18, 0.1), (24, 1e-5), (32, 1e-6)])
def test_learned_scales_start_as_their_sources_say(num_layers, first):
  model = small_model(placement=f"layerscale*{num_layers - 3},skipinit*1,admin*1,pre*1+gpas", num_layers=num_layers)
  params = flat(draw(model))
  for sublayer in ("attention", "mlp"):
    np.testing.assert_allclose(params[f"layers/{sublayer}_vector_c_out"][:-3], first, rtol=ROUNDED)
    np.testing.assert_array_equal(params[f"layers/{sublayer}_scalar_c_out"][-3], 0)
    np.testing.assert_array_equal(params[f"layers/{sublayer}_vector_c_res"][-2], 1)
  np.testing.assert_array_equal(params["layers/gpas"], 0)
  plain = count_params(small_model(placement="pre", num_layers=num_layers))
  assert count_params(model) - plain == 2 * 24 * (num_layers - 3) + 2 + 2 * 24 + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_hash_is_an_exact_sum_of_bits(dtype):
  params = draw(small_model(param_dtype=dtype))
  sums = {name: int(value) for name, value in jax.jit(bit_sums)(params).items()}
  for name, leaf in flat(params).items():
    bits = leaf.view(np.uint32 if dtype == "float32" else np.uint16)
    assert sums[name] == int(bits.astype(object).sum()) % 2**32, name
  assert hash_of_sums(sums) == hash_of_sums(dict(reversed(sums.items())))
  params["layers"]["down"] = params["layers"]["down"].at[3, 1, 2].multiply(-1)
  assert hash_of_sums(jax.jit(bit_sums)(params)) != hash_of_sums(sums)

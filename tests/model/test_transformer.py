"""The model against an independent reference, and the promises of its one signature."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, small_model
from ml_collections import FrozenConfigDict

from mixln_jax import placement
from mixln_jax.model import Columns, Transformer, next_token_loss
from mixln_jax.model.transformer import REMAT_POLICIES, empty_cache
from model import reference

STRIPS = {
  "pre": "pre pre pre pre",
  "post": "post post post post",
  "mix:0.25": "post pre pre pre",
  "mix:0.5": "post post pre pre",
  "sandwich": "sandwich sandwich sandwich sandwich",
  "reordered": "reordered reordered reordered reordered",
  "lns": "lns lns lns lns",
  "pre*1,sandwich*2,post*1": "pre sandwich sandwich post",
  "lns*2,post*1,reordered*1": "lns lns post reordered",
}
CORE = ("pre", "post", "mix:0.25", "mix:0.5")


def mean_loss(model, params, tokens, **arguments):
  def apply(transformer):
    hidden, _ = transformer.hidden(tokens, **arguments)
    labels = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    total, count = next_token_loss(hidden, transformer.head_weights(), labels, weights)
    return total / count

  return nn.apply(apply, Transformer(model))({"params": params})


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, arguments):
  return Transformer(model).apply({"params": params}, tokens, **arguments)


def apply(model, params, tokens, **arguments):
  """`Transformer(model).apply`, under jit."""
  return logits_of(FrozenConfigDict(model), params, tokens, arguments)


def reference_logits(model, params, tokens, kinds):
  return reference.logits(params, tokens, tuple(kinds), FrozenConfigDict(model))


@functools.cache
def reference_case(name):
  """Parameters, tokens, and what the reference makes of them."""
  model = small_model(placement=name)
  params, tokens = random_params(model), random_tokens(model)
  kinds = tuple(STRIPS[name].split())
  loss, gradient = reference.loss_and_gradient(params, tokens, kinds, FrozenConfigDict(model))
  return params, tokens, reference_logits(model, params, tokens, kinds), loss, gradient


def assert_trees_close(actual, expected, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a, b, atol=tolerance * max(scale, 1e-3), rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  ("name", "unroll"), [("mix:0.5", 2), *((name, 1) for name in STRIPS), *((name, 0) for name in CORE)]
)
def test_logits_and_gradients_equal_the_independent_reference(name, unroll):
  model = small_model(placement=name, unroll=unroll)
  params, tokens, expected, expected_loss, expected_grads = reference_case(name)
  logits = jax.jit(lambda p: Transformer(model).apply({"params": p}, tokens))(params)
  np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
  loss, grads = jax.jit(jax.value_and_grad(lambda p: mean_loss(model, p, tokens)))(params)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  assert_trees_close(grads, expected_grads, 1e-5)


@pytest.mark.parametrize(
  "fields",
  [
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "head_dim": 10},
    {"tied_embeddings": True},
    {"qkv_bias": True, "rope_base": 500.0},
    {"norm_epsilon": 0.1},
  ],
  ids=str,
)
def test_options_of_open_models_equal_the_reference(fields):
  model = small_model(placement="mix:0.5", **fields)
  params, tokens = random_params(model), random_tokens(model)
  logits = apply(model, params, tokens)
  expected = reference_logits(model, params, tokens, STRIPS["mix:0.5"].split())
  np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize(("policy", "unroll"), [("full", 0), *((policy, 1) for policy in REMAT_POLICIES)])
def test_remat_changes_neither_loss_nor_gradient(policy, unroll):
  plain, remat = small_model(placement="mix:0.5"), small_model(placement="mix:0.5", remat=policy, unroll=unroll)
  params, tokens = random_params(plain), random_tokens(plain)
  expected = reference_case("mix:0.5")[-1]
  program = jax.jit(jax.grad(lambda p: mean_loss(remat, p, tokens)))
  assert_trees_close(program(params), expected, 1e-5)
  # It really recomputes: the backward pass of the saved program has no second softmax.
  assert _exponentials(program, params) > _exponentials(
    jax.jit(jax.grad(lambda p: mean_loss(plain, p, tokens))), params
  )


def _exponentials(program, params):
  return program.lower(params).as_text().count("stablehlo.exponential")


@pytest.mark.parametrize("name", STRIPS)
def test_no_position_sees_a_later_token(name):
  model = small_model(placement=name)
  params, tokens = random_params(model), random_tokens(model, batch=1, length=8)

  def logit(embedding_of_tokens, position):
    rows = {**params, "embedding": embedding_of_tokens}
    return Transformer(model).apply({"params": rows}, jnp.arange(8)[None])[0, position].sum()

  rows = jnp.zeros((model.vocab_size, model.embed_dim)).at[:8].set(params["embedding"][tokens[0]])
  gradient = jax.jit(jax.grad(logit))
  for position in range(8):
    touched = np.abs(gradient(rows, position)).sum(axis=1)[:8] > 0
    np.testing.assert_array_equal(touched, np.arange(8) <= position)


def test_columns_as_data_equal_the_placement_in_the_config():
  names = ["pre", "post", "mix:0.5", "lns", "reordered"]
  base = small_model(placement="pre")
  params, tokens = random_params(base), random_tokens(base)
  columns = Columns.of_many([placement.parse(name, 4) for name in names])
  together = jax.jit(jax.vmap(lambda c: Transformer(base).apply({"params": params}, tokens, columns=c), in_axes=(0,)))(
    columns
  )
  for logits, name in zip(together, names, strict=True):
    expected = apply(small_model(placement=name), params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("name", ["pre", "post", "mix:0.5"])
@pytest.mark.parametrize("unroll", [1, 0])
def test_removing_a_layer_by_flag_equals_surgery(name, unroll):
  model = small_model(placement=name, unroll=unroll)
  params, tokens = random_params(model), random_tokens(model)
  kinds = STRIPS[name].split()
  for removed in range(4):
    left = [index for index in range(4) if index != removed]
    keep = jnp.ones(4).at[removed].set(0)
    actual = apply(model, params, tokens, keep_L=keep)
    rest = {**params, "layers": jax.tree.map(lambda w, left=left: w[np.array(left)], params["layers"])}
    expected = reference_logits(model, rest, tokens, [kinds[index] for index in left])
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_segments_equal_separate_rows():
  model = small_model(placement="mix:0.5")
  params, tokens = random_params(model), random_tokens(model, batch=2, length=12)
  segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [2] * 3])
  positions = jnp.asarray([[*range(5), *range(7)], [*range(9), *range(3)]])
  packed = apply(model, params, tokens, segment_ids_BT=segments, positions_BT=positions)
  for row, cut in ((0, 5), (1, 9)):
    for part in (slice(0, cut), slice(cut, 12)):
      alone = apply(model, params, tokens[row : row + 1, part])
      np.testing.assert_allclose(packed[row, part], alone[0], atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("unroll", [1, 0])
def test_a_cache_gives_what_recomputing_gives(unroll):
  model = small_model(placement="mix:0.5", num_kv_heads=2, unroll=unroll)
  params, tokens = random_params(model), random_tokens(model, batch=2, length=10)
  expected = apply(model, params, tokens)
  cache = empty_cache(model, 2, 10)
  pieces = []
  for begin, end in ((0, 4), (4, 5), (5, 10)):  # a prompt, one token, and a chunk
    positions = jnp.broadcast_to(jnp.arange(begin, end), (2, end - begin))
    logits, cache = apply(model, params, tokens[:, begin:end], positions_BT=positions, cache=cache)
    pieces.append(logits)
  np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, atol=1e-5 * np.abs(expected).max())
  at = {"positions_BT": jnp.broadcast_to(jnp.arange(10), (2, 10))}
  with pytest.raises(ValueError, match="10 tokens don't fit into a cache of 9 slots"):
    apply(model, params, tokens, cache=empty_cache(model, 2, 9), **at)
  with pytest.raises(ValueError, match="segment_ids_BT can't be given with a cache"):
    apply(model, params, tokens, cache=cache, segment_ids_BT=tokens, **at)
  with pytest.raises(ValueError, match="positions_BT is needed"):
    Transformer(model).apply({"params": params}, tokens, cache=cache)


def test_padding_the_mlp_is_exact():
  plain, padded = small_model(placement="mix:0.5"), small_model(placement="mix:0.5", mlp_pad_to=64)
  tokens = random_tokens(plain)
  params, wide = random_params(plain), random_params(padded)
  assert wide["layers"]["gate"].shape == (4, 24, 64)
  expected = jax.jit(jax.value_and_grad(lambda p: mean_loss(plain, p, tokens)))(params)
  value, grads = jax.jit(jax.value_and_grad(lambda p: mean_loss(padded, p, tokens)))(wide)
  np.testing.assert_allclose(value, expected[0], rtol=1e-6)
  for name, axis in (("gate", 2), ("up", 2), ("down", 1)):
    inside, outside = np.split(np.asarray(grads["layers"][name]), [40], axis)
    np.testing.assert_allclose(inside, expected[1]["layers"][name], atol=1e-6)
    assert not outside.any()


@pytest.mark.parametrize("name", CORE)
def test_an_unused_gain_never_gets_a_gradient_and_a_used_one_does(name):
  model = small_model(placement=name)
  params, tokens = random_params(model), random_tokens(model)
  grads = jax.jit(jax.grad(lambda p: mean_loss(model, p, tokens)))(params)
  for gain in ("attention_norm", "mlp_norm"):
    assert np.abs(grads["layers"][gain]).sum(axis=1).all()
  mixture = small_model(placement="sandwich*2,post*2")
  grads = jax.jit(jax.grad(lambda p: mean_loss(mixture, p, tokens)))(random_params(mixture))
  for gain in ("attention_norm_2", "mlp_norm_2"):
    np.testing.assert_array_equal(np.abs(grads["layers"][gain]).sum(axis=1) > 0, [True, True, False, False])


@pytest.mark.parametrize(("name", "residual_dtype"), [("mix:0.5", "float32"), *((name, "auto") for name in STRIPS)])
def test_bfloat16_stays_near_float32_and_keeps_its_types(name, residual_dtype):
  exact = small_model(placement=name)
  low = small_model(placement=name, dtype="bfloat16", residual_dtype=residual_dtype)
  params, tokens = random_params(exact), random_tokens(exact)
  hidden, taps = jax.jit(functools.partial(Transformer(low).apply, method="hidden"))({"params": params}, tokens)
  assert hidden.dtype == jnp.bfloat16
  assert taps["stream_LBTD"].dtype == (jnp.float32 if residual_dtype == "float32" else jnp.bfloat16)
  logits = apply(low, params, tokens)
  assert logits.dtype == jnp.float32
  expected = apply(exact, params, tokens)
  # Four layers of eight rounded products each, at weights that are far from small.
  assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_the_taps_are_the_stream_and_cost_nothing_unread():
  model = small_model(placement="mix:0.5")
  params, tokens = random_params(model), random_tokens(model)
  _, taps = Transformer(model).apply({"params": params}, tokens, method="hidden")
  assert taps["stream_LBTD"].shape == (4, 3, 12, 24)
  np.testing.assert_array_equal(taps["embedded_BTD"], params["embedding"][tokens])
  last = reference.norm(taps["stream_LBTD"][-1], params["final_norm"], 1e-6) @ params["head"]
  np.testing.assert_allclose(last, apply(model, params, tokens), atol=1e-4)

  def forward(read):
    def run(p):
      hidden, taps = Transformer(model).apply({"params": p}, tokens, method="hidden")
      return (hidden, taps["stream_LBTD"]) if read else hidden

    memory = jax.jit(run).lower(params).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes

  # Read or not is not the same program: what nobody reads is not kept.
  assert forward(read=True) - forward(read=False) > 0.5 * taps["stream_LBTD"].nbytes


def test_a_norm_that_is_data_never_selects_between_tensors():
  def selects(name, shape):
    model = small_model(placement=name)
    params, tokens = random_params(model), random_tokens(model)
    text = jax.jit(lambda p: Transformer(model).apply({"params": p}, tokens)).lower(params).as_text()
    return sum("stablehlo.select" in line and f"tensor<{shape}xf32>" in line for line in text.splitlines())

  # A mixture gates the norm's factor of each row and its gain; pre has nothing to gate.
  assert selects("mix:0.5", "3x12x1") > 0
  assert selects("pre", "3x12x1") == 0
  for name in ("post", "mix:0.5", "lns*2,post*1,reordered*1"):
    assert selects(name, "3x12x24") == selects("pre", "3x12x24"), name  # the embedding's look-up has one


def test_the_module_hashes_by_its_config():
  assert hash(Transformer(small_model())) == hash(Transformer(small_model()))
  assert Transformer(small_model()) == Transformer(small_model())
  assert Transformer(small_model()) != Transformer(small_model(placement="pre"))

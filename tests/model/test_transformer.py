"""The model against an independent reference, and the promises of its one signature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, small_model

from mixln_jax.model import Transformer
from mixln_jax.model.transformer import REMAT_POLICIES, empty_cache
from model import reference
from model.cases import LAYER_LISTS, apply, assert_trees_close, mean_loss, reference_case
from model.rounding import NETWORK, assert_near


@pytest.mark.parametrize(
  "fields",
  [
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "head_dim": 10},
    {"tied_embeddings": True},
    {"qkv_bias": True, "rope_base": 500.0},
    {"norm_epsilon": 0.1},
    {"norm": "layernorm"},
    {"norm": "dyt"},
    {"norm": "dyt_bias"},
    {"norm": "derf"},
  ],
  ids=str,
)
def test_options_of_open_models_equal_the_reference(fields):
  model = small_model(placement="mix:0.5", **fields)
  params, tokens = random_params(model), random_tokens(model)
  logits = apply(model, params, tokens)
  expected = reference.logits(params, tokens, LAYER_LISTS["mix:0.5"].split(), model)
  assert_near(logits, expected)


@pytest.mark.parametrize(("policy", "unroll"), [("full", 0), *((policy, 1) for policy in REMAT_POLICIES)])
def test_remat_changes_neither_loss_nor_gradient(policy, unroll):
  plain, remat = small_model(placement="mix:0.5"), small_model(placement="mix:0.5", remat=policy, unroll=unroll)
  params, tokens = random_params(plain), random_tokens(plain)
  expected = reference_case("mix:0.5")[-1]
  program = jax.jit(jax.grad(lambda p: mean_loss(remat, p, tokens)))
  assert_trees_close(program(params), expected)
  # It really recomputes: the backward pass of the saved program has no second softmax.
  assert _exponentials(program, params) > _exponentials(
    jax.jit(jax.grad(lambda p: mean_loss(plain, p, tokens))), params
  )


def _exponentials(program, params):
  return program.lower(params).as_text().count("stablehlo.exponential")


@pytest.mark.parametrize("name", ["pre", "post", "mix:0.5"])
@pytest.mark.parametrize("unroll", [1, 0])
def test_removing_a_layer_by_flag_equals_surgery(name, unroll):
  model = small_model(placement=name, unroll=unroll)
  params, tokens = random_params(model), random_tokens(model)
  kinds = LAYER_LISTS[name].split()
  for removed in range(4):
    left = [index for index in range(4) if index != removed]
    keep = jnp.ones(4).at[removed].set(0)
    actual = apply(model, params, tokens, keep_L=keep)
    rest = {**params, "layers": jax.tree.map(lambda w, left=left: w[np.array(left)], params["layers"])}
    expected = reference.logits(rest, tokens, [kinds[index] for index in left], model)
    assert_near(actual, expected)


def test_segments_equal_separate_rows():
  model = small_model(placement="mix:0.5")
  params, tokens = random_params(model), random_tokens(model, batch=2, length=12)
  segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [2] * 3])
  positions = jnp.asarray([[*range(5), *range(7)], [*range(9), *range(3)]])
  packed = apply(model, params, tokens, segment_ids_BT=segments, positions_BT=positions)
  for row, cut in ((0, 5), (1, 9)):
    for part in (slice(0, cut), slice(cut, 12)):
      alone = apply(model, params, tokens[row : row + 1, part])
      assert_near(packed[row, part], alone[0])


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
  assert_near(jnp.concatenate(pieces, 1), expected)
  at = {"positions_BT": jnp.broadcast_to(jnp.arange(10), (2, 10))}
  with pytest.raises(ValueError, match="10 tokens do not fit into a cache of 9 slots"):
    apply(model, params, tokens, cache=empty_cache(model, 2, 9), **at)
  with pytest.raises(ValueError, match="segment_ids_BT can't be given with a cache"):
    apply(model, params, tokens, cache=cache, segment_ids_BT=tokens, **at)
  with pytest.raises(ValueError, match="positions_BT is required"):
    Transformer(model).apply({"params": params}, tokens, cache=cache)


def test_padding_the_mlp_is_exact():
  plain, padded = small_model(placement="mix:0.5"), small_model(placement="mix:0.5", mlp_pad_to=64)
  tokens = random_tokens(plain)
  params, wide = random_params(plain), random_params(padded)
  assert wide["layers"]["gate"].shape == (4, 24, 64)
  expected = jax.jit(jax.value_and_grad(lambda p: mean_loss(plain, p, tokens)))(params)
  value, grads = jax.jit(jax.value_and_grad(lambda p: mean_loss(padded, p, tokens)))(wide)
  np.testing.assert_allclose(value, expected[0], rtol=NETWORK)
  for name, axis in (("gate", 2), ("up", 2), ("down", 1)):
    inside, outside = np.split(np.asarray(grads["layers"][name]), [40], axis)
    assert_near(inside, expected[1]["layers"][name])
    assert not outside.any()


def test_the_taps_are_the_stream_and_cost_nothing_unread():
  model = small_model(placement="mix:0.5")
  params, tokens = random_params(model), random_tokens(model)
  _, taps = Transformer(model).apply({"params": params}, tokens, method="hidden")
  assert taps["stream_LBTD"].shape == (4, 3, 12, 24)
  np.testing.assert_array_equal(taps["embedded_BTD"], params["embedding"][tokens])
  last = reference.norm(taps["stream_LBTD"][-1], params["final_norm"], 1e-6) @ params["head"]
  assert_near(last, apply(model, params, tokens))

  def forward(read):
    def run(p):
      hidden, taps = Transformer(model).apply({"params": p}, tokens, method="hidden")
      return (hidden, taps["stream_LBTD"]) if read else hidden

    memory = jax.jit(run).lower(params).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes

  # Read or not is not the same program: what nobody reads is not kept.
  assert forward(read=True) - forward(read=False) > 0.5 * taps["stream_LBTD"].nbytes


@pytest.mark.parametrize("name", ["pre", "post", "mix:0.5"])
def test_parameters_may_come_in_another_type_than_the_config_says(name):
  model = small_model(placement=name)
  params, tokens = random_params(model), random_tokens(model)
  low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  expected = apply(model, jax.tree.map(lambda p: p.astype(jnp.float32), low), tokens)
  assert_near(apply(model, low, tokens), expected)


def test_the_module_hashes_by_its_config():
  assert hash(Transformer(small_model())) == hash(Transformer(small_model()))
  assert Transformer(small_model()) == Transformer(small_model())
  assert Transformer(small_model()) != Transformer(small_model(placement="pre"))

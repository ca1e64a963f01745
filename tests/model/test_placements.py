"""Every placement: against the independent reference, causal, in bfloat16, as data, and the identities among them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, small_model
from ml_collections import FrozenConfigDict

from mixln_jax import placement
from mixln_jax.model import Columns, Transformer
from mixln_jax.model.admin import profile_admin
from mixln_jax.model.parameters import used_by_layer
from mixln_jax.model.transformer import empty_cache
from mixln_jax.placement import ROWS, Layer, Table
from model import reference
from model.cases import ARGUMENTS, CORE, apply, assert_trees_close, each_placement, mean_loss, reference_case
from model.rounding import NETWORK, assert_near


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_what_its_tests_need(name):
  """A new row is covered by all that is enumerated here once its mathematics and an argument of it are given."""
  assert name in reference.SUBLAYERS, f"tests/model/reference.py: add a line for {name!r} to SUBLAYERS"
  if ROWS[name].arguments:
    assert name in ARGUMENTS, f"tests/model/cases.py: add to ARGUMENTS a spelling of {name!r} with its arguments"
    assert ARGUMENTS[name].count(":") == len(ROWS[name].arguments)


@pytest.mark.parametrize(("name", "unroll"), [("mix:0.5", 2), *each_placement(1), (CORE[-1], 0)])
def test_logits_and_gradients_equal_the_independent_reference(name, unroll):
  model = small_model(placement=name, unroll=unroll)
  params, tokens, expected, expected_loss, expected_grads = reference_case(name)
  logits = jax.jit(lambda p: Transformer(model).apply({"params": p}, tokens))(params)
  assert_near(logits, expected)
  loss, grads = jax.jit(jax.value_and_grad(lambda p: mean_loss(model, p, tokens)))(params)
  np.testing.assert_allclose(loss, expected_loss, rtol=NETWORK)
  assert_trees_close(grads, expected_grads)


@pytest.mark.parametrize("name", each_placement())
def test_a_loop_over_the_layers_gives_the_logits_of_the_reference(name):
  """A column that only the scan, or only the loop, reads for the wrong layer. Gradients of loops: test_golden.py."""
  model = small_model(placement=name, unroll=0)
  params, tokens, expected, *_ = reference_case(name)
  assert_near(apply(model, params, tokens), expected)


@pytest.mark.parametrize("name", each_placement())
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


@pytest.mark.parametrize("name", CORE)
def test_what_a_layer_does_not_use_never_gets_a_gradient_and_what_it_uses_does(name):
  model = small_model(placement=name)
  params, tokens = random_params(model), random_tokens(model)
  grads = jax.jit(jax.grad(lambda p: mean_loss(model, p, tokens)))(params)["layers"]
  for parameter, used_L in used_by_layer(small_model(placement=name)).items():
    assert used_L.any() == (parameter in grads), parameter
    if parameter in grads:
      moved_L = np.abs(grads[parameter]).reshape(4, -1).sum(axis=1) > 0
      np.testing.assert_array_equal(moved_L, used_L, err_msg=parameter)


@pytest.mark.parametrize(("name", "residual_dtype"), [("mix:0.5", "float32"), *each_placement("auto")])
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
  # bfloat16 rounds by 2^-9: four layers of eight products, at weights that are far from small, as a random walk are
  # √32·2^-9 = 0.011 of the sums' size; measured up to 0.05, since Post-LN layers do not let the stream grow.
  assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


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


def together(names):
  """The columns of several placements, and parameters with what any of them uses."""
  columns = Columns.of_many([placement.parse(name, 4) for name in names])
  model = small_model(placement=names[0])
  return columns, random_params(model, columns=jax.tree.map(lambda c: c[0], columns))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_placements_as_data_equal_the_same_compiled_in(dtype):
  # Those of several streams: test_streams.py.
  one_stream = [name for name in (*ROWS, *ARGUMENTS.values()) if not placement.parse(name, 4).streams.kind]
  names = [
    *one_stream,
    "mix:0.5",
    "mix:0.5+gpas",
    "sandwich+gpas",
    "pre+qk_norm",
    "reordered+qk_norm_full",
  ]
  columns, params = together(names)
  assert set(NAMES_THAT_VARY) <= {name.split(".")[1] for name in columns.varying}
  tokens = random_tokens(small_model())
  side_by_side = jax.jit(
    jax.vmap(lambda c: Transformer(small_model(dtype=dtype)).apply({"params": params}, tokens, columns=c))
  )
  for logits, name in zip(side_by_side(columns), names, strict=True):
    expected = apply(small_model(placement=name, dtype=dtype), params, tokens)
    # In bfloat16 an addition that rounds the other way in its last bit may be rounded again by each product after it.
    tolerance = NETWORK if dtype == "float32" else 2e-2
    assert_near(logits, expected, tolerance, err_msg=name)


NAMES_THAT_VARY = (
  *("norm_in", "norm_mid", "norm_out", "residual_from_normed", "c_in", "c_res", "gain_norm_out"),
  *("vector_c_res", "vector_c_out", "scalar_c_out", "gpas", "qk_norm", "qk_norm_full", "v_norm"),
)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, params, tokens):
  return jax.value_and_grad(lambda p: mean_loss(model, p, tokens))(params)


def table_of(name, **columns):
  """The table of a placement with some columns changed in every row."""

  def change(row):
    return dataclasses.replace(row, **columns)

  layers = placement.parse(name, 4).layers
  return Table(tuple(Layer(layer.name, change(layer.attention), change(layer.mlp)) for layer in layers))


@pytest.mark.parametrize(
  ("name", "changes", "parameters", "same_as"),
  [
    ("mix:0", {}, {}, "pre"),
    ("mix:1", {}, {}, "post"),
    ("deepnorm", {"c_res": 1.0}, {}, "post"),
    ("lns", {"c_in": 1.0}, {}, "pre"),
    ("post", {"c_res": 3.0, "c_out": 3.0}, {}, "post"),  # an N_out takes no notice of a common factor
    ("admin", {}, {"vector_c_res": 1.0}, "post"),
    ("layerscale", {}, {"vector_c_out": 1.0}, "pre"),
    ("skipinit", {}, {"scalar_c_out": 1.0}, "pre"),
    ("keel", {"c_res": 1.0, "norm_out": False}, {}, "pre"),
    ("sandwich", {"norm_mid": False}, {}, "pre"),
    *((f"{name}+gpas", {}, {"gpas": 0.0}, name) for name in ("pre", "post", "mix:0.5", "sandwich", "deepnorm")),
  ],
)
def test_identities(name, changes, parameters, same_as):
  table = table_of(name, **changes)
  model = small_model(placement=name, norm_epsilon=0.0)  # so that a common factor of a norm's input really cancels
  params, tokens = random_params(model), random_tokens(model)
  for path in params["layers"]:
    for parameter, value in parameters.items():
      if path.endswith(parameter):
        params["layers"][path] = jnp.full_like(params["layers"][path], value)

  base = FrozenConfigDict(small_model(placement=same_as, norm_epsilon=0.0))
  expected_loss, expected = loss_and_gradient(base, params, tokens)
  actual_loss, actual = jax.jit(jax.value_and_grad(lambda p: mean_loss(model, p, tokens, columns=Columns.of(table))))(
    params
  )
  np.testing.assert_allclose(actual_loss, expected_loss, rtol=NETWORK)
  learned = [path for path in params["layers"] if path.endswith(tuple(parameters))] if parameters else []
  for path in learned:  # the base has no such parameter
    assert np.abs(actual["layers"].pop(path)).sum() > 0
    expected["layers"].pop(path)
  assert_trees_close(actual, expected)


def test_skipinit_starts_as_no_layers_at_all():
  model = small_model(placement="skipinit")
  params, tokens = random_params(model), random_tokens(model)
  for name in ("attention", "mlp"):
    params["layers"][f"{name}_scalar_c_out"] = jnp.zeros(4)
  expected = reference.norm(params["embedding"][tokens], params["final_norm"], 1e-6) @ params["head"]
  assert_near(apply(model, params, tokens), expected)


@pytest.mark.parametrize("name", ["admin", "pre*1,admin*2,post*1"])
def test_admin_profiles_each_scale_with_those_before_it_set(name):
  model = small_model(placement=name)
  params, tokens = random_params(model), random_tokens(model)
  for sublayer in ("attention", "mlp"):
    params["layers"][f"{sublayer}_vector_c_res"] = jnp.ones((4, 24))
  weights = jnp.asarray(np.arange(12)[None] < np.array([[12], [5], [1]]), jnp.float32)
  actual = jax.jit(functools.partial(profile_admin, model))(params, tokens, weights)["layers"]

  def counted(h):
    return np.asarray(h)[np.asarray(weights) > 0]

  x, omega, found = params["embedding"][tokens], 1.0, []
  for index, kind in enumerate(placement.parse(name, 4).layer_list.split()):
    p = jax.tree.map(lambda w, index=index: w[index], params["layers"])
    if kind != "admin":
      (x,) = reference.layer([x], p, kind, index + 1, 4, model)
      for sublayer in ("attention", "mlp"):
        np.testing.assert_array_equal(actual[f"{sublayer}_vector_c_res"][index], 1)
      continue
    for sublayer, f in (
      ("attention", lambda h, p=p: reference.attention(h, p, model)),
      ("mlp", lambda h, p=p: reference.mlp(h, p)),
    ):
      np.testing.assert_allclose(actual[f"{sublayer}_vector_c_res"][index], omega, rtol=NETWORK)
      out = f(x)
      following = np.sqrt(counted(omega * x).var() + counted(out).var())
      x = reference.norm(omega * x + out, p[f"{sublayer}_norm"], 1e-6)
      omega = following
      found.append(float(omega))
  assert len(set(found)) == 2 * sum(layer.name == "admin" for layer in placement.parse(name, 4).layers)


@pytest.mark.parametrize("name", each_placement())
def test_a_placement_decodes_with_its_cache_as_it_computes_at_once(name):
  """A row whose norms or coefficients depended on the other positions of the call would give other logits."""
  model = small_model(placement=name)
  params, tokens = random_params(model), random_tokens(model, batch=2, length=5)
  cache, pieces = empty_cache(model, 2, 5), []
  for begin, end in ((0, 2), (2, 3), (3, 5)):  # a prompt, one token, and a chunk that the prompt's program serves
    positions = jnp.broadcast_to(jnp.arange(begin, end), (2, end - begin))
    logits, cache = apply(model, params, tokens[:, begin:end], cache=cache, positions_BT=positions)
    pieces.append(logits)
  expected = apply(model, params, tokens)
  assert_near(jnp.concatenate(pieces, 1), expected)

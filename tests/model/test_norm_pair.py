"""Two norms in a row with the sums of both in one pass: the values and gradients of the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, small_model

from mixln_jax.model import residual
from mixln_jax.model.norm import NormParams, norm
from mixln_jax.model.residual import Stream
from mixln_jax.model.tuned.norm_pair import Switched, norm_pair
from model.cases import mean_loss

EPSILON = 1e-2  # large, so that a wrong place of it shows
WIDTH = 24


def plain(stream_BTD, out_gain_D, out_on, in_gain_D, in_on, scale):
  """`Stream.value`, and what `Sublayer.input` makes of it."""
  x_BTD = Stream(stream_BTD, NormParams(out_gain_D), out_on).value("rmsnorm", EPSILON)
  y_BTD = norm("rmsnorm", x_BTD, NormParams(in_gain_D), epsilon=EPSILON, on=in_on, scale=scale)
  return x_BTD, y_BTD.astype(stream_BTD.dtype)


def paired(stream_BTD, out_gain_D, out_on, in_gain_D, in_on, scale):
  outer, inner = Switched(out_gain_D, out_on), Switched(in_gain_D, in_on)
  return norm_pair(EPSILON, stream_BTD.dtype, stream_BTD, outer, inner, scale)


def operands(dtype):
  """A stream whose positions differ in size, two gains and a scale; and the gradients of both results."""
  generator = np.random.default_rng(3)
  shape = (2, 5, WIDTH)
  sizes = generator.uniform(0.05, 4.0, (2, 5, 1))
  stream_BTD = jnp.asarray(sizes * generator.normal(size=shape), dtype)
  gains = [jnp.asarray(generator.uniform(0.5, 1.5, WIDTH), jnp.float32) for _ in range(2)]
  gradients = tuple(jnp.asarray(generator.normal(size=shape), dtype) for _ in range(2))
  return stream_BTD, *gains, jnp.float32(0.7), gradients


def results_and_gradients(form, out_on, in_on, dtype):
  stream_BTD, out_gain_D, in_gain_D, scale, gradients = operands(dtype)

  def of(stream_BTD, out_gain_D, in_gain_D, scale):
    return form(stream_BTD, out_gain_D, out_on, in_gain_D, in_on, scale)

  results, pull_back = jax.vjp(of, stream_BTD, out_gain_D, in_gain_D, scale)
  return *results, *pull_back(gradients)


@pytest.mark.parametrize("out_on", [True, False])
@pytest.mark.parametrize("in_on", [True, False])
def test_it_has_the_values_and_gradients_of_the_plain_form(out_on, in_on):
  """Catches a sum that is left out, a flag that is read for the other norm, and an epsilon in the wrong mean."""
  on = jnp.asarray(out_on), jnp.asarray(in_on)
  expected = results_and_gradients(plain, *on, jnp.float32)
  made = results_and_gradients(paired, *on, jnp.float32)
  for one, other in zip(made, expected, strict=True):
    # Both are fp32 sums of WIDTH or of 10 terms in another order.
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6 * float(jnp.abs(other).max()))


def test_in_bfloat16_it_is_no_further_from_fp32_than_the_plain_form():
  """Catches a sum in bfloat16, and a rounding that the plain form does not have."""
  on = jnp.asarray(True), jnp.asarray(True)
  exact = results_and_gradients(plain, *on, jnp.float32)

  def errors(form):
    rounded = results_and_gradients(form, *on, jnp.bfloat16)
    pairs = zip(rounded, exact, strict=True)
    return [float(jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)) for one, other in pairs]

  for of_pair, of_plain in zip(errors(paired), errors(plain), strict=True):
    # One sample of roundings against another: a sum in bfloat16 would be several times as far.
    assert of_pair < 1.3 * of_plain + 1e-4


def test_runs_trained_together_each_have_their_own_flags():
  """Catches a flag that one run takes from another under vmap."""
  flags = jnp.asarray([True, False, True, False]), jnp.asarray([True, True, False, False])
  together = jax.vmap(lambda out_on, in_on: results_and_gradients(paired, out_on, in_on, jnp.float32))(*flags)
  for run, on in enumerate(zip(*flags, strict=True)):
    alone = results_and_gradients(paired, *on, jnp.float32)
    for one, other in zip(together, alone, strict=True):
      np.testing.assert_allclose(one[run], other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("platform", "placement", "is_paired"),
  [
    ("tpu", "mix:0.5", True),
    ("tpu", "post*2,lns*2", True),
    ("tpu", "keel*2,post*2", True),
    ("tpu", "pre", False),
    ("tpu", "post", False),
    ("tpu", "pre*2,lns*2", False),
    ("cpu", "mix:0.5", False),
  ],
)
def test_a_mixture_on_a_tpu_trains_by_it_as_by_the_plain_form(monkeypatch, platform, placement, is_paired):
  """Catches a pair of other norms, scale or residual, and one where a constant row has no need of it."""
  model = small_model(placement=placement)
  params, tokens = random_params(model), random_tokens(model)
  expected = jax.grad(lambda params: mean_loss(model, params, tokens))(params)
  calls = []

  def counted(*arguments):
    calls.append(arguments)
    return norm_pair(*arguments)

  monkeypatch.setattr(residual, "norm_pair", counted)
  monkeypatch.setattr(residual, "platform", lambda: platform)
  made = jax.grad(lambda params: mean_loss(model, params, tokens))(params)
  assert bool(calls) == is_paired
  for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))

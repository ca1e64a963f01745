"""Products with weights: equal to einsum, also in what is differentiated, and with little to turn around."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax.model.product import multiply

SHAPES = {
  "btd,df->btf": ((2, 3, 4), (4, 5)),
  "btd,dhk->bthk": ((2, 3, 4), (4, 2, 6)),
  "bthk,hkd->btd": ((2, 3, 2, 6), (2, 6, 4)),
}


@pytest.mark.parametrize("equation", SHAPES)
def test_equal_to_einsum_with_the_narrower_operand_first(equation):
  rng = np.random.default_rng(0)
  x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES[equation])
  product = jnp.einsum(equation, x, weight)
  gradient = jnp.asarray(rng.normal(size=product.shape), jnp.float32)

  def gradients(multiply):
    return lambda x, weight, gradient: jax.vjp(multiply, x, weight)[1](gradient)

  ours = gradients(lambda x, weight: multiply(equation, x, weight))
  expected = gradients(lambda x, weight: jnp.einsum(equation, x, weight))(x, weight, gradient)
  np.testing.assert_allclose(multiply(equation, x, weight), product, rtol=1e-6, atol=1e-6)
  for actual, value in zip(ours(x, weight, gradient), expected, strict=True):
    np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-5)
  equations = jax.make_jaxpr(ours)(x, weight, gradient).eqns
  (of_weight,) = (e for e in equations if e.primitive.name == "dot_general" and e.outvars[0].aval.size == weight.size)
  assert of_weight.invars[0].aval.size == min(x.size, gradient.size)
  turned = [e.invars[0].aval.size for e in equations if e.primitive.name == "transpose"]
  assert turned == ([weight.size] if x.size > gradient.size else [])


def test_rematerialisation_still_sees_the_products():
  """A policy that keeps products keeps these: none is multiplied a second time."""

  def count(policy):
    f = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(multiply("btd,df->btf", x, w))), policy=policy)
    return str(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(jnp.ones((1, 2, 3)), jnp.ones((3, 4)))).count("dot_general")

  policies = jax.checkpoint_policies
  assert count(policies.dots_saveable) == count(policies.dots_with_no_batch_dims_saveable) == 3
  assert count(policies.nothing_saveable) == 4

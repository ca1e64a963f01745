"""Products with weights: both forms against einsum in fp64, and which one a platform gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model

from mixln_jax.model import product
from mixln_jax.model.parameters import parameters
from mixln_jax.model.tuned.product import multiply_narrow_first
from mixln_jax.parallel.rules import RULES
from model.rounding import assert_within, sum_error

SHAPES = {
  "btd,df->btf": ((2, 3, 4), (4, 5)),
  "btd,dhk->bthk": ((2, 3, 4), (4, 2, 6)),
  "bthk,hkd->btd": ((2, 3, 2, 6), (2, 6, 4)),
}


@pytest.fixture(params=SHAPES)
def case(request):
  equation = request.param
  rng = np.random.default_rng(0)
  x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES[equation])
  gradient = jnp.asarray(rng.normal(size=jnp.einsum(equation, x, weight).shape), jnp.float32)
  return equation, x, weight, gradient


def gradients(form, equation, x, weight, gradient):
  return jax.vjp(lambda x, weight: form(equation, x, weight), x, weight)[1](gradient)


@pytest.mark.parametrize("form", [jnp.einsum, multiply_narrow_first, product._gather_and_multiply])
def test_values_and_gradients_are_einsums_in_fp64(case, form):
  """Catches a gradient that sums over the wrong letters, or a weight gradient left transposed."""
  equation, x, weight, gradient = case
  inputs, output_term = equation.split("->")
  x_term, weight_term = inputs.split(",")
  exact = {
    equation: (form(equation, x, weight), x, weight),
    f"{output_term},{weight_term}->{x_term}": (gradients(form, *case)[0], gradient, weight),
    f"{x_term},{output_term}->{weight_term}": (gradients(form, *case)[1], x, gradient),
  }
  for name, (actual, a, b) in exact.items():
    expected = np.einsum(name, np.asarray(a, np.float64), np.asarray(b, np.float64))
    terms = a.size * b.size // expected.size  # at least the length of the sum
    assert_within(actual, expected, sum_error(terms, name, a, b), name)


def test_tuned_weight_gradient_has_the_narrower_operand_first(case):
  """Catches the copy of the wider operand that the tuned form is for: it would cost a CPU time and change no value."""
  _, x, weight, gradient = case
  equations = jax.make_jaxpr(lambda *a: gradients(multiply_narrow_first, case[0], *a))(x, weight, gradient).eqns
  (of_weight,) = (e for e in equations if e.primitive.name == "dot_general" and e.outvars[0].aval.size == weight.size)
  assert of_weight.invars[0].aval.size == min(x.size, gradient.size)
  transposed = [e.invars[0].aval.size for e in equations if e.primitive.name == "transpose"]
  assert transposed == ([weight.size] if x.size > gradient.size else [])


@pytest.mark.parametrize(("platform", "tuned"), [("cpu", True), ("tpu", False), ("gpu", False)])
def test_only_a_cpu_gets_the_tuned_form(monkeypatch, platform, tuned):
  """Catches a door that costs an accelerator forward-mode and second derivatives, or a CPU its tuned form."""
  monkeypatch.setattr(product, "platform", lambda: platform)
  jaxpr = jax.make_jaxpr(lambda x, w: product.multiply("btd,df->btf", x, w))(jnp.ones((1, 2, 3)), jnp.ones((3, 4)))
  assert ("custom_vjp" in str(jaxpr)) == tuned


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_rematerialisation_still_sees_the_products(monkeypatch, platform):
  """Catches a form that hides its products from a remat policy: they would be multiplied a second time."""
  monkeypatch.setattr(product, "platform", lambda: platform)

  def count(policy):
    f = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(product.multiply("btd,df->btf", x, w))), policy=policy)
    return str(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(jnp.ones((1, 2, 3)), jnp.ones((3, 4)))).count("dot_general")

  policies = jax.checkpoint_policies
  assert count(policies.dots_saveable) == count(policies.dots_with_no_batch_dims_saveable) == 3
  assert count(policies.nothing_saveable) == 4


def test_a_weights_letters_are_cut_as_its_parameter_is():
  """Catches an equation whose letters name other axes than the table of parameters: it would gather the wrong ones."""
  axes = {param.name: param.axes[1:] for param in parameters(small_model()).values() if param.in_layers}
  equations = {
    "btd,df->btf": ("gate", "up"),
    "btf,fd->btd": ("down",),
    "btd,dhk->bthk": ("query", "key", "value"),
    "bthk,hkd->btd": ("output",),
  }
  for equation, names in equations.items():
    for name in names:
      expected = [RULES[axis] for axis in axes[name]]
      assert [RULES[axis] for axis in product._weight_axes(equation)] == expected, name

"""Where fusion is fenced off, and that a fence changes no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, small_model

from mixln_jax.model import Transformer, residual
from mixln_jax.model.tuned import fence


def cubed_behind_a_backward_fence(x):
  return jnp.sum(fence.backward_fence(x) ** 3)


def cubed_before_a_fence(x):
  output, auxiliary = fence.fenced(lambda x: (x**3, 7))(x)
  assert auxiliary == 7
  return jnp.sum(output)


@pytest.mark.parametrize("fenced_sum", [cubed_behind_a_backward_fence, cubed_before_a_fence])
def test_a_fence_changes_no_value(fenced_sum):
  """Catches a fence that stops a gradient, or forms another one."""
  x = jnp.asarray([0.5, -2.0])
  value, gradient = jax.value_and_grad(fenced_sum)(x)
  np.testing.assert_array_equal(value, jnp.sum(x**3))
  np.testing.assert_array_equal(gradient, 3 * x**2)


@pytest.mark.parametrize(
  ("platform", "placement", "kind", "fenced"),
  [
    ("tpu", "mix:0.5", "rmsnorm", True),
    ("tpu", "mix:0.5", "layernorm", True),
    ("tpu", "hc:2", "rmsnorm", True),
    ("tpu", "pre", "rmsnorm", False),
    ("tpu", "post", "rmsnorm", False),
    ("tpu", "siamese", "rmsnorm", False),
    ("tpu", "pre+x0", "rmsnorm", False),
    ("cpu", "mix:0.5", "rmsnorm", False),
    ("cpu", "hc:2", "rmsnorm", False),
  ],
)
def test_only_a_tpu_fences_and_only_norms_of_some_layers_and_learned_write_weights(
  monkeypatch, platform, placement, kind, fenced
):
  """Catches a fence where it costs a fusion that is wanted, and a CPU's program that changes."""
  monkeypatch.setattr(residual, "platform", lambda: platform)
  model = small_model(placement=placement, norm=kind, num_layers=2)
  params = random_params(model)
  tokens = jnp.zeros((1, 3), jnp.int32)

  def loss(params):
    return jnp.sum(Transformer(model).apply({"params": params}, tokens))

  assert ("optimization_barrier" in str(jax.make_jaxpr(jax.grad(loss))(params))) == fenced

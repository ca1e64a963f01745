"""The loss and its gradients against the loss written out with all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax.model import next_token_loss
from mixln_jax.model.tuned import loss as tuned_loss

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 22, 16, 101


def written_out(hidden, head, labels, weights):
  logits = (hidden @ head).astype(jnp.float32)
  losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return jnp.sum(losses * weights)


@pytest.fixture(scope="module")
def case():
  rng = np.random.default_rng(0)
  # Logits of deviation 40: softmax without its largest logit taken off would overflow.
  hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)) * 10, jnp.float32)
  head = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH)), jnp.int32)
  weights = jnp.asarray(rng.integers(0, 2, (BATCH, LENGTH)), jnp.int32)
  return hidden, head, labels, weights


@pytest.mark.parametrize("chunk", [None, LENGTH, 11, 5, 1])  # 5 chunks of 5 are 3 positions too many
def test_value_and_gradients_equal_those_of_all_logits(case, chunk):
  hidden, head, labels, weights = case
  expected, gradients = jax.value_and_grad(written_out, argnums=(0, 1))(hidden, head, labels, weights)

  def scaled(hidden, head):  # as the division by the count does: the gradient must take the factor
    return next_token_loss(hidden, head, labels, weights, chunk=chunk)[0] / 7

  value, found = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(hidden, head)
  np.testing.assert_allclose(value * 7, expected, rtol=1e-6)
  for one, other in zip(found, gradients, strict=True):
    np.testing.assert_allclose(one * 7, other, rtol=0, atol=2e-6 * float(jnp.abs(other).max()))
  total, count = next_token_loss(hidden, head, labels, weights, chunk=chunk)
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  assert count == weights.sum()


def test_bfloat16_is_rounded_in_the_products_alone(case):
  hidden, head, labels, weights = case
  hidden, head = hidden.astype(jnp.bfloat16) / 10, head.astype(jnp.float32)
  exact = written_out(hidden.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32), labels, weights)
  loss = lambda hidden, head: next_token_loss(hidden, head, labels, weights, chunk=5)[0]  # noqa: E731
  value, (by_hidden, by_head) = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
  np.testing.assert_allclose(value, exact, rtol=1e-5)  # the logits are sums in fp32
  assert (by_hidden.dtype, by_head.dtype) == (hidden.dtype, head.dtype)
  expected = jax.grad(written_out, argnums=(0, 1))(hidden.astype(jnp.float32), head, labels, weights)
  for one, other in zip((by_hidden, by_head), expected, strict=True):
    np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0, atol=0.02 * float(jnp.abs(other).max()))


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
  vocabulary, batch = 4096, 2

  def temporaries(length):
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    step = jax.jit(jax.value_and_grad(lambda *a: next_token_loss(*a)[0], argnums=(0, 1)))
    rows = shape(batch, length, dtype=jnp.int32)
    compiled = step.lower(shape(batch, length, WIDTH), shape(WIDTH, vocabulary), rows, rows).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  monkeypatch.setitem(tuned_loss.CHUNK_LOGITS, "cpu", 16 * batch * vocabulary)
  short, long = temporaries(64), temporaries(1024)
  assert long - short < 0.05 * (1024 - 64) * batch * vocabulary * 4

"""The loss and its gradients, in both forms, against the loss written out in fp64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax.model import next_token_loss
from mixln_jax.model.loss import all_logits_loss
from mixln_jax.model.tuned import loss as tuned_loss
from mixln_jax.model.tuned.loss import chunked_loss
from model.rounding import UNIT, assert_within, sum_error

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 22, 16, 101
# 5 chunks of 5 are 3 positions too many.
FORMS = {
  "all logits": all_logits_loss,
  "chunks as chosen": chunked_loss,
  **{f"chunks of {chunk}": partial(chunked_loss, chunk=chunk) for chunk in (LENGTH, 11, 5, 1)},
}


def written_out(hidden, head, labels, weights):
  """The loss and its gradients in fp64, and how far fp32 may be from each, for any order of its sums.

  An error δ of the logits is one of 2δ in a position's loss, and a relative one of 2δ in its softmax; the gradients are
  sums, of VOCABULARY and of BATCH · LENGTH terms, with their own rounding. (exp and log add a few units more.)
  """
  error_BT = sum_error(WIDTH, "btd,dv->btv", hidden, head).max(axis=-1)
  hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
  labels_BT1 = np.asarray(labels)[..., None]
  logits = hidden @ head
  largest = logits.max(axis=-1, keepdims=True)
  powers = np.exp(logits - largest)
  sums = powers.sum(axis=-1, keepdims=True)
  losses = (np.log(sums) + largest - np.take_along_axis(logits, labels_BT1, axis=-1))[..., 0]
  one_hot = np.arange(VOCABULARY) == labels_BT1
  gradient = weights[..., None] * (powers / sums - one_hot)
  size = weights[..., None] * (powers / sums + one_hot)
  relative_BT1 = 2 * error_BT[..., None] + (VOCABULARY + 8) * UNIT
  exact = np.sum(losses * weights), gradient @ head.T, np.einsum("btd,btv->dv", hidden, gradient)
  tolerances = (
    np.sum((2 * error_BT + (BATCH * LENGTH + 8) * UNIT * np.abs(losses)) * weights),
    (size * (relative_BT1 + VOCABULARY * UNIT)) @ np.abs(head).T,
    np.einsum("btd,btv->dv", np.abs(hidden), size * (relative_BT1 + BATCH * LENGTH * UNIT)),
  )
  return exact, tolerances


@pytest.fixture(scope="module")
def case():
  rng = np.random.default_rng(0)
  # Logits of standard deviation 40: softmax without its largest logit taken off would overflow.
  hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)) * 10, jnp.float32)
  head = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH)), jnp.int32)
  weights = jnp.asarray(rng.integers(0, 2, (BATCH, LENGTH)), jnp.float32)
  return hidden, head, labels, weights


def check_value_and_gradients(form, case):
  hidden, head, labels, weights = case
  exact, tolerances = written_out(*case)

  def scaled(hidden, head):  # as the division by the count does: the gradient must take the factor
    return form(hidden, head, labels, weights) / 8

  value, gradients = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(hidden, head)
  found = value, *gradients
  for name, one, expected, tolerance in zip(("loss", "hidden", "head"), found, exact, tolerances, strict=True):
    assert_within(one * 8, expected, tolerance, name)
  assert_within(form(hidden, head, labels, weights), exact[0], tolerances[0], "loss without gradients")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_loss_in_fp64(case, form):
  """Catches a chunk that is lost or counted twice, and a gradient that is not that of the value."""
  check_value_and_gradients(FORMS[form], case)


def test_label_by_comparison_as_on_an_accelerator(monkeypatch, case):
  """Catches a mistake in the gradient that a CPU, which scatters, would never show."""
  monkeypatch.setattr(tuned_loss, "platform", lambda: "tpu")
  check_value_and_gradients(partial(chunked_loss, chunk=5), case)


def test_the_door_gives_the_sum_and_the_count(case):
  """Catches a mean, or a count of all positions instead of the counted ones; weights may be integers."""
  hidden, head, labels, weights = case
  exact, tolerances = written_out(*case)
  total, count = next_token_loss(hidden, head, labels, weights.astype(jnp.int32), chunk=5)
  assert_within(total, exact[0], tolerances[0])
  assert count == weights.sum()


@pytest.mark.parametrize("form", ["all logits", "chunks of 5"])
def test_bfloat16_is_rounded_in_the_products_alone(monkeypatch, case, form):
  """Catches logits or sums that are rounded to bfloat16 on the way."""
  hidden, head, labels, weights = case
  hidden, head = hidden.astype(jnp.bfloat16) / 10, head.astype(jnp.bfloat16)
  exact, tolerances = written_out(hidden, head, labels, weights)
  form = FORMS[form]
  value, gradients = jax.value_and_grad(form, argnums=(0, 1))(hidden, head, labels, weights)
  assert_within(value, exact[0], tolerances[0])  # the logits are sums in fp32
  for one, expected in zip(gradients, exact[1:], strict=True):
    assert one.dtype == jnp.bfloat16
    # bfloat16's unit roundoff is 2⁻⁸: of the gradient by the logits, the scaled hidden states and the result.
    np.testing.assert_allclose(one.astype(jnp.float32), expected, rtol=0, atol=4 * 2**-8 * np.abs(expected).max())


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
  """Catches a scan that saves the logits of every chunk for the backward pass."""
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

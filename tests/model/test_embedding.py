"""The embedding's look-up, in the form for a table that a mesh cuts; without a mesh it lays nothing out."""

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.model.embedding import _look_up_in_columns, look_up

VOCABULARY, WIDTH = 5, 3


def test_both_forms_find_the_same():
  """Catches a row that is off, and an id outside the vocabulary that silently gets a neighbour's row."""
  table = jnp.asarray(np.random.default_rng(0).normal(size=(VOCABULARY, WIDTH)), jnp.float32)
  tokens = jnp.asarray([[0, 4, 2], [4, 4, VOCABULARY]])
  found = _look_up_in_columns(VOCABULARY, jnp.float32, table, tokens)
  np.testing.assert_array_equal(found, look_up(table, tokens, jnp.float32))
  np.testing.assert_array_equal(found[:, :2], np.asarray(table)[np.asarray(tokens)[:, :2]])
  assert np.isnan(found[1, 2]).all()


def test_the_gradient_of_a_frequent_token_is_added_up_in_fp32():
  """Catches a sum in bfloat16: from 256 equal terms on it would not grow any more."""
  count = 4096
  table = jnp.zeros((VOCABULARY, WIDTH), jnp.float32)
  tokens = jnp.full((1, count), 3).at[0, 0].set(1)
  gradients = jax.random.uniform(jax.random.key(0), (1, count, WIDTH), jnp.bfloat16, 0.5, 1.5)
  _, gradient_of = jax.vjp(lambda table: _look_up_in_columns(VOCABULARY, jnp.bfloat16, table, tokens), table)
  (of_table,) = gradient_of(gradients)
  assert of_table.dtype == table.dtype
  exact = np.zeros((VOCABULARY, WIDTH))
  np.add.at(exact, np.asarray(tokens)[0], np.asarray(gradients, np.float64)[0])
  np.testing.assert_allclose(of_table, exact, rtol=count * 2**-24)

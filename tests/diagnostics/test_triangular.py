"""The triangular factor against LAPACK in float64."""

import jax
import numpy as np
import pytest

from mixln_jax.diagnostics import triangular


def decomposed(rows, num_columns):
  return np.asarray(jax.jit(triangular.triangularize, static_argnums=1)(rows.astype(np.float32), num_columns))


@pytest.mark.parametrize("num_columns", [1, 7, triangular.PANEL, triangular.PANEL + 5])
def test_the_factor_and_the_projections_are_those_of_lapack(num_columns):
  """A panel that leaves out its last column, a reflection of another sign or one applied in the wrong order."""
  rows = np.random.default_rng(num_columns).normal(size=(num_columns + 40, num_columns + 3))
  found = decomposed(rows, num_columns)
  orthogonal, triangle = np.linalg.qr(rows[:, :num_columns])
  expected = np.concatenate([triangle, orthogonal.T @ rows[:, num_columns:]], axis=1)
  signs = np.sign(np.diag(expected)) * np.sign(np.diag(found))
  np.testing.assert_allclose(found * signs[:, None], expected, atol=2e-5)
  assert (np.tril(found[:, :num_columns], -1) == 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_small_directions_are_resolved_as_a_sum_of_squares_does_not(scale):
  """Normal equations, whose smallest singular values here would be noise; a square that over- or underflows."""
  generator = np.random.default_rng(0)
  left, _ = np.linalg.qr(generator.normal(size=(200, 40)))
  right, _ = np.linalg.qr(generator.normal(size=(40, 40)))
  expected = scale * np.logspace(0, -5, 40)
  found = decomposed((left * expected) @ right.T, 40)
  np.testing.assert_allclose(np.linalg.svd(found.astype(np.float64), compute_uv=False), expected, atol=scale * 3e-7)


def test_rows_of_zeros_and_columns_that_depend_on_others():
  """A division by the length of a column of which nothing is left; infinity that turns into a number."""
  generator = np.random.default_rng(0)
  rows = np.zeros((30, 12))
  rows[10:15] = generator.normal(size=(5, 12))  # fewer rows than columns
  rows[:, 3] = 0
  rows[:, 6] = rows[:, 5]
  found = decomposed(rows, 10)
  np.testing.assert_allclose(found[:, :10].T @ found, rows[:, :10].T @ rows, atol=1e-5)
  rows[12, 4] = np.inf
  assert np.isnan(decomposed(rows, 10)).any()

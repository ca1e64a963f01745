"""The triangular factor of a QR decomposition, in a program that is small for any width.

On a TPU, XLA unrolls `jnp.linalg.qr` over blocks of columns; for 10,245 rows of 2,049 numbers that had not compiled
after 24 minutes on a busy machine. Here the blocks are a loop. Both use Householder reflections and resolve in fp32
singular values down to 1e-7 of the largest one, where sums of squares resolve 3e-4.

Dimensions: R rows; X columns, of which the first E are made triangular; P columns of a panel.
"""

import jax
import jax.numpy as jnp

from mixln_jax.parallel.rules import constrain

PANEL = 32  # columns that are reduced before their reflections are applied to the others


def triangularize(rows_RX: jax.Array, num_columns: int) -> jax.Array:
  """Qᵀ times the rows, [E, X], where the first E = `num_columns` columns of the rows have the decomposition Q R.

  The result is R with Qᵀ times the other columns on its right. Signs of its rows are those of Householder's method: the
  diagonal of R may be negative. There must be at least E rows.

  Source: the UT transform (Joffrain et al., ACM Trans. Math. Softw. 32, 2006): reflections I − 2 v vᵀ with the unit
  vectors V multiply to I − V U⁻¹ Vᵀ, where U is the upper triangle of VᵀV with half its diagonal.
  """
  num_rows = len(rows_RX)
  panel = min(PANEL, num_columns)
  num_panels = -(-num_columns // panel)
  # Columns of zeros fill the last panel; they have no reflections.
  fill = num_panels * panel - num_columns
  ours_RE, others_RF = rows_RX[:, :num_columns], rows_RX[:, num_columns:]
  padded_RX = jnp.concatenate([ours_RE, jnp.zeros((num_rows, fill)), others_RF], axis=1)
  # On a mesh each device has all rows; if they stayed sharded, every column would need its own exchange.
  padded_RX = constrain(padded_RX, None, None)
  row_R = jnp.arange(num_rows)

  def reduce_panel(number: jax.Array, matrix_RX: jax.Array) -> jax.Array:
    first = number * panel

    def reduce_column(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      panel_RP, vectors_RP = carry
      vector_R = reflection(panel_RP[:, index], first + index, row_R)
      panel_RP -= 2.0 * jnp.outer(vector_R, vector_R @ panel_RP)
      return panel_RP, vectors_RP.at[:, index].set(vector_R)

    panel_RP = jax.lax.dynamic_slice_in_dim(matrix_RX, first, panel, axis=1)
    _, vectors_RP = jax.lax.fori_loop(0, panel, reduce_column, (panel_RP, jnp.zeros_like(panel_RP)))
    triangle_PP = jnp.triu(vectors_RP.T @ vectors_RP, 1) + 0.5 * jnp.eye(panel)
    coefficients_PX = jax.scipy.linalg.solve_triangular(triangle_PP, vectors_RP.T @ matrix_RX, trans="T")
    return matrix_RX - vectors_RP @ coefficients_PX

  with jax.default_matmul_precision("highest"):
    reduced_RX = jax.lax.fori_loop(0, num_panels, reduce_panel, padded_RX)
  triangle_EE = jnp.triu(reduced_RX[:num_columns, :num_columns])
  return jnp.concatenate([triangle_EE, reduced_RX[:num_columns, num_columns + fill :]], axis=1)


def reflection(column_R: jax.Array, place: jax.Array, row_R: jax.Array) -> jax.Array:
  """The unit vector v for which I − 2 v vᵀ makes the column 0 below `place` and leaves it as it is above, [R].

  It is 0 if there is nothing to reflect: the column is 0 from `place` on.
  """
  below_R = jnp.where(row_R >= place, column_R, 0.0)
  # Divided by the largest entry, so that no square over- or underflows.
  largest = jnp.max(jnp.abs(below_R))
  scaled_R = below_R / jnp.where(largest == 0, 1.0, largest)
  is_place_R = row_R == place
  head = jnp.sum(jnp.where(is_place_R, scaled_R, 0.0))
  # With the sign of the head, the sum does not cancel.
  length = jnp.linalg.norm(scaled_R)
  vector_R = scaled_R + jnp.where(is_place_R, jnp.where(head < 0, -length, length), 0.0)
  size = jnp.linalg.norm(vector_R)
  return vector_R / jnp.where(size == 0, 1.0, size)

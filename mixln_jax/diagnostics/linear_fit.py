"""The affine map that is closest to each layer, in least squares over tokens.

For each layer, the rows (1, x, y) of all tokens, where x is what the layer reads and y what it writes, are stored as
the triangular factor of their QR decomposition, which each batch updates. The factor resolves singular values down to
1e-7 of the largest one, where fp32 sums of squares resolve 3e-4. If the factors of all layers don't fit in memory, some
layers are fitted at a time.

Dimensions: G layers of one pass; E = 1 + what a layer reads; F what it writes; the others as in the model.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mixln_jax.config import ModelConfig
from mixln_jax.diagnostics.layer_io import AnyStreams, Batch, LayerIO, by_layer, present
from mixln_jax.diagnostics.substitution import Affine
from mixln_jax.diagnostics.triangular import triangularize
from mixln_jax.model import Transformer

MOST_NUMBERS = 2**28  # in the factors of one pass: 1 GB
ROWS = 4  # rows of one decomposition, in multiples of E
RESOLVED = 1e-6  # directions whose singular value is below this fraction of the largest are left out


class Factors(flax.struct.PyTreeNode):
  """The R of the rows (1, x) [G, E, E], and Qᵀ times the rows y [G, E, F]."""

  triangle_GEE: jax.Array
  projected_GEF: jax.Array

  @classmethod
  def zeros(cls, model: ModelConfig) -> "Factors":
    read, written = LayerIO(Transformer(model)).sizes()
    num = layers_at_once(model)
    return cls(jnp.zeros((num, read + 1, read + 1)), jnp.zeros((num, read + 1, written)))


Step = Callable[[Any, Factors, Batch, Any], Factors]


def layers_at_once(model: ModelConfig) -> int:
  """G, the number of layers whose factors fit in MOST_NUMBERS."""
  read, written = LayerIO(Transformer(model)).sizes()
  return max(1, min(model.num_layers, MOST_NUMBERS // ((read + 1) * (read + 1 + written))))


def make_fit_step(model: ModelConfig) -> Step:
  """`step(params, factors, batch, first)`: adds a batch to the factors of layers first … first + G − 1, under jit."""

  def add(transformer: Transformer, factors: Factors, batch: Batch, first: Any) -> Factors:
    io, layers, present_BT = LayerIO(transformer), by_layer(transformer, batch), present(batch)
    num = factors.triangle_GEE.shape[0]

    def body(carry: tuple[AnyStreams, Factors], inputs: Any) -> tuple[Any, None]:
      before, factors = carry
      layer_inputs, slots = inputs
      after = layers.apply(layer_inputs, before)
      place = layer_inputs[1].layer - first

      def extend() -> Factors:
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), factors)
        read_BTE, written_BTF = io.read(before), io.written(before, after, slots)
        updated = add_rows(own.triangle_GEE, own.projected_GEF, read_BTE, written_BTF, present_BT)
        triangle_GEE = jax.lax.dynamic_update_index_in_dim(factors.triangle_GEE, updated[0], place, 0)
        projected_GEF = jax.lax.dynamic_update_index_in_dim(factors.projected_GEF, updated[1], place, 0)
        return Factors(triangle_GEE, projected_GEF)

      factors = jax.lax.cond((place >= 0) & (place < num), extend, lambda: factors)
      return (after, factors), None

    (_, factors), _ = jax.lax.scan(body, (layers.first, factors), (layers.layers, io.slots()))
    return factors

  def step(params: Any, factors: Factors, batch: Batch, first: Any) -> Factors:
    return nn.apply(lambda transformer: add(transformer, factors, batch, first), Transformer(model))({"params": params})

  return step


def add_rows(
  triangle_EE: jax.Array, projected_EF: jax.Array, x_BTE: jax.Array, y_BTF: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Updates the factors of one layer with the rows (1, x, y) whose weight is 1, some positions at a time."""
  batch, length = weights_BT.shape
  at_once = max(1, min(length, ROWS * len(triangle_EE) // batch))
  pieces = -(-length // at_once)

  def cut(values_BTX: jax.Array) -> jax.Array:
    """The values as [pieces, rows, X], padded with rows of zeros."""
    padded = jnp.pad(values_BTX, ((0, 0), (0, pieces * at_once - length), (0, 0)))
    by_piece = padded.reshape(batch, pieces, at_once, -1).swapaxes(0, 1)
    return by_piece.reshape(pieces, batch * at_once, -1)

  weights_BT1 = weights_BT[..., None]
  rows_BTE = jnp.concatenate([weights_BT1, x_BTE * weights_BT1], axis=-1)

  def extend(factors: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
    triangle_EE, projected_EF = factors
    so_far = jnp.concatenate([triangle_EE, projected_EF], axis=1)
    stacked = jnp.concatenate([so_far, jnp.concatenate(rows, axis=1)])
    reduced = triangularize(stacked, len(triangle_EE))
    return (reduced[:, : len(triangle_EE)], reduced[:, len(triangle_EE) :]), None

  factors, _ = jax.lax.scan(extend, (triangle_EE, projected_EF), (cut(rows_BTE), cut(y_BTF * weights_BT1)))
  return factors


def solve(factors: Factors) -> np.ndarray:
  """The maps [G, E, F] in fp32, with the offset in the first row; computed in float64.

  In directions that the tokens do not resolve (there may be fewer tokens than E), the map is the one of least norm. A
  layer with a factor that is not finite has a map of NaN.
  """
  maps = []
  for triangle_EE, projected_EF in zip(factors.triangle_GEE, factors.projected_GEF, strict=True):
    triangle, projected = np.asarray(triangle_EE, np.float64), np.asarray(projected_EF, np.float64)
    if np.isfinite(triangle).all() and np.isfinite(projected).all():
      solution: Any = scipy.linalg.lstsq(triangle, projected, cond=RESOLVED, lapack_driver="gelsy")
      maps.append(solution[0])
    else:
      maps.append(np.full(projected.shape, np.nan))
  return np.stack(maps).astype(np.float32)


def affine(maps_LEF: np.ndarray) -> Affine:
  """The maps of `solve` in the form that `make_substitution_step` takes."""
  return Affine(maps_LEF[:, 1:], maps_LEF[:, 0])

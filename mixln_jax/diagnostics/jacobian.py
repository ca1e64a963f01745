"""How far each layer's Jacobian is from the identity, estimated from its products with a few random vectors.

J[a, b] = ∂ output b / ∂ input a of a layer, averaged over positions. For a random vector v of length √width, the
expectation of ‖(J − I) v‖² is ‖J − I‖²_F (Hutchinson). J v is a vector-Jacobian product, so the cost does not grow with
the width. Two versions of J are measured:

`summed`: the mean over input positions of the sum over all output positions, as in DepthBench's code. It includes what
attention carries to later tokens.

`same_position`: the derivative of a position's output by its own input only. The cotangents and the gradients of a
position are multiplied by the same random sign, so that derivatives between different positions cancel on average. The
square is the product of two estimates with independent signs; squaring a single estimate would add its variance.

Dimensions: K vectors, N streams that are carried from layer to layer, the others as in the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.diagnostics.layer_io import AnyStreams, Batch, by_layer, present
from mixln_jax.model import Transformer
from mixln_jax.model.residual import Sources, Stream, Streams
from mixln_jax.model.transformer import separate


class Products(flax.struct.PyTreeNode):
  """J v for each layer and vector, summed over input positions.

  Attributes:
    tokens: number of input positions.
    summed_LKND: with the J of `summed`.
    same_LKSND: with the J of `same_position`, for S draws of signs (S = 1 if it is exact).
  """

  tokens: jax.Array
  summed_LKND: jax.Array
  same_LKSND: jax.Array


class Deviation(NamedTuple):
  """‖J − I‖_F / √(N D) of each layer, and the standard error of the estimate; [L] each."""

  value: np.ndarray
  standard_error: np.ndarray


Step = Callable[[Any, Batch, Any, Any, Any], Products]


def make_jacobian_step(transformer: Transformer, *, exact: bool = False) -> Step:
  """`step(params, batch, rows_B, vectors_KND, draw) -> Products`. Call it under jit.

  Only rows where rows_B is 1 count. `draw` is a pair (seed, number) that determines the random signs.

  Args:
    transformer: the model.
    exact: compute `same_position` with one product per position and without signs; for small models.
  """

  def products(model: Transformer, batch: Batch, rows_B: Any, vectors_KND: Any, draw: Any) -> Products:
    config, layers = model.config, by_layer(model, batch)
    key = jax.random.fold_in(jax.random.key(draw[0]), draw[1])
    present_BT = present(batch) * rows_B[:, None]
    present_BT1 = present_BT[..., None]

    def body(before: AnyStreams, layer_inputs: Any) -> tuple[AnyStreams, tuple[jax.Array, jax.Array]]:
      def apply(values: list[jax.Array]) -> tuple[list[jax.Array], AnyStreams]:
        after = layers.apply(layer_inputs, join(values, before, config.norm))
        return separate(after, config), after

      values, pull_back, after = jax.vjp(apply, separate(before, config), has_aux=True)

      def gradient(vector_ND: jax.Array, factor_BT1: jax.Array) -> jax.Array:
        """The gradient of Σ factor · (v · output) by the inputs, [N, B, T, D]."""
        cotangents = []
        for vector_D, value in zip(vector_ND, values, strict=True):
          cotangents.append((vector_D * factor_BT1).astype(value.dtype))
        return jnp.stack(pull_back(cotangents)[0]).astype(jnp.float32)

      def one_vector(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        vector_ND, vector_key = inputs
        summed_ND = jnp.sum(gradient(vector_ND, present_BT1) * present_BT1, axis=(1, 2))

        def with_signs(key: jax.Array) -> jax.Array:
          signs_BT1 = jax.random.rademacher(key, present_BT.shape, jnp.float32)[..., None] * present_BT1
          return jnp.sum(gradient(vector_ND, signs_BT1) * signs_BT1, axis=(1, 2))

        def at_position(position: jax.Array) -> jax.Array:
          here_BT1 = present_BT1 * (jnp.arange(present_BT.shape[1]) == position)[:, None]
          return jnp.sum(gradient(vector_ND, here_BT1) * here_BT1, axis=(1, 2))

        if exact:
          by_position = jax.lax.map(at_position, jnp.arange(present_BT.shape[1]))
          return summed_ND, jnp.sum(by_position, axis=0)[None]
        return summed_ND, jax.lax.map(with_signs, jax.random.split(vector_key, 2))

      layer_key = jax.random.fold_in(key, layer_inputs[1].layer)
      return after, jax.lax.map(one_vector, (vectors_KND, jax.random.split(layer_key, len(vectors_KND))))

    _, (summed_LKND, same_LKSND) = jax.lax.scan(body, layers.first, layers.layers)
    return Products(jnp.sum(present_BT), summed_LKND, same_LKSND)

  def step(params: Any, batch: Batch, rows_B: Any, vectors_KND: Any, draw: Any) -> Products:
    return nn.apply(lambda model: products(model, batch, rows_B, vectors_KND, draw), transformer)({"params": params})

  return step


def join(values: list[jax.Array], like: AnyStreams, kind: str) -> AnyStreams:
  """The inverse of `separate`: streams in the form that a layer reads, which is that of `like`."""
  if isinstance(like, Sources):
    return Sources(jnp.stack(values))
  first = Stream(values[0])
  if like.first.pending is not None:
    first = first.as_scan_carry(kind)
  return Streams(first, tuple(values[1:]))


def deviation(products_LKND: np.ndarray, others_LKND: np.ndarray, vectors_KND: np.ndarray) -> Deviation:
  """‖J − I‖_F / √(N D) of each layer, from products of J with random vectors.

  Args:
    products_LKND: J v, averaged over positions.
    others_LKND: a second estimate of J v with other signs, or the same array if it has no signs.
    vectors_KND: the vectors v.
  """
  products = (products_LKND - vectors_KND) * (others_LKND - vectors_KND)
  squares_LK = products.sum(axis=(2, 3)) / vectors_KND[0].size
  mean_L = squares_LK.mean(axis=1)
  value_L = np.sqrt(np.maximum(mean_L, 0.0))
  num_vectors = squares_LK.shape[1]
  if num_vectors == 1:
    return Deviation(value_L, np.full_like(value_L, np.nan))
  error_L = squares_LK.std(axis=1, ddof=1) / np.sqrt(num_vectors)
  # The standard error of a square root, to first order; near 0, where that diverges, √error bounds it.
  first_order_L = error_L / (2.0 * np.maximum(value_L, np.finfo(float).tiny))
  return Deviation(value_L, np.minimum(first_order_L, np.sqrt(error_L)))


def exact_deviation(matrix_LEE: np.ndarray) -> np.ndarray:
  """‖J − I‖_F / √width of each layer from the whole Jacobians [L, E, E], [L]."""
  width = matrix_LEE.shape[-1]
  return np.linalg.norm(matrix_LEE - np.eye(width), axis=(1, 2)) / np.sqrt(width)


def random_vectors(seed: int, num_vectors: int, num_streams: int, width: int) -> np.ndarray:
  """K random vectors of length √(N D), [K, N, D] fp32; each group of up to N D consecutive ones is orthogonal.

  N D of them give ‖J − I‖_F exactly. Fewer have a smaller error than independent vectors, for which the standard error
  is computed.
  """
  entries = num_streams * width
  generator = np.random.default_rng(seed)
  vectors = []
  for start in range(0, num_vectors, entries):
    count = min(entries, num_vectors - start)
    orthogonal, _ = np.linalg.qr(generator.normal(size=(entries, count)))
    vectors.append(np.sqrt(entries) * orthogonal.T)
  return np.concatenate(vectors).reshape(num_vectors, num_streams, width).astype(np.float32)

"""How far a layer's Jacobian is from the identity, by products of a few random vectors with it.

J[a, b] = ∂ output b / ∂ input a of a layer, the mean over positions. For a random vector v of length √width,
‖(J − I) v‖² is on average ‖J − I‖²_F (Hutchinson), and J v is a vector-Jacobian product: the cost does not grow with
the width.

`summed`: the mean over input positions of the sum over all output positions, as DepthBench codes it: what attention
carries to later tokens is inside. `same_position`: a position's output by its own input alone. There the cotangents of
the positions get random signs, and the gradients the same ones, so that what crosses between positions cancels on
average; two draws of signs are multiplied with one another, as the square of one would keep its noise.

Dimensions: K vectors, N streams that go from layer to layer, the others as in the model.
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
  """J v of each layer and vector, summed over input positions.

  Attributes:
    tokens: input positions.
    summed_LKND: J of `summed`.
    same_LKSND: J of `same_position`, of S draws of signs (one where it is exact).
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
  """`step(params, batch, rows_B, vectors_KND, draw) -> Products`, under jit.

  Of the rows where rows_B is 1; `draw` is a seed and a number, which choose the signs.

  Args:
    transformer: the model.
    exact: `same_position` by one product for each position, without signs; for small models.
  """

  def products(model: Transformer, batch: Batch, rows_B: Any, vectors_KND: Any, draw: Any) -> Products:
    config, layers = model.config, by_layer(model, batch)
    key = jax.random.fold_in(jax.random.key(draw[0]), draw[1])
    present_BT = present(batch) * rows_B[:, None]
    at_BT1 = present_BT[..., None]

    def body(before: AnyStreams, of_layer: Any) -> tuple[AnyStreams, tuple[jax.Array, jax.Array]]:
      def apply(values: list[jax.Array]) -> tuple[list[jax.Array], AnyStreams]:
        after = layers.apply(of_layer, join(values, before, config.norm))
        return separate(after, config), after

      values, pull_back, after = jax.vjp(apply, separate(before, config), has_aux=True)

      def gradient(vector_ND: jax.Array, factor_BT1: jax.Array) -> jax.Array:
        """Of Σ factor · (v · output) by the inputs, [N, B, T, D]."""
        pairs = zip(vector_ND, values, strict=True)
        cotangents = [(vector_D * factor_BT1).astype(value.dtype) for vector_D, value in pairs]
        return jnp.stack(pull_back(cotangents)[0]).astype(jnp.float32)

      def one_vector(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        vector_ND, own_key = inputs
        summed_ND = jnp.sum(gradient(vector_ND, at_BT1) * at_BT1, axis=(1, 2))

        def with_signs(key: jax.Array) -> jax.Array:
          signs_BT1 = jax.random.rademacher(key, present_BT.shape, jnp.float32)[..., None] * at_BT1
          return jnp.sum(gradient(vector_ND, signs_BT1) * signs_BT1, axis=(1, 2))

        def at_position(position: jax.Array) -> jax.Array:
          here_BT1 = at_BT1 * (jnp.arange(present_BT.shape[1]) == position)[:, None]
          return jnp.sum(gradient(vector_ND, here_BT1) * here_BT1, axis=(1, 2))

        if exact:
          by_position = jax.lax.map(at_position, jnp.arange(present_BT.shape[1]))
          return summed_ND, jnp.sum(by_position, axis=0)[None]
        return summed_ND, jax.lax.map(with_signs, jax.random.split(own_key, 2))

      own_key = jax.random.fold_in(key, of_layer[1].layer)
      return after, jax.lax.map(one_vector, (vectors_KND, jax.random.split(own_key, len(vectors_KND))))

    _, (summed_LKND, same_LKSND) = jax.lax.scan(body, layers.first, layers.layers)
    return Products(jnp.sum(present_BT), summed_LKND, same_LKSND)

  def step(params: Any, batch: Batch, rows_B: Any, vectors_KND: Any, draw: Any) -> Products:
    return nn.apply(lambda model: products(model, batch, rows_B, vectors_KND, draw), transformer)({"params": params})

  return step


def join(values: list[jax.Array], like: AnyStreams, kind: str) -> AnyStreams:
  """What `separate` took apart, in the form that a layer finds it in."""
  if isinstance(like, Sources):
    return Sources(jnp.stack(values))
  first = Stream(values[0])
  if like.first.owed is not None:
    first = first.carried(kind)
  return Streams(first, tuple(values[1:]))


def deviation(products_LKND: np.ndarray, others_LKND: np.ndarray, vectors_KND: np.ndarray) -> Deviation:
  """From two estimates of J v, which may be one, and the vectors v.

  Args:
    products_LKND: J v, the mean over positions.
    others_LKND: the same, of other signs.
    vectors_KND: the vectors.
  """
  products = (products_LKND - vectors_KND) * (others_LKND - vectors_KND)
  squares_LK = products.sum(axis=(2, 3)) / vectors_KND[0].size
  mean_L = squares_LK.mean(axis=1)
  value_L = np.sqrt(np.maximum(mean_L, 0.0))
  num_vectors = squares_LK.shape[1]
  if num_vectors == 1:
    return Deviation(value_L, np.full_like(value_L, np.nan))
  error_L = squares_LK.std(axis=1, ddof=1) / np.sqrt(num_vectors)
  # The error of a root, by its derivative; where that is far too steep, the root of the error bounds it.
  steep_L = error_L / (2.0 * np.maximum(value_L, np.finfo(float).tiny))
  return Deviation(value_L, np.minimum(steep_L, np.sqrt(error_L)))


def exact_deviation(matrix_LEE: np.ndarray) -> np.ndarray:
  """Of Jacobians that are known, [L]."""
  width = matrix_LEE.shape[-1]
  return np.linalg.norm(matrix_LEE - np.eye(width), axis=(1, 2)) / np.sqrt(width)


def random_vectors(seed: int, num_vectors: int, num_streams: int, width: int) -> np.ndarray:
  """K random vectors of length √(N D), [K, N, D] fp32, any N D consecutive ones orthogonal to one another.

  So N D of them give ‖J − I‖_F exactly, and fewer a smaller error than independent ones, by which it is estimated.
  """
  entries = num_streams * width
  generator = np.random.default_rng(seed)
  vectors = []
  for start in range(0, num_vectors, entries):
    count = min(entries, num_vectors - start)
    orthogonal, _ = np.linalg.qr(generator.normal(size=(entries, count)))
    vectors.append(np.sqrt(entries) * orthogonal.T)
  return np.concatenate(vectors).reshape(num_vectors, num_streams, width).astype(np.float32)

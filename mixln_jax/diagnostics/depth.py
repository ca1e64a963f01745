"""The residual stream by depth: angular distances, the logit lens, and the effective rank.

Depth l, from 0, is the input of layer l; depth L is the output of the last layer, before the final norm.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.diagnostics.triangular import triangularize
from mixln_jax.model import Transformer, next_token_loss
from mixln_jax.placement import Streams


class DepthSums(flax.struct.PyTreeNode):
  """Sums over batches; `P` = L + 1 depths.

  Attributes:
    tokens: counted positions.
    rows: rows with a counted position.
    angle_all_PP: angular distances, summed over counted positions.
    angle_last_PP: angular distances, summed over the last counted position of each row.
    lens_P: the loss of the final norm and head on each depth, summed over counted positions.
    triangle_PEE: R of the QR decomposition of the rows (1, x) for all counted positions, where x is the stream there;
      E = D + 1.
  """

  tokens: Any
  rows: Any
  angle_all_PP: Any
  angle_last_PP: Any
  lens_P: Any
  triangle_PEE: Any

  @classmethod
  def zeros(cls, model: ModelConfig) -> "DepthSums":
    depths, width = model.num_layers + 1, model.embed_dim + 1
    square = (depths, depths)
    return cls(
      tokens=jnp.zeros(()),
      rows=jnp.zeros(()),
      angle_all_PP=jnp.zeros(square),
      angle_last_PP=jnp.zeros(square),
      lens_P=jnp.zeros((depths,)),
      triangle_PEE=jnp.zeros((depths, width, width)),
    )


def angular_distances(streams_PBTD: jax.Array) -> jax.Array:
  """arccos(cos(x_l, x_m)) / π of each token and pair of depths, [B, T, P, P]; in fp32, cosines clipped to [-1, 1].

  Defined by Gromov et al. (arXiv 2403.17887). A zero vector counts as orthogonal to all others. Inner products and
  squared lengths come from the same matrix product, so that equal vectors have distance 0; otherwise a rounding error
  in the last bit of a cosine near 1 would give 1e-4.
  """
  x = streams_PBTD.astype(jnp.float32)
  products = jnp.einsum("lbtd,mbtd->btlm", x, x, precision=jax.lax.Precision.HIGHEST)
  squares = jnp.diagonal(products, axis1=-2, axis2=-1)
  sizes = jnp.sqrt(squares[..., :, None] * squares[..., None, :])
  cosines = products / jnp.maximum(sizes, jnp.finfo(jnp.float32).tiny)
  return jnp.arccos(jnp.clip(cosines, -1.0, 1.0)) / jnp.pi


def last_counted(weights_BT: jax.Array) -> jax.Array:
  """1 at the last counted position of each row that has one, [B, T]."""
  position = jnp.arange(weights_BT.shape[1])
  last_B = jnp.max(jnp.where(weights_BT > 0, position, -1), axis=1)
  return (position == last_B[:, None]).astype(jnp.float32)


def add_rows(triangle_EE: jax.Array, x_ND: jax.Array, weights_N: jax.Array) -> jax.Array:
  """Updates R, the triangular QR factor of all rows so far, with the rows (1, x) whose weight is 1.

  The first column is all ones, so the lower right block of R is the factor of the rows minus their mean. R is more
  exact than a covariance matrix, which squares: in fp32 it resolves singular values down to 1e-7 of the largest one
  instead of 3e-4.
  """
  rows_NE = jnp.concatenate([jnp.ones((len(x_ND), 1)), x_ND.astype(jnp.float32)], axis=1) * weights_N[:, None]
  return triangularize(jnp.concatenate([triangle_EE, rows_NE]), len(triangle_EE))


def effective_rank(triangle_EE: np.ndarray) -> float | None:
  """The effective rank of the centred rows that an R of `add_rows` was made from.

  It is exp of the entropy of the singular values divided by their sum (Roy and Vetterli, The effective rank, EUSIPCO
  2007). None if all rows are equal or a value is not finite.
  """
  values = np.linalg.svd(np.asarray(triangle_EE, np.float64)[1:, 1:], compute_uv=False)
  if not np.isfinite(values).all() or values.sum() == 0:
    return None
  fractions = values[values > 0] / values.sum()
  return float(np.exp(-(fractions * np.log(fractions)).sum()))


def make_depth_step(model: ModelConfig) -> Callable[[Any, DepthSums, Mapping[str, jax.Array]], DepthSums]:
  """`step(params, sums, batch) -> sums`: adds a batch to the sums. Call it under jit."""
  model_streams = config_lib.table(model).streams
  available_PN = available_streams(model)

  def add_batch(transformer: Transformer, sums: DepthSums, batch: Mapping[str, jax.Array]) -> DepthSums:
    labels_BT, weights_BT = batch["labels_BT"], batch["weights_BT"]
    _, taps = transformer.hidden(
      batch["tokens_BT"], segment_ids_BT=batch.get("segment_ids_BT"), positions_BT=batch.get("positions_BT")
    )
    streams_PBTD = jnp.concatenate([taps["embedded_BTD"][None], taps["stream_LBTD"]])
    angles = angular_distances(streams_PBTD)
    last_BT = last_counted(weights_BT)

    def lens(depth: tuple[list[jax.Array], jax.Array]) -> jax.Array:
      streams, available_N = depth
      hidden_BTD = transformer.read_out(streams, model_streams, available_N)
      return next_token_loss(hidden_BTD, transformer.head_weights(), labels_BT, weights_BT)[0]

    def extend(triangle_and_stream: tuple[jax.Array, jax.Array]) -> jax.Array:
      triangle_EE, x_BTD = triangle_and_stream
      return add_rows(triangle_EE, x_BTD.reshape(-1, x_BTD.shape[-1]), weights_BT.reshape(-1))

    return DepthSums(
      tokens=sums.tokens + jnp.sum(weights_BT),
      rows=sums.rows + jnp.sum(last_BT),
      angle_all_PP=sums.angle_all_PP + jnp.einsum("btlm,bt->lm", angles, weights_BT),
      angle_last_PP=sums.angle_last_PP + jnp.einsum("btlm,bt->lm", angles, last_BT),
      lens_P=sums.lens_P + jax.lax.map(lens, (all_streams(taps, model_streams), available_PN)),
      triangle_PEE=jax.lax.map(extend, (sums.triangle_PEE, streams_PBTD)),
    )

  def step(params: Any, sums: DepthSums, batch: Mapping[str, jax.Array]) -> DepthSums:
    return nn.apply(lambda transformer: add_batch(transformer, sums, batch), Transformer(model))({"params": params})

  return step


def available_streams(model: ModelConfig) -> np.ndarray:
  """Which streams the head reads at each depth, [P, N] of 0 and 1.

  If all sublayers are attention residuals, it reads at each depth the sources that the next layer's attention reads;
  otherwise it reads all streams at every depth.
  """
  table = config_lib.table(model)
  all_N = (1.0,) * table.streams.num
  num_layers = len(table.layers)
  if all(row.streams == "sources" for row in table.all_rows):
    return np.array([*(row.read for row in table.rows("attention")), all_N])
  return np.array([all_N] * (num_layers + 1))


def all_streams(taps: Mapping[str, jax.Array], model_streams: Streams) -> list[jax.Array]:
  """Each residual stream at all depths, [P, B, T, D]: before the first layer and after each layer."""
  embedded_BTD = taps["embedded_BTD"]
  if model_streams.num_carried == 1:
    return [jnp.concatenate([embedded_BTD[None], taps["stream_LBTD"]])]
  streams = [jnp.concatenate([embedded_BTD[None], taps["stream_0_LBTD"]])]
  for index in range(1, model_streams.num):
    first_BTD = (model_streams.start * embedded_BTD).astype(embedded_BTD.dtype)
    streams.append(jnp.concatenate([first_BTD[None], taps[f"stream_{index}_LBTD"]]))
  return streams


def by_block(mean_PP: np.ndarray) -> list[list[float | None]]:
  """A matrix over pairs of depths, reindexed as [l][n - 1]: from depth l to depth l + n; None where l + n > L."""
  num_layers = len(mean_PP) - 1
  rows: list[list[float | None]] = []
  for start in range(num_layers):
    known = [float(value) for value in mean_PP[start, start + 1 :]]
    rows.append([*known, *[None] * start])
  return rows

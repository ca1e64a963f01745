"""The logit lens (the final norm and head applied to the stream at each depth), and angles between depths.

Depth l, from 0, is the input of layer l; depth L is the output of the last layer. P = L + 1 depths.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.diagnostics.depth import all_streams, angular_distances, available_streams, last_counted
from mixln_jax.diagnostics.layer_io import Batch, present
from mixln_jax.model import Transformer
from mixln_jax.model.transformer import project_to_logits
from mixln_jax.parallel.rules import shards

TOP = 5
MOST_LOGITS = 2**25  # logits that a device computes at once: 128 MB


class Sums(flax.struct.PyTreeNode):
  """Sums over a batch: of the lens over counted positions, of angles over positions that hold a token.

  Attributes:
    count: counted positions.
    tokens: positions that hold a token.
    rows: rows with such a position.
    cross_entropy_P: cross entropy with the next token.
    kl_P: Σ p log(p / q), where p is the model's prediction and q that of the depth.
    overlap_P: fraction of the model's TOP likeliest tokens that are among the depth's TOP likeliest.
    angle_all_PP: arccos(cosine) / π, over all positions.
    angle_last_PP: arccos(cosine) / π, over the last position of each row.
  """

  count: Any
  tokens: Any
  rows: Any
  cross_entropy_P: Any
  kl_P: Any
  overlap_P: Any
  angle_all_PP: Any
  angle_last_PP: Any


Step = Callable[[Any, Batch], Sums]


def make_lens_step(model: ModelConfig) -> Step:
  """`step(params, batch) -> Sums`. Call it under jit."""
  model_streams = config_lib.table(model).streams
  available_PN = available_streams(model)

  def measure(transformer: Transformer, batch: Batch) -> Sums:
    weights_BT, present_BT = batch["weights_BT"].astype(jnp.float32), present(batch)
    _, taps = transformer.hidden(
      batch["tokens_BT"], segment_ids_BT=batch.get("segment_ids_BT"), positions_BT=batch.get("positions_BT")
    )
    streams_PBTD = jnp.concatenate([taps["embedded_BTD"][None], taps["stream_LBTD"]])
    head_DV = transformer.head_weights()

    def logits(streams: list[jax.Array], available_N: Any) -> jax.Array:
      return project_to_logits(transformer.read_out(streams, model_streams, available_N), head_DV)

    def piece(inputs: tuple[list[jax.Array], jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
      streams, labels_BC, weights_BC = inputs  # streams: [P, B, C, D] each
      last_BCV = logits([stream[-1] for stream in streams], available_PN[-1])
      log_p_BCV = jax.nn.log_softmax(last_BCV)
      top_BCK = jax.lax.top_k(last_BCV, min(TOP, last_BCV.shape[-1]))[1]

      def at_depth(inputs: tuple[list[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        streams, available_N = inputs
        logits_BCV = logits(streams, available_N)
        log_q_BCV = jax.nn.log_softmax(logits_BCV)
        label_log_q_BC1 = jnp.take_along_axis(log_q_BCV, labels_BC[..., None], axis=-1)
        kl_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1)
        own_BCK = jax.lax.top_k(logits_BCV, top_BCK.shape[-1])[1]
        overlap_BC = jnp.mean(jnp.any(top_BCK[..., :, None] == own_BCK[..., None, :], axis=-1), axis=-1)
        return (
          jnp.sum(-label_log_q_BC1[..., 0] * weights_BC),
          jnp.sum(kl_BC * weights_BC),
          jnp.sum(overlap_BC * weights_BC),
        )

      return jax.lax.map(at_depth, (streams, available_PN))

    streams = all_streams(taps, model_streams)
    cut = _cutter(batch["tokens_BT"].shape, head_DV.shape[1])
    pieces = ([cut(stream, 2) for stream in streams], cut(batch["labels_BT"], 1), cut(weights_BT, 1))
    by_piece = jax.lax.map(piece, pieces)
    cross_entropy_P, kl_P, overlap_P = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), by_piece)
    angles = angular_distances(streams_PBTD)
    last_BT = last_counted(present_BT)
    return Sums(
      count=jnp.sum(weights_BT),
      tokens=jnp.sum(present_BT),
      rows=jnp.sum(last_BT),
      cross_entropy_P=cross_entropy_P,
      kl_P=kl_P,
      overlap_P=overlap_P,
      angle_all_PP=jnp.einsum("btlm,bt->lm", angles, present_BT),
      angle_last_PP=jnp.einsum("btlm,bt->lm", angles, last_BT),
    )

  def step(params: Any, batch: Batch) -> Sums:
    return nn.apply(lambda transformer: measure(transformer, batch), Transformer(model))({"params": params})

  return step


def _cutter(shape: tuple[int, ...], vocab: int) -> Callable[[jax.Array, int], jax.Array]:
  """A function that splits the length axis into pieces whose logits fit, as a new first axis, padded with zeros."""
  batch, length = shape
  logits_per_column = -(-batch // shards("batch")) * -(-vocab // shards("vocab"))
  at_once = max(1, min(length, MOST_LOGITS // logits_per_column))
  pieces = -(-length // at_once)

  def cut(values: jax.Array, axis: int) -> jax.Array:
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, pieces * at_once - length)
    shape = (*values.shape[:axis], pieces, at_once, *values.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(values, padding).reshape(shape), axis, 0)

  return cut

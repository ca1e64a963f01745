"""The logit lens: what the final norm and the head make of the stream at each depth. And angles between depths.

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
from mixln_jax.diagnostics.depth import all_streams, angular_distances, depths_there, last_counted
from mixln_jax.diagnostics.layer_io import Batch, present
from mixln_jax.model import Transformer
from mixln_jax.model.transformer import project_to_logits
from mixln_jax.parallel.rules import shards

TOP = 5
MOST_LOGITS = 2**25  # that a device forms at once: 128 MB


class Sums(flax.struct.PyTreeNode):
  """Sums over a batch; of the lens over counted positions, of angles over those that hold a token.

  Attributes:
    count: counted positions.
    tokens: positions that hold a token.
    rows: rows with one.
    cross_entropy_P: of the next token.
    kl_P: Σ p log(p / q), p the model's prediction and q that of the depth.
    overlap_P: fraction of the TOP likeliest tokens of the model that are among those of the depth.
    angle_all_PP: arccos(cosine) / π, over all positions.
    angle_last_PP: the same, over the last one of each row.
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
  of_model = config_lib.table(model).streams
  there_PN = depths_there(model)

  def look(transformer: Transformer, batch: Batch) -> Sums:
    weights_BT, present_BT = batch["weights_BT"].astype(jnp.float32), present(batch)
    _, taps = transformer.hidden(
      batch["tokens_BT"], segment_ids_BT=batch.get("segment_ids_BT"), positions_BT=batch.get("positions_BT")
    )
    streams_PBTD = jnp.concatenate([taps["embedded_BTD"][None], taps["stream_LBTD"]])
    head_DV = transformer.head_weights()

    def logits(streams: list[jax.Array], there_N: Any) -> jax.Array:
      return project_to_logits(transformer.read_out(streams, of_model, there_N), head_DV)

    def piece(inputs: tuple[list[jax.Array], jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
      streams, labels_BC, weights_BC = inputs  # streams: [P, B, C, D] each
      last_BCV = logits([stream[-1] for stream in streams], there_PN[-1])
      log_p_BCV = jax.nn.log_softmax(last_BCV)
      top_BCK = jax.lax.top_k(last_BCV, min(TOP, last_BCV.shape[-1]))[1]

      def depth(stream_and_there: tuple[list[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits_BCV = logits(*stream_and_there)
        log_q_BCV = jax.nn.log_softmax(logits_BCV)
        found_BC1 = jnp.take_along_axis(log_q_BCV, labels_BC[..., None], axis=-1)
        kl_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1)
        own_BCK = jax.lax.top_k(logits_BCV, top_BCK.shape[-1])[1]
        overlap_BC = jnp.mean(jnp.any(top_BCK[..., :, None] == own_BCK[..., None, :], axis=-1), axis=-1)
        return (
          jnp.sum(-found_BC1[..., 0] * weights_BC),
          jnp.sum(kl_BC * weights_BC),
          jnp.sum(overlap_BC * weights_BC),
        )

      return jax.lax.map(depth, (streams, there_PN))

    streams = all_streams(taps, of_model)
    cut = _cutter(batch["tokens_BT"].shape, head_DV.shape[1])
    pieces = ([cut(stream, 2) for stream in streams], cut(batch["labels_BT"], 1), cut(weights_BT, 1))
    entropy_P, kl_P, overlap_P = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), jax.lax.map(piece, pieces))
    angles = angular_distances(streams_PBTD)
    last_BT = last_counted(present_BT)
    return Sums(
      count=jnp.sum(weights_BT),
      tokens=jnp.sum(present_BT),
      rows=jnp.sum(last_BT),
      cross_entropy_P=entropy_P,
      kl_P=kl_P,
      overlap_P=overlap_P,
      angle_all_PP=jnp.einsum("btlm,bt->lm", angles, present_BT),
      angle_last_PP=jnp.einsum("btlm,bt->lm", angles, last_BT),
    )

  def step(params: Any, batch: Batch) -> Sums:
    return nn.apply(lambda transformer: look(transformer, batch), Transformer(model))({"params": params})

  return step


def _cutter(shape: tuple[int, ...], vocab: int) -> Callable[[jax.Array, int], jax.Array]:
  """Cuts the length (of the given axis) into pieces whose logits fit, as a new first axis; filled up with zeros."""
  batch, length = shape
  of_column = -(-batch // shards("batch")) * -(-vocab // shards("vocab"))
  at_once = max(1, min(length, MOST_LOGITS // of_column))
  pieces = -(-length // at_once)

  def cut(values: jax.Array, axis: int) -> jax.Array:
    filled = [(0, 0)] * values.ndim
    filled[axis] = (0, pieces * at_once - length)
    shape = (*values.shape[:axis], pieces, at_once, *values.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(values, filled).reshape(shape), axis, 0)

  return cut

"""Log-likelihoods of continuations, in batches of few shapes."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from mixln_jax.config import ModelConfig
from mixln_jax.inference import batching
from mixln_jax.inference.generate import check_decoder
from mixln_jax.model import Transformer
from mixln_jax.model.transformer import project_to_logits

CHUNK = 64  # the most positions whose logits exist at the same time


class Score(NamedTuple):
  """The likelihood of a continuation."""

  log_likelihood: float  # summed over its tokens, in nats
  greedy: bool  # whether each of its tokens is the likeliest one


def score(
  model: ModelConfig,
  params: Any,
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  batch_size: int,
  keep_L: Any = None,
) -> list[Score]:
  """Log-likelihoods of continuations after their contexts.

  On a mesh (`parallel.rules.on_mesh`) the rows are sharded like those of a training batch.

  Args:
    model: config.model.
    params: the parameters.
    pairs: (context ids, continuation ids), each at least one id; they are never truncated.
    batch_size: rows at a time; rounded up to a number that the mesh divides evenly.
    keep_L: 0 removes a layer, 1 keeps it.

  Returns:
    A score for each pair, in the order of the pairs.

  Raises:
    ValueError: a context or a continuation is empty.
    InputError: the model is an encoder, or has no embedding for a position of a pair.
  """
  check_decoder(model, max((len(context) + len(rest) - 1 for context, rest in pairs), default=0))
  if not all(len(context) and len(rest) for context, rest in pairs):
    raise ValueError("a context or a continuation is empty; give each at least one id")
  frozen = cast(ModelConfig, FrozenConfigDict(model))
  num_rows = batching.bucket_rows(batch_size)
  scores: dict[int, Score] = {}
  for indices in batching.by_length([len(context) + len(rest) for context, rest in pairs], num_rows):
    rows = [[*pairs[index][0], *pairs[index][1]] for index in indices]
    length = batching.bucket(max(map(len, rows)) - 1)
    tokens_BT, lengths_B = batching.pad([row[:-1] for row in rows], num_rows, length)
    labels_BT, _ = batching.pad([row[1:] for row in rows], num_rows, length)
    first_B, _ = batching.pad([[len(pairs[index][0]) - 1] for index in indices], num_rows, 1)
    position_T = np.arange(length)
    counts_BT = (position_T >= first_B) & (position_T < lengths_B[:, None])
    sums_B, greedy_B = jax.device_get(score_batch(frozen, params, tokens_BT, labels_BT, counts_BT, keep_L))
    scores |= {index: Score(float(sums_B[row]), bool(greedy_B[row])) for row, index in enumerate(indices)}
  return [scores[index] for index in range(len(pairs))]


@partial(jax.jit, static_argnums=0)
def score_batch(
  config: ModelConfig, params: Any, tokens_BT: jax.Array, labels_BT: jax.Array, counts_BT: jax.Array, keep_L: Any
) -> tuple[jax.Array, jax.Array]:
  """For each row, the log-likelihood of its counted labels, and whether each of them is the likeliest token.

  Args:
    config: config.model, frozen.
    params: the parameters.
    tokens_BT: the input tokens.
    labels_BT: the token after each input token.
    counts_BT: True for labels that count.
    keep_L: 0 removes a layer, 1 keeps it; None = keep all.
  """

  def apply(transformer: Transformer) -> tuple[jax.Array, jax.Array]:
    hidden_BTD, _ = transformer.hidden(tokens_BT, keep_L=keep_L)
    head_DV = transformer.head_weights()

    def chunk(start: jax.Array) -> tuple[jax.Array, jax.Array]:
      hidden, labels, counts = (
        jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (hidden_BTD, labels_BT, counts_BT)
      )
      logits_BCV = project_to_logits(hidden, head_DV)
      log_probability_BC = jnp.take_along_axis(jax.nn.log_softmax(logits_BCV), labels[..., None], axis=-1)[..., 0]
      likeliest_BC = jnp.argmax(logits_BCV, axis=-1) == labels
      return jnp.sum(log_probability_BC * counts, axis=1), jnp.all(likeliest_BC | ~counts, axis=1)

    size = math.gcd(tokens_BT.shape[1], CHUNK)
    sums_CB, greedy_CB = jax.lax.map(chunk, jnp.arange(0, tokens_BT.shape[1], size))
    return jnp.sum(sums_CB, axis=0), jnp.all(greedy_CB, axis=0)

  sums_B, greedy_B = nn.apply(apply, Transformer(config))({"params": params})
  return nn.with_logical_constraint(sums_B, (None,)), nn.with_logical_constraint(greedy_B, (None,))

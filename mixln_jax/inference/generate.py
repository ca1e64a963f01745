"""Sampling with a key-value cache."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from mixln_jax.config import Config
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.model import Transformer
from mixln_jax.model.transformer import empty_cache


def generate(
  config: Config,
  params: Any,
  prompts: Sequence[Sequence[int]],
  num_tokens: int,
  *,
  temperature: float = 0.0,
  seed: int = 0,
  num_ids: int | None = None,
) -> np.ndarray:
  """Goes on with prompts of any lengths, as one batch.

  Args:
    config: config.model.
    params: the parameters.
    prompts: ids, at least one each.
    num_tokens: how many to add.
    temperature: 0 = the likeliest token.
    seed: of the sampling.
    num_ids: only ids below it are sampled; by default all rows of the head (a tokenizer may have fewer ids).

  Returns:
    The added ids, [B, num_tokens].
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  if lengths.min() == 0:
    raise ValueError("a prompt is empty; give it at least one id, such as the end-of-document id")
  tokens = np.zeros((len(prompts), int(lengths.max())), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  return np.asarray(
    _generate(
      FrozenConfigDict(config),
      num_tokens,
      num_ids or config.vocab_size,
      params,
      tokens,
      lengths,
      jnp.float32(temperature),
      jax.random.key(seed),
    )
  )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
  config: Config,
  num_tokens: int,
  num_ids: int,
  params: Any,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  temperature: jax.Array,
  key: jax.Array,
) -> jax.Array:
  model = Transformer(config)
  batch, prompt_length = tokens_BT.shape

  def choose(logits_BV: jax.Array, key: jax.Array) -> jax.Array:
    logits_BV = logits_BV[:, :num_ids]
    sampled = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)

  # Padding of shorter prompts writes keys behind their ends; each is overwritten before a query can reach it.
  positions_BT = jnp.broadcast_to(jnp.arange(prompt_length), tokens_BT.shape)
  cache = empty_cache(config, batch, prompt_length + num_tokens)
  logits_BTV, cache = model.apply({"params": params}, tokens_BT, positions_BT=positions_BT, cache=cache)
  keys = jax.random.split(key, num_tokens)
  first_B = choose(jnp.take_along_axis(logits_BTV, lengths_B[:, None, None] - 1, axis=1)[:, 0], keys[0])

  def advance(carry: Any, key: jax.Array) -> Any:
    token_B, position_B, cache = carry
    logits_B1V, cache = model.apply({"params": params}, token_B[:, None], positions_BT=position_B[:, None], cache=cache)
    next_B = choose(logits_B1V[:, 0], key)
    return (next_B, position_B + 1, cache), next_B

  _, rest_NB = jax.lax.scan(advance, (first_B, lengths_B, cache), keys[1:])
  return jnp.concatenate((first_B[None], rest_NB)).T


def generate_text(
  config: Config,
  params: Any,
  tokenizer: Tokenizer,
  prompt: str,
  num_tokens: int,
  *,
  temperature: float = 0.8,
  seed: int = 0,
) -> str:
  """Text that goes on from `prompt`, up to the end of a document; from the start of a document where it is empty."""
  prompts = [[tokenizer.eos_id, *tokenizer.encode(prompt)]]
  ids = generate(config, params, prompts, num_tokens, temperature=temperature, seed=seed, num_ids=tokenizer.vocab_size)[
    0
  ]
  ends = np.flatnonzero(ids == tokenizer.eos_id)
  return tokenizer.decode(ids[: ends[0]].tolist() if len(ends) else ids.tolist())

"""Sampling of the next token from the logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixln_jax.errors import InputError


class Sampling(NamedTuple):
  """The settings that determine the next token. They are data, so one compiled program serves all of them.

  Attributes:
    temperature: divides the logits; 0 = always the likeliest token.
    top_k: only the k likeliest tokens; 0 = all.
    top_p: of those, only the likeliest tokens whose probabilities together reach p, at least one (arXiv 1904.09751);
      1 = all.
    seed: the seed of the draws. The draws of a row don't depend on the other rows.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  @property
  def narrows(self) -> bool:
    """Whether the logits must be sorted."""
    return self.top_k > 0 or self.top_p < 1

  def check(self) -> None:
    """Raises InputError, which names the setting, if one is invalid."""
    if self.temperature < 0:
      raise InputError(f"temperature={self.temperature}: must be 0 (always the likeliest token) or more")
    if self.top_k < 0:
      raise InputError(f"top_k={self.top_k}: must be 0 (all tokens) or more")
    if not 0 < self.top_p <= 1:
      raise InputError(f"top_p={self.top_p}: must be above 0, and at most 1 (all tokens)")
    if self.temperature == 0 and self.narrows:
      raise InputError("top_k and top_p have no meaning with temperature=0, which takes the likeliest token")


def choose(
  logits_BV: jax.Array,
  keys_B: jax.Array,
  temperature: jax.Array,
  narrowing: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
  """The next token of each row, [B] int32.

  Args:
    logits_BV: fp32.
    keys_B: a random key per row.
    temperature: a scalar; 0 = the likeliest token.
    narrowing: the scalars (top_k, top_p) of `Sampling`; None = all tokens are allowed.
  """
  scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
  if narrowing is None:
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BV)
  else:
    sorted_BV, ids_BV = jax.lax.top_k(scaled_BV, scaled_BV.shape[-1])
    ranks_B = jax.vmap(jax.random.categorical)(keys_B, keep_likeliest(sorted_BV, *narrowing))
    drawn_B = jnp.take_along_axis(ids_BV, ranks_B[:, None], axis=1)[:, 0]
  return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def keep_likeliest(sorted_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Sorted logits (descending) with -inf for the tokens that top-k, and then top-p, leave out."""
  rank_V = jnp.arange(sorted_BV.shape[-1])
  kept_BV = jnp.where((top_k == 0) | (rank_V < top_k), sorted_BV, -jnp.inf)
  probability_BV = jax.nn.softmax(kept_BV, axis=-1)
  before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV  # the total of all likelier tokens
  return jnp.where((before_BV < top_p) | (rank_V == 0), kept_BV, -jnp.inf)

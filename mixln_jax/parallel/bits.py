"""Exact sums of the bits of arrays: the same on any mesh, and different if a single bit flips."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def bit_sums(tree: Any) -> dict[str, jax.Array]:
  """The sum of each tensor's bit patterns, modulo 2^32: name -> uint32.

  Call it under jit, so that each device reduces its own shards.
  """

  def total(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): total(leaf) for path, leaf in leaves}


def hash_of_sums(sums: Mapping[str, Any]) -> str:
  """A short hash of all sums of `bit_sums`."""
  lines = "".join(f"{name} {int(value)}\n" for name, value in sorted(sums.items()))
  return hashlib.sha256(lines.encode()).hexdigest()[:16]

"""Products of activations with weights."""

import jax
import jax.numpy as jnp

from mixln_jax.model.tuned.product import multiply_narrow_first
from mixln_jax.parallel.rules import platform


def multiply(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """`jnp.einsum(equation, x, weight)`; on a CPU its gradient is formed in another order (`tuned/product.py`).

  Args:
    equation: of two operands, each letter in two of the three terms: `btd,df->btf`.
    x: activations.
    weight: a weight in the type of the activations.
  """
  if platform() == "cpu":
    return multiply_narrow_first(equation, x, weight)
  return jnp.einsum(equation, x, weight)

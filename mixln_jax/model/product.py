"""Products of activations with weights: the one entry point, with what each platform needs.

Where the mesh shards weights over fsdp, each product gathers its whole weight, multiplies, and frees it. The code here
spells that out. Otherwise the TPU compiler splits most of these products into one step per shard of the weight, and
every step reads, rounds and writes the whole result again to add its partial sum.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mixln_jax.model.tuned.product import multiply_narrow_first
from mixln_jax.parallel.rules import constrain, gathered, platform, shards

# The logical axis of each letter in a weight's term of an equation; the letters are those of `transformer.py`.
AXES = {"d": "embed", "e": "norm", "f": "mlp", "h": "heads", "k": "head_dim"}


def multiply(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """`jnp.einsum(equation, x, weight)`; a CPU computes the weight's gradient in another order (`tuned/product.py`).

  Where the mesh shards D, the weight is gathered for the product and its gradient is sharded again. The result can then
  be differentiated once, in reverse mode.

  Args:
    equation: two operands; each letter is in two of the three terms; the weight's letters are keys of AXES:
      `btd,df->btf`.
    x: activations.
    weight: a weight in the type of the activations.
  """
  if shards("embed") == 1:
    return _product(equation, x, weight)
  return _gather_and_multiply(equation, x, weight)


def _product(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """The product with a weight that is not sharded over fsdp, in the form that suits the platform."""
  if platform() == "cpu":
    return multiply_narrow_first(equation, x, weight)
  return jnp.einsum(equation, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_and_multiply(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  return _product(equation, x, constrain(weight, *gathered(_weight_axes(equation))))


def _forward(equation: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  # Save the sharded weight: the gathered weights of all layers would be the whole model.
  return _gather_and_multiply(equation, x, weight), (x, weight)


def _backward(equation: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, weight = operands
  axes = _weight_axes(equation)
  whole_axes = gathered(axes)
  _, pull_back = jax.vjp(partial(_product, equation), x, constrain(weight, *whole_axes))
  x_gradient, weight_gradient = pull_back(gradient)
  # Whole first, then sharded: constrained only to its shards, the product would be split into steps as well.
  return x_gradient, constrain(constrain(weight_gradient, *whole_axes), *axes)


_gather_and_multiply.defvjp(_forward, _backward)


def _weight_axes(equation: str) -> tuple[str, ...]:
  _, weight_term = equation.split("->")[0].split(",")
  return tuple(AXES[letter] for letter in weight_term)

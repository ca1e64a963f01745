"""Products of activations with weights, behind one door.

Where the mesh cuts weights over fsdp, each product gathers its weight whole, multiplies, and lets go of it. That is
written out here. The TPU compiler, left to choose, cuts most of these products into as many steps as there are pieces
of the weight: each adds a partial sum to the whole result, which is read, rounded and written again every time.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mixln_jax.model.tuned.product import multiply_narrow_first
from mixln_jax.parallel.rules import constrain, gathered, platform, shards

# The logical axis of each letter of a weight's dimensions, which are those of the legend in `transformer.py`.
AXES = {"d": "embed", "e": "norm", "f": "mlp", "h": "heads", "k": "head_dim"}


def multiply(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """`jnp.einsum(equation, x, weight)`; on a CPU its gradient is formed in another order (`tuned/product.py`).

  Where the mesh cuts D, the weight is gathered for the product and its gradient is cut again; the result can then be
  differentiated once, in reverse.

  Args:
    equation: of two operands, each letter in two of the three terms, the weight's letters those of AXES: `btd,df->btf`.
    x: activations.
    weight: a weight in the type of the activations.
  """
  if shards("embed") == 1:
    return _product(equation, x, weight)
  return _gather_and_multiply(equation, x, weight)


def _product(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """The product with a weight that is not cut over fsdp, in the platform's form."""
  if platform() == "cpu":
    return multiply_narrow_first(equation, x, weight)
  return jnp.einsum(equation, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_and_multiply(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  return _product(equation, x, constrain(weight, *gathered(_weight_axes(equation))))


def _forward(equation: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  # The backward pass gets the weight as it is cut: the whole ones of all layers would be the whole model.
  return _gather_and_multiply(equation, x, weight), (x, weight)


def _backward(equation: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, weight = operands
  axes = _weight_axes(equation)
  whole_axes = gathered(axes)
  _, gradients_of = jax.vjp(partial(_product, equation), x, constrain(weight, *whole_axes))
  x_gradient, weight_gradient = gradients_of(gradient)
  # Whole first: cut at once, the product that forms it would be cut into steps.
  return x_gradient, constrain(constrain(weight_gradient, *whole_axes), *axes)


_gather_and_multiply.defvjp(_forward, _backward)


def _weight_axes(equation: str) -> tuple[str, ...]:
  _, weight_term = equation.split("->")[0].split(",")
  return tuple(AXES[letter] for letter in weight_term)

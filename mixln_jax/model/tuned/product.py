"""The product of activations with a weight, with the gradient that suits a CPU."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply_narrow_first(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """`jnp.einsum(equation, x, weight)`, whose weight gradient transposes the smaller of its operands.

  The weight gradient is a product that sums over positions. A CPU makes a transposed copy of the first operand, and JAX
  puts the output's gradient first, even where that is the wider one (2.7 times wider in LLaMA's MLP). Here the narrower
  operand comes first. The result can be differentiated once, in reverse mode.

  Args:
    equation: two operands; each letter is in two of the three terms: `btd,df->btf`.
    x: activations.
    weight: a weight in the type of the activations.
  """
  return jnp.einsum(equation, x, weight)


def _forward(equation: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return jnp.einsum(equation, x, weight), (x, weight)


def _backward(equation: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, weight = operands
  inputs, output_term = equation.split("->")
  x_term, weight_term = inputs.split(",")
  x_gradient = jnp.einsum(f"{output_term},{weight_term}->{x_term}", gradient, weight)
  if x.size <= gradient.size:
    return x_gradient, jnp.einsum(f"{x_term},{output_term}->{weight_term}", x, gradient)
  # With the gradient first, its letters come first in the result. The result is the weight's gradient, much smaller
  # than either operand, so it is transposed afterwards.
  transposed_term = "".join(sorted(weight_term, key=lambda letter: letter in x_term))
  transposed_gradient = jnp.einsum(f"{output_term},{x_term}->{transposed_term}", gradient, x)
  return x_gradient, jnp.einsum(f"{transposed_term}->{weight_term}", transposed_gradient)


multiply_narrow_first.defvjp(_forward, _backward)

"""Fences, for compilers that fuse more than is good."""

from collections.abc import Callable
from typing import Any

import jax


@jax.custom_vjp
def backward_fence(x: jax.Array) -> jax.Array:
  """x; the compiler may fuse nothing across the point where its gradient is formed. To be differentiated in reverse.

  Behind a norm that only some layers have, a TPU's compiler takes the sums over the norm's width into the product that
  forms the gradient, whose tiles then no longer fill the matrix units.
  """
  return x


def _forward(x: jax.Array) -> tuple[jax.Array, None]:
  return x, None


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
  return (jax.lax.optimization_barrier(gradient),)


backward_fence.defvjp(_forward, _backward)


def fenced(f: Callable[[jax.Array], tuple[jax.Array, Any]]) -> Callable[[jax.Array], tuple[jax.Array, Any]]:
  """f, across whose first result the compiler may fuse nothing, forward and backward.

  A TPU's compiler takes what several streams do with a branch's output into the product that makes it, whose tiles then
  no longer fill the matrix units.
  """

  def with_fence(x: jax.Array) -> tuple[jax.Array, Any]:
    output, said = f(x)
    return jax.lax.optimization_barrier(output), said

  return with_fence

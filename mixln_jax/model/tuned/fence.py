"""Fusion barriers, for compilers that fuse too much."""

from collections.abc import Callable
from typing import Any

import jax


@jax.custom_vjp
def backward_fence(x: jax.Array) -> jax.Array:
  """Returns x; in the backward pass the compiler can't fuse across the gradient of x. Reverse mode only.

  After a norm that only some layers have, the TPU compiler fuses the norm's sums over the width into the product that
  computes the gradient, whose tiles then no longer fill the matrix units.
  """
  return x


def _forward(x: jax.Array) -> tuple[jax.Array, None]:
  return x, None


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
  return (jax.lax.optimization_barrier(gradient),)


backward_fence.defvjp(_forward, _backward)


def fenced(f: Callable[[jax.Array], tuple[jax.Array, Any]]) -> Callable[[jax.Array], tuple[jax.Array, Any]]:
  """f with a fusion barrier around its first result, in the forward and in the backward pass.

  Where learned weights say how much of a branch's output each stream receives, the TPU compiler fuses the sums that use
  that output into the product that computes it, whose tiles then no longer fill the matrix units.
  """

  def with_fence(x: jax.Array) -> tuple[jax.Array, Any]:
    output, auxiliary = f(x)
    return jax.lax.optimization_barrier(output), auxiliary

  return with_fence

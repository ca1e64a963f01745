"""The clip and Adam's update in the forms that suit a CPU; `optimizer.py` picks, docs/tuned.md has what they are worth.

XLA's passes over memory on a CPU have one output each, so what two of them need is either written in between or
computed in both.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def clip_with_known_norm(grads: Any, norm: jax.Array, limit: float) -> Any:
  """`optax.clip_by_global_norm`, as one factor, for gradients whose norm is known.

  optax computes the norm once more and divides by it. A CPU does not repeat a division in each of the passes that read
  its result: it writes all gradients once more.
  """
  factor = jnp.where(norm < limit, 1.0, limit / norm)
  return jax.tree.map(lambda g: g * factor, grads)


def update_from_moments(state: optax.ScaleByAdamState, b1: float, b2: float, epsilon: float) -> Any:
  """Adam's update, computed from the moments that the step writes.

  optax computes it from the new moments before it is known whether the step accepts them. A CPU then computes those a
  second time where it updates the parameters, and for that copies all old ones.
  """
  mean = optax.tree.bias_correction(state.mu, b1, state.count)
  square = optax.tree.bias_correction(state.nu, b2, state.count)
  return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, square)

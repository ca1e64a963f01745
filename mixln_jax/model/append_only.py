"""A scan over layers whose carry is only added to, with a backward pass in the memory of one carry instead of L.

Differentiating a scan keeps the carry of every step. Where the carry is a buffer of sources, of which a layer changes
one or two and reads all (attention residuals, arXiv 2603.15031), that is O(L²) of what are O(L) numbers: the buffer
after the last layer holds every earlier one. The rule here walks back over it. Each layer's sources are set back to
what they were, the layer is computed again from the buffer, and its cotangents are added to one buffer of them; so a
layer is always recomputed, whatever config.model.remat says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


class Slots(NamedTuple):
  """Which sources each layer adds to, by its two sublayers; they are constants of the table.

  Attributes:
    attention_L: int [L].
    mlp_L: int [L]; the same one, or one that was empty before the layer.
    begun: whether any layer finds attention's source begun by an earlier layer.
  """

  attention_L: jax.Array
  mlp_L: jax.Array
  begun: bool


# (buffer [S, ...], a layer's parameters, what differs from layer to layer, what layers share) -> (buffer, taps)
Step = Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Any]]


def scan_layers(
  step: Step, slots: Slots, unroll: int, buffer: jax.Array, params_L: Any, varying_L: Any, shared: Any, constant: Any
) -> tuple[jax.Array, Any]:
  """The buffer after all layers, and their taps stacked.

  Args:
    step: one layer. It must change only the sources of `slots`, by adding to them.
    slots: which those are.
    unroll: layers a step of the scan.
    buffer: the sources [S, B, T, D] before the first layer.
    params_L: parameters, stacked along L. Differentiated.
    varying_L: what else differs from layer to layer, stacked; a constant to the derivative.
    shared: what all layers read and is differentiated, or None.
    constant: what all layers read and is a constant to the derivative.
  """
  return _scan(step, slots.begun, unroll, buffer, params_L, varying_L, shared, constant, slots[:2])[:2]


def _forward_scan(
  step: Step,
  begun: bool,
  unroll: int,
  buffer: Any,
  params_L: Any,
  varying_L: Any,
  shared: Any,
  constant: Any,
  slots: Any,
) -> tuple[jax.Array, Any, jax.Array | None]:
  """The buffer, the taps, and what attention's source held before each layer, where that can be something."""

  def body(buffer: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
    params, varying, slot = inputs
    before = buffer[slot] if begun else None
    buffer, taps = step(buffer, params, varying, (shared, constant))
    return buffer, (taps, before)

  buffer, (taps_L, before_L) = jax.lax.scan(body, buffer, (params_L, varying_L, slots[0]), unroll=unroll)
  return buffer, taps_L, before_L


def _forward(step: Step, begun: bool, unroll: int, *arguments: Any) -> tuple[Any, Any]:
  values = jax.tree.map(lambda primal: primal.value, arguments, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
  buffer, taps_L, before_L = _forward_scan(step, begun, unroll, *values)
  return (buffer, taps_L, before_L), (buffer, before_L, values)


def _backward(step: Step, begun: bool, unroll: int, kept: Any, cotangents: Any) -> Any:
  buffer, before_L, (_, params_L, varying_L, shared, constant, slots) = kept
  of_buffer, of_taps_L, _ = cotangents
  # Taps that nobody differentiates have symbolic zeros, which become arrays inside the loop alone.
  leaves_L, structure = jax.tree.flatten(of_taps_L, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
  real_L = [None if isinstance(leaf, SymbolicZero) else leaf for leaf in leaves_L]

  def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
    buffer, of_buffer, of_shared = carry
    params, varying, attention_slot, mlp_slot, before, of_taps = inputs
    buffer = buffer.at[mlp_slot].set(jnp.zeros_like(buffer[0]))
    buffer = buffer.at[attention_slot].set(before if begun else jnp.zeros_like(buffer[0]))

    def layer(buffer: jax.Array, params: Any, shared: Any) -> tuple[jax.Array, Any]:
      return step(buffer, params, varying, (shared, constant))

    (_, taps), pull_back = jax.vjp(layer, buffer, params, shared)
    tap_leaves = jax.tree.leaves(taps)
    filled = [jnp.zeros_like(tap) if given is None else given for tap, given in zip(tap_leaves, of_taps, strict=True)]
    of_buffer, of_params, of_shared_here = pull_back((of_buffer, jax.tree.unflatten(structure, filled)))
    return (buffer, of_buffer, jax.tree.map(jnp.add, of_shared, of_shared_here)), of_params

  if isinstance(of_buffer, SymbolicZero):
    of_buffer = jnp.zeros_like(buffer)
  start = (buffer, of_buffer, jax.tree.map(jnp.zeros_like, shared))
  inputs_L = (params_L, varying_L, *slots, before_L, real_L)
  (_, of_buffer, of_shared), of_params_L = jax.lax.scan(body, start, inputs_L, reverse=True, unroll=unroll)
  return of_buffer, of_params_L, None, of_shared, None, None


_scan = jax.custom_vjp(_forward_scan, nondiff_argnums=(0, 1, 2))
_scan.defvjp(_forward, _backward, symbolic_zeros=True)

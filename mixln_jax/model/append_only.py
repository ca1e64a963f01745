"""A scan over layers with an append-only carry, whose backward pass needs the memory of one carry instead of L.

The derivative of `lax.scan` saves the carry of every step. With attention residuals (arXiv 2603.15031) the carry is a
buffer of sources: each layer reads all of them and adds to one or two. Saving every carry then takes O(L²) memory,
although the final buffer contains all earlier ones. The rule here walks back over the final buffer instead. For each
layer, last one first, it resets the layer's sources to their earlier values, recomputes the layer from the buffer, and
accumulates the cotangents of the sources in one buffer. So layers are always recomputed, whatever config.model.remat
says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


class Slots(NamedTuple):
  """The source that each sublayer adds its output to; constants of the table.

  Attributes:
    attention_L: of each layer's attention, int [L].
    mlp_L: of each layer's MLP, int [L]: the source of its attention, or one that was empty before the layer.
    shared: whether the source of some layer's attention is not empty before that layer.
  """

  attention_L: jax.Array
  mlp_L: jax.Array
  shared: bool


# (buffer [S, ...], a layer's parameters, its other inputs, the inputs that all layers share) -> (buffer, taps)
Step = Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Any]]


def scan_layers(
  step: Step, slots: Slots, unroll: int, buffer: jax.Array, params_L: Any, varying_L: Any, shared: Any, constant: Any
) -> tuple[jax.Array, Any]:
  """The buffer after all layers, and their stacked taps.

  Args:
    step: one layer. It must change only the sources of `slots`, and only by adding to them.
    slots: the sources that each layer adds to.
    unroll: layers per iteration of the scan.
    buffer: the sources [S, B, T, D] before the first layer; differentiated.
    params_L: parameters, stacked along L; differentiated.
    varying_L: the other inputs that differ from layer to layer, stacked along L; not differentiated.
    shared: inputs of all layers that are differentiated, or None.
    constant: inputs of all layers that are not differentiated.
  """
  return _scan(step, slots.shared, unroll, buffer, params_L, varying_L, shared, constant, slots[:2])[:2]


def _forward_scan(
  step: Step,
  slots_shared: bool,
  unroll: int,
  buffer: Any,
  params_L: Any,
  varying_L: Any,
  shared: Any,
  constant: Any,
  slots: Any,
) -> tuple[jax.Array, Any, jax.Array | None]:
  """The buffer, the taps, and the value of attention's source before each layer (None if it is always empty)."""

  def body(buffer: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
    params, varying, slot = inputs
    before = buffer[slot] if slots_shared else None
    buffer, taps = step(buffer, params, varying, (shared, constant))
    return buffer, (taps, before)

  buffer, (taps_L, before_L) = jax.lax.scan(body, buffer, (params_L, varying_L, slots[0]), unroll=unroll)
  return buffer, taps_L, before_L


def _forward(step: Step, slots_shared: bool, unroll: int, *arguments: Any) -> tuple[Any, Any]:
  values = jax.tree.map(lambda primal: primal.value, arguments, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
  buffer, taps_L, before_L = _forward_scan(step, slots_shared, unroll, *values)
  return (buffer, taps_L, before_L), (buffer, before_L, values)


def _backward(step: Step, slots_shared: bool, unroll: int, saved: Any, cotangents: Any) -> Any:
  """Names that begin with `d_` are cotangents."""
  buffer, before_L, (_, params_L, varying_L, shared, constant, slots) = saved
  d_buffer, d_taps_L, _ = cotangents
  # Taps that nobody differentiates have symbolic zeros: None here, and arrays of zeros only inside the loop.
  leaves_L, structure = jax.tree.flatten(d_taps_L, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
  d_tap_leaves_L = [None if isinstance(leaf, SymbolicZero) else leaf for leaf in leaves_L]

  def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
    buffer, d_buffer, d_shared = carry
    params, varying, attention_slot, mlp_slot, before, d_tap_leaves = inputs
    buffer = buffer.at[mlp_slot].set(jnp.zeros_like(buffer[0]))
    buffer = buffer.at[attention_slot].set(before if slots_shared else jnp.zeros_like(buffer[0]))

    def layer(buffer: jax.Array, params: Any, shared: Any) -> tuple[jax.Array, Any]:
      return step(buffer, params, varying, (shared, constant))

    (_, taps), pull_back = jax.vjp(layer, buffer, params, shared)
    filled = []
    for tap, d_tap in zip(jax.tree.leaves(taps), d_tap_leaves, strict=True):
      filled.append(jnp.zeros_like(tap) if d_tap is None else d_tap)
    d_buffer, d_params, d_shared_here = pull_back((d_buffer, jax.tree.unflatten(structure, filled)))
    return (buffer, d_buffer, jax.tree.map(jnp.add, d_shared, d_shared_here)), d_params

  if isinstance(d_buffer, SymbolicZero):
    d_buffer = jnp.zeros_like(buffer)
  start = (buffer, d_buffer, jax.tree.map(jnp.zeros_like, shared))
  inputs_L = (params_L, varying_L, *slots, before_L, d_tap_leaves_L)
  (_, d_buffer, d_shared), d_params_L = jax.lax.scan(body, start, inputs_L, reverse=True, unroll=unroll)
  return d_buffer, d_params_L, None, d_shared, None, None


_scan = jax.custom_vjp(_forward_scan, nondiff_argnums=(0, 1, 2))
_scan.defvjp(_forward, _backward, symbolic_zeros=True)

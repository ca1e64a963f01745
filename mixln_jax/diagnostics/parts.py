"""Norms over the parts of a model's parameters (`Param.part`), by layer from the stacked arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.model.parameters import LAYERS, Param, gain_name, param_paths
from mixln_jax.placement import SUBLAYERS

# statistic -> the parameter that it measures: a sublayer's first and second gain, in order of application.
GAINS: dict[str, str] = {}
for sublayer in SUBLAYERS:
  GAINS[f"{sublayer}/norm_gain_rms"] = gain_name(sublayer, 0)
  GAINS[f"{sublayer}/norm_gain_rms_2"] = gain_name(sublayer, 1)

Table = Mapping[str, Param]  # `model.parameters.parameters`


def norms(tree: Any, table: Table) -> dict[str, jax.Array]:
  """L2 norms of the parts of a tree with the structure of the parameters, in fp32. Call it under jit.

  Returns:
    part -> the norm of all entries of its tensors together, [L], or a scalar for a part outside the layers.
  """
  squares: dict[str, jax.Array] = {}
  for path, leaf in zip(jax.tree.leaves(param_paths(tree)), jax.tree.leaves(tree), strict=True):
    part = table[path].part
    if part is None:
      continue
    axes = tuple(range(1 if path.startswith(LAYERS) else 0, leaf.ndim))
    square = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
    squares[part] = squares[part] + square if part in squares else square
  return {part: jnp.sqrt(square) for part, square in squares.items()}


def gradient_norms(grads: Any, table: Table) -> dict[str, jax.Array]:
  """`attention/gradient_norm`, `attention/gain_gradient_norm`, …, `embedding/gradient_norm`, … of a gradient."""
  return {f"{part}gradient_norm": norm for part, norm in norms(grads, table).items()}


def update_ratios(old: Any, new: Any, table: Table) -> dict[str, jax.Array]:
  """`attention/update_ratio`, `mlp/update_ratio` [L]: ‖new − old‖ / ‖old‖ over all weights of the sublayer.

  The change is that of the stored parameters: what rounding to a narrow type loses is not part of it.
  """
  changes = norms(jax.tree.map(lambda a, b: b.astype(jnp.float32) - a.astype(jnp.float32), old, new), table)
  sizes = norms(old, table)
  return {f"{name}/update_ratio": changes[f"{name}/"] / sizes[f"{name}/"] for name in SUBLAYERS}


def gain_sizes(params: Any) -> dict[str, jax.Array]:
  """The RMS [L] of those of GAINS that the model has. In a layer that does not use a gain, it is that of the initial
  value."""

  def rms(gains_LD: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(gains_LD.astype(jnp.float32)), axis=-1))

  layers = params["layers"]
  return {statistic: rms(layers[name]) for statistic, name in GAINS.items() if name in layers}

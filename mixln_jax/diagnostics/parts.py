"""The parts that a model's parameters fall into, and norms over them, layer by layer from the stacked arrays."""

from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.model.initial import SUBLAYER_OF
from mixln_jax.model.transformer import param_paths
from mixln_jax.placement import SUBLAYERS

GAIN = "gain_"
# statistic -> its parameter: a sublayer's first and second gain, in order of application.
GAINS = {
  f"{sublayer}/norm_gain_rms{which}": f"{sublayer}_norm{which}" for sublayer in SUBLAYERS for which in ("", "_2")
}


def part_of(path: str) -> str | None:
  """What a parameter belongs to, as a prefix of a statistic's name.

  `attention/`, `mlp/`: all weights of the sublayer, biases among them; `attention/gain_`, `mlp/gain_`: the gains of its
  norms, those of queries, keys and values among attention's; outside the layers the parameter itself, `embedding/`,
  `head/`, `final_norm/`. None: what else a placement learns (`gpas`, learned c_res and c_out).
  """
  name = path.removeprefix("layers/")
  if name == path:
    return f"{path}/"
  if "_norm" in name:
    return f"mlp/{GAIN}" if name.startswith("mlp") else f"attention/{GAIN}"
  sublayer = SUBLAYER_OF.get(name.removesuffix("_bias"))
  return None if sublayer is None else f"{sublayer}/"


def norms(tree: Any) -> dict[str, jax.Array]:
  """L2 norms of the parts of a tree shaped like the parameters: part -> [L] (outside the layers: a scalar), fp32.

  A norm over several tensors is that of all their entries together. Call it under jit.
  """
  squares: dict[str, jax.Array] = {}
  for path, leaf in zip(jax.tree.leaves(param_paths(tree)), jax.tree.leaves(tree), strict=True):
    if (part := part_of(path)) is None:
      continue
    axes = tuple(range(1 if path.startswith("layers/") else 0, leaf.ndim))
    square = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
    squares[part] = squares[part] + square if part in squares else square
  return {part: jnp.sqrt(square) for part, square in squares.items()}


def gradient_norms(grads: Any) -> dict[str, jax.Array]:
  """`attention/gradient_norm`, `attention/gain_gradient_norm`, …, `embedding/gradient_norm`, … of a gradient."""
  return {f"{part}gradient_norm": norm for part, norm in norms(grads).items()}


def update_ratios(old: Any, new: Any) -> dict[str, jax.Array]:
  """`attention/update_ratio`, `mlp/update_ratio` [L]: ‖new − old‖ / ‖old‖ over all weights of the sublayer.

  The change is that of the stored parameters: it lacks what a narrow type rounds away.
  """
  changes = norms(jax.tree.map(lambda a, b: b.astype(jnp.float32) - a.astype(jnp.float32), old, new))
  sizes = norms(old)
  return {f"{name}/update_ratio": changes[f"{name}/"] / sizes[f"{name}/"] for name in SUBLAYERS}


def gain_sizes(params: Any) -> dict[str, jax.Array]:
  """The RMS [L] of the gains of GAINS that the model has. A layer that does not use one still holds its first value."""

  def rms(gains_LD: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(gains_LD.astype(jnp.float32)), axis=-1))

  layers = params["layers"]
  return {statistic: rms(layers[name]) for statistic, name in GAINS.items() if name in layers}

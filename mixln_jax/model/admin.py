"""Admin's profiling pass, which sets the initial values of its residual scales (Liu et al., arXiv 2004.08249)."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import ModelConfig
from mixln_jax.model.transformer import Transformer

TERMS = ("residual_LBTD", "branch_LBTD")  # the taps of the two terms of a sublayer's sum
ROWS = 8  # rows of the batch to profile; each scale is one number, estimated from all counted entries of [ROWS, T, D]


def sublayers_to_profile(config: ModelConfig) -> list[tuple[int, str]]:
  """(layer, sublayer) of each sublayer of config.model with a learned residual scale, in order of application."""
  sublayers = []
  for index, layer in enumerate(config_lib.table(config).layers):
    for name in placement.SUBLAYERS:
      if getattr(layer, name).vector_c_res:
        sublayers.append((index, name))
  return sublayers


def profile_admin(
  config: ModelConfig,
  params: Any,
  tokens_BT: jax.Array,
  weights_BT: jax.Array | None = None,
  **arguments: Any,
) -> Any:
  """The parameters with Admin's residual scales ω set from one batch. Call it under jit.

  With i counting the sublayers that have a scale, ω_1 = 1 and ω_{i+1}² = Var[ω_i ⊙ x_i] + Var[f_i(x_i)], as in the
  authors' code. x_i depends on all earlier scales, so the scales are set in order, each from a forward pass with the
  earlier ones set. That takes one pass of the same compiled program for each scale.

  Args:
    config: config.model.
    params: its initial parameters.
    tokens_BT: a few rows of tokens.
    weights_BT: 1 where a position counts, else 0; by default all do.
    arguments: further arguments of `Transformer.hidden`: `segment_ids_BT`, `positions_BT`.
  """
  sublayers = sublayers_to_profile(config)
  weights_BT1 = (jnp.ones(tokens_BT.shape) if weights_BT is None else weights_BT)[..., None]
  model = Transformer(config)

  def variance(x_BTD: jax.Array) -> jax.Array:
    count = weights_BT1.sum() * x_BTD.shape[-1]
    mean = (x_BTD * weights_BT1).sum() / count
    return (jnp.square(x_BTD - mean) * weights_BT1).sum() / count

  def next_scales(layers: Any) -> dict[str, jax.Array]:
    """The ω that each sublayer implies for the next one, given the current scales: [L] for attention and for MLP."""
    _, taps = cast(Any, model.apply({"params": {**params, "layers": layers}}, tokens_BT, method="hidden", **arguments))
    variance_L = {name: jax.vmap(variance)(tap) for name, tap in taps.items() if name.endswith(TERMS)}
    return {name: jnp.sqrt(sum(variance_L[f"{name}_{term}"] for term in TERMS)) for name in placement.SUBLAYERS}

  # Pass i sets scale i. Its layer and sublayer are data, so that all passes share one loop body.
  is_mlp = jnp.array([name == "mlp" for _, name in sublayers])
  layer = jnp.array([index for index, _ in sublayers])

  def set_scale(i: jax.Array, layers: Any) -> Any:
    scales = next_scales(layers)
    omega = jnp.where(is_mlp[i - 1], scales["mlp"][layer[i - 1]], scales["attention"][layer[i - 1]])
    updated = dict(layers)
    for name, is_here in (("attention", ~is_mlp[i]), ("mlp", is_mlp[i])):
      vector_LD = layers[f"{name}_vector_c_res"]
      vector_D = jnp.where(is_here, omega.astype(vector_LD.dtype), vector_LD[layer[i]])
      updated[f"{name}_vector_c_res"] = vector_LD.at[layer[i]].set(vector_D)
    return updated

  return {**params, "layers": jax.lax.fori_loop(1, len(sublayers), set_scale, dict(params["layers"]))}

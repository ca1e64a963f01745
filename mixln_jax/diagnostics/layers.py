"""Statistics of the residual stream by layer, reduced inside the scan over layers, so that no [L, B, T, D] is stored.

They are sums and maxima over counted positions (those whose next token the loss counts). Those of micro-batches and
devices therefore combine to those of the whole batch; `finish` divides once, by the number of counted tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.diagnostics import parts
from mixln_jax.placement import SUBLAYERS

Statistics = dict[str, dict[str, jax.Array]]  # "sums" and "maxima": name -> scalar, [L] outside the scan


def observe(taps: dict[str, jax.Array], weights_BT: jax.Array) -> Statistics:
  """One layer's statistics; the function for `Transformer.observe`."""

  def total(values_BT: jax.Array) -> jax.Array:
    return jnp.sum(values_BT * weights_BT)

  input_BTD, stream_BTD = taps["input_BTD"].astype(jnp.float32), taps["stream_BTD"].astype(jnp.float32)
  sums = {
    "stream": total(_mean_square(stream_BTD)),
    "variance": total(jnp.var(stream_BTD, axis=-1)),
    "cosine": total(_cosine(input_BTD, stream_BTD)),
    "entropy": total(taps["attention_entropy_BT"]),
  }
  for name in SUBLAYERS:
    sums |= {f"{name}/{term}": total(_mean_square(taps[f"{name}_{term}_BTD"])) for term in ("branch", "residual")}
  largest = jnp.max(jnp.where(weights_BT > 0, taps["attention_largest_logit_BT"], -jnp.inf))
  return {"sums": sums, "maxima": {"largest_logit": largest}}


def _mean_square(x_BTD: jax.Array) -> jax.Array:
  return jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1)


def _cosine(a_BTD: jax.Array, b_BTD: jax.Array) -> jax.Array:
  norms_BT = jnp.linalg.norm(a_BTD, axis=-1) * jnp.linalg.norm(b_BTD, axis=-1)
  # A vector of zeros, as the row of a padding token can be, is orthogonal to all others.
  return jnp.sum(a_BTD * b_BTD, axis=-1) / jnp.maximum(norms_BT, jnp.finfo(jnp.float32).tiny)


def collect(taps: dict[str, Any], weights_BT: jax.Array) -> Statistics:
  """The statistics in the taps of a model with `observe`, and that of the stream before the first layer."""
  embedded = jnp.sum(_mean_square(jax.lax.stop_gradient(taps["embedded_BTD"])) * weights_BT)
  return {"sums": taps["sums"] | {"embedded": embedded}, "maxima": taps["maxima"]}


def merge(statistics: Statistics) -> Statistics:
  """Merges statistics that are stacked along their first axis."""
  return {
    "sums": jax.tree.map(lambda x: jnp.sum(x, axis=0), statistics["sums"]),
    "maxima": jax.tree.map(lambda x: jnp.max(x, axis=0), statistics["maxima"]),
  }


def finish(statistics: Statistics, count: jax.Array) -> dict[str, jax.Array]:
  """The reported numbers, from the statistics of `count` tokens; each [L], `embedded_rms` a scalar.

  `stream_rms`        RMS of the residual stream after the layer (before the final norm), over tokens and channels
  `stream_variance`   its variance over the channels of a token, the mean over tokens
  `cosine`            cosine of the layer's input and output, the mean over tokens
  `S/branch_ratio`    RMS of the sublayer's branch over that of its residual, as the sublayer rule adds them
  `attention/largest_logit`  maximum over all heads, queries and the keys that they may read
  `attention/entropy`        entropy of a query's attention in nats, the mean over heads and tokens
  `embedded_rms`      RMS of the stream before the first layer
  """
  sums = statistics["sums"]
  ratios = {f"{name}/branch_ratio": jnp.sqrt(sums[f"{name}/branch"] / sums[f"{name}/residual"]) for name in SUBLAYERS}
  return ratios | {
    "stream_rms": jnp.sqrt(sums["stream"] / count),
    "stream_variance": sums["variance"] / count,
    "cosine": sums["cosine"] / count,
    "attention/largest_logit": statistics["maxima"]["largest_logit"],
    "attention/entropy": sums["entropy"] / count,
    "embedded_rms": jnp.sqrt(sums["embedded"] / count),
  }


def of_step(
  statistics: Statistics, count: jax.Array, grads: Any, old_params: Any, new_params: Any, table: parts.Table
) -> dict[str, jax.Array]:
  """All statistics of one step: of its forward pass, gradient, update and parameters.

  Args:
    statistics: of the whole batch.
    count: its counted tokens.
    grads: gradient of the mean loss, before clipping.
    old_params: the parameters before the update.
    new_params: the parameters after the update.
    table: the table of the parameters.
  """
  return (
    finish(statistics, count)
    | parts.gradient_norms(grads, table)
    | parts.update_ratios(old_params, new_params, table)
    | parts.gain_sizes(old_params)
  )

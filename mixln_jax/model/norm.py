"""The norms: RMSNorm, LayerNorm, and point-wise functions that replace a norm (DyT, Derf). All in fp32."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Flag = bool | jax.Array

# The parameters of each kind of norm besides its gain: name -> True for a vector [D], False for [1]. All start at 0
# except alpha, whose first value depends on where the norm stands (`model/parameters.py`).
EXTRA_PARAMETERS: Mapping[str, Mapping[str, bool]] = {
  "rmsnorm": {},
  "layernorm": {"bias": True},
  "dyt": {"alpha": False},
  "dyt_bias": {"alpha": False, "bias": True},
  "derf": {"alpha": False, "bias": True, "shift": False},
}


class NormParams(NamedTuple):
  """The parameters of one norm; None for those that its kind does not have."""

  gain: jax.Array  # [D]
  bias: jax.Array | None = None  # [D]
  alpha: jax.Array | None = None  # [1]
  shift: jax.Array | None = None  # [1]


def norm_params(weights: Mapping[str, jax.Array], name: str, kind: str) -> NormParams:
  """The parameters of the norm `name`: its gain has that name, the others are `name_bias` and so on."""
  return NormParams(weights[name], **{extra: weights[f"{name}_{extra}"] for extra in EXTRA_PARAMETERS[kind]})


def neutral_params(kind: str, width: int) -> NormParams:
  """Placeholder parameters for a norm of this kind, in fp32: what a scan carries where no norm is pending."""
  extras = {}
  for extra, is_vector in EXTRA_PARAMETERS[kind].items():
    extras[extra] = jnp.zeros(width if is_vector else 1, jnp.float32)
  return NormParams(jnp.ones(width, jnp.float32), **extras)


def norm(
  kind: str,
  x_BTD: jax.Array,
  params: NormParams | None,
  *,
  epsilon: float,
  on: Flag = True,
  scale: float | jax.Array = 1.0,
) -> jax.Array:
  """`scale * N(x)` where `on`, else `scale * x`; in fp32, with x's shape. N by kind:

    rmsnorm    gain * x / sqrt(mean(x²) + epsilon)                               arXiv 1910.07467
    layernorm  gain * (x - mean(x)) / sqrt(var(x) + epsilon) + bias              arXiv 1607.06450
    dyt        gain * tanh(alpha * x), dyt_bias the same + bias                  arXiv 2503.10622
    derf       gain * erf(alpha * x + shift) + bias                              arXiv 2512.10938

  Args:
    kind: config.model.norm.
    x_BTD: activations of any floating type.
    params: None where `on` is False.
    epsilon: as above.
    on: whether to normalise; a Python bool, compiled in, or a traced scalar.
    scale: factor on the result; a Python number, compiled in, or a traced scalar.
  """
  if kind == "rmsnorm":
    return rms_norm(x_BTD, None if params is None else params.gain, epsilon=epsilon, on=on, scale=scale)
  x_BTD = x_BTD.astype(jnp.float32)
  out_BTD = x_BTD
  if on is not False and params is not None:
    normed_BTD = _layer_norm(x_BTD, params, epsilon) if kind == "layernorm" else _squashed(kind, x_BTD, params)
    out_BTD = normed_BTD if on is True else jnp.where(on, normed_BTD, x_BTD)
  return out_BTD if _is_one(scale) else out_BTD * scale


def _layer_norm(x_BTD: jax.Array, params: NormParams, epsilon: float) -> jax.Array:
  centered_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  return _plus(params.bias, rms_norm(centered_BTD, params.gain, epsilon=epsilon))


def _squashed(kind: str, x_BTD: jax.Array, params: NormParams) -> jax.Array:
  squash = jax.lax.erf if kind == "derf" else jnp.tanh
  alpha = jnp.asarray(params.alpha, jnp.float32)
  return _plus(params.bias, params.gain.astype(jnp.float32) * squash(_plus(params.shift, alpha * x_BTD)))


def _plus(term: jax.Array | None, x_BTD: jax.Array) -> jax.Array:
  return x_BTD if term is None else x_BTD + term.astype(jnp.float32)


def rms_norm(
  x_BTD: jax.Array,
  gain_D: jax.Array | None,
  *,
  epsilon: float,
  on: Flag = True,
  scale: float | jax.Array = 1.0,
) -> jax.Array:
  """`scale * gain * x / sqrt(mean(x²) + epsilon)` where `on`, else `scale * x`.

  A Python `on` or `scale` is compiled in. A traced one selects between factors and gains, never between tensors, so a
  layer that skips its norm at run time needs no second copy of x.

  Args:
    x_BTD: activations of any floating type.
    gain_D: learned gain; None where `on` is False.
    epsilon: added to the mean square, inside the root.
    on: whether to normalise; a Python bool or a traced scalar.
    scale: factor on the result; a Python number or a traced scalar.

  Returns:
    fp32 array of x's shape.
  """
  x_BTD = x_BTD.astype(jnp.float32)
  if on is False or gain_D is None:
    return x_BTD if _is_one(scale) else x_BTD * scale
  factor_BT1 = jax.lax.rsqrt(mean_square(x_BTD) + epsilon)
  gain_D = gain_D.astype(jnp.float32)
  if on is not True:
    factor_BT1 = jnp.where(on, factor_BT1, 1.0)
    gain_D = jnp.where(on, gain_D, 1.0)
  if not _is_one(scale):
    factor_BT1 = factor_BT1 * scale
  return x_BTD * factor_BT1 * gain_D


def mean_square(x_BTD: jax.Array) -> jax.Array:
  """The mean square over the width, [B, T, 1] in fp32."""
  return jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1, keepdims=True)


def _is_one(scale: float | jax.Array) -> bool:
  return isinstance(scale, float) and scale == 1.0

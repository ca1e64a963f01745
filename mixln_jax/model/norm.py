"""RMSNorm (arXiv 1910.07467), reduced in fp32."""

import jax
import jax.numpy as jnp


def rms_norm(
  x_BTD: jax.Array,
  gain_D: jax.Array | None,
  *,
  epsilon: float,
  on: bool | jax.Array = True,
  scale: float | jax.Array = 1.0,
) -> jax.Array:
  """`scale * gain * x / sqrt(mean(x²) + epsilon)` where `on`, else `scale * x`.

  A Python `on` or `scale` is compiled in. A traced one gates the per-row factor and the gain, never the tensor, so a
  layer that skips its norm at run time costs no second copy of x.

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
  factor_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True) + epsilon)
  gain_D = gain_D.astype(jnp.float32)
  if on is not True:
    factor_BT1 = jnp.where(on, factor_BT1, 1.0)
    gain_D = jnp.where(on, gain_D, 1.0)
  if not _is_one(scale):
    factor_BT1 = factor_BT1 * scale
  return x_BTD * factor_BT1 * gain_D


def _is_one(scale: float | jax.Array) -> bool:
  return isinstance(scale, float) and scale == 1.0

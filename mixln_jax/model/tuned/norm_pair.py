"""Two RMSNorms in a row, each switched by data, with the sums of both made in one pass over the stream.

In a mixture a sublayer reads the stream through the N_out of the sublayer before it and through its own N_in. In most
layers one of the two is off, but both are computed, since which one is data. Written one after the other, each needs a
sum over the width of what the other returns, so that the stream is passed over once more forward, and several times
more backward. Here it is one pass forward and two backward.

With h the stream, G the gain where the norm is on, else 1, and r the factor 1 / sqrt(mean + epsilon) where it is on,
else 1:

    x = r_out G_out h                 mean(x²) = r_out² mean((G_out h)²)
    y = scale r_in G_in x

The second mean is one of h as well, and so are all sums that the gradient needs once the two incoming gradients are
there. `Stream.value` and `Sublayer.normed` are the plain form.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixln_jax.model.norm import Flag, mean_square


class Switched(NamedTuple):
  """A norm that is on or off.

  Attributes:
    gain_D: its gain.
    on: whether it is on; a scalar.
  """

  gain_D: jax.Array
  on: Flag

  def effective_gain(self) -> jax.Array:
    """The gain [D] in fp32 where the norm is on, else 1."""
    return jnp.where(self.on, self.gain_D.astype(jnp.float32), 1.0)

  def factor(self, mean_square_BT1: jax.Array, epsilon: float) -> jax.Array:
    """What the norm multiplies by besides its gain, [B, T, 1] in fp32."""
    return jnp.where(self.on, jax.lax.rsqrt(mean_square_BT1 + epsilon), 1.0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def norm_pair(
  epsilon: float, dtype: Any, stream_BTD: jax.Array, outer: Switched, inner: Switched, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(N_out(h), scale * N_in(N_out(h))); can be differentiated once, in reverse mode.

  Args:
    epsilon: of both norms, inside the root.
    dtype: the type of the second result.
    stream_BTD: h.
    outer: N_out, the pending norm of the stream.
    inner: N_in.
    scale: a scalar in fp32.

  Returns:
    The normed stream in the type of h, and what the sublayer's function gets in `dtype`.
  """
  return _forward(epsilon, dtype, stream_BTD, outer, inner, scale)[0]


def _forward(
  epsilon: float, dtype: Any, stream_BTD: jax.Array, outer: Switched, inner: Switched, scale: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  h_BTD = stream_BTD.astype(jnp.float32)
  scaled_BTD = h_BTD * outer.effective_gain()
  out_factor_BT1 = outer.factor(mean_square(h_BTD), epsilon)
  scaled_mean_BT1 = mean_square(scaled_BTD)
  in_factor_BT1 = inner.factor(jnp.square(out_factor_BT1) * scaled_mean_BT1, epsilon)
  x_BTD = (scaled_BTD * out_factor_BT1).astype(stream_BTD.dtype)
  y_BTD = x_BTD.astype(jnp.float32) * (in_factor_BT1 * scale) * inner.effective_gain()
  saved = stream_BTD, outer, inner, scale, out_factor_BT1, in_factor_BT1, scaled_mean_BT1
  return (x_BTD, y_BTD.astype(dtype)), saved


def _backward(_epsilon: float, _dtype: Any, saved: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
  stream_BTD, outer, inner, scale, out_factor_BT1, in_factor_BT1, scaled_mean_BT1 = saved
  h_BTD = stream_BTD.astype(jnp.float32)
  out_gain_D, in_gain_D = outer.effective_gain(), inner.effective_gain()
  scaled_BTD = h_BTD * out_gain_D
  x_BTD = (scaled_BTD * out_factor_BT1).astype(stream_BTD.dtype).astype(jnp.float32)

  # The first pass: every sum that needs no other sum. The fence before it keeps these sums out of the product that
  # computes the gradient of y, whose tiles would no longer fill the matrix units.
  x_gradient_BTD = gradients[0].astype(jnp.float32)
  y_gradient_BTD = jax.lax.optimization_barrier(gradients[1]).astype(jnp.float32)
  through_BTD = x_gradient_BTD + y_gradient_BTD * (in_factor_BT1 * scale) * in_gain_D  # of x, the factor held
  y_sum_BT1 = jnp.sum(y_gradient_BTD * in_gain_D * x_BTD, axis=-1, keepdims=True)
  x_sum_BT1 = jnp.sum(through_BTD * scaled_BTD, axis=-1, keepdims=True)
  in_gain_gradient_D = _over_positions(y_gradient_BTD * x_BTD * (in_factor_BT1 * scale))
  # In the stream's type, as gradients of the stream are kept; the fence makes the second pass read it, and not both
  # gradients again.
  first_pass = y_sum_BT1, x_sum_BT1, in_gain_gradient_D, through_BTD.astype(stream_BTD.dtype)
  y_sum_BT1, x_sum_BT1, in_gain_gradient_D, through_BTD = jax.lax.optimization_barrier(first_pass)

  # Of the means: d r / d mean = -r³ / 2, and the second mean has out_factor in it.
  in_mean_gradient_BT1 = jnp.where(inner.on, -0.5 * scale * y_sum_BT1 * in_factor_BT1**3, 0.0)
  out_factor_gradient_BT1 = x_sum_BT1 + 2.0 * in_mean_gradient_BT1 * out_factor_BT1 * scaled_mean_BT1
  out_mean_gradient_BT1 = jnp.where(outer.on, -0.5 * out_factor_gradient_BT1 * out_factor_BT1**3, 0.0)
  of_square = 2.0 / h_BTD.shape[-1]  # d mean(v²) / d v = 2 v / D
  h_weight_BT1 = of_square * out_mean_gradient_BT1
  scaled_weight_BT1 = of_square * in_mean_gradient_BT1 * jnp.square(out_factor_BT1)

  # The second pass.
  scaled_gradient_BTD = through_BTD.astype(jnp.float32) * out_factor_BT1 + scaled_BTD * scaled_weight_BT1
  stream_gradient_BTD = scaled_gradient_BTD * out_gain_D + h_BTD * h_weight_BT1
  out_gain_gradient_D = _over_positions(scaled_gradient_BTD * h_BTD)
  return (
    stream_gradient_BTD.astype(stream_BTD.dtype),
    _gradient_of(outer, out_gain_gradient_D),
    _gradient_of(inner, in_gain_gradient_D),
    jnp.sum(y_sum_BT1 * in_factor_BT1),
  )


def _gradient_of(norm: Switched, gain_gradient_D: jax.Array) -> Switched:
  """None for the flag, which has no gradient."""
  return Switched(jnp.where(norm.on, gain_gradient_D, 0.0).astype(norm.gain_D.dtype), None)  # pyright: ignore[reportArgumentType]


def _over_positions(v_BTD: jax.Array) -> jax.Array:
  return jnp.sum(v_BTD, axis=tuple(range(v_BTD.ndim - 1)))


norm_pair.defvjp(_forward, _backward)

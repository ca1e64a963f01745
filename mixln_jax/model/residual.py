"""The sublayer rule: how a sublayer meets the residual stream. The heart of the project.

Every sublayer f (attention or MLP) of every layer is

    s = c_res * x + c_out * N_mid(f(c_in * N_in(x)))
    y = N_out(s) where there is an N_out, else s

and a placement (`mixln_jax/placement.py`) is the table of its constants. Pre-LN has only N_in, Post-LN only N_out
(Xiong et al., arXiv 2002.04745), Mix-LN both by depth (arXiv 2412.13795, eq. 5).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.model.norm import rms_norm


def sublayer(
  x_BTD: jax.Array,
  branch: Callable[[jax.Array], jax.Array],
  gains: Sequence[jax.Array],
  row: dict[str, Any],
  *,
  epsilon: float,
  dtype: jnp.dtype,
) -> jax.Array:
  """One step of the residual stream.

  Args:
    x_BTD: residual stream; its type is kept.
    branch: f, from [B, T, D] in `dtype` to [B, T, D].
    gains: the sublayer's norm gains, each [D], in order of application.
    row: the sublayer's columns (`columns.NAMES`), each a Python constant or a traced scalar.
    epsilon: of the norms.
    dtype: what f reads.

  Returns:
    The residual stream after the sublayer. Norms, constants and the sum are fp32; the sum is cast once.
  """

  def norm(h_BTD: jax.Array, which: str, scale: float | jax.Array = 1.0) -> jax.Array:
    gain_D = _pick(gains, row[f"gain_{which}"])
    return rms_norm(h_BTD, gain_D, epsilon=epsilon, on=row[which], scale=scale)

  out_BTD = norm(branch(norm(x_BTD, "norm_in", row["c_in"]).astype(dtype)), "norm_mid")
  sum_BTD = _times(row["c_res"], x_BTD.astype(jnp.float32)) + _times(row["c_out"], out_BTD)
  return norm(sum_BTD, "norm_out").astype(x_BTD.dtype)


def _pick(gains: Sequence[jax.Array], index: int | jax.Array) -> jax.Array:
  return gains[index] if isinstance(index, int) else jnp.stack(gains)[index]


def _times(factor: float | jax.Array, x: jax.Array) -> jax.Array:
  return x if isinstance(factor, float) and factor == 1.0 else factor * x

"""The sublayer rule: how a sublayer meets the residual stream. The heart of the project.

Every sublayer f (attention or MLP) of every layer is

    r = N_in(x) if residual_from_normed else x
    s = c_res * g(r) + c_out * N_mid(f(c_in * N_in(x)))
    y = N_out(s) where there is an N_out, else g(s)

and a placement (`mixln_jax/placement.py`) is the table of its columns. Pre-LN has only N_in, Post-LN only N_out
(Xiong et al., arXiv 2002.04745), Mix-LN both by depth (arXiv 2412.13795, eq. 5). g is the identity, or with `gpas`
g(h) = h - silu(a) * stop_gradient(h) (arXiv 2506.22049), which stands where its source has it: on the residual
where there is an N_out, else on the sum.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.model.norm import rms_norm

Flag = bool | jax.Array  # a Python constant, or data
OutNorm = tuple[jax.Array, Flag] | None  # the gain [D] of an N_out and whether there is one; None = there is none


def sublayer(
  x_BTD: jax.Array,
  branch: Callable[[jax.Array], jax.Array],
  gains: Sequence[jax.Array],
  learned: Mapping[str, jax.Array],
  row: Mapping[str, Any],
  *,
  epsilon: float,
  dtype: jnp.dtype,
) -> tuple[jax.Array, OutNorm, dict[str, jax.Array]]:
  """One step of the residual stream, up to its N_out.

  Args:
    x_BTD: residual stream; its type is kept.
    branch: f, from [B, T, D] in `dtype` to [B, T, D].
    gains: the sublayer's norm gains, each [D], in order of application.
    learned: what else the sublayer learns: `vector_c_res` [D], `vector_c_out` [D], `scalar_c_out` [], `gpas` []. Only
      what a column of `row` asks for is read.
    row: the sublayer's columns (`columns.NAMES`), each a Python constant or a traced scalar.
    epsilon: of the norms.
    dtype: what f reads.

  Returns:
    What N_out is still to be applied to (`settle` does it), that N_out, and the two terms of the sum s, `residual_BTD`
    and `branch_BTD`, in fp32. Norms, constants and the sum are fp32; the sum is cast once.
  """

  def norm(h_BTD: jax.Array, which: str, scale: float | jax.Array = 1.0, *, only: Flag = True) -> jax.Array:
    on = _and(row[which], only)
    gain_D = None if on is False else _pick(gains, row[f"gain_{which}"])
    return rms_norm(h_BTD, gain_D, epsilon=epsilon, on=on, scale=scale)

  def gate(h_BTD: jax.Array, on: Flag) -> jax.Array:
    if on is False:
      return h_BTD
    amount = jax.nn.silu(learned["gpas"].astype(jnp.float32))
    return h_BTD - (amount if on is True else jnp.where(on, amount, 0.0)) * jax.lax.stop_gradient(h_BTD)

  def factor(constant: float | jax.Array, *names: str) -> float | jax.Array:
    for name in names:
      if row[name] is not False:
        weight = learned[name].astype(jnp.float32)
        constant = constant * (weight if row[name] is True else jnp.where(row[name], weight, 1.0))
    return constant

  out_BTD = norm(branch(norm(x_BTD, "norm_in", row["c_in"]).astype(dtype)), "norm_mid")
  r_BTD = norm(x_BTD, "norm_in", only=row["residual_from_normed"])
  residual_BTD = _times(factor(row["c_res"], "vector_c_res"), gate(r_BTD, _and(row["gpas"], row["norm_out"])))
  branch_BTD = _times(factor(row["c_out"], "vector_c_out", "scalar_c_out"), out_BTD)
  sum_BTD = gate(residual_BTD + branch_BTD, _and(row["gpas"], _not(row["norm_out"])))
  out_norm = None if row["norm_out"] is False else (_pick(gains, row["gain_norm_out"]), row["norm_out"])
  return sum_BTD.astype(x_BTD.dtype), out_norm, {"residual_BTD": residual_BTD, "branch_BTD": branch_BTD}


def settle(sum_BTD: jax.Array, out_norm: OutNorm, *, epsilon: float) -> jax.Array:
  """The residual stream after a sublayer: its sum, normalised where the sublayer has an N_out; in the sum's type."""
  if out_norm is None:
    return sum_BTD
  gain_D, on = out_norm
  return rms_norm(sum_BTD, gain_D, epsilon=epsilon, on=on).astype(sum_BTD.dtype)


def _pick(gains: Sequence[jax.Array], index: int | jax.Array) -> jax.Array:
  return gains[index] if isinstance(index, int) else jnp.stack(gains)[index]


def _times(factor: float | jax.Array, x: jax.Array) -> jax.Array:
  return x if isinstance(factor, float) and factor == 1.0 else factor * x


def _and(a: Flag, b: Flag) -> Flag:
  if a is False or b is False:
    return False
  return b if a is True else a if b is True else jnp.logical_and(a, b)


def _not(a: Flag) -> Flag:
  return not a if isinstance(a, bool) else jnp.logical_not(a)

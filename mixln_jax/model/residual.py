"""The sublayer rule: how a sublayer meets the residual stream. The heart of the project.

Every sublayer f (attention or MLP) of every layer is

    r = N_in(x) if residual_from_normed else x
    s = c_res * g(r) + c_out * N_mid(f(c_in * N_in(x)))
    y = N_out(s) where there is an N_out, else g(s)

and a placement (`mixln_jax/placement.py`) is the table of its columns. Pre-LN has only N_in, Post-LN only N_out
(Xiong et al., arXiv 2002.04745), Mix-LN both by depth (arXiv 2412.13795, eq. 5). Each c is a number of the table, times
what the row learns for it. g is the identity, or with `gpas` g(h) = h - silu(a) * stop_gradient(h) (arXiv 2506.22049),
which stands where its source has it: on the residual where there is an N_out, else on the sum.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mixln_jax.model.columns import Flag, Number, TracedRow
from mixln_jax.model.norm import rms_norm
from mixln_jax.placement import LEARNED


class Stream(flax.struct.PyTreeNode):
  """The residual stream between two sublayers: a sum, and the N_out that it still owes.

  A layer's last norm is applied by whoever reads the stream next. What the backward pass needs of a norm is its input,
  and that is what the scan over layers saves anyway: so a layer that ends with a norm costs neither memory nor
  recomputation more than one that does not.

  Attributes:
    sum_BTD: the sum s of the last sublayer; before the first one, the embedded tokens.
    gain_D: the gain of the N_out; None = no layer owes one.
    owes: whether there is an N_out, a constant or data; None where `gain_D` is.
  """

  sum_BTD: jax.Array
  gain_D: jax.Array | None = None
  owes: Flag | None = None

  def value(self, epsilon: float) -> jax.Array:
    """The stream [B, T, D] with its norm applied, in the sum's type."""
    if self.gain_D is None or self.owes is None:
      return self.sum_BTD
    normed_BTD = rms_norm(self.sum_BTD, self.gain_D, epsilon=epsilon, on=self.owes)
    return normed_BTD.astype(self.sum_BTD.dtype)

  def carried(self) -> "Stream":
    """The same with a norm, owed or not, as data in fp32: the form that a scan carries where any layer owes one."""
    if self.gain_D is None or self.owes is None:
      return Stream(self.sum_BTD, jnp.ones(self.sum_BTD.shape[-1], jnp.float32), jnp.asarray(False))
    return Stream(self.sum_BTD, self.gain_D.astype(jnp.float32), jnp.asarray(self.owes))


def sublayer(
  x_BTD: jax.Array,
  branch: Callable[[jax.Array], tuple[jax.Array, Any]],
  gains: Sequence[jax.Array],
  learned: Mapping[str, jax.Array],
  row: TracedRow,
  *,
  epsilon: float,
  dtype: jnp.dtype,
) -> tuple[Stream, Any, dict[str, jax.Array]]:
  """One step of the residual stream. Norms, constants and the sum are fp32; the sum is cast once.

  Args:
    x_BTD: the residual stream; its type is kept.
    branch: f, from [B, T, D] in `dtype` to ([B, T, D], whatever else it has to say).
    gains: the sublayer's norm gains, each [D], in order of application.
    learned: what else the sublayer learns, by column (`placement.LEARNED`, and `gpas`). Only what the row asks for is
      read.
    row: the sublayer's columns.
    epsilon: of the norms.
    dtype: what f reads.

  Returns:
    The stream after the sublayer; what else the branch said; and the two terms of the sum s, `residual_BTD` and
    `branch_BTD`, in fp32.
  """

  def normed(h_BTD: jax.Array, on: Flag, gain_index: int | jax.Array, scale: Number = 1.0) -> jax.Array:
    gain_D = None if on is False else _pick(gains, gain_index)
    return rms_norm(h_BTD, gain_D, epsilon=epsilon, on=on, scale=scale)

  def gated(h_BTD: jax.Array, on: Flag) -> jax.Array:
    if on is False:
      return h_BTD
    amount = _where(on, jax.nn.silu(learned["gpas"].astype(jnp.float32)), 0.0)
    return h_BTD - amount * jax.lax.stop_gradient(h_BTD)

  c_in = _factor("c_in", row, learned)
  input_BTD = normed(x_BTD, row.norm_in, row.gain_norm_in, scale=c_in).astype(dtype)
  f_BTD, said = branch(input_BTD)
  f_BTD = normed(f_BTD, row.norm_mid, row.gain_norm_mid)
  r_BTD = normed(x_BTD, _and(row.norm_in, row.residual_from_normed), row.gain_norm_in)
  residual_BTD = _times(_factor("c_res", row, learned), gated(r_BTD, _and(row.gpas, row.norm_out)))
  branch_BTD = _times(_factor("c_out", row, learned), f_BTD)
  sum_BTD = gated(residual_BTD + branch_BTD, _and(row.gpas, _not(row.norm_out))).astype(x_BTD.dtype)

  after = Stream(sum_BTD)
  if row.norm_out is not False:
    after = Stream(sum_BTD, _pick(gains, row.gain_norm_out), row.norm_out)
  return after, said, {"residual_BTD": residual_BTD, "branch_BTD": branch_BTD}


def _factor(name: str, row: TracedRow, learned: Mapping[str, jax.Array]) -> Number:
  """A coefficient of the rule: the table's number, times what the row learns for it."""
  factor: Number = getattr(row, name)
  for column, kind in LEARNED.items():
    on: Flag = getattr(row, column)
    if kind.factor == name and on is not False:
      factor = factor * _where(on, learned[column].astype(jnp.float32), 1.0)
  return factor


# Arithmetic that leaves out what a Python constant decides: so a placement with constant columns compiles to what a
# layer written by hand compiles to.


def _pick(gains: Sequence[jax.Array], index: int | jax.Array) -> jax.Array:
  return gains[index] if isinstance(index, int) else jnp.stack(gains)[index]


def _times(factor: Number, x: jax.Array) -> jax.Array:
  return x if isinstance(factor, float) and factor == 1.0 else factor * x


def _where(on: Flag, value: jax.Array, otherwise: float) -> jax.Array:
  return value if on is True else jnp.where(on, value, otherwise)


def _and(a: Flag, b: Flag) -> Flag:
  if a is False or b is False:
    return False
  if a is True:
    return b
  return a if b is True else jnp.logical_and(a, b)


def _not(a: Flag) -> Flag:
  return not a if isinstance(a, bool) else jnp.logical_not(a)

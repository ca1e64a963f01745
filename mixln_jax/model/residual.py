"""The sublayer rule: how a sublayer meets the residual stream. The heart of the project.

Every sublayer f (attention or MLP) of every layer, for n residual streams H_0 … H_{n-1}, is

    x   = Σ_i read_i M_i(H_i)                                  what it reads
    b   = c_out N_mid(f(c_in N_in(x)))                         its branch
    s   = c_res g(Σ_i mix_i0 R_i) + write_0 b                  R_0 = N_in(x) if residual_from_normed else M_0(H_0)
    H_0 ← N_out(s) where there is an N_out, else g(s)          R_i = H_i
    H_j ← Σ_i mix_ij R_i + write_j b                           the further streams

and a placement (`mixln_jax/placement.py`) is the table of its columns. Pre-LN has one stream and only N_in, Post-LN
only N_out (Xiong et al., arXiv 2002.04745), Mix-LN both by depth (arXiv 2412.13795, eq. 5); with one stream read = mix
= write = 1, and the rule is s = c_res g(x) + b. Each c is a number of the table, times what the row learns for it;
what read, mix and write are made of is in `model/wiring.py`. g is the identity, or with `gpas`
g(h) = h - silu(a) * stop_gradient(h) (arXiv 2506.22049), which stands where its source has it: on the residual where
there is an N_out, else on the sum.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mixln_jax.model.columns import Flag, Number, TracedRow
from mixln_jax.model.norm import NormParams, neutral_params, norm
from mixln_jax.model.wiring import weighted_sum, wiring_of
from mixln_jax.placement import LEARNED


class Stream(flax.struct.PyTreeNode):
  """A residual stream between two sublayers: a sum, and the N_out that it still owes.

  A layer's last norm is applied by whoever reads the stream next. What the backward pass needs of a norm is its input,
  and that is what the scan over layers saves anyway: so a layer that ends with a norm costs neither memory nor
  recomputation more than one that does not.

  Attributes:
    sum_BTD: the sum s of the last sublayer; before the first one, the embedded tokens.
    owed: the parameters of the N_out; None = no layer owes one.
    owes: whether there is an N_out, a constant or data; None where `owed` is.
  """

  sum_BTD: jax.Array
  owed: NormParams | None = None
  owes: Flag | None = None

  def value(self, kind: str, epsilon: float) -> jax.Array:
    """The stream [B, T, D] with its norm, of config.model.norm's kind, applied; in the sum's type."""
    if self.owed is None or self.owes is None:
      return self.sum_BTD
    normed_BTD = norm(kind, self.sum_BTD, self.owed, epsilon=epsilon, on=self.owes)
    return normed_BTD.astype(self.sum_BTD.dtype)

  def carried(self, kind: str) -> "Stream":
    """The same with a norm, owed or not, as data in fp32: the form that a scan carries where any layer owes one."""
    if self.owed is None or self.owes is None:
      return Stream(self.sum_BTD, neutral_params(kind, self.sum_BTD.shape[-1]), jnp.asarray(False))
    owed = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.owed)
    return Stream(self.sum_BTD, owed, jnp.asarray(self.owes))


class Streams(flax.struct.PyTreeNode):
  """All residual streams between two sublayers: only the first one can owe a norm."""

  first: Stream
  further: tuple[jax.Array, ...] = ()  # each [B, T, D]

  def values(self, kind: str, epsilon: float) -> list[jax.Array]:
    """The n streams, each [B, T, D]."""
    return [self.first.value(kind, epsilon), *self.further]


def sublayer(
  streams: Sequence[jax.Array],
  branch: Callable[[jax.Array], tuple[jax.Array, Any]],
  norms: Sequence[NormParams],
  learned: Mapping[str, jax.Array],
  row: TracedRow,
  *,
  stream_norms: Sequence[NormParams] = (),
  kind: str,
  epsilon: float,
  dtype: jnp.dtype,
) -> tuple[Streams, Any, dict[str, jax.Array]]:
  """One step of the residual streams. Norms, coefficients and the sums are fp32; each sum is cast once.

  Args:
    streams: H, n arrays [B, T, D] of one type, which is kept.
    branch: f, from [B, T, D] in `dtype` to ([B, T, D], whatever else it has to say).
    norms: the sublayer's norms in order of application.
    learned: what else the sublayer learns, by column (`placement.LEARNED`, and `gpas`) or by wiring. Only what the row
      asks for is read.
    row: the sublayer's columns.
    stream_norms: M_0 and M_1, where the row has them.
    kind: of the norms, config.model.norm.
    epsilon: of the norms.
    dtype: what f reads.

  Returns:
    The streams after the sublayer; what else the branch said; and the two terms of the sum s, `residual_BTD` and
    `branch_BTD`, in fp32.
  """

  def normed(h_BTD: jax.Array, on: Flag, index: int | jax.Array, scale: Number = 1.0) -> jax.Array:
    params = None if on is False else _pick(norms, index)
    return norm(kind, h_BTD, params, epsilon=epsilon, on=on, scale=scale)

  def gated(h_BTD: jax.Array, on: Flag) -> jax.Array:
    if on is False:
      return h_BTD
    amount = _where(on, jax.nn.silu(learned["gpas"].astype(jnp.float32)), 0.0)
    return h_BTD - amount * jax.lax.stop_gradient(h_BTD)

  wiring = wiring_of(row, streams, learned, epsilon)
  read_from = list(streams)
  if row.norm_streams is not False:
    for index, params in enumerate(stream_norms):
      read_from[index] = norm(kind, streams[index], params, epsilon=epsilon, on=row.norm_streams)
  x_BTD = weighted_sum(wiring.read, read_from)
  c_in = _factor("c_in", row, learned)
  input_BTD = normed(x_BTD, row.norm_in, row.gain_norm_in, scale=c_in).astype(dtype)
  f_BTD, said = branch(input_BTD)
  f_BTD = normed(f_BTD, row.norm_mid, row.gain_norm_mid)
  branch_BTD = _times(_factor("c_out", row, learned), f_BTD)

  kept = [read_from[0], *streams[1:]]  # R
  from_normed = _and(row.norm_in, row.residual_from_normed)
  if len(streams) == 1:
    kept[0] = normed(x_BTD, from_normed, row.gain_norm_in)
  elif from_normed is not False:
    kept[0] = _where(from_normed, normed(x_BTD, row.norm_in, row.gain_norm_in), kept[0])
  mixed = [weighted_sum([wiring.mix[source][to] for source in range(len(kept))], kept) for to in range(len(kept))]
  residual_BTD = _times(_factor("c_res", row, learned), gated(mixed[0], _and(row.gpas, row.norm_out)))
  sum_BTD = weighted_sum([1.0, wiring.write[0]], [residual_BTD, branch_BTD])
  sum_BTD = gated(sum_BTD, _and(row.gpas, _not(row.norm_out))).astype(streams[0].dtype)
  first = Stream(sum_BTD)
  if row.norm_out is not False:
    first = Stream(sum_BTD, _pick(norms, row.gain_norm_out), row.norm_out)
  further = []
  for to in range(1, len(streams)):
    after_BTD = weighted_sum([1.0, wiring.write[to]], [mixed[to], branch_BTD])
    further.append(after_BTD.astype(streams[0].dtype))
  return Streams(first, tuple(further)), said, {"residual_BTD": residual_BTD, "branch_BTD": branch_BTD}


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


def _pick(norms: Sequence[NormParams], index: int | jax.Array) -> NormParams:
  if isinstance(index, int):
    return norms[index]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves)[index], *norms)


def _times(factor: Number, x: jax.Array) -> jax.Array:
  return x if isinstance(factor, float) and factor == 1.0 else factor * x


def _where(on: Flag, value: jax.Array, otherwise: float | jax.Array) -> jax.Array:
  return value if on is True else jnp.where(on, value, otherwise)


def _and(a: Flag, b: Flag) -> Flag:
  if a is False or b is False:
    return False
  if a is True:
    return b
  return a if b is True else jnp.logical_and(a, b)


def _not(a: Flag) -> Flag:
  return not a if isinstance(a, bool) else jnp.logical_not(a)

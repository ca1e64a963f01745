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

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mixln_jax.model.columns import Flag, Number, TracedRow
from mixln_jax.model.norm import NormParams, mean_square, neutral_params, norm
from mixln_jax.model.tuned.fence import backward_fence, fenced
from mixln_jax.model.wiring import Seen, weighted_sum, wiring_of
from mixln_jax.parallel.rules import platform
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

  def carried(self, kind: str) -> Stream:
    """The same with a norm, owed or not, as data in fp32: the form that a scan carries where any layer owes one."""
    if self.owed is None or self.owes is None:
      return Stream(self.sum_BTD, neutral_params(kind, self.sum_BTD.shape[-1]), jnp.asarray(False))
    owed = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.owed)
    return Stream(self.sum_BTD, owed, jnp.asarray(self.owes))


Branch = Callable[[jax.Array], tuple[jax.Array, Any]]  # f
Terms = dict[str, jax.Array]  # the two terms of a sublayer's sum


class Streams(flax.struct.PyTreeNode):
  """All residual streams between two sublayers: only the first one can owe a norm."""

  first: Stream
  further: tuple[jax.Array, ...] = ()  # each [B, T, D]

  def values(self, kind: str, epsilon: float) -> list[jax.Array]:
    """The n streams, each [B, T, D]."""
    return [self.first.value(kind, epsilon), *self.further]


class Sources(flax.struct.PyTreeNode):
  """The streams of attention residuals: the embedding and the outputs of earlier sublayers, as one buffer."""

  buffer_SBTD: jax.Array

  def mixture(self, query_D: jax.Array, gain_D: jax.Array, epsilon: float, there_S: jax.Array) -> jax.Array:
    """Σ softmax(query · RMSNorm(v)) v over the sources v that are there, [B, T, D] in fp32.

    The gain and the query are one vector, and the norm a number a position, so that a source is read twice and no fp32
    copy of it is made.
    """
    scale_D = gain_D.astype(jnp.float32) * query_D.astype(jnp.float32)
    sources_SBTD = self.buffer_SBTD.astype(jnp.float32)
    score_SBT = jnp.sum(sources_SBTD * scale_D, axis=-1)
    score_SBT = score_SBT * jax.lax.rsqrt(mean_square(sources_SBTD)[..., 0] + epsilon)
    score_SBT = jnp.where(there_S[:, None, None] > 0, score_SBT, -jnp.inf)
    return jnp.sum(jax.nn.softmax(score_SBT, axis=0)[..., None] * sources_SBTD, axis=0)

  def added(self, slot: jax.Array, branch_BTD: jax.Array) -> Sources:
    """With the branch added to one source."""
    branch_BTD = branch_BTD.astype(self.buffer_SBTD.dtype)
    return Sources(self.buffer_SBTD.at[slot].add(branch_BTD))


class Sublayer(NamedTuple):
  """What a sublayer is made of, besides f.

  Attributes:
    norms: its norms in order of application.
    stream_norms: M_0 and M_1, where there are any.
    learned: what else it learns, by column (`placement.LEARNED`, and `gpas`) or by wiring. Only what the row asks for
      is read.
    row: its columns.
    kind: of the norms, config.model.norm.
    epsilon: of the norms.
    dtype: what f reads.
    hides: whether g hides from the gradient what `gpas` takes off; else it is the function that it computes.
  """

  norms: Sequence[NormParams]
  stream_norms: Sequence[NormParams]
  learned: Mapping[str, jax.Array]
  row: TracedRow
  kind: str
  epsilon: float
  dtype: Any
  hides: bool = True

  def normed(self, h_BTD: jax.Array, on: Flag, index: int | jax.Array, scale: Number = 1.0) -> jax.Array:
    """The norm number `index` of h where `on`, times `scale`, in fp32."""
    params = None if on is False else _pick(self.norms, index)
    return norm(self.kind, h_BTD, params, epsilon=self.epsilon, on=on, scale=scale)

  def gated(self, h_BTD: jax.Array, on: Flag) -> jax.Array:
    """g(h) where `on`, else h."""
    if on is False:
      return h_BTD
    amount = _where(on, jax.nn.silu(self.learned["gpas"].astype(jnp.float32)), 0.0)
    return h_BTD - amount * (jax.lax.stop_gradient(h_BTD) if self.hides else h_BTD)

  def branch(self, f: Branch, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
    """b = c_out N_mid(f(c_in N_in(x))) in fp32, and what else f said."""
    row = self.row
    input_BTD = self.normed(x_BTD, row.norm_in, row.gain_norm_in, scale=_factor("c_in", row, self.learned))
    input_BTD = input_BTD.astype(self.dtype)
    if platform() == "tpu" and not isinstance(row.norm_in, bool):
      input_BTD = backward_fence(input_BTD)
    f_BTD, said = f(input_BTD)
    f_BTD = self.normed(f_BTD, row.norm_mid, row.gain_norm_mid)
    return _times(_factor("c_out", row, self.learned), f_BTD), said

  def apply(self, f: Branch, streams: Sequence[jax.Array]) -> tuple[Streams, Any, Terms]:
    """One step of the residual streams. Norms, coefficients and the sums are fp32; each sum is cast once.

    Args:
      f: the sublayer itself, from [B, T, D] in `dtype` to ([B, T, D], whatever else it has to say).
      streams: H, n arrays [B, T, D] of one type, which is kept.

    Returns:
      The streams after the sublayer; what else f said; and the two terms of the sum s, `residual_BTD` and
      `branch_BTD`, in fp32.
    """
    row, n, dtype = self.row, len(streams), streams[0].dtype
    wiring = wiring_of(Seen(row, streams, self.learned, self.epsilon))
    read_from = list(streams)  # M_i(H_i)
    if row.norm_streams is not False:
      for index, params in enumerate(self.stream_norms):
        read_from[index] = norm(self.kind, streams[index], params, epsilon=self.epsilon, on=row.norm_streams)
    x_BTD = weighted_sum(wiring.read, read_from)
    if n > 1 and platform() == "tpu":
      f = fenced(f)
    branch_BTD, said = self.branch(f, x_BTD)

    kept = [read_from[0], *streams[1:]]  # R_i
    from_normed = _and(row.norm_in, row.residual_from_normed)
    if n == 1 and not row.wired:
      kept[0] = self.normed(x_BTD, from_normed, row.gain_norm_in)
    elif from_normed is not False:
      kept[0] = _where(from_normed, self.normed(x_BTD, row.norm_in, row.gain_norm_in), kept[0])
    mixed = [weighted_sum([wiring.mix[source][to] for source in range(n)], kept) for to in range(n)]

    residual_BTD = _times(_factor("c_res", row, self.learned), self.gated(mixed[0], _and(row.gpas, row.norm_out)))
    sum_BTD = weighted_sum([1.0, wiring.write[0]], [residual_BTD, branch_BTD])
    sum_BTD = self.gated(sum_BTD, _and(row.gpas, _not(row.norm_out))).astype(dtype)
    first = Stream(sum_BTD)
    if row.norm_out is not False:
      first = Stream(sum_BTD, _pick(self.norms, row.gain_norm_out), row.norm_out)
    further = []
    for to in range(1, n):
      further.append(weighted_sum([1.0, wiring.write[to]], [mixed[to], branch_BTD]).astype(dtype))
    # What the sum takes of the branch, where that is not all.
    branch_BTD = weighted_sum([wiring.write[0]], [branch_BTD])
    return Streams(first, tuple(further)), said, {"residual_BTD": residual_BTD, "branch_BTD": branch_BTD}

  def append(self, f: Branch, sources: Sources) -> tuple[Sources, Any, Terms]:
    """The same for attention residuals alone, whose streams are one buffer that is only added to.

    read is a softmax over the sources that are there, mix the identity, and write says which source grows.
    """
    there_S, slot = jnp.asarray(self.row.read), jnp.argmax(jnp.asarray(self.row.write))
    query_D, gain_D = self.learned["source_query"], self.learned["source_norm"]
    x_BTD = sources.mixture(query_D, gain_D, self.epsilon, there_S)
    branch_BTD, said = self.branch(f, x_BTD)
    terms = {"residual_BTD": x_BTD, "branch_BTD": branch_BTD}
    return sources.added(slot, branch_BTD), said, terms


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

"""The sublayer rule: how a sublayer reads and updates the residual streams. The heart of the project.

Every sublayer f (attention or MLP) of every layer, for n residual streams H_0 … H_{n-1}, is

    x   = Σ_i read_i M_i(H_i)                                  what it reads
    b   = c_out N_mid(f(c_in N_in(x)))                         its branch
    s   = c_res g(Σ_i mix_i0 R_i) + write_0 b                  R_0 = N_in(x) if residual_from_normed else M_0(H_0)
    H_0 ← N_out(s) where there is an N_out, else g(s)          R_i = H_i
    H_j ← Σ_i mix_ij R_i + write_j b                           the further streams

A placement (`mixln_jax/placement/`) is a table whose columns are the symbols of this rule. Pre-LN has one stream and
only N_in, Post-LN only N_out (Xiong et al., arXiv 2002.04745), Mix-LN one or the other by depth (arXiv 2412.13795,
eq. 5). With one stream read = mix = write = 1, and the rule is s = c_res g(x) + b.

Each c is a number from the table, times a learned factor if the row has one. `model/wiring.py` computes read, mix and
write. g is the identity, or with `gpas` g(h) = h - silu(a) * stop_gradient(h) (arXiv 2506.22049). As in that paper, g
is applied to the residual where there is an N_out, else to the sum.
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
from mixln_jax.model.tuned.norm_pair import Switched, norm_pair
from mixln_jax.model.wiring import WiringInputs, weighted_sum, wiring_of
from mixln_jax.parallel.rules import platform
from mixln_jax.placement import LEARNED


class Stream(flax.struct.PyTreeNode):
  """A residual stream between two sublayers: a sum, and a pending N_out that has not been applied to it yet.

  The next reader of the stream applies a layer's last norm. The backward pass of a norm needs its input, which is then
  what the scan over layers saves anyway. So a layer that ends with a norm needs no more memory or recomputation than
  one that does not.

  Attributes:
    sum_BTD: the sum s of the last sublayer; before the first sublayer, the embedded tokens.
    pending: the parameters of the N_out; None if no layer has one.
    is_pending: whether the N_out is to be applied, as a constant or as data; None if `pending` is None.
  """

  sum_BTD: jax.Array
  pending: NormParams | None = None
  is_pending: Flag | None = None

  def value(self, kind: str, epsilon: float) -> jax.Array:
    """The stream [B, T, D] with its pending norm, of config.model.norm's kind, applied; in the sum's type."""
    if self.pending is None or self.is_pending is None:
      return self.sum_BTD
    normed_BTD = norm(kind, self.sum_BTD, self.pending, epsilon=epsilon, on=self.is_pending)
    return normed_BTD.astype(self.sum_BTD.dtype)

  def as_scan_carry(self, kind: str) -> Stream:
    """The stream with all fields as arrays, the norm's in fp32: what a scan carries if any layer ends with a norm."""
    if self.pending is None or self.is_pending is None:
      return Stream(self.sum_BTD, neutral_params(kind, self.sum_BTD.shape[-1]), jnp.asarray(False))
    pending = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.pending)
    return Stream(self.sum_BTD, pending, jnp.asarray(self.is_pending))


Branch = Callable[[jax.Array], tuple[jax.Array, Any]]  # f, with an auxiliary output
Terms = dict[str, jax.Array]  # the two terms of a sublayer's sum


class Streams(flax.struct.PyTreeNode):
  """All residual streams between two sublayers. Only the first one can have a pending norm."""

  first: Stream
  further: tuple[jax.Array, ...] = ()  # each [B, T, D]

  def values(self, kind: str, epsilon: float) -> list[jax.Array]:
    """The n streams, each [B, T, D]."""
    return [self.first.value(kind, epsilon), *self.further]


class Sources(flax.struct.PyTreeNode):
  """The streams of attention residuals: the embedding and the outputs of earlier sublayers, as one buffer."""

  buffer_SBTD: jax.Array

  def mixture(self, query_D: jax.Array, gain_D: jax.Array, epsilon: float, available_S: jax.Array) -> jax.Array:
    """Σ softmax(query · RMSNorm(v)) v over the available sources v, [B, T, D] in fp32.

    The gain is folded into the query, and the norm's factor (one number per position) into the score. So each source is
    read twice, and no fp32 copy of it is made.
    """
    scale_D = gain_D.astype(jnp.float32) * query_D.astype(jnp.float32)
    sources_SBTD = self.buffer_SBTD.astype(jnp.float32)
    score_SBT = jnp.sum(sources_SBTD * scale_D, axis=-1)
    score_SBT = score_SBT * jax.lax.rsqrt(mean_square(sources_SBTD)[..., 0] + epsilon)
    score_SBT = jnp.where(available_S[:, None, None] > 0, score_SBT, -jnp.inf)
    return jnp.sum(jax.nn.softmax(score_SBT, axis=0)[..., None] * sources_SBTD, axis=0)

  def added(self, slot: jax.Array, branch_BTD: jax.Array) -> Sources:
    """The sources after the branch is added to source `slot`."""
    branch_BTD = branch_BTD.astype(self.buffer_SBTD.dtype)
    return Sources(self.buffer_SBTD.at[slot].add(branch_BTD))


class Sublayer(NamedTuple):
  """The parts of a sublayer besides f.

  Attributes:
    norms: the parameters of its norms, in order of application.
    stream_norms: the parameters of M_0 and M_1; empty if there are none.
    learned: its other parameters, by column (`placement.LEARNED` and `gpas`) or by the name that its wiring gives them.
      Only those that the row needs are read.
    row: its columns.
    kind: config.model.norm.
    epsilon: of the norms.
    dtype: the type of f's input.
    gpas_stops_gradient: whether g has the `stop_gradient` of `gpas`; without it, derivatives are those of the function
      that g computes.
  """

  norms: Sequence[NormParams]
  stream_norms: Sequence[NormParams]
  learned: Mapping[str, jax.Array]
  row: TracedRow
  kind: str
  epsilon: float
  dtype: Any
  gpas_stops_gradient: bool = True

  def normed(self, h_BTD: jax.Array, on: Flag, index: int | jax.Array, scale: Number = 1.0) -> jax.Array:
    """Norm number `index` applied to h where `on`, else h; times `scale`, in fp32."""
    params = None if on is False else _pick(self.norms, index)
    return norm(self.kind, h_BTD, params, epsilon=self.epsilon, on=on, scale=scale)

  def gated(self, h_BTD: jax.Array, on: Flag) -> jax.Array:
    """g(h) where `on`, else h."""
    if on is False:
      return h_BTD
    amount = _where(on, jax.nn.silu(self.learned["gpas"].astype(jnp.float32)), 0.0)
    subtracted_BTD = jax.lax.stop_gradient(h_BTD) if self.gpas_stops_gradient else h_BTD
    return h_BTD - amount * subtracted_BTD

  @property
  def norm_in_is_data_on_tpu(self) -> bool:
    """Whether only some layers have N_in, on a TPU: its compiler needs other forms of the same there."""
    return platform() == "tpu" and not isinstance(self.row.norm_in, bool)

  def input(self, x_BTD: jax.Array) -> jax.Array:
    """c_in N_in(x) in f's type."""
    row = self.row
    input_BTD = self.normed(x_BTD, row.norm_in, row.gain_norm_in, scale=_factor("c_in", row, self.learned))
    input_BTD = input_BTD.astype(self.dtype)
    if self.norm_in_is_data_on_tpu:
      input_BTD = backward_fence(input_BTD)
    return input_BTD

  def branch(self, f: Branch, input_BTD: jax.Array) -> tuple[jax.Array, Any]:
    """b = c_out N_mid(f(input)) in fp32, and the auxiliary output of f."""
    row = self.row
    f_BTD, auxiliary = f(input_BTD)
    f_BTD = self.normed(f_BTD, row.norm_mid, row.gain_norm_mid)
    return _times(_factor("c_out", row, self.learned), f_BTD), auxiliary

  def read_through_both_norms(self, stream: Stream | None) -> tuple[jax.Array, jax.Array] | None:
    """x and c_in N_in(x) for the value x of a stream with a pending norm; None where the plain form is to be used.

    A TPU's form, for RMSNorms.
    """
    row = self.row
    if not self.norm_in_is_data_on_tpu or self.kind != "rmsnorm":
      return None
    if stream is None or stream.pending is None or stream.is_pending is None:
      return None
    outer = Switched(stream.pending.gain, stream.is_pending)
    inner = Switched(_pick(self.norms, row.gain_norm_in).gain, row.norm_in)
    scale = jnp.asarray(_factor("c_in", row, self.learned), jnp.float32)
    return norm_pair(self.epsilon, self.dtype, stream.sum_BTD, outer, inner, scale)

  def apply(self, f: Branch, streams: Sequence[jax.Array], first: Stream | None = None) -> tuple[Streams, Any, Terms]:
    """Applies the sublayer to the residual streams. Norms, coefficients and sums are fp32; each sum is cast once.

    Args:
      f: the sublayer itself, from [B, T, D] in `dtype` to ([B, T, D], an auxiliary output).
      streams: H, n arrays [B, T, D] of one type, which the results have too.
      first: what H_0 is the value of, if it is known; a TPU computes it and N_in together.

    Returns:
      The streams after the sublayer; the auxiliary output of f; and the two terms of the sum s, `residual_BTD` and
      `branch_BTD`, in fp32.
    """
    row, n, dtype = self.row, len(streams), streams[0].dtype
    wiring = wiring_of(WiringInputs(row, streams, self.learned, self.epsilon))
    read_from = list(streams)  # M_i(H_i)
    if row.norm_streams is not False:
      for index, params in enumerate(self.stream_norms):
        read_from[index] = norm(self.kind, streams[index], params, epsilon=self.epsilon, on=row.norm_streams)
    x_BTD = weighted_sum(wiring.read, read_from)
    write_is_constant = all(isinstance(weight, float) for weight in wiring.write)
    if platform() == "tpu" and row.wired and not write_is_constant:  # their gradients are sums over f's output
      f = fenced(f)
    x_is_the_stream = n == 1 and not row.wired and row.norm_streams is False
    through_norms = self.read_through_both_norms(first) if x_is_the_stream else None
    if through_norms is not None:
      x_BTD, input_BTD = through_norms
      read_from = [x_BTD]
    else:
      input_BTD = self.input(x_BTD)
    branch_BTD, auxiliary = self.branch(f, input_BTD)

    residuals = [read_from[0], *streams[1:]]  # R_i
    from_normed = _and(row.norm_in, row.residual_from_normed)
    if n == 1 and not row.wired:
      residuals[0] = self.normed(x_BTD, from_normed, row.gain_norm_in)
    elif from_normed is not False:
      residuals[0] = _where(from_normed, self.normed(x_BTD, row.norm_in, row.gain_norm_in), residuals[0])
    mixed = []
    for to in range(n):
      coefficients = [wiring.mix[source][to] for source in range(n)]
      mixed.append(weighted_sum(coefficients, residuals))

    residual_BTD = _times(_factor("c_res", row, self.learned), self.gated(mixed[0], _and(row.gpas, row.norm_out)))
    sum_BTD = weighted_sum([1.0, wiring.write[0]], [residual_BTD, branch_BTD])
    sum_BTD = self.gated(sum_BTD, _and(row.gpas, _not(row.norm_out))).astype(dtype)
    first = Stream(sum_BTD)
    if row.norm_out is not False:
      first = Stream(sum_BTD, _pick(self.norms, row.gain_norm_out), row.norm_out)
    further = []
    for to in range(1, n):
      further.append(weighted_sum([1.0, wiring.write[to]], [mixed[to], branch_BTD]).astype(dtype))
    written_BTD = weighted_sum([wiring.write[0]], [branch_BTD])  # the branch's term of the sum s
    return Streams(first, tuple(further)), auxiliary, {"residual_BTD": residual_BTD, "branch_BTD": written_BTD}

  def append(self, f: Branch, sources: Sources) -> tuple[Sources, Any, Terms]:
    """`apply` for a model whose sublayers are all attention residuals: its streams are one append-only buffer.

    read is a softmax over the available sources, mix is the identity, and write is one-hot: the source that the branch
    is added to.
    """
    available_S, slot = jnp.asarray(self.row.read), jnp.argmax(jnp.asarray(self.row.write))
    query_D, gain_D = self.learned["source_query"], self.learned["source_norm"]
    x_BTD = sources.mixture(query_D, gain_D, self.epsilon, available_S)
    branch_BTD, auxiliary = self.branch(f, self.input(x_BTD))
    terms = {"residual_BTD": x_BTD, "branch_BTD": branch_BTD}
    return sources.added(slot, branch_BTD), auxiliary, terms


def _factor(name: str, row: TracedRow, learned: Mapping[str, jax.Array]) -> Number:
  """A coefficient of the rule: the number from the table, times the learned factor if the row has one."""
  factor: Number = getattr(row, name)
  for column, kind in LEARNED.items():
    on: Flag = getattr(row, column)
    if kind.factor == name and on is not False:
      factor = factor * _where(on, learned[column].astype(jnp.float32), 1.0)
  return factor


# Arithmetic that is resolved at trace time where its operands are Python constants. A placement whose columns are
# constants therefore compiles to the same program as a hand-written layer.


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

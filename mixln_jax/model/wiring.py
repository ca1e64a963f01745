"""The coefficients read, mix and write of the sublayer rule, and how the head reads the streams.

A coefficient is a Python constant, a learned scalar, or an array [B, T] computed at each position from the streams.
`WIRINGS` has a function for each value of the table's `wiring` column except `fixed`; `READ_OUTS` has one for each
read-out of `placement.STREAM_SETS`. All arithmetic is fp32, except products with the streams: their operands have the
streams' type, and they accumulate in fp32.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixln_jax.model.columns import Flag, TracedRow
from mixln_jax.model.norm import mean_square, rms_norm
from mixln_jax.parallel.rules import constrain
from mixln_jax.placement import identity

Coefficient = float | jax.Array  # a Python constant, or an array [] or [B, T]
Weights = Mapping[str, jax.Array]
Products = Callable[[jax.Array, jax.Array, "WiringInputs"], jax.Array]
V4_EPSILON = 1e-6  # what DeepSeek-V4 adds to its coefficients
SINKHORN_ITERATIONS = 20  # arXiv 2512.24880, §4


class WiringInputs(NamedTuple):
  """What the coefficients of a sublayer are computed from.

  Attributes:
    row: the sublayer's columns.
    streams: n arrays [B, T, D].
    weights: the sublayer's parameters, by name without the prefix `attention_` or `mlp_`.
    epsilon: of the norms.
  """

  row: TracedRow
  streams: Sequence[jax.Array]
  weights: Weights
  epsilon: float

  @property
  def n(self) -> int:
    return len(self.streams)


class Wiring(NamedTuple):
  """How one sublayer meets n streams."""

  read: Sequence[Coefficient]
  mix: Sequence[Sequence[Coefficient]]  # [from][to]
  write: Sequence[Coefficient]


def wiring_of(inputs: WiringInputs) -> Wiring:
  """The coefficients of a sublayer: those of the table, or those of the wiring that the row names."""
  row, n = inputs.row, inputs.n
  read, mix, write = _entries(row.read, n), _entries(row.mix, n), _entries(row.write, n)
  wiring = Wiring(read, [_entries(mix_from, n) for mix_from in mix], write)
  for name, on in row.wired.items():
    if on is False:
      continue
    named = WIRINGS[name](inputs)
    wiring = named if on is True else _choose(on, named, wiring)
  return wiring


def _entries(column: Any, n: int) -> list[Any]:
  """The first n entries of a tuple or of a traced array, as a list."""
  return [column[index] for index in range(n)]


def _choose(on: Flag, wiring: Wiring, other: Wiring) -> Wiring:
  """`wiring` where `on`, else `other`, coefficient by coefficient."""

  def choose(a: Coefficient, b: Coefficient) -> Coefficient:
    same = isinstance(a, float) and isinstance(b, float) and a == b
    return a if same else jnp.where(on, a, b)

  return jax.tree.map(choose, wiring, other)


def weighted_sum(coefficients: Sequence[Coefficient], values: Sequence[jax.Array]) -> jax.Array:
  """Σ coefficient · value in fp32. A constant 0 drops its term, a constant 1 costs no product; if one term with
  coefficient 1 is left, its value is returned uncast."""
  terms = []
  for coefficient, value in zip(coefficients, values, strict=True):
    if isinstance(coefficient, float) and coefficient == 0.0:
      continue
    terms.append((coefficient, value))
  if not terms:
    return jnp.zeros_like(values[0])
  if len(terms) == 1 and isinstance(terms[0][0], float) and terms[0][0] == 1.0:
    return terms[0][1]
  total = _scaled(*terms[0])
  for coefficient, value in terms[1:]:
    total = total + _scaled(coefficient, value)
  return total


def _scaled(coefficient: Coefficient, value_BTD: jax.Array) -> jax.Array:
  value_BTD = value_BTD.astype(jnp.float32)
  if isinstance(coefficient, jax.Array):
    return value_BTD * (coefficient[..., None] if coefficient.ndim else coefficient)
  return value_BTD if coefficient == 1.0 else coefficient * value_BTD


# The wirings.


def _x0(inputs: WiringInputs) -> Wiring:
  """x ← λ_1 x + λ_2 embedding; the second stream holds the embedding."""
  own, embedded = jnp.asarray(inputs.weights["x0_lambdas"], jnp.float32)
  return Wiring([own, embedded], [[own, 0.0], [embedded, 1.0]], [1.0, 0.0])


def _identity(n: int) -> list[list[Coefficient]]:
  return [list(row) for row in identity(n)]


def _static(inputs: WiringInputs) -> Wiring:
  """Hyper-connections (arXiv 2409.19606, eq. 2): A = [read, mix], B = write."""
  n = inputs.n
  alpha, beta = inputs.weights["hc_alpha"].astype(jnp.float32), inputs.weights["hc_beta"].astype(jnp.float32)
  mix = []
  for source in range(n):
    mix.append([alpha[source, 1 + to] for to in range(n)])
  return Wiring([alpha[source, 0] for source in range(n)], mix, [beta[source] for source in range(n)])


def _whole(weight: jax.Array) -> jax.Array:
  """Gathers a small matrix once. If it stayed sharded over D, each product with it would gather it again."""
  return constrain(weight, *[None] * weight.ndim)


def _dynamic(products: Products, inputs: WiringInputs) -> Wiring:
  """Dynamic hyper-connections (arXiv 2409.19606, eq. 10 to 13): row i of A and entry i of B depend on stream i only.

  Args:
    products: (a stream, a matrix [D, N + 2], inputs) -> the normalised stream times the matrix.
    inputs: what the coefficients are computed from.
  """
  n, static, weights = inputs.n, _static(inputs), inputs.weights
  to_both_DA = _whole(jnp.concatenate([weights["hc_dynamic_alpha"], weights["hc_dynamic_beta"][:, None]], axis=1))
  read, mix, write = [], [], []
  for index, stream_BTD in enumerate(inputs.streams):
    changes_BTA = jnp.tanh(products(stream_BTD, to_both_DA.astype(jnp.float32), inputs))
    alpha_BTA = weights["hc_dynamic_alpha_scale"] * changes_BTA[..., :-1]
    read.append(static.read[index] + alpha_BTA[..., 0])
    mix.append([static.mix[index][to] + alpha_BTA[..., 1 + to] for to in range(n)])
    write.append(static.write[index] + weights["hc_dynamic_beta_scale"] * changes_BTA[..., -1])
  return Wiring(read, mix, write)


# The `products` of `_dynamic`. Layers of `dhc` and `dhc_layernorm` share a tree, so the weights in it don't tell which
# norm a layer has. RMSNorm's factor is one number per position and its gain one per channel: both can be applied to the
# product's other terms, and the stream itself is multiplied as it is.


def _after_rms_norm(x_BTD: jax.Array, weight_DA: jax.Array, inputs: WiringInputs) -> jax.Array:
  return _after_norm_without_gain(x_BTD, inputs.weights["hc_norm"].astype(jnp.float32)[:, None] * weight_DA, inputs)


def _after_norm_without_gain(x_BTD: jax.Array, weight_DA: jax.Array, inputs: WiringInputs) -> jax.Array:
  return _product("btd,da->bta", x_BTD, weight_DA) * jax.lax.rsqrt(mean_square(x_BTD) + inputs.epsilon)


def _after_layer_norm(x_BTD: jax.Array, weight_DA: jax.Array, inputs: WiringInputs) -> jax.Array:
  x_BTD = x_BTD.astype(jnp.float32)
  centered_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  normed_BTD = (
    rms_norm(centered_BTD, inputs.weights["hc_norm"], epsilon=inputs.epsilon) + inputs.weights["hc_norm_bias"]
  )
  return _product("btd,da->bta", normed_BTD, weight_DA)


def _dynamic_identity(inputs: WiringInputs) -> Wiring:
  """Dynamic hyper-connections without mixing, as in two published commits of DepthBench (arXiv 2609.32534)."""
  return _dynamic(_after_norm_without_gain, inputs)._replace(mix=_identity(inputs.n))


def _product(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """An einsum in x's type that accumulates in fp32; an fp32 copy of a stream would cost more than the product."""
  return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def _from_all(streams: Sequence[jax.Array], to_DNM: jax.Array, epsilon: float) -> jax.Array:
  """The concatenated streams, RMS-normalised without a gain, times a matrix: [B, T, M].

  The norm's factor is one number per position and is applied last, so the streams need not be concatenated.
  """
  n = len(streams)
  total, square = 0.0, 0.0
  for index, stream_BTD in enumerate(streams):
    total = total + _product("btd,dm->btm", stream_BTD, to_DNM[index])
    square = square + mean_square(stream_BTD)
  return total * jax.lax.rsqrt(square / n + epsilon)


def _logits(inputs: WiringInputs, *names: str) -> list[jax.Array]:
  """α (x φ) + b for each name out of pre, post and res (arXiv 2512.24880, eq. 7), [B, T, …].

  Each stream is multiplied once, with the φ of all names side by side.
  """
  phi = _whole(jnp.concatenate([inputs.weights[f"hc_phi_{name}"] for name in names], axis=1))
  changes = _from_all(inputs.streams, phi.reshape(inputs.n, -1, phi.shape[-1]), inputs.epsilon)
  logits, begin = [], 0
  for name in names:
    bias = inputs.weights[f"hc_b_{name}"]
    part = changes[..., begin : begin + bias.size].reshape(*changes.shape[:-1], *bias.shape)
    logits.append(inputs.weights[f"hc_scale_{name}"] * part + bias)
    begin += bias.size
  return logits


def _last(values_BTN: jax.Array) -> list[Coefficient]:
  """The entries of the last axis as a list of arrays [B, T]."""
  return [values_BTN[..., index] for index in range(values_BTN.shape[-1])]


def _matrix(values_BTNM: jax.Array) -> list[list[Coefficient]]:
  return [_last(values_BTNM[..., index, :]) for index in range(values_BTNM.shape[-2])]


def _ihc(inputs: WiringInputs) -> Wiring:
  """mHC without mixing: read = σ(…), write = 2σ(…)."""
  pre, post = _logits(inputs, "pre", "post")
  return Wiring(_last(jax.nn.sigmoid(pre)), _identity(inputs.n), _last(2.0 * jax.nn.sigmoid(post)))


def _mhc(inputs: WiringInputs) -> Wiring:
  """Manifold-constrained hyper-connections (arXiv 2512.24880, eq. 7 to 9): mix is made doubly stochastic."""
  pre, post, res = _logits(inputs, "pre", "post", "res")
  mix = _balanced(jax.nn.softmax(res, axis=-1))
  return Wiring(_last(jax.nn.sigmoid(pre)), _matrix(mix), _last(2.0 * jax.nn.sigmoid(post)))


def _balanced(x_BTNM: jax.Array, epsilon: float = 0.0) -> jax.Array:
  """Sinkhorn's iteration: divides by the sums over `to` (M) and over `from` (N) alternately.

  The caller has done the first division, over `to`.
  """

  def over_from(x_BTNM: jax.Array) -> jax.Array:
    return x_BTNM / (x_BTNM.sum(axis=-2, keepdims=True) + epsilon)

  def over_both(x_BTNM: jax.Array, _: None) -> tuple[jax.Array, None]:
    return over_from(x_BTNM / (x_BTNM.sum(axis=-1, keepdims=True) + epsilon)), None

  return jax.lax.scan(over_both, over_from(x_BTNM), None, length=SINKHORN_ITERATIONS - 1)[0]


def _v4_logits(inputs: WiringInputs) -> list[jax.Array]:
  """scale (x fn) + base, split into pre, post and, with three scales, res: DeepSeek-V4 has one matrix for all."""
  n = inputs.n
  fn, base, scale = (inputs.weights[f"hc_{name}"].astype(jnp.float32) for name in ("fn", "base", "scale"))
  fn = _whole(fn)
  products = _from_all(inputs.streams, fn.reshape(-1, n, fn.shape[1] // n).transpose(1, 2, 0), inputs.epsilon)
  ends = [n, 2 * n]
  # With two scales the third piece of each split is empty, and `zip` drops it.
  parts = zip(jnp.split(products, ends, axis=-1), jnp.split(base, ends), scale, strict=False)
  return [part_scale * part + part_base for part, part_base, part_scale in parts]


def _ihc_v4(inputs: WiringInputs) -> Wiring:
  """iHC with DeepSeek-V4's epsilon."""
  pre, post = _v4_logits(inputs)
  read, write = jax.nn.sigmoid(pre) + V4_EPSILON, 2.0 * jax.nn.sigmoid(post) + V4_EPSILON
  return Wiring(_last(read), _identity(inputs.n), _last(write))


def _mhc_v4(inputs: WiringInputs) -> Wiring:
  """mHC as DeepSeek-V4 computes it: an epsilon in the sums of Sinkhorn's iteration, a softmax for its first half."""
  n = inputs.n
  pre, post, res = _v4_logits(inputs)
  mix = _balanced(jax.nn.softmax(res.reshape(*res.shape[:-1], n, n), axis=-1) + V4_EPSILON, V4_EPSILON)
  read, write = jax.nn.sigmoid(pre) + V4_EPSILON, 2.0 * jax.nn.sigmoid(post)
  return Wiring(_last(read), _matrix(mix), _last(write))


def _attention(inputs: WiringInputs) -> Wiring:
  """Attention residuals (arXiv 2603.15031): a softmax over the available sources, those with read = 1 in the table."""
  available = _entries(inputs.row.read, inputs.n)
  query_D, gain_D = inputs.weights["source_query"], inputs.weights["source_norm"]
  read = source_weights(inputs.streams, query_D, gain_D, inputs.epsilon, available)
  return Wiring(read, _identity(inputs.n), _entries(inputs.row.write, inputs.n))


def source_weights(
  sources: Sequence[jax.Array],
  query_D: jax.Array,
  gain_D: jax.Array,
  epsilon: float,
  available: Sequence[float | jax.Array],
) -> list[Coefficient]:
  """softmax over sources v of query · RMSNorm(v): a weight [B, T] for each source, 0 for those not available."""
  scores = []
  for source_BTD, is_available in zip(sources, available, strict=True):
    score_BT = jnp.sum(rms_norm(source_BTD, gain_D, epsilon=epsilon) * query_D.astype(jnp.float32), axis=-1)
    scores.append(jnp.where(jnp.asarray(is_available) > 0, score_BT, -jnp.inf))
  return list(jax.nn.softmax(jnp.stack(scores), axis=0))


WIRINGS: Mapping[str, Callable[[WiringInputs], Wiring]] = {
  "x0": _x0,
  "hc": _static,
  "dhc": functools.partial(_dynamic, _after_rms_norm),
  "dhc_layernorm": functools.partial(_dynamic, _after_layer_norm),
  "dhc_identity": _dynamic_identity,
  "ihc": _ihc,
  "mhc": _mhc,
  "ihc_v4": _ihc_v4,
  "mhc_v4": _mhc_v4,
  "attention": _attention,
}


# Read-outs: the streams after the final norm, combined into what the head multiplies, [B, T, D] in fp32.


class ReadOutContext(NamedTuple):
  """What a read-out needs besides the streams.

  Attributes:
    weights: the parameters outside the layers.
    final_norm: applies the final norm.
    stream_norm: (0 or 1, that stream) -> the stream after its own norm; for `siamese`.
    epsilon: of the norms.
    weight: of the first stream; for `dual`.
    available: 0 for a source that has not been written yet, else 1; for `attention`.
  """

  weights: Weights
  final_norm: Callable[[jax.Array], jax.Array]
  stream_norm: Callable[[int, jax.Array], jax.Array]
  epsilon: float
  weight: float
  available: Sequence[float] | jax.Array


def _first(streams: Sequence[jax.Array], context: ReadOutContext) -> jax.Array:
  return context.final_norm(streams[0])


def _sum(streams: Sequence[jax.Array], context: ReadOutContext) -> jax.Array:
  return context.final_norm(weighted_sum([1.0] * len(streams), streams))


def _sum_of_normed(streams: Sequence[jax.Array], context: ReadOutContext) -> jax.Array:
  return weighted_sum([1.0] * len(streams), [context.final_norm(stream_BTD) for stream_BTD in streams])


def _weighted(streams: Sequence[jax.Array], context: ReadOutContext) -> jax.Array:
  fn, base, scale = (context.weights[f"hc_head_{name}"].astype(jnp.float32) for name in ("fn", "base", "scale"))
  n = len(streams)
  logits = scale * _from_all(streams, fn.reshape(n, n, -1).transpose(1, 2, 0), context.epsilon) + base
  return context.final_norm(weighted_sum(_last(jax.nn.sigmoid(logits) + V4_EPSILON), streams))


def _siamese(streams: Sequence[jax.Array], context: ReadOutContext) -> jax.Array:
  return context.final_norm(context.stream_norm(0, streams[0]) + context.stream_norm(1, streams[1]))


def _dual(streams: Sequence[jax.Array], context: ReadOutContext) -> jax.Array:
  return weighted_sum([context.weight, 1.0], [streams[0], context.final_norm(streams[1])]).astype(jnp.float32)


def _over_sources(streams: Sequence[jax.Array], context: ReadOutContext) -> jax.Array:
  available = _entries(context.available, len(streams))
  weights = source_weights(
    streams, context.weights["source_query"], context.weights["source_norm"], context.epsilon, available
  )
  return context.final_norm(weighted_sum(weights, streams))


READ_OUTS: Mapping[str, Callable[[Sequence[jax.Array], ReadOutContext], jax.Array]] = {
  "first": _first,
  "sum": _sum,
  "sum_of_normed": _sum_of_normed,
  "weighted_sum": _weighted,
  "siamese": _siamese,
  "dual": _dual,
  "attention": _over_sources,
}

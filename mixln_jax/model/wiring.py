"""What the coefficients read, mix and write of the sublayer rule are made of, and how the head reads the streams.

A coefficient is a Python constant, a number that a layer has learned, or one for each position [B, T] that is computed
from the streams there. `WIRINGS` has a function for each word of the table's `wiring` column but `fixed`, `READ_OUTS`
one for each read-out of `placement.STREAM_SETS`. All is fp32, but for products with the
streams, which are taken in their type and added up in fp32.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixln_jax.model.columns import Flag, TracedRow
from mixln_jax.model.norm import mean_square, rms_norm
from mixln_jax.parallel.rules import constrain

Coefficient = float | jax.Array  # a Python constant, [] or [B, T]
Weights = Mapping[str, jax.Array]
Products = Callable[[jax.Array, jax.Array, "Seen"], jax.Array]
V4_EPSILON = 1e-6  # DeepSeek-V4's, in its coefficients
SINKHORN_ITERATIONS = 20  # arXiv 2512.24880, §4


class Seen(NamedTuple):
  """What a wiring may look at.

  Attributes:
    row: the sublayer's columns.
    streams: n arrays [B, T, D].
    weights: what the sublayer learns, by name without the sublayer's.
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


def wiring_of(seen: Seen) -> Wiring:
  """The coefficients of a sublayer."""
  row, n = seen.row, seen.n
  read, mix, write = (_entries(column, n) for column in (row.read, row.mix, row.write))
  wiring = Wiring(read, [_entries(of_stream, n) for of_stream in mix], write)
  for name, on in row.wired.items():
    if on is not False:
      learned = WIRINGS[name](seen)
      wiring = learned if on is True else _choose(on, learned, wiring)
  return wiring


def _entries(column: Any, n: int) -> list[Any]:
  return [column[index] for index in range(n)]


def _choose(on: Flag, learned: Wiring, other: Wiring) -> Wiring:
  """The one where `on`, else the other, coefficient by coefficient."""

  def choose(a: Coefficient, b: Coefficient) -> Coefficient:
    same = isinstance(a, float) and isinstance(b, float) and a == b
    return a if same else jnp.where(on, a, b)

  return jax.tree.map(choose, learned, other)


def weighted_sum(coefficients: Sequence[Coefficient], values: Sequence[jax.Array]) -> jax.Array:
  """Σ coefficient · value. A constant 0 is left out, a constant 1 not multiplied, one value alone left as it is."""
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
  if not isinstance(coefficient, jax.Array):
    return value_BTD if coefficient == 1.0 else coefficient * value_BTD
  return value_BTD * (coefficient[..., None] if coefficient.ndim else coefficient)


# The wirings.


def _x0(seen: Seen) -> Wiring:
  """x ← λ_1 x + λ_2 embedding, which the second stream keeps."""
  own, embedded = jnp.asarray(seen.weights["x0_lambdas"], jnp.float32)
  return Wiring([own, embedded], [[own, 0.0], [embedded, 1.0]], [1.0, 0.0])


def _identity(n: int) -> list[list[Coefficient]]:
  return [[float(source == to) for to in range(n)] for source in range(n)]


def _static(seen: Seen) -> Wiring:
  """Hyper-connections (arXiv 2409.19606, eq. 2): A = [read, mix], B = write."""
  n = seen.n
  alpha, beta = seen.weights["hc_alpha"].astype(jnp.float32), seen.weights["hc_beta"].astype(jnp.float32)
  mix = [[alpha[source, 1 + to] for to in range(n)] for source in range(n)]
  return Wiring([alpha[source, 0] for source in range(n)], mix, [beta[source] for source in range(n)])


def _whole(weight: jax.Array) -> jax.Array:
  """A small matrix, gathered once: cut along the streams' width, each of its products would gather it again."""
  return constrain(weight, *[None] * weight.ndim)


def _dynamic(products: Products, seen: Seen) -> Wiring:
  """The dynamic ones (eq. 10 to 13): row i of A and entry i of B change with stream i, and with it alone.

  Args:
    products: (a stream, a matrix [D, N + 2], seen) -> the stream, after the norm for it, times the matrix.
    seen: what a wiring may look at.
  """
  n, static, weights = seen.n, _static(seen), seen.weights
  to_both_DA = _whole(jnp.concatenate([weights["hc_dynamic_alpha"], weights["hc_dynamic_beta"][:, None]], axis=1))
  read, mix, write = [], [], []
  for index, stream_BTD in enumerate(seen.streams):
    changes_BTA = jnp.tanh(products(stream_BTD, to_both_DA.astype(jnp.float32), seen))
    alpha_BTA = weights["hc_dynamic_alpha_scale"] * changes_BTA[..., :-1]
    read.append(static.read[index] + alpha_BTA[..., 0])
    mix.append([static.mix[index][to] + alpha_BTA[..., 1 + to] for to in range(n)])
    write.append(static.write[index] + weights["hc_dynamic_beta_scale"] * changes_BTA[..., -1])
  return Wiring(read, mix, write)


# Layers of `dhc` and `dhc_layernorm` share a tree, so that the weights there don't say which norm a layer has. The
# factor of RMSNorm is one number a position and its gain one a channel: the product is taken of the stream as it is.


def _after_rms_norm(x_BTD: jax.Array, weight_DA: jax.Array, seen: Seen) -> jax.Array:
  return _after_norm_without_gain(x_BTD, seen.weights["hc_norm"].astype(jnp.float32)[:, None] * weight_DA, seen)


def _after_norm_without_gain(x_BTD: jax.Array, weight_DA: jax.Array, seen: Seen) -> jax.Array:
  return _product("btd,da->bta", x_BTD, weight_DA) * jax.lax.rsqrt(mean_square(x_BTD) + seen.epsilon)


def _after_layer_norm(x_BTD: jax.Array, weight_DA: jax.Array, seen: Seen) -> jax.Array:
  x_BTD = x_BTD.astype(jnp.float32)
  centered_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  normed_BTD = rms_norm(centered_BTD, seen.weights["hc_norm"], epsilon=seen.epsilon) + seen.weights["hc_norm_bias"]
  return _product("btd,da->bta", normed_BTD, weight_DA)


def _dynamic_identity(seen: Seen) -> Wiring:
  """The same without its mixing, as two published commits of DepthBench (arXiv 2609.32534) compute it."""
  return _dynamic(_after_norm_without_gain, seen)._replace(mix=_identity(seen.n))


def _product(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """In x's type, added up in fp32: an fp32 copy of a stream would cost more than the product."""
  return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def _from_all(streams: Sequence[jax.Array], to_DNM: jax.Array, epsilon: float) -> jax.Array:
  """The streams, side by side and normalised without a gain, times a matrix: [B, T, M].

  The factor of the norm is one number a position, so the products are taken stream by stream and nothing is joined.
  """
  n = len(streams)
  total, square = 0.0, 0.0
  for index, stream_BTD in enumerate(streams):
    total = total + _product("btd,dm->btm", stream_BTD, to_DNM[index])
    square = square + mean_square(stream_BTD)
  return total * jax.lax.rsqrt(square / n + epsilon)


def _logits(seen: Seen, *names: str) -> list[jax.Array]:
  """α (x φ) + b of each of pre, post and res that is named (arXiv 2512.24880, eq. 7), [B, T, …].

  All in one product a stream.
  """
  phi = _whole(jnp.concatenate([seen.weights[f"hc_phi_{name}"] for name in names], axis=1))
  changes = _from_all(seen.streams, phi.reshape(seen.n, -1, phi.shape[-1]), seen.epsilon)
  logits, begin = [], 0
  for name in names:
    bias = seen.weights[f"hc_b_{name}"]
    part = changes[..., begin : begin + bias.size].reshape(*changes.shape[:-1], *bias.shape)
    logits.append(seen.weights[f"hc_scale_{name}"] * part + bias)
    begin += bias.size
  return logits


def _last(values_BTN: jax.Array) -> list[Coefficient]:
  return [values_BTN[..., index] for index in range(values_BTN.shape[-1])]


def _matrix(values_BTNM: jax.Array) -> list[list[Coefficient]]:
  return [_last(values_BTNM[..., index, :]) for index in range(values_BTNM.shape[-2])]


def _ihc(seen: Seen) -> Wiring:
  """mHC without mixing: read = σ(…), write = 2σ(…)."""
  pre, post = _logits(seen, "pre", "post")
  return Wiring(_last(jax.nn.sigmoid(pre)), _identity(seen.n), _last(2.0 * jax.nn.sigmoid(post)))


def _mhc(seen: Seen) -> Wiring:
  """Manifold-constrained hyper-connections (arXiv 2512.24880, eq. 7 to 9): mix is made doubly stochastic."""
  pre, post, res = _logits(seen, "pre", "post", "res")
  mix = _balanced(jax.nn.softmax(res, axis=-1))
  return Wiring(_last(jax.nn.sigmoid(pre)), _matrix(mix), _last(2.0 * jax.nn.sigmoid(post)))


def _balanced(x_BTNM: jax.Array, epsilon: float = 0.0) -> jax.Array:
  """Sinkhorn's iteration: sums over `to` and over `from` are brought to 1 in turn. The first over `to` is done."""

  def over_from(x_BTNM: jax.Array) -> jax.Array:
    return x_BTNM / (x_BTNM.sum(axis=-2, keepdims=True) + epsilon)

  def over_both(x_BTNM: jax.Array, _: None) -> tuple[jax.Array, None]:
    return over_from(x_BTNM / (x_BTNM.sum(axis=-1, keepdims=True) + epsilon)), None

  return jax.lax.scan(over_both, over_from(x_BTNM), None, length=SINKHORN_ITERATIONS - 1)[0]


def _v4_logits(seen: Seen) -> list[jax.Array]:
  """The parts of DeepSeek-V4's one matrix: pre, post and, where there are three scales, res."""
  n = seen.n
  fn, base, scale = (seen.weights[f"hc_{name}"].astype(jnp.float32) for name in ("fn", "base", "scale"))
  fn = _whole(fn)
  logits = _from_all(seen.streams, fn.reshape(-1, n, fn.shape[1] // n).transpose(1, 2, 0), seen.epsilon)
  parts = zip(jnp.split(logits, [n, 2 * n], axis=-1), jnp.split(base, [n, 2 * n]), scale, strict=False)
  return [part_scale * part + part_base for part, part_base, part_scale in parts]


def _ihc_v4(seen: Seen) -> Wiring:
  """iHC with DeepSeek-V4's epsilon."""
  pre, post = _v4_logits(seen)
  read, write = jax.nn.sigmoid(pre) + V4_EPSILON, 2.0 * jax.nn.sigmoid(post) + V4_EPSILON
  return Wiring(_last(read), _identity(seen.n), _last(write))


def _mhc_v4(seen: Seen) -> Wiring:
  """mHC as DeepSeek-V4 computes it: an epsilon in the sums of Sinkhorn's iteration, a softmax for its first half."""
  n = seen.n
  pre, post, res = _v4_logits(seen)
  mix = _balanced(jax.nn.softmax(res.reshape(*res.shape[:-1], n, n), axis=-1) + V4_EPSILON, V4_EPSILON)
  read, write = jax.nn.sigmoid(pre) + V4_EPSILON, 2.0 * jax.nn.sigmoid(post)
  return Wiring(_last(read), _matrix(mix), _last(write))


def _attention(seen: Seen) -> Wiring:
  """Attention residuals (arXiv 2603.15031): a softmax over the sources that are there, those that the table reads."""
  there = _entries(seen.row.read, seen.n)
  query_D, gain_D = seen.weights["source_query"], seen.weights["source_norm"]
  read = source_weights(seen.streams, query_D, gain_D, seen.epsilon, there)
  return Wiring(read, _identity(seen.n), _entries(seen.row.write, seen.n))


def source_weights(
  sources: Sequence[jax.Array],
  query_D: jax.Array,
  gain_D: jax.Array,
  epsilon: float,
  there: Sequence[float | jax.Array],
) -> list[Coefficient]:
  """softmax over sources v of query · RMSNorm(v): a weight [B, T] for each, 0 for those that are not there."""
  scores = []
  for source_BTD, is_there in zip(sources, there, strict=True):
    score_BT = jnp.sum(rms_norm(source_BTD, gain_D, epsilon=epsilon) * query_D.astype(jnp.float32), axis=-1)
    scores.append(jnp.where(jnp.asarray(is_there) > 0, score_BT, -jnp.inf))
  return list(jax.nn.softmax(jnp.stack(scores), axis=0))


WIRINGS: Mapping[str, Callable[[Seen], Wiring]] = {
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


# Read-outs: what the head reads, its final norm included, [B, T, D] in fp32.


class ReadOut(NamedTuple):
  """What a read-out is made of.

  Attributes:
    weights: the parameters outside the layers.
    final_norm: the final norm.
    stream_norm: the norm of stream 0 or 1 that comes before it, where there is one.
    epsilon: of the norms.
    weight: of the first stream, where the read-out takes one.
    there: 0 for a stream that is not there yet, where the read-out is over sources.
  """

  weights: Weights
  final_norm: Callable[[jax.Array], jax.Array]
  stream_norm: Callable[[int, jax.Array], jax.Array]
  epsilon: float
  weight: float
  there: Sequence[float] | jax.Array


def _first(streams: Sequence[jax.Array], by: ReadOut) -> jax.Array:
  return by.final_norm(streams[0])


def _sum(streams: Sequence[jax.Array], by: ReadOut) -> jax.Array:
  return by.final_norm(weighted_sum([1.0] * len(streams), streams))


def _sum_of_normed(streams: Sequence[jax.Array], by: ReadOut) -> jax.Array:
  return weighted_sum([1.0] * len(streams), [by.final_norm(stream_BTD) for stream_BTD in streams])


def _weighted(streams: Sequence[jax.Array], by: ReadOut) -> jax.Array:
  fn, base, scale = (by.weights[f"hc_head_{name}"].astype(jnp.float32) for name in ("fn", "base", "scale"))
  n = len(streams)
  logits = scale * _from_all(streams, fn.reshape(n, n, -1).transpose(1, 2, 0), by.epsilon) + base
  return by.final_norm(weighted_sum(_last(jax.nn.sigmoid(logits) + V4_EPSILON), streams))


def _siamese(streams: Sequence[jax.Array], by: ReadOut) -> jax.Array:
  return by.final_norm(by.stream_norm(0, streams[0]) + by.stream_norm(1, streams[1]))


def _dual(streams: Sequence[jax.Array], by: ReadOut) -> jax.Array:
  return weighted_sum([by.weight, 1.0], [streams[0], by.final_norm(streams[1])]).astype(jnp.float32)


def _over_sources(streams: Sequence[jax.Array], by: ReadOut) -> jax.Array:
  there = _entries(by.there, len(streams))
  weights = source_weights(streams, by.weights["source_query"], by.weights["source_norm"], by.epsilon, there)
  return by.final_norm(weighted_sum(weights, streams))


READ_OUTS: Mapping[str, Callable[[Sequence[jax.Array], ReadOut], jax.Array]] = {
  "first": _first,
  "sum": _sum,
  "sum_of_normed": _sum_of_normed,
  "weighted_sum": _weighted,
  "siamese": _siamese,
  "dual": _dual,
  "attention": _over_sources,
}

"""An independent LLaMA with a placement per layer: plain loops over layers and streams, no code shared with the model.

Other formulations on purpose: complex rotations, one head at a time, an explicit mask, layer kinds spelt out.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def norm(x, gain, epsilon):
  return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) / x.shape[-1] + epsilon) * gain


def rotate(x, base):  # x: [B, T, K]
  half = x.shape[-1] // 2
  pairs = x[..., :half] + 1j * x[..., half:]
  angles = jnp.arange(x.shape[1])[:, None] / base ** (jnp.arange(half) / half)[None, :]
  turned = pairs * jnp.exp(1j * angles)
  return jnp.concatenate([turned.real, turned.imag], -1)


def attention(x, p, model, norms=(), mix=lambda values: values):
  """`norms`: of "qk" (per head), "full" (over all heads) and "v"; `mix`: of the values, by head."""
  head_dim = p["query"].shape[-1]
  group = p["query"].shape[1] // p["key"].shape[1]
  length = x.shape[1]
  projected = {}
  for name in ("query", "key", "value"):
    heads = [x @ p[name][:, h] for h in range(p[name].shape[1])]
    if "query_bias" in p:
      heads = [head + p[f"{name}_bias"][h] for h, head in enumerate(heads)]
    if "full" in norms and name != "value":
      size = len(heads) * head_dim
      mean_square = sum(jnp.sum(head * head, -1, keepdims=True) for head in heads) / size
      root = jnp.sqrt(mean_square + model.norm_epsilon)
      heads = [head / root * p[f"{name}_norm_full"][h] for h, head in enumerate(heads)]
    if ("v" if name == "value" else "qk") in norms:
      heads = [norm(head, p[f"{name}_norm"], model.norm_epsilon) for head in heads]
    projected[name] = mix(heads) if name == "value" else heads
  out = 0.0
  for head in range(p["query"].shape[1]):
    q, k = projected["query"][head], projected["key"][head // group]
    q, k = rotate(q, model.rope_base), rotate(k, model.rope_base)
    scores = q @ jnp.swapaxes(k, 1, 2) / math.sqrt(head_dim)
    scores = jnp.where(jnp.arange(length)[:, None] < jnp.arange(length)[None, :], -jnp.inf, scores)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = out + (weights / weights.sum(-1, keepdims=True)) @ projected["value"][head // group] @ p["output"][head]
  return out


def mlp(x, p):
  gate = x @ p["gate"]
  return (gate / (1 + jnp.exp(-gate)) * (x @ p["up"])) @ p["down"]


class At(NamedTuple):
  number: int  # of the layer, from 1
  total: int  # layers
  name: str  # of the sublayer
  arguments: tuple[float, ...]  # the numbers after the placement's colons
  before: Any  # the stream before the layer
  norm: Any  # (x, the name of a norm of the sublayer) -> its norm of x

  @property
  def argument(self):
    return self.arguments[0] if self.arguments else None

  @property
  def sublayer(self):
    """Its number in the model, from 0."""
    return 2 * (self.number - 1) + (self.name == "mlp")


def lns(x, f, n, n2, g, w, at):
  exponent = 0.5 if at.argument is None else at.argument
  return g(x + f(n(x) / at.number**exponent))


def deepnorm(x, f, n, n2, g, w, at):
  alpha = (2 * at.total) ** 0.25 if at.argument is None else at.argument
  return n(alpha * g(x) + f(x))


def keel(x, f, n, n2, g, w, at):
  alpha = 2 * at.total if at.argument is None else at.argument
  if at.number > 1:
    return n2(alpha * g(x) + f(n(x)))
  if at.name == "attention":
    return g(x + f(n(x)))
  return n2(g(x) + f(n(x)))


def hybrid(x, f, n, n2, g, w, at):
  return g(x + f(x)) if at.name == "attention" else g(n(x) + f(n(x)))


def hybrid_first(x, f, n, n2, g, w, at):
  return g(x + f(n(x))) if at.number == 1 else hybrid(x, f, n, n2, g, w, at)


def b2t(x, f, n, n2, g, w, at):
  return n(x + f(x)) if at.name == "attention" else n(x + at.before + f(x))


def spannorm(x, f, n, n2, g, w, at):
  return n(x + f(x)) if at.name == "attention" else n(at.before + f(x))


def parallel(x, f, n, n2, g, w, at):
  return x + f(n(at.before))


# kind -> x after a sublayer f. n and n2 are its first and second norm, w what else it learns, g is GPAS or nothing.
ONE_STREAM = {
  "pre": lambda x, f, n, n2, g, w, at: g(x + f(n(x))),
  "post": lambda x, f, n, n2, g, w, at: n(g(x) + f(x)),
  "sandwich": lambda x, f, n, n2, g, w, at: g(x + n2(f(n(x)))),
  "peri": lambda x, f, n, n2, g, w, at: g(x + n2(f(n(x)))),
  "reordered": lambda x, f, n, n2, g, w, at: g(x + n(f(x))),
  "lns": lns,
  "deepnorm": deepnorm,
  "deepnorm_as_published": lambda x, f, n, n2, g, w, at: n(math.sqrt(8) * g(x) + f(x)),
  "admin": lambda x, f, n, n2, g, w, at: n(w["vector_c_res"] * g(x) + f(x)),
  "layerscale": lambda x, f, n, n2, g, w, at: g(x + w["vector_c_out"] * f(n(x))),
  "skipinit": lambda x, f, n, n2, g, w, at: g(x + w["scalar_c_out"] * f(n(x))),
  "keel": keel,
  "hybrid": hybrid,
  "hybrid_first": hybrid_first,
  "parallel": parallel,
  "b2t": b2t,
  "spannorm": spannorm,
}


def residual(H, f, n, w, at):
  scale = at.arguments[0] if at.arguments else 1.0
  branch = f(H[0])
  return [n(H[0] + branch), H[1] + scale * branch]


def siamese(H, f, n, w, at):
  X = at.norm(H[0], "stream_norm_0")
  branch = f(n(X + at.norm(H[1], "stream_norm_1")))
  return [X + branch / math.sqrt(2 * at.number), H[1] + branch]


def connected(H, f, n, read, mix, write):
  """The stream rule of hyper-connections; coefficients are numbers or [B, T], mix[from][to]."""
  count = len(H)
  branch = f(n(sum(wide(read[s]) * H[s] for s in range(count))))
  after = []
  for to in range(count):
    mixed = sum(wide(mix[source][to]) * H[source] for source in range(count))
    after.append(mixed + wide(write[to]) * branch)
  return after


def wide(coefficient):
  return coefficient[..., None] if jnp.ndim(coefficient) else coefficient


def identity(count):
  return np.eye(count).tolist()


def without_gain(x, epsilon):
  return norm(x, 1.0, epsilon)


def hc(H, f, n, w, at):
  A, b = w["hc_alpha"], w["hc_beta"]
  return connected(H, f, n, A[:, 0], A[:, 1:], b)


def dynamic(normalise, *, mixes=True):
  """`normalise`: (stream, weights) -> what the coefficients of that stream are computed from."""

  def rule(H, f, n, w, at):
    read, mix, write = [], [], []
    for s, stream in enumerate(H):
      seen = normalise(stream, w)
      alpha = w["hc_dynamic_alpha_scale"] * jnp.tanh(seen @ w["hc_dynamic_alpha"])
      beta = jnp.tanh(seen @ w["hc_dynamic_beta"]) * w["hc_dynamic_beta_scale"]
      row = [w["hc_alpha"][s, column] + alpha[..., column] for column in range(len(H) + 1)]
      read.append(row[0])
      mix.append(row[1:])
      write.append(w["hc_beta"][s] + beta)
    return connected(H, f, n, read, mix if mixes else identity(len(H)), write)

  return rule


def layer_norm(x, gain, bias, epsilon):
  centred = x - jnp.sum(x, -1, keepdims=True) / x.shape[-1]
  return norm(centred, gain, epsilon) + bias


def sigmoid(x):
  return 1 / (1 + jnp.exp(-x))


def side_by_side(H):
  """All streams normalised as one vector, stream by stream."""
  return without_gain(jnp.concatenate(H, -1), EPSILON)


def manifold(H, f, n, w, at, mixes=True):
  x, count = side_by_side(H), len(H)
  logits = {}
  for name in ("pre", "post", "res")[: 3 if mixes else 2]:
    logits[name] = w[f"hc_scale_{name}"] * (x @ w[f"hc_phi_{name}"]) + w[f"hc_b_{name}"].reshape(-1)
  mix = identity(count)
  if mixes:
    matrix = jnp.exp(logits["res"].reshape(*x.shape[:2], count, count))  # [from, to]
    for _ in range(20):
      matrix = matrix / matrix.sum(TO, keepdims=True)
      matrix = matrix / matrix.sum(FROM, keepdims=True)
    mix = by_entry(matrix)
  return connected(H, f, n, by_stream(sigmoid(logits["pre"])), mix, by_stream(2 * sigmoid(logits["post"])))


FROM, TO = -2, -1


def by_stream(values):
  return [values[..., s] for s in range(values.shape[-1])]


def by_entry(matrix):
  return [by_stream(matrix[..., s, :]) for s in range(matrix.shape[-2])]


def manifold_v4(H, f, n, w, at, mixes=True):
  x, count, eps = side_by_side(H), len(H), 1e-6
  parts = [slice(0, count), slice(count, 2 * count), slice(2 * count, None)]
  logits = [w["hc_scale"][i] * (x @ w["hc_fn"][parts[i]].T) + w["hc_base"][parts[i]] for i in range(2 + mixes)]
  read = sigmoid(logits[0]) + eps
  write = 2 * sigmoid(logits[1]) + (0.0 if mixes else eps)
  mix = identity(count)
  if mixes:
    matrix = jnp.exp(logits[2].reshape(*x.shape[:2], count, count))
    matrix = matrix / matrix.sum(TO, keepdims=True) + eps
    matrix = matrix / (matrix.sum(FROM, keepdims=True) + eps)
    for _ in range(19):
      matrix = matrix / (matrix.sum(TO, keepdims=True) + eps)
      matrix = matrix / (matrix.sum(FROM, keepdims=True) + eps)
    mix = by_entry(matrix)
  return connected(H, f, n, by_stream(read), mix, by_stream(write))


def attnres(H, f, n, w, at):
  """H: the embedding, and the outputs of each block of sublayers. A source that no sublayer wrote to is zeros."""
  block = int(at.argument or 1)
  begun = -(-at.sublayer // block)
  x = H[0] if at.sublayer == 0 else over_sources(H[: 1 + begun], w["source_query"], w["source_norm"])
  after = list(H)
  after[1 + at.sublayer // block] = after[1 + at.sublayer // block] + f(n(x))
  return after


def over_sources(sources, query, gain):
  scores = [jnp.exp(norm(source, gain, EPSILON) @ query) for source in sources]
  return sum(wide(score / sum(scores)) * source for score, source in zip(scores, sources, strict=True))


# kind -> all streams after a sublayer f, whose norm is n; w is what else it learns.
SEVERAL_STREAMS = {
  "residual": residual,
  "siamese": siamese,
  "hc": hc,
  "dhc": dynamic(lambda x, w: norm(x, w["hc_norm"], EPSILON)),
  "dhc_layernorm": dynamic(lambda x, w: layer_norm(x, w["hc_norm"], w["hc_norm_bias"], EPSILON)),
  "dhc_identity": dynamic(lambda x, w: without_gain(x, EPSILON), mixes=False),
  "ihc": functools.partial(manifold, mixes=False),
  "mhc": manifold,
  "mhc_zero_bias": manifold,
  "ihc_v4": functools.partial(manifold_v4, mixes=False),
  "mhc_v4": manifold_v4,
  "attnres": attnres,
}
SUBLAYERS = (*ONE_STREAM, *SEVERAL_STREAMS)
EPSILON = 1e-6  # of the norms behind coefficients, in every model of these tests that has them


def norm_of_kind(x, p, name, model):
  """The norm `name` of config.model.norm's kind."""
  gain, bias = p[name], p.get(f"{name}_bias", 0.0)
  if model.norm == "rmsnorm":
    return norm(x, gain, model.norm_epsilon)
  if model.norm == "layernorm":
    return layer_norm(x, gain, bias, model.norm_epsilon)
  if model.norm == "derf":
    return gain * jax.scipy.special.erf(p[f"{name}_alpha"] * x + p[f"{name}_shift"]) + bias
  grown = jnp.exp(2 * p[f"{name}_alpha"] * x)
  return gain * (1 - 2 / (1 + grown)) + bias


def words_of(kind):
  """A word of the layer list -> (attention's name, the MLP's), the arguments of each, the modifiers with theirs."""
  word, *modifiers = kind.split("+")
  names, arguments = [], []
  for of_sublayer in word.split("/"):
    name, *texts = of_sublayer.split(":")
    if name not in SUBLAYERS:
      raise NotImplementedError(f"tests/model/reference.py: add a line for {name!r}, its mathematics")
    names.append(name)
    arguments.append(tuple(float(text) for text in texts))
  with_arguments = {modifier.split(":")[0]: modifier.split(":")[1:] for modifier in modifiers}
  return (names[0], names[-1]), (arguments[0], arguments[-1]), with_arguments


def progress(texts, number, total):
  """ProRes: the factor of a layer's branches at a frozen step of the linear schedule, `linear:100@37`."""
  schedule, steps = texts
  assert schedule == "linear"
  end, step = (int(text) for text in steps.split("@"))
  ends = np.linspace(end // total, end, total)
  return min(step / ends[number - 1], 1.0)


def mixed_values(values, first_values, p, modifiers, number):
  """With one λ the first layer mixes its values with themselves, with two it doesn't mix."""
  if "value_residual" not in modifiers or number == 1:
    return values
  if modifiers["value_residual"] == ["2"]:
    of_first, of_own = p["value_lambdas"]
  else:
    of_first, of_own = p["value_lambda"], 1 - p["value_lambda"]
  return [of_own * own + of_first * first for own, first in zip(values, first_values, strict=True)]


def layer(H, p, kind, number, total, model, first_values=None, look_at_values=lambda values: values):
  """The streams after a layer. `kind` is its word in the layer list; `first_values` the first layer's, by head."""
  bases, arguments, modifiers = words_of(kind)
  norms = ("qk", "v") if bases[0].startswith("hybrid") else ()
  norms += tuple({"qk_norm": "qk", "qk_norm_full": "full"}[m] for m in modifiers if m.startswith("qk"))
  factor = progress(modifiers["prores"], number, total) if "prores" in modifiers else 1.0
  if "x0" in modifiers:
    H = [p["x0_lambdas"][0] * H[0] + p["x0_lambdas"][1] * H[1], H[1]]

  def g(h):
    if "gpas" not in modifiers:
      return h
    return h - p["gpas"] / (1 + jnp.exp(-p["gpas"])) * jax.lax.stop_gradient(h)

  def mix(values):
    return mixed_values(look_at_values(values), first_values, p, modifiers, number)

  before = H[0]
  branches = (lambda h: factor * attention(h, p, model, norms, mix), lambda h: factor * mlp(h, p))
  for name, base, of_base, f in zip(("attention", "mlp"), bases, arguments, branches, strict=True):

    def normed(h, which, name=name):
      return norm_of_kind(h, p, f"{name}_{which}", model)

    def n(h, normed=normed):
      return normed(h, "norm")

    def n2(h, normed=normed):
      return normed(h, "norm_2")

    w = {key.removeprefix(f"{name}_"): value for key, value in p.items() if key.startswith(f"{name}_")}
    at = At(number, total, name, of_base, before, normed)
    if base in ONE_STREAM:
      H = [ONE_STREAM[base](H[0], f, n, n2, g, w, at), *H[1:]]
    else:
      H = SEVERAL_STREAMS[base](H, f, n, w, at)
  return H


def streams_of(kinds):
  """The name and the arguments of what has several streams, or ("", ())."""
  for kind in kinds:
    bases, arguments, modifiers = words_of(kind)
    for base, of_base in zip(bases, arguments, strict=True):
      if base in SEVERAL_STREAMS:
        return base, of_base
    if "x0" in modifiers:
      return "x0", ()
  return "", ()


def first_streams(x, kinds):
  family, arguments = streams_of(kinds)
  if not family:
    return [x]
  if family == "attnres":
    block = int(arguments[0]) if arguments else 1
    return [x] + [jnp.zeros_like(x)] * -(-2 * len(kinds) // block)
  if family == "residual":
    return [x, x * (arguments[0] if arguments else 1.0)]
  if family in ("siamese", "x0"):
    return [x, x]
  return [x] * (int(arguments[0]) if arguments else 4)


def read_out(H, params, kinds, model):
  """What the head reads."""
  family, arguments = streams_of(kinds)

  def final(x):
    return norm_of_kind(x, params, "final_norm", model)

  if family in ("", "x0"):
    return final(H[0])
  if family == "residual":
    return (arguments[1] if len(arguments) > 1 else 1.0) * H[0] + final(H[1])
  if family == "siamese":
    X, Y = (norm_of_kind(stream, params, f"stream_norm_{s}", model) for s, stream in enumerate(H))
    return final(X + Y)
  if family == "attnres":
    return final(over_sources(H, params["source_query"], params["source_norm"]))
  if family == "dhc_identity":
    return sum(final(stream) for stream in H)
  if family.endswith("_v4"):
    logits = params["hc_head_scale"] * (side_by_side(H) @ params["hc_head_fn"].T) + params["hc_head_base"]
    return final(sum((sigmoid(logits[..., s : s + 1]) + 1e-6) * stream for s, stream in enumerate(H)))
  return final(sum(H))


def in_float64(compute):
  """Op by op in float64: a comparison sees the model's rounding only, and there is no program to compile."""

  @functools.wraps(compute)
  def run(params, tokens, kinds, model):
    with jax.enable_x64(True):
      wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
      return jax.tree.map(np.asarray, compute(wide, tokens, kinds, model))

  return run


def forward(params, tokens, kinds, model):
  x = params["embedding"][tokens] * params.get("embedding_scale", 1.0)
  H, first_values = first_streams(x, kinds), None
  for index, kind in enumerate(kinds):
    p = jax.tree.map(lambda w, index=index: w[index], params["layers"])
    if index == 0:
      first_values = values_of_layer(H, p, kind, len(kinds), model)
    H = layer(H, p, kind, index + 1, len(kinds), model, first_values)
  head = params["embedding"].T if "head" not in params else params["head"]
  return read_out(H, params, kinds, model) @ head


def values_of_layer(H, p, kind, total, model):
  """The values of the first layer, by head."""
  found = []

  def look(values):
    found.append(values)
    return values

  layer(H, p, kind, 1, total, model, look_at_values=look)
  return found[0]


def mean_cross_entropy(params, tokens, kinds, model):
  out = forward(params, tokens, kinds, model)[:, :-1]
  probabilities = jnp.exp(out) / jnp.exp(out).sum(-1, keepdims=True)
  picked = jnp.take_along_axis(probabilities, tokens[:, 1:, None], -1)
  return -jnp.log(picked).mean()


@in_float64
def logits(params, tokens, kinds, model):
  """Logits [B, T, V]; `kinds` are the layer list's words."""
  return forward(params, tokens, kinds, model)


@in_float64
def loss_and_gradient(params, tokens, kinds, model):
  """Mean cross entropy of each token given the ones before it."""
  return jax.value_and_grad(mean_cross_entropy)(params, tokens, kinds, model)

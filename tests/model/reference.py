"""An independent LLaMA with a norm placement per layer: plain loops, no code shared with the model.

Other formulations on purpose: complex rotations, one head at a time, an explicit mask, layer kinds spelt out.
"""

import functools
import math
from typing import NamedTuple

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


def attention(x, p, model, norms=()):
  """`norms`: of "qk" (per head), "full" (over all heads) and "v"."""
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
    projected[name] = heads
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
  argument: float | None  # the number after the placement's colon


def lns(x, f, n, n2, g, w, at):
  exponent = 0.5 if at.argument is None else at.argument
  return g(x + f(n(x) / at.number**exponent))


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


# kind -> x after a sublayer f. n and n2 are its first and second norm, w what else it learns, g is GPAS or nothing.
SUBLAYERS = {
  "pre": lambda x, f, n, n2, g, w, at: g(x + f(n(x))),
  "post": lambda x, f, n, n2, g, w, at: n(g(x) + f(x)),
  "sandwich": lambda x, f, n, n2, g, w, at: g(x + n2(f(n(x)))),
  "peri": lambda x, f, n, n2, g, w, at: g(x + n2(f(n(x)))),
  "reordered": lambda x, f, n, n2, g, w, at: g(x + n(f(x))),
  "lns": lns,
  "deepnorm": lambda x, f, n, n2, g, w, at: n((2 * at.total) ** 0.25 * g(x) + f(x)),
  "deepnorm_as_published": lambda x, f, n, n2, g, w, at: n(math.sqrt(8) * g(x) + f(x)),
  "admin": lambda x, f, n, n2, g, w, at: n(w["vector_c_res"] * g(x) + f(x)),
  "layerscale": lambda x, f, n, n2, g, w, at: g(x + w["vector_c_out"] * f(n(x))),
  "skipinit": lambda x, f, n, n2, g, w, at: g(x + w["scalar_c_out"] * f(n(x))),
  "keel": keel,
  "hybrid": hybrid,
  "hybrid_first": hybrid_first,
}


def layer(x, p, kind, number, total, model):
  """`kind` is the layer's word in the layer list."""
  word, *modifiers = kind.split("+")
  base, _, argument = word.partition(":")
  if base not in SUBLAYERS:
    raise NotImplementedError(f"tests/model/reference.py: add a line for {base!r} to SUBLAYERS, its mathematics")
  norms = ("qk", "v") if base.startswith("hybrid") else ()
  norms += tuple({"qk_norm": "qk", "qk_norm_full": "full"}[m] for m in modifiers if m.startswith("qk"))

  def g(h):
    if "gpas" not in modifiers:
      return h
    return h - p["gpas"] / (1 + jnp.exp(-p["gpas"])) * jax.lax.stop_gradient(h)

  for name, f in (("attention", lambda h: attention(h, p, model, norms)), ("mlp", lambda h: mlp(h, p))):

    def n(h, name=name):
      return norm(h, p[f"{name}_norm"], model.norm_epsilon)

    def n2(h, name=name):
      return norm(h, p[f"{name}_norm_2"], model.norm_epsilon)

    w = {key.removeprefix(f"{name}_"): value for key, value in p.items() if key.startswith(f"{name}_")}
    at = At(number, total, name, float(argument) if argument else None)
    x = SUBLAYERS[base](x, f, n, n2, g, w, at)
  return x


def in_float64(compute):
  """Op by op in float64: a comparison sees the model's rounding only, and there is no program to compile."""

  @functools.wraps(compute)
  def run(params, tokens, kinds, model):
    with jax.enable_x64(True):
      wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
      return jax.tree.map(np.asarray, compute(wide, tokens, kinds, model))

  return run


def forward(params, tokens, kinds, model):
  x = params["embedding"][tokens]
  for index, kind in enumerate(kinds):
    p = jax.tree.map(lambda w, index=index: w[index], params["layers"])
    x = layer(x, p, kind, index + 1, len(kinds), model)
  head = params["embedding"].T if "head" not in params else params["head"]
  return norm(x, params["final_norm"], model.norm_epsilon) @ head


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

"""An independent LLaMA with a norm placement per layer: plain loops, no code shared with the model.

Other formulations on purpose: complex rotations, one head at a time, an explicit mask, layer kinds spelt out.
"""

import functools
import math

import jax
import jax.numpy as jnp


def norm(x, gain, epsilon):
  return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) / x.shape[-1] + epsilon) * gain


def rotate(x, base):  # x: [B, T, K]
  half = x.shape[-1] // 2
  pairs = x[..., :half] + 1j * x[..., half:]
  angles = jnp.arange(x.shape[1])[:, None] / base ** (jnp.arange(half) / half)[None, :]
  turned = pairs * jnp.exp(1j * angles)
  return jnp.concatenate([turned.real, turned.imag], -1)


def attention(x, p, model):
  head_dim = p["query"].shape[-1]
  group = p["query"].shape[1] // p["key"].shape[1]
  length = x.shape[1]
  out = 0.0
  for head in range(p["query"].shape[1]):
    q, k, v = (x @ p[name][:, h] for name, h in (("query", head), ("key", head // group), ("value", head // group)))
    if "query_bias" in p:
      q, k, v = q + p["query_bias"][head], k + p["key_bias"][head // group], v + p["value_bias"][head // group]
    q, k = rotate(q, model.rope_base), rotate(k, model.rope_base)
    scores = q @ jnp.swapaxes(k, 1, 2) / math.sqrt(head_dim)
    scores = jnp.where(jnp.arange(length)[:, None] < jnp.arange(length)[None, :], -jnp.inf, scores)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = out + (weights / weights.sum(-1, keepdims=True)) @ v @ p["output"][head]
  return out


def mlp(x, p):
  gate = x @ p["gate"]
  return (gate / (1 + jnp.exp(-gate)) * (x @ p["up"])) @ p["down"]


def layer(x, p, kind, number, model):
  """`kind` is the layer's word in the strip, `number` counts layers from 1."""
  sublayers = (("attention_norm", lambda h: attention(h, p, model)), ("mlp_norm", lambda h: mlp(h, p)))
  for gain, f in sublayers:

    def n(h, which=gain):
      return norm(h, p[which], model.norm_epsilon)

    def n2(h, which=gain + "_2"):
      return norm(h, p[which], model.norm_epsilon)

    x = {
      "pre": lambda x, f=f, n=n: x + f(n(x)),
      "post": lambda x, f=f, n=n: n(x + f(x)),
      "sandwich": lambda x, f=f, n=n, n2=n2: x + n2(f(n(x))),
      "reordered": lambda x, f=f, n=n: x + n(f(x)),
      "lns": lambda x, f=f, n=n: x + f(n(x) / math.sqrt(number)),
    }[kind](x)
  return x


@functools.partial(jax.jit, static_argnames=("kinds", "model"))
def logits(params, tokens, kinds, model):
  """Logits [B, T, V]; `kinds` is a tuple of the strip's words, `model` a FrozenConfigDict."""
  x = params["embedding"][tokens]
  for index, kind in enumerate(kinds):
    p = jax.tree.map(lambda w, index=index: w[index], params["layers"])
    x = layer(x, p, kind, index + 1, model)
  head = params["embedding"].T if "head" not in params else params["head"]
  return norm(x, params["final_norm"], model.norm_epsilon) @ head


@functools.partial(jax.jit, static_argnames=("kinds", "model"))
@functools.partial(jax.value_and_grad, argnums=0)
def loss_and_gradient(params, tokens, kinds, model):
  """Mean cross entropy of each token given the ones before it."""
  out = logits(params, tokens, kinds, model)[:, :-1]
  probabilities = jnp.exp(out) / jnp.exp(out).sum(-1, keepdims=True)
  picked = jnp.take_along_axis(probabilities, tokens[:, 1:, None], -1)
  return -jnp.log(picked).mean()

"""The placements that the model's tests go through, and what several of them do with a model."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, small_model
from ml_collections import FrozenConfigDict

from mixln_jax.model import Transformer, next_token_loss
from mixln_jax.placement import ROWS
from model import reference
from model.rounding import NETWORK

# Arguments, beside their defaults, of each row that takes any.
ARGUMENTS = {
  "lns": "lns:0.25",
  "deepnorm": "deepnorm:1.5:0.5",
  "keel": "keel:3",
  "layerscale": "layerscale:0.01",
  "skipinit": "skipinit:0.5",
  "residual": "residual:0.5:2",
  "attnres": "attnres:3",
  **{name: f"{name}:2" for name in ("hc", "dhc", "dhc_layernorm", "dhc_identity")},
  **{name: f"{name}:2" for name in ("ihc", "mhc", "mhc_zero_bias", "ihc_v4", "mhc_v4")},
}
WITH_MODIFIERS = ("pre+gpas", "sandwich+gpas", "pre+qk_norm", "pre+x0", "pre+value_residual", "pre+value_residual:2")
UNIFORM = (*ROWS, *ARGUMENTS.values(), *WITH_MODIFIERS)
LAYER_LISTS = {
  **{name: " ".join([name] * 4) for name in UNIFORM},
  "mix:0.25": "post pre pre pre",
  "mix:0.5": "post post pre pre",
  "mix:0.5+gpas": "post+gpas post+gpas pre+gpas pre+gpas",
  "pre*1,sandwich*1,peri*1,post*1": "pre sandwich peri post",
  "lns*2,post*1,reordered*1": "lns lns post reordered",
  "keel*2,admin*1,layerscale*1": "keel keel admin layerscale",
  "lns:0.25*2,keel:3*1,layerscale:0.01*1": "lns:0.25 lns:0.25 keel:3 layerscale:0.01",
  "hybrid_first*2,skipinit*1,deepnorm*1+gpas": "hybrid_first hybrid_first skipinit deepnorm+gpas",
  "pre*1+qk_norm,reordered*2+qk_norm_full,hybrid*1": "pre+qk_norm reordered+qk_norm_full reordered+qk_norm_full hybrid",
  # Several streams. Rows of different families that have them for one purpose, and rows that know one.
  "dhc:2*1,dhc_layernorm:2*1,mhc:2*1,post/pre*1": "dhc:2 dhc_layernorm:2 mhc:2 post/pre",
  "hybrid*1,hc:2*1,ihc:2*1,mhc_zero_bias:2*1": "hybrid hc:2 ihc:2 mhc_zero_bias:2",
  "b2t*1,pre/parallel*1,spannorm*1,pre*1": "b2t pre/parallel spannorm pre",
  "attnres*2,pre*2": "attnres attnres pre pre",
  "post*2,siamese*2": "post post siamese siamese",
  "residual*3,post/pre*1": "residual residual residual post/pre",
  "post*2+x0+prores:linear:100@37,pre*2+value_residual:2": (
    "post+x0+prores:linear:100@37 post+x0+prores:linear:100@37 pre+value_residual:2 pre+value_residual:2"
  ),
  # Tested with the long tests alone.
  "hc:4*2,pre*2": "hc:4 hc:4 pre pre",
  "hc:2*2,dhc:2*2": "hc:2 hc:2 dhc:2 dhc:2",
  "hc:1*2,ihc:1*2": "hc:1 hc:1 ihc:1 ihc:1",
  "parallel/b2t*2,pre/spannorm*2": "parallel/b2t parallel/b2t pre/spannorm pre/spannorm",
  "post/pre*2+value_residual,pre*2+prores:linear:100@37": (
    "post/pre+value_residual post/pre+value_residual pre+prores:linear:100@37 pre+prores:linear:100@37"
  ),
}
LONG = (
  "hc:4*2,pre*2",
  "hc:2*2,dhc:2*2",
  "hc:1*2,ihc:1*2",
  "parallel/b2t*2,pre/spannorm*2",
  "post/pre*2+value_residual,pre*2+prores:linear:100@37",
)
CORE = ("pre", "post", "mix:0.25", "mix:0.5", "hybrid_first*2,skipinit*1,deepnorm*1+gpas")


def parts_of(layer_list):
  """The names of rows and modifiers in a layer list, without their arguments."""
  return {part.split(":")[0] for part in re.split("[ /+]", layer_list)}


MIXED = set().union(*(parts_of(layer_list) for name, layer_list in LAYER_LISTS.items() if "*" in name))


def is_long(name):
  """Whether a mixture tests the same: a uniform placement of nothing but what mixtures have, or one of LONG."""
  return name in LONG or ("*" not in name and name not in CORE and parts_of(LAYER_LISTS[name]) <= MIXED)


def each_placement(*values):
  """A parameter set (name, *values) of each placement. One that also stands in a mixture is tested alone with the long
  tests; a row of placement.ROWS that no mixture has yet, with all tests."""
  return [pytest.param(name, *values, marks=[pytest.mark.slow] if is_long(name) else []) for name in LAYER_LISTS]


def mean_loss(model, params, tokens, **arguments):
  def apply(transformer):
    hidden, _ = transformer.hidden(tokens, **arguments)
    labels = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    total, count = next_token_loss(hidden, transformer.head_weights(), labels, weights)
    return total / count

  return nn.apply(apply, Transformer(model))({"params": params})


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, arguments):
  return Transformer(model).apply({"params": params}, tokens, **arguments)


def apply(model, params, tokens, **arguments):
  """`Transformer(model).apply`, under jit."""
  return logits_of(FrozenConfigDict(model), params, tokens, arguments)


@functools.cache
def reference_case(name):
  """Parameters, tokens, and what the reference makes of them."""
  model = small_model(placement=name)
  params, tokens = random_params(model), random_tokens(model)
  kinds = LAYER_LISTS[name].split()
  loss, gradient = reference.loss_and_gradient(params, tokens, kinds, model)
  return params, tokens, reference.logits(params, tokens, kinds, model), loss, gradient


def assert_trees_close(actual, expected, tolerance=NETWORK):
  """Every leaf near the expected one, in units of its own largest entry."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    # A learned scalar's gradient is a sum over all positions of larger terms that cancel: the floor is their size. That
    # of a scale of hyper-connections is one over N (N + 1) = 20 coefficients too, which adds up like a random walk.
    name = jax.tree_util.keystr(path)
    of_coefficients = "hc_" in name and "scale" in name
    scale = max(np.abs(b).max(), 2e-2 * (np.sqrt(20) if of_coefficients else 1.0))
    np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0, err_msg=name)

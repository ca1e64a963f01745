"""The placements that the model's tests go through, and what several of them do with a model."""

import functools

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

# One argument, beside its default, of each row that takes one.
ARGUMENTS = {"lns": "lns:0.25", "keel": "keel:3", "layerscale": "layerscale:0.01"}
UNIFORM = (*ROWS, *ARGUMENTS.values(), "pre+gpas", "sandwich+gpas", "pre+qk_norm")
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
}
MIXED = {kind for name, layer_list in LAYER_LISTS.items() if "*" in name for kind in layer_list.split()}
CORE = ("pre", "post", "mix:0.25", "mix:0.5", "hybrid_first*2,skipinit*1,deepnorm*1+gpas")


def each_placement(*values):
  """A parameter set (name, *values) of each placement. One that also stands in a mixture is tested alone with the long
  tests; a row of placement.ROWS that no mixture has yet, with all tests."""
  return [
    pytest.param(name, *values, marks=[pytest.mark.slow] if name in MIXED.difference(CORE) else [])
    for name in LAYER_LISTS
  ]


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
    # A learned scalar's gradient is a sum over all positions of larger terms that cancel: the floor is their size.
    scale = max(np.abs(b).max(), 2e-2)
    np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0, err_msg=jax.tree_util.keystr(path))

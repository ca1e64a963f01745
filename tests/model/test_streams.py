"""Several residual streams: identities at their first values, the walk back over sources, and placements as data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, small_model

from mixln_jax import placement
from mixln_jax.errors import InputError
from mixln_jax.model import Columns, Transformer
from mixln_jax.model.initial import initial_params
from model.cases import apply, assert_trees_close
from model.rounding import assert_near


@pytest.mark.parametrize("name", ["hc:3", "dhc:3", "mhc:3", "attnres", "attnres:3", "pre+x0"])
def test_at_its_first_values_it_is_pre_ln(name):
  """A first value that is off, or a read-out that is not of all streams: then a run starts as another model."""
  # Without the norms' epsilon a mean over streams is as good as their sum.
  pre = small_model(placement="pre", norm_epsilon=1e-12)
  model = small_model(placement=name, norm_epsilon=1e-12)
  params, tokens = random_params(pre), random_tokens(pre)
  first = initial_params(model, 0)
  same = {**first, **params, "layers": {**first["layers"], **params["layers"]}}
  assert len(same["layers"]) > len(params["layers"])
  assert_near(apply(model, same, tokens), apply(pre, params, tokens))


SEGMENTS = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [2] * 3])
POSITIONS = jnp.asarray([[*range(5), *range(7)], [*range(9), *range(3)]])
KEPT = jnp.asarray([[1, 1, 1, 1], [1, 0, 1, 1]])


def weighed(seed, array):
  """A sum of an array's entries with random weights."""
  return jnp.sum(array * np.random.default_rng(seed).normal(size=array.shape).astype(np.float32))


@pytest.mark.parametrize(
  ("name", "read"),
  [
    ("attnres+value_residual", "everything"),
    ("attnres:3", "everything"),
    ("attnres:3", "a branch"),
    pytest.param("attnres", "a branch", marks=pytest.mark.slow),
    pytest.param("attnres:8", "everything", marks=pytest.mark.slow),
    pytest.param("hc:2", "everything", marks=pytest.mark.slow),
    ("b2t", "everything"),
  ],
)
def test_the_scan_differentiates_as_a_plain_loop_does(name, read):
  """The walk back over sources is a derivative by hand: of parameters, through taps, with layers removed and segments,
  and for several at once. A source that is not set back, or a cotangent that is left out, shows in some parameter."""

  def gradients(unroll):
    model = small_model(placement=name, unroll=unroll)
    tokens = random_tokens(model, batch=2)

    def objective(params, keep_L):
      hidden, taps = Transformer(model).apply(
        {"params": params},
        tokens,
        keep_L=keep_L,
        segment_ids_BT=SEGMENTS,
        positions_BT=POSITIONS,
        method="hidden",
      )
      if read == "a branch":  # then nothing is asked of the last buffer
        return weighed(0, taps["attention_branch_LBTD"][2])
      return weighed(0, hidden) + sum(weighed(len(tap), taps[tap]) for tap in sorted(taps))

    return jax.jit(jax.vmap(jax.value_and_grad(objective), in_axes=(None, 0)))(random_params(model), KEPT)

  values, actual = gradients(1)
  expected_values, expected = gradients(0)
  assert_near(values, expected_values)
  assert_trees_close(actual, expected, 2e-5)


@pytest.mark.parametrize(
  "names",
  [
    ("hc:2", "hc:2*2,pre*2", "mhc:2*1,dhc:2*1,ihc:2*1,post/pre*1", "pre"),
    ("b2t", "parallel*2,spannorm*1,pre*1", "pre"),
    pytest.param(("post*2+x0,pre*2", "pre+x0", "mix:0.5"), marks=pytest.mark.slow),
    pytest.param(("attnres:3", "attnres:3*2,pre*2"), marks=pytest.mark.slow),
    pytest.param(("siamese", "post*2,siamese*2"), marks=pytest.mark.slow),
  ],
)
def test_placements_of_one_tree_side_by_side_equal_each_alone(names):
  """A coefficient that is compiled in from one of them, or a wiring that another one's parameters decide."""
  columns = Columns.of_many([placement.parse(name, 4) for name in names])
  model = small_model(placement=names[0])
  params, tokens = random_params(model, columns=columns.of_run(0)), random_tokens(model)
  side_by_side = jax.jit(jax.vmap(lambda c: Transformer(model).apply({"params": params}, tokens, columns=c)))(columns)
  for logits, name in zip(side_by_side, names, strict=True):
    assert_near(logits, apply(small_model(placement=name), params, tokens), err_msg=name)


@pytest.mark.parametrize("names", [("siamese", "hc:2"), ("hc:4", "hc:2"), ("attnres", "attnres:2")])
def test_placements_with_different_streams_are_not_one_program(names):
  """What one of them writes the other would read as something else."""
  with pytest.raises(InputError, match="different residual streams"):
    Columns.of_many([placement.parse(name, 4) for name in names])

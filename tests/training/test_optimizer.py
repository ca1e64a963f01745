"""Schedules, against their formulas; the update, against optax's and without a copy of the moments."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.training import optimizer as optimizer_lib
from mixln_jax.training.derived import with_num_steps
from mixln_jax.training.optimizer import init_moments, learning_rate_schedule, make_optimizer
from mixln_jax.training.step import init_state, make_train_step

# fp32: near the end the falling part of the rate is the difference of two numbers 20 times as large (1 and the cosine).
SCHEDULE = 1e-5


def rates(**fields):
  config = config_lib.base()
  config.train.num_steps = 100
  config.optimizer.update(learning_rate=2.0, **fields)
  config_lib.validate(config)
  schedule = learning_rate_schedule(config)
  return np.array([float(schedule(step)) for step in range(100)])


def test_cosine_is_the_official_codes():
  # Linear from 0 over the warm-up, then floor + (1 - floor) (1 + cos(pi t)) / 2.
  expected = []
  for step in range(100):
    t = (step - 10) / (100 - 10)
    expected.append(2 * (step / 10 if step < 10 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t))))
  np.testing.assert_allclose(rates(), expected, rtol=SCHEDULE)


def test_linear():
  expected = [step / 10 * 2 if step < 10 else 2 + (0.5 - 2) * (step - 10) / 90 for step in range(100)]
  np.testing.assert_allclose(rates(schedule="linear", final_fraction=0.25), expected, rtol=SCHEDULE)


def test_warmup_stable_decay():
  expected = [2 * min(1, step / 5) - max(0, step - 80) / 20 * 1.8 for step in range(100)]
  np.testing.assert_allclose(rates(schedule="wsd", warmup_steps=5, decay_steps=20), expected, rtol=SCHEDULE)


def test_trapezoid_cools_down_by_the_square_root():
  """Catches a cool-down that begins elsewhere, or whose root is of what is left (which falls slowly at first)."""
  expected = []
  for step in range(100):
    elapsed = max(0, step - 80) / 20
    expected.append(2 * min(1, step / 5) - (2 - 0.2) * math.sqrt(elapsed))
  np.testing.assert_allclose(rates(schedule="trapezoid", warmup_steps=5, decay_steps=20), expected, rtol=SCHEDULE)


def test_warm_up_and_decay_as_fractions():
  """Catches a fraction whose float product falls short of the whole number of steps that it means."""
  fractions = rates(schedule="wsd", warmup_fraction=0.29, decay_fraction=0.07)
  steps = rates(schedule="wsd", warmup_steps=29, decay_steps=7)
  np.testing.assert_array_equal(fractions, steps)
  config = config_lib.base()
  for config.train.num_steps in (1, 9, 10, 19, 20, 30, 300, 999, 1_000_000, 123_456_789):
    assert config_lib.warmup_steps(config) == config.train.num_steps // 10  # as it was before fractions


def test_tokens_per_parameter_count_the_matrices_alone():
  """Catches placements of one shape that would train for different lengths, and a length that is stated twice."""
  config = config_lib.base()
  config.model.update(vocab_size=100, embed_dim=8, mlp_dim=16, num_layers=2, num_heads=2, mlp_pad_to=32)
  config.data.sequence_length = 16
  config.train.update(num_steps=0, tokens_per_parameter=2.5, batch_size=3)
  matrices = 2 * 100 * 8 + 2 * (4 * 8 * 8 + 3 * 8 * 16)
  for config.model.placement in ("pre", "sandwich", "dhc:4"):
    assert with_num_steps(config).train.num_steps == math.ceil(2.5 * matrices / (3 * 16))
  assert with_num_steps(with_num_steps(config)) == with_num_steps(config)  # what config.json says is taken as it is
  config.model.tied_embeddings = True
  assert with_num_steps(config).train.num_steps == math.ceil(2.5 * (matrices - 800) / (3 * 16))
  config.train.num_steps = 7
  with pytest.raises(InputError, match=r"num_steps=7 and tokens_per_parameter=2\.5 both state"):
    with_num_steps(config)


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_constant_with_any_warm_up(warmup):
  expected = [2 * min(1, step / warmup) if warmup else 2 for step in range(100)]
  np.testing.assert_allclose(rates(schedule="constant", warmup_steps=warmup), expected, rtol=SCHEDULE)


def test_a_step_keeps_no_copy_of_the_moments_on_a_cpu(make_config):
  """Catches an update made of the moments before `accept`, for which a CPU copies all old ones at every step."""
  config = make_config()
  config.model.vocab_size = 4096  # so that the moments are most of the memory
  state = jax.eval_shape(lambda: init_state(config))
  batch = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in ("tokens_BT", "labels_BT", "weights_BT")}
  compiled = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch).compile()
  shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1}
  copies = re.findall(r"f32\[([\d,]+)\]\S* copy\(%state_opt_state", compiled.as_text())
  assert not shapes & set(copies)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # the tuned form, and the plain one
@pytest.mark.parametrize("scale", [1e-3, 1.0])  # below the limit of the clip, and above
def test_each_form_updates_as_optax_and_keeps_the_state_where_it_is_rejected(monkeypatch, platform, scale):
  """Catches a form that clips, corrects the bias or accepts otherwise than optax, and a state of another tree, which
  no checkpoint of the other platform could be loaded into."""
  monkeypatch.setattr(optimizer_lib, "platform", lambda: platform)
  config = config_lib.base()
  config.optimizer.update(clip_norm=0.5, weight_decay=0.1)
  c = config.optimizer
  rng = np.random.default_rng(0)
  params, *grads = ({"head": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)} for _ in range(4))
  grads = [jax.tree.map(lambda g: g * scale, one) for one in grads]
  plain = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.identity(),  # where the moments' type is set
    optax.scale_by_adam(c.b1, c.b2, c.epsilon),
    optax.add_decayed_weights(0.1, mask={"head": True}),
  )
  ours = make_optimizer(config)
  expected_state, state = plain.init(params), init_moments(ours, params, "float32")
  assert jax.tree.structure(state) == jax.tree.structure(expected_state)
  for one in grads:
    _, rejected = ours.update(one, state, params, norm=optax.tree.norm(one), accept=jnp.bool_(False))
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(rejected), strict=True):
      np.testing.assert_array_equal(before, after)
    expected, expected_state = plain.update(one, expected_state, params)
    updates, state = ours.update(one, state, params, norm=optax.tree.norm(one), accept=jnp.bool_(True))
    # Each number comes out of some ten roundings (2⁻²⁴ each), but for the norm, a sum of 128 squares that both forms
    # take: 20 · 2⁻²⁴ bounds what one form may be from the other. The bias corrections are the same numbers.
    np.testing.assert_allclose(updates["head"], expected["head"], rtol=20 * 2**-24, atol=20 * 2**-24)
    for moment, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
      np.testing.assert_allclose(moment, other, rtol=20 * 2**-24, atol=0)

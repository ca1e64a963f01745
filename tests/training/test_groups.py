"""Multipliers by group: CompleteP's two published readings against its code's own numbers, and what people state."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import llama_9m
from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.interop import hf
from mixln_jax.model import Transformer
from mixln_jax.model.initial import starting_values
from mixln_jax.training.derived import with_derived
from mixln_jax.training.groups import optimizer_table, parse_multipliers
from mixln_jax.training.optimizer import init_moments, make_optimizer
from mixln_jax.training.step import make_train_step, start_state

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "optimizers"


def load(name):
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
    data = dict(file)
  return data, json.loads(bytes(data["meta"]))


def of_case(case, **fields):
  """A config of one row of `cases`: L, L_base, N, N_base, a."""
  layers, base_layers, width, base_width, exponent = case
  config = config_lib.base()
  config.model.update(placement="pre", num_layers=int(layers), embed_dim=int(width), qkv_bias=True)
  config.optimizer.update(base_depth=int(base_layers), base_width=int(base_width))
  config.optimizer.parameterization = "completep" if exponent == 1.0 else "depth_mup"
  config.optimizer.update(**fields)
  return with_derived(config)


def multipliers(config, *names):
  table = optimizer_table(config)
  return [[table[name].rate, table[name].decay, table[name].epsilon] for name in names]


def test_both_published_readings_of_completep():
  """Catches a wrong exponent, or a multiplier in the wrong group; and a default that is neither reading.

  nanoGPT-mup's epsilon is the same in all groups; DepthBench's, and the paper's table, leaves the depth out of what
  lies outside the layers. DepthBench decays norms; here that is asked for by group.
  """
  data, _ = load("completep_multipliers")
  block = ("layers/attention_norm", "layers/query")
  for index, case in enumerate(data["cases"]):
    as_run = of_case(case, completep_reading="nanogpt_mup")
    found = multipliers(as_run, "embedding", *block, "layers/query_bias", "final_norm")
    np.testing.assert_allclose(found, data["nanogpt_mup/multipliers"][index], rtol=1e-7)
    paper = of_case(case, decay_multipliers="gains:1,final_norm:1")
    found = multipliers(paper, "embedding", *block, "head")
    np.testing.assert_allclose(found, data["depthbench_depth_width/multipliers"][index], rtol=1e-7)
    np.testing.assert_allclose(found[3], multipliers(paper, "final_norm")[0])
    only_depth = of_case(case, decay_multipliers="gains:1,final_norm:1", base_width=0)
    found = multipliers(only_depth, "embedding", *block, "head")
    np.testing.assert_allclose(found, data["depthbench_depth_only/multipliers"][index], rtol=1e-7)
    for name in ("residual_multiplier", "output_multiplier", "hidden_init_std_multiplier"):
      field = {"residual_multiplier": "branch_multiplier", "output_multiplier": "logit_multiplier"}.get(name)
      np.testing.assert_allclose(paper.model[field or "matrix_std_multiplier"], data[name][index], rtol=1e-7)


def test_six_updates_of_completep():
  """Catches a multiplier that is in the table and not in the update, and a branch or logits that are not scaled."""
  data, meta = load("completep_pre")
  config, said = llama_9m.get_config(), meta["hyperparameters"]
  config.model.update(
    placement="pre",
    vocab_size=meta["vocab_size"],
    embed_dim=meta["hidden_size"],
    mlp_dim=meta["intermediate_size"],
    num_layers=meta["num_hidden_layers"],
    num_heads=meta["num_attention_heads"],
  )
  adamw = meta["adamw"]
  config.train.micro_batches = 1
  config.optimizer.update(learning_rate=adamw["lr"], schedule="constant", warmup_steps=0, clip_norm=0.0)
  config.optimizer.update(b1=adamw["b1"], b2=adamw["b2"], epsilon=adamw["eps"], weight_decay=adamw["weight_decay"])
  config.optimizer.update(parameterization="completep", completep_reading="nanogpt_mup")
  config.optimizer.update(base_width=said["N_base"], base_depth=said["L_base"])
  config = with_derived(config)
  weights = {key.removeprefix("weight/"): array for key, array in data.items() if key.startswith("weight/")}
  params = hf.import_weights(weights, config.model)
  labels, counted = np.roll(data["input_ids"], -1, 1), np.roll(data["loss_mask"], -1, 1)
  counted[:, -1] = 0
  batch = {"tokens_BT": data["input_ids"], "labels_BT": labels, "weights_BT": counted}
  logits = jax.jit(Transformer(config.model).apply)({"params": params}, data["input_ids"])
  np.testing.assert_allclose(logits, data["logits"], atol=5e-5, rtol=0)
  step = jax.jit(make_train_step(config))
  state = start_state(params, init_moments(make_optimizer(config), params, "float32"))
  losses = []
  for _ in range(adamw["steps"]):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  np.testing.assert_allclose(losses, data["adamw_losses"], atol=5e-5, rtol=0)
  after = {key.removeprefix("weight_after/"): array for key, array in data.items() if key.startswith("weight_after/")}
  expected = hf.import_weights(after, config.model)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(expected), strict=True):
    # An update is at most the rate, 1e-2. An entry whose gradient is near epsilon takes its relative error from that:
    # a hundredth of an update for one alone, and next to nothing for all of them.
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=0, err_msg=jax.tree_util.keystr(path))
    assert float(jnp.mean(jnp.abs(a - b))) < 1e-6


def test_roles_of_gains_follow_the_placement_and_layers_their_numbers():
  """Catches weight decay of a norm after the branch where that of one before it is meant, in a mixture of both."""
  config = config_lib.base()
  config.model.update(num_layers=4, placement="post*1,sandwich*1,pre*2", num_heads=8)
  config.optimizer.update(decay_multipliers="input_gains:0.5,output_gains:2", rate_multipliers="mlp@2-3:3,head:0.5")
  table = optimizer_table(config)
  np.testing.assert_array_equal(table["layers/attention_norm"].decay, [2, 0.5, 0.5, 0.5])
  np.testing.assert_array_equal(table["layers/attention_norm_2"].decay, [2, 2, 2, 2])  # of the sandwich alone
  np.testing.assert_array_equal(table["layers/down"].rate, [1, 3, 3, 1])
  assert (table["layers/query"].rate, table["head"].rate, table["final_norm"].decay) == (1.0, 0.5, 0.0)
  assert table["layers/query"].decay == 1.0


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("mpl:2", "no group 'mpl'"),
    ("mlp=2", "'mlp=2' is not GROUP:FACTOR"),
    ("mlp:-1", "'mlp:-1' is not GROUP:FACTOR"),
    ("mlp:1e999", "is not GROUP:FACTOR"),
    ("mlp@0:1", "they are numbered 1 to 4"),
    ("mlp@3-9:1", "names layers that mlp has not; they are numbered 1 to 4"),
    ("mlp@4-3:1", "names layers that mlp has not"),
    ("head@2:1", "names layers that head has not"),
  ],
)
def test_what_can_not_be_read_is_named(text, words):
  """Catches a misspelt group that would be left out in silence."""
  with pytest.raises(InputError, match=r"config\.optimizer\.rate_multipliers=") as error:
    parse_multipliers(text, "rate_multipliers", 4)
  assert words in str(error.value)


def test_multipliers_are_those_of_the_update():
  """Catches a multiplier that is applied twice, to another layer, or to the decay alone: against optax by hand."""
  config = config_lib.base()
  config.model.update(vocab_size=8, embed_dim=4, mlp_dim=4, num_layers=2, num_heads=2, placement="pre")
  config.optimizer.update(clip_norm=0.0, weight_decay=0.1, epsilon=0.01)
  config.optimizer.update(
    rate_multipliers="attention@2:4", decay_multipliers="attention@1:3", epsilon_multipliers="attention@2:2"
  )
  rng = np.random.default_rng(0)
  params, first, second = ({"layers": {"query": jnp.asarray(rng.normal(size=(2, 4, 2, 2)))}} for _ in range(3))
  ours = make_optimizer(config)
  state = init_moments(ours, params, "float32")
  for grads in (first, second):
    norm = optax.tree.norm(grads)
    updates, state = ours.update(grads, state, params, norm=norm, accept=jnp.bool_(True))
  for layer, (rate, decay, epsilon) in enumerate([(1, 3, 0.01), (4, 1, 0.02)]):
    adam = optax.scale_by_adam(0.9, 0.999, epsilon)
    weights = params["layers"]["query"][layer]
    own = adam.init(weights)
    for grads in (first, second):
      expected, own = adam.update(grads["layers"]["query"][layer], own)
    expected = rate * (expected + 0.1 * decay * weights)
    np.testing.assert_allclose(updates["layers"]["query"][layer], expected, rtol=1e-5)


def test_a_parameterization_is_filled_in_once_and_never_over_what_is_stated():
  """Catches a run whose own config.json is refused, and a stated multiplier that is lost."""
  config = of_case((8, 2, 64, 32, 1.0), base_head_dim=16)
  model = config.model
  assert (model.branch_multiplier, model.logit_multiplier, model.attention_multiplier) == (
    0.25,
    0.5,
    math.sqrt(16 / 8),
  )
  assert starting_values(model)["layers/query"][0] == pytest.approx(0.02 / math.sqrt(2))
  assert starting_values(model)["head"] == 0.02
  again = with_derived(config_lib.from_json(config_lib.to_json(config)))
  assert config_lib.differences(config, again) == []
  config.model.branch_multiplier = 0.5
  with pytest.raises(InputError, match=r"config\.model\.branch_multiplier=0\.5: .* makes it 0\.25"):
    with_derived(config)

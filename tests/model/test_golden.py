"""Equal to the official PyTorch code: logits, hidden states, loss, gradients and ten Adam updates."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import llama_9m
from mixln_jax.interop import hf
from mixln_jax.model import Transformer
from mixln_jax.training.step import init_moments, loss_sum, make_optimizer, make_train_step, start_state
from model.rounding import NETWORK, assert_near

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
# Both sides are fp32, with sums of up to 128 terms in orders of their own: the estimate of rounding.py times two.
# The backward pass is as long again, and a gradient sums over all positions.
GRADIENT = 1e-4
# Adam divides by the root of the second moment: a gradient near 0 moves its weight by a whole step of 1e-3 in the
# direction of its rounding. Hence ten times NETWORK for losses of 1.3 to 5; they fall by 3 and more.
TEN_UPDATES = 1e-4
FILES = {
  "pre": "pre",
  "post": "post",
  "mix_1_of_4": "mix:0.25",
  "mix_2_of_4": "mix:0.5",
  "post_post_post_pre": "post*3,pre*1",
  "sandwich": "sandwich",
  "deeppost_as_coded": "deepnorm_as_published",
}


def load(name, unroll=1):
  data = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
  meta = json.loads(bytes(data["meta"]))
  config = llama_9m.get_config()
  config.train.micro_batches = 1
  config.model.update(
    vocab_size=meta["vocab_size"],
    embed_dim=meta["hidden_size"],
    mlp_dim=meta["intermediate_size"],
    num_layers=meta["num_hidden_layers"],
    num_heads=meta["num_attention_heads"],
    placement=FILES[name],
    unroll=unroll,
  )
  ids, mask = data["input_ids"], data["loss_mask"]
  labels, weights = np.roll(ids, -1, 1), np.roll(mask, -1, 1)
  weights[:, -1] = 0
  batch = {"tokens_BT": jnp.asarray(ids), "labels_BT": jnp.asarray(labels), "weights_BT": jnp.asarray(weights)}
  return data, config, hf.import_weights(tensors(data, "weight/"), config.model), batch


def tensors(data, prefix):
  return {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)}


@pytest.mark.parametrize(
  ("name", "unroll"),
  [
    *((name, 1) for name in FILES),
    *(pytest.param(name, 0, marks=[] if name == "mix_2_of_4" else pytest.mark.slow) for name in FILES),
  ],
)
def test_forward_and_gradients(name, unroll):
  data, config, params, batch = load(name, unroll)
  model = Transformer(config.model)
  logits = jax.jit(model.apply)({"params": params}, batch["tokens_BT"])
  assert_near(logits, data["logits"])
  hidden, taps = jax.jit(functools.partial(model.apply, method="hidden"))({"params": params}, batch["tokens_BT"])
  np.testing.assert_array_equal(taps["embedded_BTD"], data["hidden/0"])
  for index in range(3):
    assert_near(taps["stream_LBTD"][index], data[f"hidden/{index + 1}"])
  assert_near(hidden, data["hidden/4"])

  def mean(p):
    total, count = loss_sum(model, p, batch)
    return total / count

  value, actual = jax.jit(jax.value_and_grad(mean))(params)
  np.testing.assert_allclose(value, data["loss"], rtol=NETWORK)
  exported, expected = hf.export_weights(actual, config.model), tensors(data, "grad/")
  assert exported.keys() == expected.keys()
  for tensor, gradient in expected.items():
    assert_near(exported[tensor], gradient, GRADIENT, err_msg=tensor)


@pytest.mark.parametrize("name", FILES)
def test_ten_updates_of_the_train_step(name):
  data, config, params, batch = load(name)
  adam = json.loads(bytes(data["meta"]))["adam"]
  config.train.num_steps = adam["steps"]
  config.optimizer.update(
    learning_rate=adam["lr"], b1=adam["b1"], b2=adam["b2"], epsilon=adam["eps"], clip_norm=float(adam["clip"])
  )
  config.optimizer.update(schedule="constant", warmup_steps=0)
  step = jax.jit(make_train_step(config))
  state = start_state(params, init_moments(make_optimizer(config), params, "float32"))
  losses = []
  for _ in range(adam["steps"]):
    state, metrics = step(state, batch)
    losses.append(metrics["loss"])
  np.testing.assert_allclose(losses, data["adam_losses"], atol=TEN_UPDATES)
  assert losses[-1] < losses[0]

"""Equal to the official PyTorch code: logits, hidden states, loss, gradients and ten Adam updates."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.model import Transformer
from mixln_jax.training.step import TrainState, init_moments, loss_sum, make_optimizer, make_train_step

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FILES = {
  "pre": "pre",
  "post": "post",
  "mix_1_of_4": "mix:0.25",
  "mix_2_of_4": "mix:0.5",
  "post_post_post_pre": "post*3,pre*1",
  "sandwich": "sandwich",
}
# Which of the official gains a layer's first and second gain are, for attention and MLP.
GAINS = {
  "pre": (("input_layernorm",), ("post_attention_layernorm",)),
  "post": (("post_attention_layernorm",), ("post_feedforward_layernorm",)),
  "sandwich": (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
  ),
}


def to_tree(tensors, kinds, heads):
  """Official names and layout -> our tree."""

  def stack(name, transform):
    return jnp.stack([transform(tensors[f"model.layers.{i}.{name}.weight"]) for i in range(len(kinds))])

  def per_head(w):  # [H K, D] -> [D, H, K]
    return w.T.reshape(w.shape[1], heads, -1)

  layers = {
    "query": stack("self_attn.q_proj", per_head),
    "key": stack("self_attn.k_proj", per_head),
    "value": stack("self_attn.v_proj", per_head),
    "output": stack("self_attn.o_proj", lambda w: w.T.reshape(heads, -1, w.shape[0])),
    "gate": stack("mlp.gate_proj", lambda w: w.T),
    "up": stack("mlp.up_proj", lambda w: w.T),
    "down": stack("mlp.down_proj", lambda w: w.T),
  }
  for sublayer, which in (("attention_norm", 0), ("mlp_norm", 1)):
    for position in range(len(GAINS[kinds[0]][which])):
      names = [GAINS[kind][which][position] for kind in kinds]
      rows = [tensors[f"model.layers.{i}.{name}.weight"] for i, name in enumerate(names)]
      layers[sublayer + ("_2" if position else "")] = jnp.stack(rows)
  return {
    "embedding": tensors["model.embed_tokens.weight"],
    "layers": layers,
    "final_norm": tensors["model.norm.weight"],
    "head": tensors["lm_head.weight"].T,
  }


def load(name, unroll):
  data = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
  meta = json.loads(bytes(data["meta"]))
  config = config_lib.base()
  config.model.update(
    vocab_size=meta["vocab_size"],
    embed_dim=meta["hidden_size"],
    mlp_dim=meta["intermediate_size"],
    num_layers=meta["num_hidden_layers"],
    num_heads=meta["num_attention_heads"],
    placement=FILES[name],
    unroll=unroll,
  )
  kinds = placement.parse(FILES[name], meta["num_hidden_layers"]).strip.split()

  def tree(prefix):
    tensors = {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)}
    return jax.tree.map(jnp.asarray, to_tree(tensors, kinds, meta["num_attention_heads"]))

  ids, mask = data["input_ids"], data["loss_mask"]
  labels, weights = np.roll(ids, -1, 1), np.roll(mask, -1, 1)
  weights[:, -1] = 0
  batch = {"tokens_BT": jnp.asarray(ids), "labels_BT": jnp.asarray(labels), "weights_BT": jnp.asarray(weights)}
  return data, config, tree("weight/"), tree("grad/"), batch


@pytest.mark.parametrize(("name", "unroll"), [("mix_1_of_4", 0), *((name, 1) for name in FILES)])
def test_forward_and_gradients(name, unroll):
  data, config, params, grads, batch = load(name, unroll)
  model = Transformer(config.model)
  logits = jax.jit(model.apply)({"params": params}, batch["tokens_BT"])
  np.testing.assert_allclose(logits, data["logits"], atol=2e-5)
  hidden, taps = jax.jit(functools.partial(model.apply, method="hidden"))({"params": params}, batch["tokens_BT"])
  np.testing.assert_allclose(taps["embedded_BTD"], data["hidden/0"], atol=2e-5)
  for index in range(3):
    np.testing.assert_allclose(taps["stream_LBTD"][index], data[f"hidden/{index + 1}"], atol=2e-5)
  np.testing.assert_allclose(hidden, data["hidden/4"], atol=2e-5)

  def mean(p):
    total, count = loss_sum(model, p, batch)
    return total / count

  value, actual = jax.jit(jax.value_and_grad(mean))(params)
  np.testing.assert_allclose(value, data["loss"], atol=2e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", FILES)
def test_ten_updates_of_the_train_step(name):
  data, config, params, _, batch = load(name, unroll=1)
  adam = json.loads(bytes(data["meta"]))["adam"]
  config.train.num_steps = adam["steps"]
  config.optimizer.update(
    learning_rate=adam["lr"], b1=adam["b1"], b2=adam["b2"], epsilon=adam["eps"], clip_norm=float(adam["clip"])
  )
  config.optimizer.update(schedule="constant", warmup_steps=0)
  step = jax.jit(make_train_step(config))
  state = TrainState(jnp.int32(0), params, init_moments(make_optimizer(config), params, "float32"))
  losses = []
  for _ in range(adam["steps"]):
    state, metrics = step(state, batch)
    losses.append(metrics["loss"])
  np.testing.assert_allclose(losses, data["adam_losses"], atol=1e-4)
  assert losses[-1] < losses[0]

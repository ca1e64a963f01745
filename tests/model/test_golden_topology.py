"""Equal to the reference code of each residual topology and norm kind: tests/data/golden/README.md says whose it is.

Tolerances are those of the golden files: what the same references give in float32 instead of float64, times two and
more. Gradients are compared with the largest one of a file: some vanish in exact arithmetic (streams that are equal
before the first sublayer, scales that a norm does not see), and are rounding noise in float32.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import llama_9m
from mixln_jax import config as config_lib
from mixln_jax.interop import hf
from mixln_jax.model import Transformer
from mixln_jax.model.initial import initial_params
from mixln_jax.model.parameters import parameters
from mixln_jax.model.transformer import project_to_logits
from mixln_jax.placement import STREAM_SETS
from mixln_jax.training.step import init_moments, loss_sum, make_optimizer, make_train_step, start_state
from model.rounding import assert_near

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "golden" / "topology"
# method -> fields of config.model, formatted with what the file says of itself.
FIELDS = json.loads((DATA / "golden_fields.json").read_text())
# A variant that is another placement here.
VARIANTS = {"mhc_init_zero_bias": "mhc_zero_bias:{n}"}
LOGITS, LOSS, GRADIENT, FIVE_UPDATES = 5e-5, 1e-5, 1e-4, 5e-5
NAMES = sorted(
  path.stem for path in GOLDEN.glob("*.npz") if path.stem != "prores_factors" and "depth_metrics" not in path.stem
)
RANDOM = [name for name in NAMES if "_init" not in name]
INITIAL = [name for name in NAMES if "_init" in name]
# One of each mechanism; the others have the same with a column, a norm or a number changed.
ALWAYS = ("attnres_block", "b2t", "derf_pre", "hc_dynamic", "layernorm_mix", "mhc", "residual_dual", "siamese")
ALWAYS += ("value_residual", "x0_skip")
UPDATED_ALWAYS = ("attnres_full", "dyt_pre", "siamese")


class Golden(NamedTuple):
  data: dict
  meta: dict
  config: config_lib.Config
  batch: dict

  def tensors(self, prefix):
    return {key.removeprefix(prefix): array for key, array in self.data.items() if key.startswith(prefix)}

  @property
  def params(self):
    return hf.import_weights(self.tensors("weight/"), self.config.model)


def load(name):
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
    data = dict(file)
  meta = json.loads(bytes(data["meta"]))
  config = llama_9m.get_config()
  config.train.micro_batches = 1
  config.model.update(
    vocab_size=meta["vocab_size"],
    embed_dim=meta["hidden_size"],
    mlp_dim=meta["intermediate_size"],
    num_layers=meta["num_hidden_layers"],
    num_heads=meta["num_attention_heads"],
    unroll=1,
  )
  words = {**meta["hyperparameters"], "num_layers": meta["num_hidden_layers"]}
  words["rest"] = meta["num_hidden_layers"] - words.get("post", 0)
  fields = dict(FIELDS[meta["method"]])
  fields["placement"] = VARIANTS.get(name, fields["placement"])
  config.model.update({field: text.format(**words) for field, text in fields.items()})
  return Golden(data, meta, config, batch_of(data) if "input_ids" in data else {})


def batch_of(data):
  labels, weights = np.roll(data["input_ids"], -1, 1), np.roll(data["loss_mask"], -1, 1)
  weights[:, -1] = 0
  arrays = {"tokens_BT": data["input_ids"], "labels_BT": labels, "weights_BT": weights}
  return {key: jnp.asarray(array) for key, array in arrays.items()}


def some_always(names):
  return [pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in RANDOM]


def near(actual, expected, tolerance, name=""):
  np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0, err_msg=name)


def test_every_method_has_its_file_and_every_file_its_method():
  """A golden file that nothing reads, or an entry whose file was not added: a topology that nobody compares."""
  methods = {name: json.loads(bytes(np.load(GOLDEN / f"{name}.npz")["meta"]))["method"] for name in NAMES}
  assert set(methods.values()) == set(FIELDS)
  assert {methods[name] for name in RANDOM} == set(FIELDS)
  assert set(VARIANTS) < set(NAMES)
  assert set(ALWAYS) | set(UPDATED_ALWAYS) < set(RANDOM)
  kinds = {config_lib.table(load(name).config.model).streams.kind for name in RANDOM} - {""}
  assert kinds == set(STREAM_SETS), "a kind of residual streams that no golden file has"
  norms = {load(name).config.model.norm for name in RANDOM}
  assert norms == set(config_lib.NORMS), "a kind of norm that no golden file has"


@pytest.mark.parametrize("name", some_always(ALWAYS))
def test_logits_streams_and_gradients(name):
  """Any coefficient, norm, read-out or stream that is not the reference's, and a tensor that the layout loses."""
  golden = load(name)
  model = Transformer(golden.config.model)
  params, tokens = golden.params, golden.batch["tokens_BT"]
  hidden, taps = jax.jit(functools.partial(model.apply, method="hidden"))({"params": params}, tokens)
  near(project_to_logits(hidden, params["head"]), golden.data["logits"], LOGITS)
  near(taps["embedded_BTD"], golden.data["hidden/0"], LOGITS)
  check_streams(golden, taps)
  near(hidden, golden.data["hidden/final"], LOGITS)

  def mean(p):
    total, count = loss_sum(model, p, golden.batch)
    return total / count

  value, gradient = jax.jit(jax.value_and_grad(mean))(params)
  near(value, golden.data["loss"], LOSS)
  exported, expected = hf.export_weights(gradient, golden.config.model), golden.tensors("grad/")
  assert exported.keys() == expected.keys()
  largest = max(np.abs(tensor).max() for tensor in expected.values())
  for tensor, gradient in expected.items():
    near(exported[tensor], gradient, GRADIENT * largest, tensor)


def check_streams(golden, taps):
  """The streams after each layer; of attention residuals, whose files have no others, those after the last one."""
  streams = config_lib.table(golden.config.model).streams
  if streams.kind == "sources":
    after = {golden.config.model.num_layers: golden.data["sources"]}
  elif "streams/0" in golden.data:
    after = {int(layer): stream for layer, stream in golden.tensors("streams/").items() if layer != "0"}
  else:
    hidden = {layer: stream for layer, stream in golden.tensors("hidden/").items() if layer not in ("0", "final")}
    after = {int(layer): stream_BTD[:, :, None] for layer, stream_BTD in hidden.items()}
  assert len(after) in (1, golden.config.model.num_layers)
  for layer, expected_BTND in after.items():
    the_stream_BTD = expected_BTND.sum(axis=2) if streams.sums else expected_BTND[:, :, 0]
    # Streams without a norm grow to 65 here: what is summed has that size.
    assert_near(taps["stream_LBTD"][layer - 1], the_stream_BTD, err_msg=f"after layer {layer}")
    if expected_BTND.shape[2] == 1:
      continue
    for index in range(expected_BTND.shape[2]):
      stream_BTD, name = taps[f"stream_{index}_LBTD"][layer - 1], f"stream {index} after layer {layer}"
      assert_near(stream_BTD, expected_BTND[:, :, index], err_msg=name)


@pytest.mark.parametrize("name", some_always(UPDATED_ALWAYS))
def test_five_updates_of_the_train_step(name):
  """A parameter that the optimizer leaves out, or a gradient that belongs to another layer."""
  golden = load(name)
  adam, config, params = golden.meta["adam"], golden.config, golden.params
  config.train.num_steps = adam["steps"]
  config.optimizer.update(
    learning_rate=adam["lr"], b1=adam["b1"], b2=adam["b2"], epsilon=adam["eps"], clip_norm=float(adam["clip"])
  )
  config.optimizer.update(schedule="constant", warmup_steps=0)
  step = jax.jit(make_train_step(config))
  state = start_state(params, init_moments(make_optimizer(config), params, "float32"))
  losses = []
  for _ in range(adam["steps"]):
    state, metrics = step(state, golden.batch)
    losses.append(metrics["loss"])
  near(losses, golden.data["adam_losses"], FIVE_UPDATES)


@pytest.mark.parametrize("name", INITIAL)
def test_what_a_method_adds_starts_as_its_source_says(name):
  """A bias, scale or static coefficient that starts elsewhere, or a matrix drawn with another std."""
  golden = load(name)
  ours = hf.export_weights(jax.jit(lambda: initial_params(golden.config.model, 0))(), golden.config.model)
  drawn = {param.elsewhere for param in parameters(golden.config.model).values() if param.drawn and np.any(param.std)}
  expected = golden.tensors("weight/")
  assert set(expected) == set(golden.meta["extra_parameters"]) <= set(ours)
  for tensor, value in expected.items():
    if any(tensor.endswith(theirs) for theirs in drawn):
      # Both are normal draws of 32 numbers at least; a std of 256 numbers has a standard error of 4.4 %.
      near(np.std(ours[tensor]) / np.std(value), 1.0, 0.5, tensor)
    else:
      near(ours[tensor], value, 1e-6, tensor)

"""An export is compared with the model before it is written, and rejected where the layouts can't say what it is."""

import dataclasses
import json
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, small_model

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.data.tokenizer import ByteTokenizer
from mixln_jax.data.tokenizer_training import train_sentencepiece
from mixln_jax.errors import InputError
from mixln_jax.interop import check, export, forward, hf
from mixln_jax.interop.check import check_export
from mixln_jax.model import norm
from mixln_jax.model.parameters import Param


def exported(model, params=None, official=True):
  """The arguments of `check_export`."""
  params = random_params(model) if params is None else params
  return params, model, hf.export_weights(params, model), hf.hf_config(model, 64, official=official)


def replace_in_model(monkeypatch, name, original, other):
  """Replaces a function in every module of the model that has imported it, as an edit of the code would."""
  modules = [module for key, module in sys.modules.items() if key.startswith("mixln_jax.model")]
  for module in modules:
    if getattr(module, name, None) is original:
      monkeypatch.setattr(module, name, other)


def has_several_streams(name):
  return bool(placement.parse(name, 4).streams.kind)


ONE_STREAM = [name for name in placement.ROWS if not has_several_streams(name)]


@pytest.mark.parametrize("name", [*ONE_STREAM, "mix:0.5", "post/pre*1,post*1+gpas,hybrid*1,pre*1+qk_norm_full"])
def test_an_untouched_model_passes(name, monkeypatch):
  """Catches a guard that rejects what is right: every row must be exportable, at the tolerance with room to spare."""
  model = small_model(placement=name, num_kv_heads=1, mlp_pad_to=32)
  monkeypatch.setattr(check, "TOLERANCE", 0.01 * check.TOLERANCE)
  check_export(*exported(model))


@pytest.mark.parametrize("name", [*filter(has_several_streams, placement.ROWS), "pre+x0", "hc:2*1,pre*3"])
def test_several_streams_are_rejected_by_name(name):
  """Catches an export of a wiring that no reader of the layouts knows."""
  with pytest.raises(InputError, match=rf"placement='{re.escape(name)}' has \d+ residual streams"):
    check_export({}, small_model(placement=name), {}, {})


@pytest.mark.parametrize(
  ("field", "fields"),
  [
    ("norm='layernorm'", {"norm": "layernorm"}),
    ("value_residual", {"placement": "pre+value_residual"}),
    ("ramp", {"placement": "pre+prores:linear:8"}),
  ],
)
def test_what_the_layouts_have_no_word_for_is_rejected_by_name(field, fields):
  model = small_model(**fields)
  with pytest.raises(InputError, match=field):
    check_export({}, model, {}, hf.hf_config(model, 64, official=True))


STOCK = {
  "llama": {"placement": "pre", "tied_embeddings": True, "rope_scaling": "llama3", "rope_original_length": 16},
  "qwen2": {"placement": "pre", "qkv_bias": True, "head_dim": 6},
  "qwen3": {"placement": "pre+qk_norm"},
  "olmo2": {"placement": "reordered+qk_norm_full"},
}


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize("official", [False, True])
def test_stock_families_pass_in_both_layouts(family, official):
  """Catches a forward pass that reads a stock family's tensors, biases or RoPE in another way than the model."""
  arguments = exported(small_model(**STOCK[family]), official=official)
  assert arguments[-1]["model_type"] == ("mixln_llama" if official else family)
  check_export(*arguments)
  assert STOCK.keys() == forward.STOCK.keys()


def test_bf16_parameters_pass_at_the_same_tolerance():
  """Catches a comparison in which one side rounds: bf16 numbers are exact in fp32, so both sides read the same."""
  model = small_model(placement="sandwich", param_dtype="bfloat16", dtype="bfloat16")
  check_export(*exported(model))


def layer_norm(x_BTD, gain_D, *, epsilon, on=True, scale=1.0):
  """`rms_norm`'s arguments, with the mean taken off where it normalises."""
  x_BTD = x_BTD.astype(jnp.float32)
  if on is not False and gain_D is not None:
    x_BTD = jnp.where(on, x_BTD - x_BTD.mean(axis=-1, keepdims=True), x_BTD)
  return RMS_NORM(x_BTD, gain_D, epsilon=epsilon, on=on, scale=scale)


RMS_NORM = norm.rms_norm


@pytest.mark.parametrize("placement_string", ["pre", "post", "mix:0.5"])
def test_another_norm_is_rejected(placement_string, monkeypatch):
  """Catches an export that trusts names: a LayerNorm without bias has the very tensors of an RMSNorm."""
  replace_in_model(monkeypatch, "rms_norm", RMS_NORM, layer_norm)
  with pytest.raises(InputError, match=r"layer 0.*differs from this model.*difference is \d.*nothing was written"):
    check_export(*exported(small_model(placement=placement_string)))


def test_another_activation_is_rejected(monkeypatch):
  """Catches an export that writes `hidden_act: silu` whatever the model computes."""
  gelu = nn.gelu
  monkeypatch.setattr(nn, "silu", gelu)
  monkeypatch.setattr(jax.nn, "silu", gelu)
  with pytest.raises(InputError, match="differs from this model"):
    check_export(*exported(small_model(placement="pre")))


@pytest.mark.parametrize("change", ["base", "interleaved"])
def test_another_rope_is_rejected(change, monkeypatch):
  """Catches a comparison on one token, or on neighbours only: there RoPE does next to nothing."""
  from mixln_jax.model import attention

  if change == "base":
    original = attention.rope_frequencies
    replace_in_model(monkeypatch, "rope_frequencies", original, lambda model: original(model) ** 1.5)
  else:
    original = attention.rotate

    def interleaved(x_BTHK, rope):
      swapped = jnp.concatenate((x_BTHK[..., ::2], x_BTHK[..., 1::2]), axis=-1)
      return original(swapped, rope)

    replace_in_model(monkeypatch, "rotate", original, interleaved)
  with pytest.raises(InputError, match="differs from this model"):
    check_export(*exported(small_model(placement="pre")))


def test_initial_weights_are_enough_to_see_another_norm(monkeypatch):
  """Catches a tolerance that only a trained model exceeds: a run may be exported at its first step."""
  from mixln_jax.model.initial import initial_params

  model = small_model(placement="pre", embed_dim=256, mlp_dim=512, num_heads=4)
  params = jax.jit(lambda: initial_params(model, 0))()
  check_export(*exported(model, params))
  replace_in_model(monkeypatch, "rms_norm", RMS_NORM, layer_norm)
  with pytest.raises(InputError, match="differs from this model"):
    check_export(*exported(model, params))


@pytest.mark.parametrize("name", ["pre", "post"])
def test_a_deep_model_with_large_weights_passes(name):
  """Catches a comparison from end to end: here one rounding in a layer becomes other logits 24 layers later."""
  check_export(*exported(small_model(placement=name, embed_dim=64, mlp_dim=96, num_layers=24)))


def test_a_change_behind_the_layers_is_rejected(monkeypatch):
  """Catches a comparison of the layers alone: a cap on the logits changes no residual stream."""
  from mixln_jax.model import transformer

  original = transformer.project_to_logits
  capped = lambda hidden_BTD, head_DV: jnp.tanh(original(hidden_BTD, head_DV))  # noqa: E731
  monkeypatch.setattr(transformer, "project_to_logits", capped)
  with pytest.raises(InputError, match="the final norm and the head"):
    check_export(*exported(small_model(placement="post")))


def test_a_change_before_the_layers_is_rejected(monkeypatch):
  """Catches a comparison that starts after the first layer: Gemma scales its embedding, LLaMA does not."""
  model = small_model(placement="post")
  params, _, tensors, description = exported(model)
  scaled = {**params, "embedding": params["embedding"] * 5.0}
  with pytest.raises(InputError, match="the embedding"):
    check_export(scaled, model, tensors, description)


def test_numbers_that_are_not_finite_are_not_taken_for_a_difference():
  """Catches a comparison that NaN passes, since it is greater than nothing."""
  model = small_model(placement="pre")
  params = random_params(model)
  params["layers"]["mlp_norm"] = params["layers"]["mlp_norm"].at[1, 0].set(jnp.nan)
  with pytest.raises(InputError, match=r"layer 1 .*not finite"):
    check_export(*exported(model, params))


@pytest.mark.parametrize("path", ["layers/attention_norm_bias", "positions", "final_norm_bias"])
def test_a_parameter_without_a_name_is_rejected_by_its_name(path, monkeypatch):
  """Catches a KeyError, and a parameter of the table that is left out of the export in silence."""
  original = hf.parameters

  def with_another(model):
    shape = (model.num_layers, model.embed_dim)
    return original(model) | {path: Param(path, shape, ("layers", "norm"))}

  model = small_model(placement="pre")
  params = random_params(model)
  monkeypatch.setattr(hf, "parameters", with_another)
  with pytest.raises(InputError, match=f"parameter {path}: .*no name for it"):
    hf.export_weights(params, model)


@pytest.mark.parametrize("path", ["layers/attention_norm_bias", "positions"])
def test_a_leaf_that_is_not_in_the_table_is_rejected(path):
  """Catches an export that writes what it knows of a tree and says nothing of the rest."""
  model = small_model(placement="pre")
  params = random_params(model)
  branch = params["layers"] if path.startswith("layers/") else params
  branch[path.removeprefix("layers/")] = jnp.zeros((model.num_layers, model.embed_dim))
  with pytest.raises(InputError, match=f"parameter {path}: .*no name for it"):
    hf.export_weights(params, model)


def test_a_missing_tensor_and_an_additional_one_are_named():
  """Catches a reader that makes up what is missing (transformers draws it at random), or ignores what is left."""
  params, model, tensors, description = exported(small_model(placement="pre"))
  gate = "model.layers.2.mlp.gate_proj.weight"
  with pytest.raises(InputError, match=f"{gate} is missing"):
    check_export(params, model, {name: tensors[name] for name in tensors if name != gate}, description)
  with pytest.raises(InputError, match=r"model\.layers\.0\.x and 0 more tensors have no counterpart"):
    check_export(params, model, {**tensors, "model.layers.0.x": np.ones(3)}, description)
  with pytest.raises(InputError, match=rf"{gate} has shape \(3,\)"):
    check_export(params, model, {**tensors, gate: np.ones(3)}, description)


# Fields that the layouts have no place for: a model that sets one is rejected by the field's name.
REJECTED_FIELDS = {
  *("norm", "activation", "biases", "bidirectional", "embedding_norm", "final_norm", "head_transform"),
  *("learned_positions", "token_types", "branch_multiplier", "attention_multiplier", "logit_multiplier"),
}


def test_every_field_of_the_model_is_known_to_the_export():
  """Fails when a field is added to config.model: say in KNOWN_FIELDS where the export puts it, once it does."""
  fields = {name.removeprefix("model.") for name in config_lib.FIELDS if name.startswith("model.")}
  assert fields - REJECTED_FIELDS == check.KNOWN_FIELDS.keys()
  config_names = set(hf.hf_config(small_model(), 64, official=True)) | {"placement_table"}
  for name, goes_to in check.KNOWN_FIELDS.items():
    if " " not in goes_to:
      assert goes_to in config_names, name


def test_an_unknown_field_is_rejected_unless_it_has_its_default(monkeypatch):
  """Catches an export that ignores a field which was added to the model and not to the layouts."""
  monkeypatch.delitem(check.KNOWN_FIELDS, "rope_base")
  check.check_fields(small_model())
  with pytest.raises(InputError, match=r"config\.model\.rope_base=5000\.0 is unknown to the export.*default 10000\.0"):
    check.check_fields(small_model(rope_base=5000.0))


def test_a_rope_scaling_that_the_layouts_lack_is_rejected():
  """Catches a new choice of a known field that is written as another one: everything but "none" was "llama3"."""
  model = small_model(placement="pre")
  model.rope_scaling = "yarn"
  with pytest.raises(InputError, match="rope_scaling='yarn'"):
    hf.hf_config(model, 64)


def test_every_column_of_the_rule_is_known_to_both_readers():
  """Fails when a column is added to `Row`: teach it to the modelling file and to forward.py and name it there, or name
  it here, where a row that uses it is rejected by its name (`check_streams`, `check_columns`)."""
  rejected = {"read", "mix", "write", "wiring", "norm_streams", "streams", "stream_start", "read_out_weight"}
  rejected |= {"value_residual", "value_residual_two", "ramp"}
  columns = {field.name for field in dataclasses.fields(placement.Row) if "initial" not in field.metadata} - rejected
  assert columns == set(forward.COLUMNS)
  modeling = hf.MODELING.read_text()
  for column in columns:
    kind, _, factor = column.partition("_")
    read_by_kind = kind in ("vector", "scalar") and factor in ("c_res", "c_out")
    assert f'"{column}"' in modeling or read_by_kind, column


def test_an_unknown_column_of_the_table_is_rejected_by_name():
  """Catches a placement whose new column the modelling file would ignore: its readers use `row.get`."""
  params, model, tensors, description = exported(small_model(placement="post"))
  description["placement_table"][1]["mlp"]["norm_twice"] = True
  with pytest.raises(InputError, match=r"column norm_twice=True of layer 1's mlp is unknown to the export"):
    check_export(params, model, tensors, description)


def test_exported_tensors_are_not_all_in_memory_at_once():
  """Catches a second copy of all weights: a tensor is made when it is asked for, and is not kept."""
  model = small_model(placement="post")
  tensors = hf.export_weights(random_params(model), model)
  name = "model.layers.0.mlp.up_proj.weight"
  assert tensors[name] is not tensors[name]
  assert list(tensors) == list(dict(tensors))
  assert "model.layers.9.mlp.up_proj.weight" not in tensors


def test_the_hint_says_how_a_prompt_begins():
  """Catches a hint that leaves the start token out: then greedy generation elsewhere gives another text."""
  model = small_model(placement="mix:0.25")
  description = hf.hf_config(model, 64, official=True)
  tokenizer = train_sentencepiece(["the quick brown fox", "naïve cafés serve tea"] * 20, 300)
  files = export.modeling_files(description) | export.tokenizer_files(tokenizer, 64)
  assert not json.loads(files["tokenizer_config.json"])["add_bos_token"]
  hint = "\n".join(export.loading_hint(description | export.token_ids(tokenizer), files))
  assert "trust_remote_code=True" in hint
  assert "[tokenizer.eos_token_id, *tokenizer(PROMPT, add_special_tokens=False).input_ids]" in hint
  stock = hf.hf_config(small_model(placement="pre"), 64) | export.token_ids(ByteTokenizer())
  hint = "\n".join(export.loading_hint(stock, {}))
  assert "trust_remote_code" not in hint
  assert f"end-of-document token, id {ByteTokenizer().eos_id}" in hint

"""Against transformers: weights and configs come in and go out with equal logits; other models are refused."""

import hashlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
from helpers import random_params, random_tokens, small_model
from model.cases import each_placement
from model.rounding import assert_near

from mixln_jax import config as config_lib
from mixln_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from mixln_jax.data.tokenizer_training import train_hugging_face, train_sentencepiece
from mixln_jax.errors import InputError
from mixln_jax.interop import hf
from mixln_jax.interop.export import tokenizer_files
from mixln_jax.interop.safetensors_folder import SafetensorsFolder, write_folder
from mixln_jax.model import Transformer

GOLDEN = Path(__file__).parents[1] / "data" / "transformers"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def load(name):
  data = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
  tensors = {key.removeprefix("weight/"): data[key] for key in data.files if key.startswith("weight/")}
  config = json.loads(bytes(data["config"]))
  model = config_lib.base().model
  model.update(hf.model_fields(config))
  return data, config, tensors, model


def test_every_family_has_its_values():
  assert {load(name)[1]["model_type"] for name in NAMES} == {family.model_type for family in hf.FAMILIES}
  assert len(NAMES) == 7


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
  data, _, tensors, model = load(name)
  params = hf.import_weights(tensors, model)
  logits = jax.jit(Transformer(model).apply)({"params": params}, data["tokens"])
  assert_near(logits, data["logits"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shard_bytes", [10**9, 2000])
def test_what_comes_in_goes_out(name, shard_bytes, tmp_path):
  _, config, tensors, model = load(name)
  params = hf.import_weights(tensors, model)
  written = hf.hf_config(model, 64)
  files = write_folder(tmp_path / "out", hf.export_weights(params, model), written, shard_bytes)
  assert (files > 3) == (shard_bytes == 2000)
  folder = SafetensorsFolder(tmp_path / "out")
  assert dict(folder).keys() == tensors.keys()
  for tensor, array in tensors.items():
    np.testing.assert_array_equal(folder[tensor], array, err_msg=tensor)
  again = config_lib.base().model
  again.update(hf.model_fields(folder.config()))
  assert again == model
  assert written["model_type"] == config["model_type"]


@pytest.mark.parametrize("name", each_placement())
def test_any_placement_comes_back_from_the_official_layout(name, tmp_path):
  """A learned factor or a norm of a row that has no name there would be lost or come back elsewhere."""
  model = small_model(placement=name, mlp_pad_to=32, num_kv_heads=1)
  params = random_params(model)
  if hf.family_of(model) is None:
    with pytest.raises(InputError, match=r"not a stock decoder.*layout .official."):
      hf.hf_config(model, 64)
  write_folder(tmp_path, hf.export_weights(params, model), hf.hf_config(model, 64, official=True), 10**9)
  folder = SafetensorsFolder(tmp_path)
  again = config_lib.base().model
  again.update(hf.model_fields(folder.config()), mlp_pad_to=32)
  assert again.placement == name
  back = hf.export_weights(hf.import_weights(folder, again), again)
  exported = hf.export_weights(params, model)
  assert back.keys() == exported.keys()
  for tensor, array in exported.items():
    np.testing.assert_array_equal(back[tensor], array, err_msg=tensor)


@pytest.mark.parametrize("name", ["keel*2,admin*1+gpas,layerscale*1", "hybrid*2,reordered*1+qk_norm_full,skipinit*1"])
def test_what_comes_back_computes_the_same(name, tmp_path):
  """What no layer of a mixture uses is not exported, and must not matter."""
  model = small_model(placement=name, mlp_pad_to=32, num_kv_heads=1)
  params, tokens = random_params(model), random_tokens(model)
  write_folder(tmp_path, hf.export_weights(params, model), hf.hf_config(model, 64, official=True), 10**9)
  imported = hf.import_weights(SafetensorsFolder(tmp_path), model)
  logits = jax.jit(lambda p: Transformer(model).apply({"params": p}, tokens))
  np.testing.assert_array_equal(logits(imported), logits(params))


EXPORTED = dict(np.load(GOLDEN.parent / "exported.npz"))
OPTIONS = json.loads(str(EXPORTED["options"]))


def test_the_modelling_file_is_the_one_that_was_compared():
  assert {"mix:0.25", "post", "lns", "sandwich", "deepnorm"} < OPTIONS.keys()
  assert hashlib.sha256(hf.MODELING.read_bytes()).hexdigest() == str(EXPORTED["modeling_sha256"]), (
    "the modelling file has changed: run tests/data/make_export_golden.py, which compares it with the model"
  )


@pytest.mark.parametrize(
  "name", [name if name == "mix:0.25" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_the_modelling_file_computes_the_exported_model(name):
  """What transformers made of the exported folder with it: tests/data/make_export_golden.py."""
  model = small_model(placement=name, **OPTIONS[name])
  logits = Transformer(model).apply({"params": random_params(model)}, random_tokens(model, 2, 10))
  assert_near(logits, EXPORTED[f"logits/{name}"])


def test_tokenizers_go_along_where_transformers_builds_the_same_of_them():
  """Equal ids there: tests/data/make_export_golden.py."""
  texts = ["the quick brown fox jumps over a lazy dog", "naïve cafés serve tea"] * 20
  files = tokenizer_files(train_sentencepiece(texts, 300), 64)
  assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "LlamaTokenizer"
  assert set(tokenizer_files(train_hugging_face(texts, 270), 64)) == {"tokenizer.json", "tokenizer_config.json"}
  assert not tokenizer_files(ByteTokenizer(), 64)
  other = io.BytesIO()
  trainer = sentencepiece.SentencePieceTrainer
  trainer.train(
    sentence_iterator=iter(texts), model_writer=other, vocab_size=40, model_type="unigram", hard_vocab_limit=False,
    minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
  )  # fmt: skip
  assert set(tokenizer_files(SentencePieceTokenizer(other.getvalue(), "T5's kind"), 64)) == {"tokenizer.model"}


def test_initial_weights_and_learned_constants_are_no_part_of_being_stock():
  assert hf.family_of(small_model(placement="pre+scaled_init")).model_type == "llama"
  assert hf.family_of(small_model(placement="mix:0")).model_type == "llama"
  for name in ("lns", "post", "pre*3,post*1", "reordered", "pre+gpas", "pre*2,pre*2+qk_norm"):
    assert hf.family_of(small_model(placement=name)) is None, name


def test_the_official_names_follow_where_a_layer_has_its_norms():
  def norms(name):
    return sorted(
      tensor.split(".")[-2]
      for tensor in hf.export_weights(random_params(small_model(placement=name)), small_model(placement=name))
      if tensor.startswith("model.layers.0.") and tensor.endswith("layernorm.weight")
    )

  assert norms("pre") == ["input_layernorm", "post_attention_layernorm"]
  assert norms("post") == norms("mix:0.25") == ["post_attention_layernorm", "post_feedforward_layernorm"]
  assert norms("sandwich") == sorted([*norms("pre"), "pre_feedforward_layernorm", "post_feedforward_layernorm"])


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight is missing"),
    (lambda t: t.update({"model.norm.weight": np.ones(3)}), r"model\.norm\.weight: has shape \(3,\).*\(16,\)"),
    (lambda t: t.update({"model.layers.2.x": np.ones(3)}), r"1 tensors have no counterpart.*model\.layers\.2\.x"),
    (
      lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(16)}),
      r"have no counterpart.*q_proj\.bias",
    ),
    (
      lambda t: t.update(
        {"model.layers.1.post_feedforward_layernorm.weight": t.pop("model.layers.1.input_layernorm.weight")}
      ),
      r"layers\.1\.input_layernorm\.weight is missing.*'pre'.*norms of that layer are.*post_feedforward",
    ),
  ],
)
def test_tensors_of_another_model_are_named(change, words):
  _, _, tensors, model = load("llama")
  change(tensors)
  with pytest.raises(InputError, match=words):
    hf.import_weights(tensors, model)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"model_type": "gpt2"}, r"model_type='gpt2'.*llama"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "'yarn' is not supported"),
    ({"hidden_size": None}, "hidden_size=None is not a whole number"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps='small' is not a number"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "factor='missing' is not a number"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
    ({"rope_scaling": "linear"}, "must be objects"),
    ({"rope_parameters": {"theta": 1e6}}, r"rope_parameters has 'theta', which is unknown; known: rope_theta"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "has 'full_attention', which is unknown"),
    (
      {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
      r"rope_parameters says rope_theta=1000000\.0, but rope_theta says 10000\.0",
    ),
    (
      {"rope_parameters": None, "rope_scaling": {"type": "default", "rope_type": "llama3"}},
      "rope_scaling says rope_type='llama3', but rope_scaling says 'default'",
    ),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "full attention"),
  ],
)
def test_configs_of_another_model_are_refused(change, words):
  _, config, _, _ = load("llama")
  with pytest.raises(InputError, match=words):
    hf.model_fields({**config, **change})


def test_rope_is_read_as_transformers_4_wrote_it():
  _, config, _, model = load("llama_3_rope")
  rope = config.pop("rope_parameters")
  old = {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
  fields = hf.model_fields(old)
  assert all(model[name] == value for name, value in fields.items())
  assert model.rope_scaling == "llama3"


def test_a_config_says_all_that_decides_the_model(tmp_path):
  # Fields of a recipe that the checkpoint contradicts would be another model with its weights.
  changed = {"rope_scaling": "llama3", "qkv_bias": True, "tied_embeddings": True, "num_kv_heads": 1, "head_dim": 6}
  _, config, _, model = load("llama")
  again = small_model(**changed)
  again.update(hf.model_fields(config))
  named = ("rope_scaling", "qkv_bias", "tied_embeddings", "num_kv_heads", "head_dim", "placement", "norm_epsilon")
  assert all(again[name] == model[name] for name in named)


def test_a_head_beside_tied_embeddings_must_equal_them():
  _, _, tensors, model = load("llama_tied")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  hf.import_weights(tensors, model)
  tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
  with pytest.raises(InputError, match="tied_embeddings=False"):
    hf.import_weights(tensors, model)


def test_a_folder_of_two_checkpoints_is_named(tmp_path):
  """Would catch weights of one save that are read beside those of another."""
  _, _, tensors, model = load("llama")
  config = hf.hf_config(model, 64)
  write_folder(tmp_path / "many", tensors, config, 2000)
  write_folder(tmp_path / "one", tensors, config, 10**9)
  many, one = tmp_path / "many", tmp_path / "one" / "model.safetensors"
  (many / "consolidated.safetensors").write_bytes(one.read_bytes())  # another project's layout of the same weights
  assert len(SafetensorsFolder(many)) == len(tensors)
  for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
    (many / name).write_bytes(one.read_bytes())
    with pytest.raises(InputError, match=rf"holds two checkpoints, that of model.safetensors.index.json.* and {name}"):
      SafetensorsFolder(many)
    (many / name).unlink()
  (tmp_path / "one" / "model-00001-of-00002.safetensors").write_bytes(one.read_bytes())
  with pytest.raises(InputError, match=r"holds two checkpoints, that of model\.safetensors "):
    SafetensorsFolder(tmp_path / "one")
  index = json.loads((many / "model.safetensors.index.json").read_text())
  files = list(index["weight_map"].values())
  lost = next(name for name, file in index["weight_map"].items() if files.count(file) > 1)
  del index["weight_map"][lost]
  (many / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match=rf"has '{lost}', but .*index.json says that it does not exist"):
    SafetensorsFolder(many)


def test_a_placement_that_the_file_contradicts_is_named():
  """Would catch a model of another architecture than the weights were trained in."""
  model = small_model(placement="mix:0.5")
  written = hf.hf_config(model, 64, official=True)
  assert hf.model_fields(written, "post*2,pre*2")["placement"] == "post*2,pre*2"  # the same layers
  with pytest.raises(InputError, match=r"^placement='pre': config\.json says norm_placement='mix:0\.5'"):
    hf.model_fields(written, "pre")
  with pytest.raises(InputError, match=r"norm_placement='post' is 'post post.*norm_placement_of_layers says \['post"):
    hf.model_fields({**written, "norm_placement": "post"})


def test_damaged_folders_are_named(tmp_path):
  _, _, tensors, model = load("llama")
  with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
    SafetensorsFolder(tmp_path)
  write_folder(tmp_path / "out", tensors, hf.hf_config(model, 64), 2000)
  with pytest.raises(InputError, match="not empty"):
    write_folder(tmp_path / "out", tensors, {}, 2000)
  shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
  shard.write_bytes(shard.read_bytes()[:100])
  with pytest.raises(InputError, match=shard.name):
    SafetensorsFolder(tmp_path / "out")
  index = tmp_path / "out" / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": ["a"]}))
  with pytest.raises(InputError, match="no weight_map"):
    SafetensorsFolder(tmp_path / "out")
  index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
  shard.unlink()
  with pytest.raises(InputError, match=shard.name):
    SafetensorsFolder(tmp_path / "out")


def test_a_folder_that_can_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
  import safetensors.numpy

  _, _, tensors, model = load("llama")
  calls = []

  def fail(*arguments, **options):
    calls.append(arguments)
    if len(calls) == 3:
      raise safetensors.SafetensorError("no space left")
    original(*arguments, **options)

  original = safetensors.numpy.save_file
  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  with pytest.raises(InputError, match="no space left"):
    write_folder(tmp_path / "out", tensors, hf.hf_config(model, 64), 2000)
  assert not list(tmp_path.iterdir())

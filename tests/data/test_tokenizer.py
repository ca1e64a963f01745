"""Tokenizers are lossless and know how many bytes they stand for."""

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixln_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, are_same, content_hash
from mixln_jax.data.tokenizer_files import load_tokenizer, read_tokenizer, read_written_tokenizer, write_tokenizer
from mixln_jax.data.tokenizer_training import train_hugging_face, train_sentencepiece
from mixln_jax.errors import InputError

TEXT = "the quick brown fox\njumps over the lazy dog; 1234 naïve cafés\n\n" * 20
TRAINED = train_sentencepiece([TEXT], 300)
BYTE_LEVEL = train_hugging_face([TEXT], 300)
ALL = pytest.mark.parametrize(
  "tokenizer", [ByteTokenizer(), TRAINED, BYTE_LEVEL], ids=["bytes", "sentencepiece", "tokenizers"]
)


# A lone surrogate is not text: it has no UTF-8. A NUL ends SentencePiece's strings, "▁" is its own sign for a space.
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0▁"), max_size=60))
@settings(deadline=None)  # a busy machine is no failure
@ALL
def test_any_text_round_trips_and_its_bytes_add_up(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  table = tokenizer.bytes_per_token()
  assert sum(table[i] for i in ids) == len(text.encode("utf-8"))
  assert all(0 < i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)


@ALL
def test_special_ids(tokenizer):
  assert tokenizer.eos_id == 1
  assert tokenizer.bytes_per_token()[:3] == [0, 0, 0]
  assert len(tokenizer.bytes_per_token()) == tokenizer.vocab_size
  assert tokenizer.decode([1, *tokenizer.encode("tea"), 0]) == "tea"


@ALL
def test_what_looks_like_a_special_token_in_a_text_is_text(tokenizer):
  text = "a</s>b<pad>c<unk>"
  ids = tokenizer.encode(text)
  assert not {0, 1, 2} & set(ids)
  assert tokenizer.decode(ids) == text


@ALL
def test_a_tokenizer_is_read_back_from_its_content(tokenizer):
  again = load_tokenizer(tokenizer.name, tokenizer.content, "here")
  assert again.encode(TEXT) == tokenizer.encode(TEXT)
  assert again.vocab_size == tokenizer.vocab_size


FILES = {"bytes": "tokenizer.bytes", "sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}


@ALL
def test_a_written_tokenizer_reads_back_as_the_same_one(tokenizer, tmp_path):
  """Would catch a file under another kind's name, a torn or re-encoded one, and a second write that touches it."""
  assert read_written_tokenizer(tmp_path) is None
  path = write_tokenizer(tokenizer, tmp_path)
  assert [entry.name for entry in tmp_path.iterdir()] == [path.name] == [FILES[tokenizer.name]]
  again = read_written_tokenizer(tmp_path)
  assert again is not None
  ids = tokenizer.encode(TEXT)
  assert again.encode(TEXT) == ids
  assert again.decode(ids) == tokenizer.decode(ids)
  assert (again.name, again.eos_id, again.vocab_size) == (tokenizer.name, tokenizer.eos_id, tokenizer.vocab_size)
  assert again.bytes_per_token() == tokenizer.bytes_per_token()
  assert content_hash(again) == content_hash(tokenizer)
  os.utime(path, (1, 1))
  assert write_tokenizer(tokenizer, tmp_path) == path
  assert path.stat().st_mtime == 1  # left alone


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTE_LEVEL], ids=["sentencepiece", "tokenizers"])
def test_other_programs_read_the_written_file(tokenizer, tmp_path):
  """Would catch a format of our own: the file must be the one that the tokenizer's own library loads."""
  import sentencepiece
  import tokenizers

  path = str(write_tokenizer(tokenizer, tmp_path))
  if path.endswith(".model"):
    ids = sentencepiece.SentencePieceProcessor(model_file=path).encode(TEXT)
  else:
    ids = tokenizers.Tokenizer.from_file(path).encode(TEXT).ids
  assert ids == tokenizer.encode(TEXT)


@ALL
def test_a_damaged_tokenizer_is_named(tokenizer, tmp_path):
  """Would catch a truncated file that is read as a shorter tokenizer, or as the byte tokenizer whatever it says."""
  path = write_tokenizer(tokenizer, tmp_path)
  path.write_bytes(tokenizer.content[: len(tokenizer.content) // 2])
  with pytest.raises(InputError, match=rf"tokenizer .*{path.name}: not "):
    read_written_tokenizer(tmp_path)


def test_a_folder_has_one_tokenizer(tmp_path):
  """Would catch a run's tokenizer that is replaced by another, and a guess between two of them."""
  path = write_tokenizer(TRAINED, tmp_path)
  for other in (train_sentencepiece([TEXT], 310), ByteTokenizer()):
    with pytest.raises(InputError, match=r"tokenizer .*tokenizer\.model: another tokenizer is there already"):
      write_tokenizer(other, tmp_path)
  assert path.read_bytes() == TRAINED.content
  (tmp_path / "tokenizer.json").write_bytes(BYTE_LEVEL.content)
  with pytest.raises(InputError, match=r"tokenizer\.model and tokenizer\.json are different tokenizers"):
    read_written_tokenizer(tmp_path)


def test_a_sentencepiece_like_tokenizer_json_knows_its_bytes(tmp_path):
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  pieces = ["<pad>", "</s>", "<unk>", "<0xC3>", "<0xAF>", "▁", "▁the", "n", "a", "na"]
  vocab = {piece: index for index, piece in enumerate(pieces)}
  model = Tokenizer(models.BPE(vocab, [("n", "a")], unk_token="<unk>", byte_fallback=True))
  model.pre_tokenizer = pre_tokenizers.Metaspace()
  model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  model.add_special_tokens(["</s>"])
  model.add_tokens(["é "])
  path = tmp_path / "tokenizer.json"
  path.write_text(model.to_str())
  tokenizer = read_tokenizer(str(path))
  assert tokenizer.eos_id == 1
  assert tokenizer.vocab_size == 11
  assert tokenizer.bytes_per_token() == [5, 0, 5, 1, 1, 1, 4, 1, 1, 2, 3]


def test_training_is_deterministic_and_the_content_is_the_model():
  assert train_hugging_face([TEXT], 300).content == BYTE_LEVEL.content
  assert HuggingFaceTokenizer(BYTE_LEVEL.content, "here").encode(TEXT) == BYTE_LEVEL.encode(TEXT)
  again = train_sentencepiece([TEXT], 300)
  assert again.content == TRAINED.content
  assert SentencePieceTokenizer(TRAINED.content, "here").encode(TEXT) == TRAINED.encode(TEXT)


def test_what_can_not_be_a_tokenizer_is_refused(tmp_path):
  path = tmp_path / "x.model"
  with pytest.raises(InputError, match=r"config.data.tokenizer=.*can't be read"):
    read_tokenizer(str(path))
  json_path = tmp_path / "tokenizer.json"
  json_path.write_text("{}")
  with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json"):
    read_tokenizer(str(json_path))
  json_path.write_text(BYTE_LEVEL.content.decode().replace("</s>", "<end>"))
  with pytest.raises(InputError, match="none of the special tokens </s>"):
    read_tokenizer(str(json_path))
  with pytest.raises(InputError, match=r"vocab_size=9000: this corpus gives at most \d+ tokens"):
    train_hugging_face([TEXT], 9000)
  path.write_bytes(b"cos\nsystem\n(S'echo'\ntR.")  # a pickle
  with pytest.raises(InputError, match="not a SentencePiece model"):
    read_tokenizer(str(path))
  with pytest.raises(InputError, match=r"^vocab_size=9000: no SentencePiece model of that size"):
    train_sentencepiece([TEXT], 9000)


def changed(**sections):
  """The byte-level tokenizer.json with other sections."""
  return json.dumps(json.loads(BYTE_LEVEL.content) | sections).encode()


@pytest.mark.parametrize("token", ["<|eot_id|>", "<｜end▁of▁sentence｜>", "<END>"])
@pytest.mark.parametrize("stated", [str, lambda token: {"content": token, "lstrip": False}], ids=["text", "object"])
def test_a_tokenizer_config_says_what_ends_a_document(tmp_path, token, stated):
  """Would catch a tokenizer that is refused for the name of its end, and an end that is lost on the way to the run."""
  path = tmp_path / "tokenizer.json"
  path.write_text(BYTE_LEVEL.content.decode().replace("</s>", token))
  with pytest.raises(InputError, match=r"none of the special tokens </s>.*put its tokenizer_config\.json.*beside it"):
    read_tokenizer(str(path))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": stated(token), "bos_token": "<pad>"}))
  tokenizer = read_tokenizer(str(path))
  assert (tokenizer.eos_id, tokenizer.end_token) == (1, token)
  (tmp_path / "run").mkdir()
  write_tokenizer(tokenizer, tmp_path / "run")
  again = read_written_tokenizer(tmp_path / "run")
  assert again is not None
  assert (again.eos_id, content_hash(again)) == (1, content_hash(tokenizer))
  assert content_hash(tokenizer) != content_hash(load_tokenizer(tokenizer.name, tokenizer.content, "x", "<unk>"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "fox"}))
  with pytest.raises(InputError, match=r"none of the special tokens fox .*it has .*<pad>"):
    read_tokenizer(str(path))


def test_a_stated_end_changes_nothing_where_the_file_says_enough(tmp_path):
  """Would catch another end, and another hash, of a tokenizer that old records were made with."""
  (tmp_path / "tokenizer.json").write_bytes(BYTE_LEVEL.content)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<unk>"}))
  tokenizer = read_tokenizer(str(tmp_path / "tokenizer.json"))
  assert (tokenizer.eos_id, tokenizer.end_token) == (1, None)
  assert content_hash(tokenizer) == content_hash(BYTE_LEVEL)


def test_a_sentencepiece_model_with_a_flipped_bit_works_or_is_named():
  """Would catch a traceback from inside the library: pieces that are no UTF-8 may load, and fail when looked at."""
  rng = random.Random(0)
  named = 0
  for _ in range(400):
    content = bytearray(TRAINED.content)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    try:
      tokenizer = SentencePieceTokenizer(bytes(content), "flipped")
      tokenizer.bytes_per_token()
      tokenizer.decode(tokenizer.encode(TEXT[:200]))
    except InputError as error:
      named += str(error).startswith("tokenizer flipped: ")
  assert 100 < named < 400


def test_a_tokenizer_without_words_is_named():
  """Would catch a traceback of `max` over nothing."""
  model = json.loads(BYTE_LEVEL.content)["model"] | {"vocab": {}, "merges": []}
  with pytest.raises(InputError, match="tokenizer empty: its vocabulary is empty"):
    HuggingFaceTokenizer(changed(model=model, added_tokens=[]), "empty")


def test_a_regular_expression_that_blows_up_is_named():
  """Would catch a panic of the library, which is no Exception, in the middle of a corpus."""
  split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
  before = json.loads(BYTE_LEVEL.content)["pre_tokenizer"]
  content = changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, before]})
  tokenizer = HuggingFaceTokenizer(content, "slow")
  assert tokenizer.decode(tokenizer.encode("tea")) == "tea"
  with pytest.raises(InputError, match=r"^tokenizer slow: fails on a text \(PanicException: .*retry-limit"):
    tokenizer.encode("a" * 40 + "!")


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a"}])
def test_a_normalizer_that_grows_text_without_end_is_named(pattern):
  """Would catch forty replacements that double a letter, of which the library makes a terabyte."""
  double = {"type": "Replace", "pattern": pattern, "content": "aa"}
  nested = {"type": "Sequence", "normalizers": [double] * 20}
  for section, content in (
    ("normalizer", {"type": "Sequence", "normalizers": [nested, nested]}),
    ("decoder", {"type": "Sequence", "decoders": [json.loads(BYTE_LEVEL.content)["decoder"], *[double] * 40]}),
  ):
    with pytest.raises(InputError, match=rf"the replacements of its {section} can make .* characters of one"):
      HuggingFaceTokenizer(changed(**{section: content}), "growing")
  usual = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
  HuggingFaceTokenizer(changed(normalizer={"type": "Sequence", "normalizers": usual}), "as LLaMA 2's")
  once = {"type": "Replace", "pattern": pattern, "content": "a" * 500}
  with pytest.raises(InputError, match=r"makes \d[\d,]+ tokens of a text of 20 characters"):
    HuggingFaceTokenizer(changed(normalizer=once), "growing").encode("a" * 20)


def test_one_tokenizer_in_two_formats_is_the_same():
  """Would catch a comparison by bytes alone, and one by size alone."""
  again = HuggingFaceTokenizer(json.dumps(json.loads(BYTE_LEVEL.content), indent=4).encode(), "indented")
  assert content_hash(again) != content_hash(BYTE_LEVEL)
  assert are_same(again, BYTE_LEVEL)
  other = train_hugging_face([TEXT.replace("quick", "slow and steady")], BYTE_LEVEL.vocab_size)
  assert not are_same(other, BYTE_LEVEL)
  assert not are_same(TRAINED, BYTE_LEVEL)

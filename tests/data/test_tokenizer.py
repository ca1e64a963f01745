"""Tokenizers are lossless and know how many bytes they stand for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixln_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, read_tokenizer, train_sentencepiece
from mixln_jax.errors import InputError

TEXT = "the quick brown fox\njumps over the lazy dog; 1234 naïve cafés\n\n" * 20
TRAINED = train_sentencepiece([TEXT], 300)


# A lone surrogate is not text: it has no UTF-8. A NUL ends SentencePiece's strings, "▁" is its own sign for a space.
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0▁"), max_size=60))
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TRAINED], ids=["bytes", "sentencepiece"])
def test_any_text_round_trips_and_its_bytes_add_up(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  table = tokenizer.bytes_per_token()
  assert sum(table[i] for i in ids) == len(text.encode("utf-8"))
  assert all(0 < i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TRAINED], ids=["bytes", "sentencepiece"])
def test_special_ids(tokenizer):
  assert tokenizer.eos_id == 1
  assert tokenizer.bytes_per_token()[:3] == [0, 0, 0]
  assert len(tokenizer.bytes_per_token()) == tokenizer.vocab_size
  assert tokenizer.decode([1, *tokenizer.encode("tea"), 0]) == "tea"


def test_training_is_deterministic_and_the_content_is_the_model():
  again = train_sentencepiece([TEXT], 300)
  assert again.content == TRAINED.content
  assert SentencePieceTokenizer(TRAINED.content, "here").encode(TEXT) == TRAINED.encode(TEXT)


def test_what_can_not_be_a_tokenizer_is_refused(tmp_path):
  path = tmp_path / "x.model"
  with pytest.raises(InputError, match=r"config.data.tokenizer=.*can't be read"):
    read_tokenizer(str(path))
  path.write_bytes(b"not a model")
  with pytest.raises(InputError, match="not a SentencePiece model"):
    read_tokenizer(str(path))
  with pytest.raises(InputError, match=r"config.model.vocab_size=9000: no SentencePiece model of that size"):
    train_sentencepiece([TEXT], 9000)

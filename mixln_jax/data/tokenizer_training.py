"""Training a tokenizer on a corpus."""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece
import tokenizers

from mixln_jax.data.tokenizer import EOS, PAD, UNKNOWN, HuggingFaceTokenizer, SentencePieceTokenizer
from mixln_jax.errors import InputError, one_line

TRAINING_BYTES = 256 << 20  # text that a tokenizer is trained on, from the beginning of the corpus


def first_bytes(texts: Iterable[str], limit: int = TRAINING_BYTES) -> Iterator[str]:
  """The first texts; the text that reaches `limit` UTF-8 bytes in total is the last one."""
  total = 0
  for text in texts:
    yield text
    total += len(text.encode())
    if total >= limit:
      return


def train_hugging_face(texts: Iterable[str], vocab_size: int, field: str = "vocab_size") -> HuggingFaceTokenizer:
  """Trains a byte-level byte-pair encoding, which is lossless for any text.

  Args:
    texts: the documents to train on.
    vocab_size: number of tokens.
    field: the name of `vocab_size` in error messages.

  Raises:
    InputError: the corpus is too small for `vocab_size` tokens.
  """
  from tokenizers import decoders, models, pre_tokenizers, trainers

  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
  model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
  trainer: Any = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=["<pad>", "</s>", "<unk>"],  # PAD, EOS, UNKNOWN
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  result = HuggingFaceTokenizer(model.to_str().encode(), "just trained")
  if result.vocab_size != vocab_size:
    raise InputError(f"{field}={vocab_size}: this corpus gives at most {result.vocab_size} tokens; lower it to that")
  return result


def train_sentencepiece(texts: Iterable[str], vocab_size: int, field: str = "vocab_size") -> SentencePieceTokenizer:
  """Trains a byte-pair SentencePiece model with byte fallback, which is lossless for any text without "▁" and NULs.

  Args:
    texts: the documents to train on.
    vocab_size: number of pieces.
    field: the name of `vocab_size` in error messages.

  Raises:
    InputError: the corpus is too small for `vocab_size` pieces.
  """
  lines = (line for text in texts for line in text.split("\n") if line)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines,
      model_writer=model,
      vocab_size=vocab_size,
      model_type="bpe",
      byte_fallback=True,
      pad_id=PAD,
      eos_id=EOS,
      unk_id=UNKNOWN,
      bos_id=-1,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      split_digits=True,
      user_defined_symbols=["\n"],
      max_sentence_length=1_000_000,
      num_threads=1,  # otherwise the model depends on the machine
      minloglevel=2,
    )
  except RuntimeError as error:
    raise InputError(
      f"{field}={vocab_size}: no SentencePiece model of that size can be trained on this corpus ({one_line(error)}); "
      "lower it, or set config.data.tokenizer=bytes"
    ) from error
  return SentencePieceTokenizer(model.getvalue(), "just trained")

"""Tokenizers: text to ids and back, and how many bytes of text each id stands for."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from mixln_jax.errors import InputError

PAD, EOS, UNKNOWN = 0, 1, 2  # as T5 has them
BYTES = "bytes"
SENTENCEPIECE = "sentencepiece"


class Tokenizer(Protocol):
  """What the project needs of a tokenizer."""

  name: str  # what made it: 'bytes', 'sentencepiece'
  content: bytes  # what it is read back from; its hash identifies it
  vocab_size: int
  eos_id: int

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without the end-of-document id."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids; special ids are dropped."""
    ...

  def bytes_per_token(self) -> list[int]:
    """UTF-8 bytes that each id stands for; 0 for special ids."""
    ...


class ByteTokenizer:
  """One id a UTF-8 byte, after the three special ids."""

  name = BYTES
  content = b"pad eos unk, then the 256 bytes"
  vocab_size = 3 + 256
  eos_id = EOS

  def encode(self, text: str) -> list[int]:
    return [3 + byte for byte in text.encode("utf-8")]

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size).decode("utf-8", errors="replace")

  def bytes_per_token(self) -> list[int]:
    return [0] * 3 + [1] * 256


class SentencePieceTokenizer:
  """A SentencePiece model."""

  name = SENTENCEPIECE

  def __init__(self, content: bytes, origin: str):
    """Raises InputError where `content`, read from `origin`, is not a model that can end a sentence."""
    self.content = content
    self._model = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(content)
    except RuntimeError as error:
      raise InputError(f"tokenizer {origin}: not a SentencePiece model; give a .model file") from error
    self.vocab_size = self._model.vocab_size()
    self.eos_id = self._model.eos_id()
    if self.eos_id < 0:
      raise InputError(f"tokenizer {origin}: it has no end-of-sentence piece, which ends a document; choose another")

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    return self._model.decode([int(i) for i in ids])

  def bytes_per_token(self) -> list[int]:
    return [self._bytes_of(i) for i in range(self.vocab_size)]

  def _bytes_of(self, index: int) -> int:
    model = self._model
    if model.IsControl(index) or model.IsUnknown(index) or model.IsUnused(index):
      return 0
    if model.IsByte(index):
      return 1
    return len(model.IdToPiece(index).replace("▁", " ").encode("utf-8"))


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
  """Trains a byte-pair SentencePiece model with byte fallback, which gives any text back but its "▁" and NULs.

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
      num_threads=1,  # so that the model does not depend on the machine
      minloglevel=2,
    )
  except RuntimeError as error:
    raise InputError(
      f"config.model.vocab_size={vocab_size}: no SentencePiece model of that size can be trained on "
      f"this corpus ({error}); "
      "lower it, or set config.data.tokenizer=bytes"
    ) from error
  return SentencePieceTokenizer(model.getvalue(), "just trained")


def load_tokenizer(name: str, content: bytes, origin: str) -> Tokenizer:
  """The tokenizer that `prepare` stored as (name, content).

  Raises:
    InputError: the name is unknown or the content is damaged.
  """
  if name == BYTES:
    return ByteTokenizer()
  if name == SENTENCEPIECE:
    return SentencePieceTokenizer(content, origin)
  raise InputError(f"tokenizer {origin}: unknown kind {name!r}; choices: {BYTES}, {SENTENCEPIECE}")


def read_tokenizer(path: str) -> SentencePieceTokenizer:
  """A SentencePiece model file.

  Raises:
    InputError: the file can't be read or is not a SentencePiece model.
  """
  try:
    content = Path(path).expanduser().read_bytes()
  except OSError as error:
    choices = f"{SENTENCEPIECE} (trained on the corpus), {BYTES}, or the path of a SentencePiece .model file"
    raise InputError(f"config.data.tokenizer={path!r}: can't be read ({error.strerror}); give {choices}") from error
  return SentencePieceTokenizer(content, path)


def content_hash(tokenizer: Tokenizer) -> str:
  """SHA-256 of what the tokenizer is made of."""
  return hashlib.sha256(tokenizer.content).hexdigest()

"""Tokenizers: text to ids and back, and how many bytes of text each id stands for."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

# Rust's threads don't work with forked or spawned workers, and `prepare` has its own processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sentencepiece
import tokenizers

from mixln_jax.errors import InputError, one_line

PAD, EOS, UNKNOWN = 0, 1, 2  # as T5 has them
BYTES = "bytes"
SENTENCEPIECE = "sentencepiece"
HUGGING_FACE = "tokenizers"  # a tokenizer.json
CONFIG = "tokenizer_config.json"  # beside a tokenizer.json; names the token that ends a document
MOST_TOKENS = 64  # per character, on average; the longest of Unicode's compatibility forms is 33 bytes
MOST_GROWTH = 1000  # largest factor by which a tokenizer.json's replacements may lengthen a text
# The names of an encoder's mask token, and of the tokens before and after a text.
MASK_TOKENS, FIRST_TOKENS, LAST_TOKENS = ("[MASK]", "<mask>"), ("[CLS]", "<s>"), ("[SEP]", "</s>")
# Names of the token that ends a document, in tokenizers on the hub, likeliest first.
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
  """The interface of a tokenizer."""

  name: str  # its kind: BYTES, SENTENCEPIECE or HUGGING_FACE
  content: bytes  # its file in the standard format of its kind; its hash identifies the tokenizer
  vocab_size: int
  eos_id: int
  end_token: str | None  # the token that ends a document, if `content` does not define it
  mask_id: int | None  # the id that replaces a masked token for an encoder, if there is one
  frame: tuple[int | None, ...]  # the ids that an encoder reads before and after a text, if any

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without the end-of-document id."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids; special ids are dropped."""
    ...

  def bytes_per_token(self) -> list[int]:
    """The number of UTF-8 bytes that each id represents; 0 for special ids."""
    ...


class ByteTokenizer:
  """One id per UTF-8 byte, after three special ids."""

  name = BYTES
  content = b"pad eos unk, then the 256 bytes"
  vocab_size = 3 + 256
  eos_id = EOS
  end_token: str | None = None
  mask_id: int | None = UNKNOWN  # which no text contains
  frame: tuple[int | None, ...] = (None, None)

  def encode(self, text: str) -> list[int]:
    with _named(BYTES):
      return [3 + byte for byte in text.encode("utf-8")]

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size).decode("utf-8", errors="replace")

  def bytes_per_token(self) -> list[int]:
    return [0] * 3 + [1] * 256


@contextlib.contextmanager
def _named(origin: str) -> Iterator[None]:
  """Converts errors of a tokenizer's library to an error that names the tokenizer.

  A damaged file may load and fail on some texts; a regular expression may take too long on others.
  """
  try:
    yield
  except InputError:
    raise
  except BaseException as error:
    # A panic in Rust is a BaseException but not an Exception.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise InputError(
      f"tokenizer {origin}: fails on a text ({type(error).__name__}: {one_line(error, 150)}); download it again, or "
      "choose another"
    ) from error


def _checked(ids: list[int], text: str, origin: str) -> list[int]:
  """The ids of a text; raises InputError if they are far more than the text can have."""
  if len(ids) > MOST_TOKENS * (len(text) + 1):
    raise InputError(
      f"tokenizer {origin}: makes {len(ids):,} tokens of a text of {len(text):,} characters; its normalizer writes "
      "more than it reads; choose another"
    )
  return ids


class SentencePieceTokenizer:
  """A SentencePiece model."""

  name = SENTENCEPIECE
  end_token: str | None = None
  frame: tuple[int | None, ...] = (None, None)

  def __init__(self, content: bytes, origin: str):
    """Raises InputError if `content`, read from `origin`, is not a model with an end-of-sentence piece."""
    self.content, self._origin = content, origin
    self._model = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(content)
    except Exception as error:  # RuntimeError, or UnicodeDecodeError if its message quotes damaged bytes
      raise InputError(f"tokenizer {origin}: not a SentencePiece model; give a .model file") from error
    self.vocab_size = self._model.vocab_size()
    self.eos_id = self._model.eos_id()
    self.mask_id: int | None = self._model.unk_id()  # no text contains it if each byte has a piece
    if self.eos_id < 0:
      raise InputError(f"tokenizer {origin}: it has no end-of-sentence piece, which ends a document; choose another")

  def encode(self, text: str) -> list[int]:
    with _named(self._origin):
      return _checked(self._model.encode(text), text, self._origin)

  def decode(self, ids: Sequence[int]) -> str:
    with _named(self._origin):
      return self._model.decode([int(i) for i in ids])

  def bytes_per_token(self) -> list[int]:
    with _named(self._origin):
      return [self._bytes_of(i) for i in range(self.vocab_size)]

  def _bytes_of(self, index: int) -> int:
    model = self._model
    if model.IsControl(index) or model.IsUnknown(index) or model.IsUnused(index):
      return 0
    if model.IsByte(index):
      return 1
    return len(model.IdToPiece(index).replace("▁", " ").encode("utf-8"))


class HuggingFaceTokenizer:
  """A tokenizer.json of the `tokenizers` library: byte-level, SentencePiece-like, or WordPiece (BERT's).

  Attributes:
    mask_id: the id of the mask token; None if it has none.
    frame: the ids that an encoder reads before and after a text; None where it has none.
  """

  name = HUGGING_FACE
  mask_id: int | None
  frame: tuple[int | None, ...]

  def __init__(self, content: bytes, origin: str, end_token: str | None = None):
    """
    Args:
      content: the file.
      origin: where the file was read, for messages.
      end_token: the token that ends a document; by default the first of END_TOKENS that it has.

    Raises:
      InputError: the file is not a tokenizer.json, or has no end-of-document token.
    """
    self.content, self.end_token, self._origin = content, end_token, origin
    with _named(origin):
      self._load()

  def _load(self) -> None:
    origin = self._origin
    try:
      self._model = tokenizers.Tokenizer.from_str(self.content.decode())
      self._description = json.loads(self.content)
    except Exception as error:  # the library raises bare Exceptions
      raise InputError(f"tokenizer {origin}: not a tokenizer.json ({one_line(error)})") from error
    _check_growth(self._description, origin)
    self._model.encode_special_tokens = True  # a document that contains the text "</s>" does not end there
    self._model.no_truncation()
    self._model.no_padding()
    ids = self._model.get_vocab(with_added_tokens=True)
    if not ids:
      raise InputError(f"tokenizer {origin}: its vocabulary is empty; choose another")
    self.vocab_size = max(ids.values()) + 1
    added = self._description.get("added_tokens") or ()
    self._special = {entry["id"] for entry in added if entry["special"]}
    self._verbatim = {entry["id"] for entry in added if not entry["special"]}
    self.eos_id = self._end(ids)
    self.eos_token = str(self._model.id_to_token(self.eos_id))
    self._byte_level = '"ByteLevel"' in json.dumps(self._description.get("decoder"))
    kind = (self._description.get("model") or {}).get("type")
    self._pieces = kind == "WordPiece"
    if not self._byte_level and not self._pieces and "▁" not in json.dumps(self._description, ensure_ascii=False):
      raise InputError(
        f"tokenizer {origin}: neither byte-level nor SentencePiece-like nor WordPiece, so the bytes that a token "
        "stands for are not known; choose another"
      )
    self.frame = tuple(_first_of(ids, names) for names in (FIRST_TOKENS, LAST_TOKENS))
    self.mask_id = _first_of(ids, MASK_TOKENS)

  def _end(self, ids: Mapping[str, int]) -> int:
    """The id that ends a document."""
    choices = END_TOKENS if self.end_token is None else (self.end_token,)
    ends = [ids[token] for token in choices if ids.get(token) in self._special]
    if ends:
      return ends[0]
    special = ", ".join(sorted(token for token, index in ids.items() if index in self._special)[:8]) or "none"
    raise InputError(
      f"tokenizer {self._origin}: has none of the special tokens {', '.join(choices)} to end a document with (it has "
      f"{special}); put its {CONFIG}, whose eos_token names one of them, beside it"
    )

  def encode(self, text: str) -> list[int]:
    with _named(self._origin):
      return _checked(self._model.encode(text, add_special_tokens=False).ids, text, self._origin)

  def decode(self, ids: Sequence[int]) -> str:
    with _named(self._origin):
      return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

  def bytes_per_token(self) -> list[int]:
    with _named(self._origin):
      return [self._bytes_of(i) for i in range(self.vocab_size)]

  def _bytes_of(self, index: int) -> int:
    token = self._model.id_to_token(index)
    if token is None or index in self._special:
      return 0
    if index in self._verbatim:
      return len(token.encode())
    if self._byte_level:  # its alphabet has one character a byte
      return len(token)
    if self._pieces:  # of words that it has made lower case; the blanks between them are nobody's
      return len(token.removeprefix("##").encode())
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
      return 1
    return len(token.replace("▁", " ").encode())


def _first_of(ids: Mapping[str, int], names: Sequence[str]) -> int | None:
  """The id of the first of several tokens that exists; None if none does."""
  return next((ids[name] for name in names if name in ids), None)


def _check_growth(description: Mapping[str, Any], origin: str) -> None:
  """Rejects a tokenizer.json whose chained replacements write far more than they read.

  Forty replacements that double a letter make a terabyte of it, inside the library, where nothing can stop them.
  """
  for section in ("normalizer", "pre_tokenizer", "decoder"):
    growth = 1.0
    for step in _steps(description.get(section)):
      growth *= _growth(step)
    if growth > MOST_GROWTH:
      raise InputError(
        f"tokenizer {origin}: the replacements of its {section} can make {growth:.3g} characters of one; choose another"
      )


def _steps(node: Any) -> Iterator[Mapping[str, Any]]:
  """The steps of a normalizer, a pre-tokenizer or a decoder, which may be sequences of sequences."""
  if not isinstance(node, dict):
    return
  if node.get("type") != "Sequence":
    yield node
    return
  for name in ("normalizers", "pretokenizers", "decoders"):
    for inner in node.get(name) or ():
      yield from _steps(inner)


def _growth(step: Mapping[str, Any]) -> float:
  """How many characters a step can write per character that it reads; 1 if it only removes or exchanges."""
  if step.get("type") == "ByteLevel":
    return 2.0  # each byte of a character that is not ASCII becomes a character of two
  content = step.get("content")
  if step.get("type") != "Replace" or not isinstance(content, str) or not content:
    return 1.0
  pattern = (step.get("pattern") or {}).get("String")
  if pattern:
    return max(1.0, len(content) / len(pattern))
  return 1.0 + len(content)  # a regular expression, or an empty text, may match between any two characters


def content_hash(tokenizer: Tokenizer) -> str:
  """SHA-256 in hexadecimal of a tokenizer's content and, if it has one, of its `end_token`."""
  digest = hashlib.sha256(tokenizer.content)
  if tokenizer.end_token is not None:
    digest.update(tokenizer.end_token.encode())
  return digest.hexdigest()


PROBE = (
  "The tea in 1790 cost 12,345.67 dollars;  two  blanks, a\ttab\nand\n\nlines: don't, e.g. naïve cafés, Ελλάδα, Привет,"
  " 茶と水, 🍵!\n  def f(x): return x**2  # {a: [1]} </s>"
)


def are_same(one: Tokenizer, other: Tokenizer) -> bool:
  """Whether two tokenizers, perhaps in different formats, give the same ids.

  They do if their contents are equal, or if their vocabularies and the ids of a sample text are.
  """
  if content_hash(one) == content_hash(other):
    return True
  if (one.vocab_size, one.eos_id) != (other.vocab_size, other.eos_id):
    return False
  return one.bytes_per_token() == other.bytes_per_token() and one.encode(PROBE) == other.encode(PROBE)

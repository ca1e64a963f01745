"""Tokenizers: text to ids and back, and how many bytes of text each id stands for."""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# Rust's threads don't work with forked or spawned workers, and `prepare` has its own processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sentencepiece
import tokenizers

from mixln_jax.errors import InputError, one_line
from mixln_jax.files import json_object, local_path, read_regular, write_whole

PAD, EOS, UNKNOWN = 0, 1, 2  # as T5 has them
BYTES = "bytes"
SENTENCEPIECE = "sentencepiece"
HUGGING_FACE = "tokenizers"  # a tokenizer.json
HUB = "hf:"  # prefix of a name on the Hugging Face hub
GGUF = ".gguf"  # suffix of llama.cpp's files, which contain a model and its tokenizer
RECORDS = "records:"  # prefix of a folder of records, which contains its tokenizer
# The name of a tokenizer's file in its folder, by kind.
FILES = {SENTENCEPIECE: "tokenizer.model", HUGGING_FACE: "tokenizer.json", BYTES: "tokenizer.bytes"}
CONFIG = "tokenizer_config.json"  # beside a tokenizer.json; names the token that ends a document
LARGEST_FILE = 1 << 29  # bytes of a tokenizer's file; a vocabulary of 256,000 takes 33 MB
MOST_TOKENS = 64  # per character, on average; the longest of Unicode's compatibility forms is 33 bytes
MOST_GROWTH = 1000  # largest factor by which a tokenizer.json's replacements may lengthen a text
TRAINING_BYTES = 256 << 20  # text that a tokenizer is trained on, from the beginning of the corpus
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


def load_tokenizer(name: str, content: bytes, origin: str, end_token: str | None = None) -> Tokenizer:
  """The tokenizer of a kind, from its content.

  Args:
    name: the kind.
    content: the content of its file.
    origin: where the file was read, for messages.
    end_token: the token that ends a document, if the file does not define it.

  Raises:
    InputError: the kind is unknown or the content is damaged.
  """
  if name == BYTES:
    if content != ByteTokenizer.content:
      raise InputError(f"tokenizer {origin}: not the byte tokenizer's file; restore it")
    return ByteTokenizer()
  if name == SENTENCEPIECE:
    return SentencePieceTokenizer(content, origin)
  if name == HUGGING_FACE:
    return HuggingFaceTokenizer(content, origin, end_token)
  raise InputError(f"tokenizer {origin}: unknown kind {name!r}; choices: {BYTES}, {SENTENCEPIECE}, {HUGGING_FACE}")


def read_tokenizer(path: str) -> Tokenizer:
  """Reads a SentencePiece .model file, a tokenizer.json, the tokenizer of a .gguf file, or `hf:NAME`.

  Raises:
    InputError: it can't be read or is not a tokenizer.
  """
  if path.startswith(HUB):
    return _tokenizer_of_the_hub(path)
  if path.endswith(GGUF):
    from mixln_jax.data.gguf_file import GgufFile  # imported here because it imports this module
    from mixln_jax.data.gguf_tokenizer import gguf_tokenizer

    return gguf_tokenizer(GgufFile(path))
  file = local_path(path)
  try:
    content = read_regular(file, LARGEST_FILE)
    if not path.endswith(".json"):
      return SentencePieceTokenizer(content, path)
    beside = file.with_name(CONFIG)
    stated = read_regular(beside, LARGEST_FILE) if beside.is_file() else None
  except OSError as error:
    choices = (
      f"{SENTENCEPIECE} (trained on the corpus), {BYTES}, {HUB}NAME, {RECORDS}FOLDER, or the path of a .model, a "
      "tokenizer.json or a .gguf"
    )
    raise InputError(f"config.data.tokenizer={path!r}: can't be read ({error.strerror}); give {choices}") from error
  return _with_stated_end(content, path, stated, str(beside))


def _with_stated_end(content: bytes, origin: str, stated: bytes | None, where: str) -> HuggingFaceTokenizer:
  """A tokenizer.json; if it has none of END_TOKENS, its tokenizer_config.json names the token that ends a document."""
  try:
    return HuggingFaceTokenizer(content, origin)
  except InputError:
    end_token = None if stated is None else _eos_token(stated, where)
    if end_token is None:
      raise
    return HuggingFaceTokenizer(content, origin, end_token)


def _eos_token(content: bytes, where: str) -> str | None:
  """The eos_token of a tokenizer_config.json: a text, or an object with the text as `content`; None if it has none."""
  token = json_object(content, where).get("eos_token")
  if isinstance(token, dict):
    token = token.get("content")
  return token if isinstance(token, str) else None


def _tokenizer_of_the_hub(name: str) -> HuggingFaceTokenizer:
  from huggingface_hub import hf_hub_download

  repository = name.removeprefix(HUB)
  try:
    content = tokenizers.Tokenizer.from_pretrained(repository).to_str().encode()
  except Exception as error:  # no network, no such name, no permission: the library raises bare Exceptions
    raise InputError(
      f"config.data.tokenizer={name!r}: can't be fetched ({one_line(error)}); download its tokenizer.json and give its "
      "path"
    ) from error
  try:
    stated = Path(hf_hub_download(repository, CONFIG)).read_bytes()
  except Exception:  # there is none, which only matters if the tokenizer.json does not define the end token
    stated = None
  return _with_stated_end(content, name, stated, f"{name}/{CONFIG}")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
  """Writes a tokenizer into a folder, atomically; `read_written_tokenizer` reads it back.

  The file is in the format that other programs read: a SentencePiece model or a tokenizer.json. The byte tokenizer's
  file contains only a sentence, since there is nothing to load. If the folder has the same tokenizer, nothing is
  written.

  Returns:
    The file: `folder` / FILES[tokenizer.name].

  Raises:
    InputError: the folder holds another tokenizer.
    OSError: the file can't be written.
  """
  path = folder / FILES[tokenizer.name]
  existing = _written_files(folder)
  if existing == [path] and path.read_bytes() == tokenizer.content and _written_end(folder) == tokenizer.end_token:
    return path
  if existing:
    raise InputError(f"tokenizer {existing[0]}: another tokenizer is there already; remove it, or use another folder")
  if tokenizer.end_token is not None:
    write_whole(folder / CONFIG, json.dumps({"eos_token": tokenizer.end_token}) + "\n")
  write_whole(path, tokenizer.content)
  return path


def read_written_tokenizer(folder: Path) -> Tokenizer | None:
  """The tokenizer that `write_tokenizer` wrote into a folder; None if there is none.

  A SentencePiece model or a tokenizer.json with a few damaged bytes may still load, so a caller that knows the
  tokenizer's `content_hash` should compare it.

  Raises:
    InputError: the file is damaged, or there are two tokenizers.
  """
  existing = _written_files(folder)
  if not existing:
    return None
  if len(existing) > 1:
    names = " and ".join(path.name for path in existing)
    raise InputError(f"tokenizer {folder}: {names} are different tokenizers; remove those that are not this folder's")
  (path,) = existing
  (name,) = (name for name, file in FILES.items() if file == path.name)
  return load_tokenizer(name, path.read_bytes(), str(path), _written_end(folder))


def _written_end(folder: Path) -> str | None:
  path = folder / CONFIG
  return _eos_token(path.read_bytes(), str(path)) if path.is_file() else None


def _written_files(folder: Path) -> list[Path]:
  return [folder / file for file in FILES.values() if (folder / file).is_file()]


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

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

# Rust's threads and forked or spawned workers don't mix, and `prepare` has processes of its own.
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
GGUF = ".gguf"  # how a file with a model and its tokenizer ends, llama.cpp's
RECORDS = "records:"  # prefix of a folder of records, which has a tokenizer of its own
# What the file of a tokenizer is called in a folder that holds one.
FILES = {SENTENCEPIECE: "tokenizer.model", HUGGING_FACE: "tokenizer.json", BYTES: "tokenizer.bytes"}
CONFIG = "tokenizer_config.json"  # beside a tokenizer.json, of which it says what ends a document
LARGEST_FILE = 1 << 29  # bytes of a tokenizer's file; a vocabulary of 256,000 takes 33 MB
MOST_TOKENS = 64  # of a character, on average: the longest of Unicode's compatibility forms is 33 bytes
MOST_GROWTH = 1000  # of a text by a tokenizer.json's replacements, at the worst
TRAINING_BYTES = 256 << 20  # text that a tokenizer is trained on, from the beginning of the corpus
# What tokenizers on the hub call the token that ends a document, likeliest first.
# What encoders' tokenizers call the token that hides another, and those around a text.
MASK_TOKENS, FIRST_TOKENS, LAST_TOKENS = ("[MASK]", "<mask>"), ("[CLS]", "<s>"), ("[SEP]", "</s>")
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
  """What the project needs of a tokenizer."""

  name: str  # its kind: BYTES, SENTENCEPIECE or HUGGING_FACE
  content: bytes  # its file in the standard format of its kind; the hash of it identifies the tokenizer
  vocab_size: int
  eos_id: int
  end_token: str | None  # what ends a document, where that is stated beside `content` and not told from it
  mask_id: int | None  # what an encoder reads in a masked token's place; None where there is none
  frame: tuple[int | None, ...]  # what an encoder reads before and after a text, where there is something

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
  end_token: str | None = None
  mask_id: int | None = UNKNOWN  # which stands in no text
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
  """Turns what a tokenizer's library raises into an error that names the tokenizer.

  A damaged file may load and fail on some text; a regular expression may take too long on another.
  """
  try:
    yield
  except InputError:
    raise
  except BaseException as error:
    # A panic of Rust's is no Exception, so that nobody catches it by chance.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise InputError(
      f"tokenizer {origin}: fails on a text ({type(error).__name__}: {one_line(error, 150)}); download it again, or "
      "choose another"
    ) from error


def _checked(ids: list[int], text: str, origin: str) -> list[int]:
  """The ids of a text, unless they are far more than the text can have."""
  if len(ids) > MOST_TOKENS * (len(text) + 1):
    raise InputError(
      f"tokenizer {origin}: makes {len(ids):,} tokens of a text of {len(text):,} characters; its normalizer writes "
      "more than it reads, choose another"
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
    except Exception as error:  # RuntimeError, or UnicodeDecodeError where its message quotes what is damaged
      raise InputError(f"tokenizer {origin}: not a SentencePiece model; give a .model file") from error
    self.vocab_size = self._model.vocab_size()
    self.eos_id = self._model.eos_id()
    self.mask_id: int | None = self._model.unk_id()  # in no text, where each byte has a piece
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
    mask_id: what stands for a masked token; None where it has none.
    frame: what an encoder reads before and after a text, ids or None.
  """

  name = HUGGING_FACE
  mask_id: int | None
  frame: tuple[int | None, ...]

  def __init__(self, content: bytes, origin: str, end_token: str | None = None):
    """
    Args:
      content: the file.
      origin: where it was read, for messages.
      end_token: the token that ends a document; by default the likeliest of END_TOKENS.

    Raises:
      InputError: it is not such a file, or has no end-of-document token.
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
    self._model.encode_special_tokens = True  # a document that says "</s>" does not end there
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
  """The id of the first of several tokens that there is; None where there is none of them."""
  return next((ids[name] for name in names if name in ids), None)


def _check_growth(description: Mapping[str, Any], origin: str) -> None:
  """Rejects a tokenizer.json whose replacements, one behind the other, write far more than they read.

  Forty that double a letter make a terabyte of it, inside the library, where nothing can stop them.
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
  """How many characters a step can write for one that it reads; 1 for a step that only removes or exchanges."""
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
    field: what an error message calls `vocab_size`.

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
    field: what an error message calls `vocab_size`.

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
      f"{field}={vocab_size}: no SentencePiece model of that size can be trained on this corpus ({one_line(error)}); "
      "lower it, or set config.data.tokenizer=bytes"
    ) from error
  return SentencePieceTokenizer(model.getvalue(), "just trained")


def load_tokenizer(name: str, content: bytes, origin: str, end_token: str | None = None) -> Tokenizer:
  """The tokenizer of a kind and its content, which `origin` names in messages.

  Args:
    name: its kind.
    content: its file.
    origin: where that was read, for messages.
    end_token: what ends a document, where that is stated beside the file.

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
  """The tokenizer that `config.data.tokenizer` names: a SentencePiece .model file, a tokenizer.json, that of a .gguf
  file, or `hf:NAME`.

  Raises:
    InputError: it can't be read or is not a tokenizer.
  """
  if path.startswith(HUB):
    return _tokenizer_of_the_hub(path)
  if path.endswith(GGUF):
    from mixln_jax.data.gguf_file import GgufFile  # they stand on this module
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
  """A tokenizer.json; where it has none of END_TOKENS, its tokenizer_config.json says what ends a document."""
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
  except Exception:  # it has none, which only matters where the tokenizer.json says too little
    stated = None
  return _with_stated_end(content, name, stated, f"{name}/{CONFIG}")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
  """Writes a tokenizer into a folder, whole or not at all; `read_written_tokenizer` reads it back.

  The file is the one that other programs read: a SentencePiece model or a tokenizer.json. The byte tokenizer's file
  holds a sentence, since there is nothing to load. Nothing is written where the same tokenizer is there already.

  Returns:
    The file: `folder` / FILES[tokenizer.name].

  Raises:
    InputError: the folder holds another tokenizer.
    OSError: the file can't be written.
  """
  path = folder / FILES[tokenizer.name]
  there = _written_files(folder)
  if there == [path] and path.read_bytes() == tokenizer.content and _written_end(folder) == tokenizer.end_token:
    return path
  if there:
    raise InputError(f"tokenizer {there[0]}: another tokenizer is there already; remove it, or use another folder")
  if tokenizer.end_token is not None:
    write_whole(folder / CONFIG, json.dumps({"eos_token": tokenizer.end_token}) + "\n")
  write_whole(path, tokenizer.content)
  return path


def read_written_tokenizer(folder: Path) -> Tokenizer | None:
  """The tokenizer that `write_tokenizer` wrote into a folder; None if there is none.

  A SentencePiece model or a tokenizer.json with a few other bytes may still load. A caller that knows the tokenizer's
  `content_hash` compares it.

  Raises:
    InputError: the file is damaged, or there are two tokenizers.
  """
  there = _written_files(folder)
  if not there:
    return None
  if len(there) > 1:
    names = " and ".join(path.name for path in there)
    raise InputError(f"tokenizer {folder}: {names} are different tokenizers; remove those that are not this folder's")
  (path,) = there
  (name,) = (name for name, file in FILES.items() if file == path.name)
  return load_tokenizer(name, path.read_bytes(), str(path), _written_end(folder))


def _written_end(folder: Path) -> str | None:
  path = folder / CONFIG
  return _eos_token(path.read_bytes(), str(path)) if path.is_file() else None


def _written_files(folder: Path) -> list[Path]:
  return [folder / file for file in FILES.values() if (folder / file).is_file()]


def content_hash(tokenizer: Tokenizer) -> str:
  """SHA-256, in hexadecimal, of a tokenizer's content and of what ends a document, where that is stated beside it."""
  digest = hashlib.sha256(tokenizer.content)
  if tokenizer.end_token is not None:
    digest.update(tokenizer.end_token.encode())
  return digest.hexdigest()


PROBE = (
  "The tea in 1790 cost 12,345.67 dollars;  two  blanks, a\ttab\nand\n\nlines: don't, e.g. naïve cafés, Ελλάδα, Привет,"
  " 茶と水, 🍵!\n  def f(x): return x**2  # {a: [1]} </s>"
)


def are_same(one: Tokenizer, other: Tokenizer) -> bool:
  """Whether two tokenizers, perhaps in different formats, give the same ids: content, or vocabulary and a probe."""
  if content_hash(one) == content_hash(other):
    return True
  if (one.vocab_size, one.eos_id) != (other.vocab_size, other.eos_id):
    return False
  return one.bytes_per_token() == other.bytes_per_token() and one.encode(PROBE) == other.encode(PROBE)

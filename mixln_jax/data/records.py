"""Fixed-length records of tokens in ArrayRecord shards, and the manifest that describes them.

A record holds T tokens (position t predicts t + 1), how many of them are real, and at which of them a document starts:

    tokens: T × the smallest unsigned type that holds the vocabulary, little-endian
    length: uint32; positions from it on are padding
    starts: T bits, most significant first
    answers: T bits, only in mode instructions: tokens that count where they are predicted; elsewhere all do

Padded records hold one document each, truncated and padded. Packed records cut the concatenated documents of a part of
the corpus every T - 1 tokens and overlap by one, so that each of its tokens but the first is predicted exactly once.
Records of instructions hold several whole examples and are padded.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from mixln_jax.data.tokenizer import (
  BYTES,
  RECORDS,
  ByteTokenizer,
  Tokenizer,
  content_hash,
  load_tokenizer,
  read_tokenizer,
)
from mixln_jax.errors import InputError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.bin"
FORMAT = 2
SPLITS = ("train", "validation")
WRITER_OPTIONS = "group_size:1,uncompressed"  # single records, read in any order, hardly pack


class Record(NamedTuple):
  tokens: np.ndarray  # [T]
  length: int
  starts: np.ndarray  # [T] bool
  answers: np.ndarray | None = None  # [T] bool: tokens that count where they are predicted; None = all

  @property
  def counted(self) -> int:
    """Tokens that are predicted and count: the first one is not predicted."""
    return max(0, self.length - 1) if self.answers is None else int(self.answers[1 : self.length].sum())


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest unsigned type that holds ids below `vocab_size`."""
  return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def encode_record(record: Record, dtype: np.dtype) -> bytes:
  bits = [np.packbits(flags).tobytes() for flags in (record.starts, record.answers) if flags is not None]
  return b"".join((record.tokens.astype(dtype).tobytes(), record.length.to_bytes(4, "little"), *bits))


def decode_record(data: bytes, sequence_length: int, dtype: np.dtype) -> Record:
  end = sequence_length * dtype.itemsize
  tokens = np.frombuffer(data, dtype, sequence_length).astype(np.int32)
  length = int(np.frombuffer(data, "<u4", 1, end)[0])
  rows = np.frombuffer(data, np.uint8, -1, end + 4).reshape(-1, -(-sequence_length // 8))
  starts, *answers = np.unpackbits(rows, axis=1, count=sequence_length).astype(bool)
  return Record(tokens, length, starts, *answers)


class Padder:
  """One record a document: truncated to T tokens, padded at the right; the rest of the document is dropped."""

  def __init__(self, sequence_length: int, pad_id: int):
    self._length, self._pad_id = sequence_length, pad_id
    self._starts = np.arange(sequence_length) == 0

  def add(self, ids: Sequence[int]) -> Iterator[Record]:
    """The records that are full after one more document."""
    length = min(len(ids), self._length)
    tokens = np.full(self._length, self._pad_id, np.int32)
    tokens[:length] = ids[:length]
    yield Record(tokens, length, self._starts)

  def finish(self) -> Iterator[Record]:
    """What is left."""
    return iter(())


class Packer:
  """The documents end to end, cut every T - 1 tokens into records that overlap by one; the last one is padded."""

  def __init__(self, sequence_length: int, pad_id: int):
    self._length, self._pad_id = sequence_length, pad_id
    self._tokens, self._starts = np.empty(0, np.int32), np.empty(0, bool)

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
    """What is left; a single token, which predicts nothing, is not."""
    length = len(self._tokens)
    if length > 1:
      missing = (0, self._length - length)
      yield Record(np.pad(self._tokens, missing, constant_values=self._pad_id), length, np.pad(self._starts, missing))


class ExamplePacker:
  """Whole examples, several a record: each goes into the first of the open records that has room for it."""

  OPEN = 16  # records that wait to be filled up; the one that waited longest is given out

  def __init__(self, sequence_length: int, pad_id: int):
    self._length, self._pad_id = sequence_length, pad_id
    self._open: list[list[tuple[Sequence[int], int]]] = []

  def add(self, ids: Sequence[int], num_answer: int) -> Iterator[Record]:
    """The records that are given out after one more example.

    Args:
      ids: of the example, at most T.
      num_answer: how many of them, the last ones, count where they are predicted.
    """
    room = self._length - len(ids)
    chosen = next((examples for examples in self._open if sum(len(one) for one, _ in examples) <= room), None)
    if chosen is None:
      self._open.append(chosen := [])
    chosen.append((ids, num_answer))
    if len(self._open) > self.OPEN:
      yield self._record(self._open.pop(0))

  def finish(self) -> Iterator[Record]:
    """What is left."""
    while self._open:
      yield self._record(self._open.pop(0))

  def _record(self, examples: Sequence[tuple[Sequence[int], int]]) -> Record:
    tokens = np.full(self._length, self._pad_id, np.int32)
    starts, answers = np.zeros((2, self._length), bool)
    end = 0
    for ids, num_answer in examples:
      begin, end = end, end + len(ids)
      tokens[begin:end], starts[begin], answers[end - num_answer : end] = ids, True, True
    return Record(tokens, end, starts, answers)


PACKERS: dict[str, Callable[[int, int], Any]] = {"pad": Padder, "pack": Packer, "instructions": ExamplePacker}


@dataclasses.dataclass(frozen=True)
class Shard:
  file: str
  records: int
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
  documents: int
  tokens: int  # of the documents, their end included, before truncation
  counted: int  # tokens that are predicted and count
  largest_id: int  # of the same tokens
  shards: tuple[Shard, ...]

  @property
  def records(self) -> int:
    return sum(shard.records for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder of records is. Written last, so a folder with a manifest is whole."""

  source: str
  validation_source: str
  validation_share: float  # of the source's documents, where there is no validation source
  text_field: str
  tokenizer_source: str  # what config.data.tokenizer was
  source_sha256: str  # over the names and texts of all documents
  skipped: dict[str, int]  # reason -> documents that could not be used
  tokenizer: str
  tokenizer_sha256: str
  vocab_size: int
  sequence_length: int
  mode: str
  bytes_per_token: tuple[int, ...]  # [vocab_size]
  splits: dict[str, Split]
  cut_prompts: int | None = None  # examples whose prompt lost its beginning; None where there are no prompts

  @property
  def fingerprint(self) -> str:
    """Hash over all of it but names of where it came from, which may move: what a run's data is."""
    names = ("source", "validation_source", "text_field", "tokenizer_source")
    content = {name: value for name, value in self._content().items() if name not in names}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  def _content(self) -> dict[str, Any]:
    """Its fields, without one that says nothing here."""
    return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

  def to_json(self) -> str:
    return json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, **self._content()}, indent=1) + "\n"


class Corpus(NamedTuple):
  """An opened folder of records."""

  folder: Path
  manifest: Manifest
  tokenizer: Tokenizer

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
    return grain.MapDataset.source(source).map(functools.partial(decode_record, sequence_length=length, dtype=dtype))

  def training(self, seed: int) -> grain.MapDataset[Record]:
    """The training records for ever, in a new order each epoch; the n-th is a function of the seed and n."""
    return self.rows("train").seed(seed).shuffle().repeat()


def unreadable(folder: Path, error: Exception) -> InputError:
  """The error for what ArrayRecord raises for a damaged file."""
  return InputError(
    f"{folder}: a record can't be read ({' '.join(str(error).split())[:200]}); --config.data.verify=true names the "
    "shard that changed"
  )


class ShardWriter:
  """Writes one shard, which appears whole or not at all, and counts what goes into it."""

  def __init__(self, path: Path, dtype: np.dtype):
    self._path, self._dtype = path, dtype
    self._partial = path.with_name(f".{path.name}.{os.getpid()}")
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
    """The shard; none where nothing was written."""
    if self._writer is None:
      return ()
    try:
      self._writer.close()
    except RuntimeError as error:
      raise self._unwritable(error) from error
    self._partial.replace(self._path)
    return (Shard(self._path.name, self.records, self._path.stat().st_size, file_sha256(self._path)),)

  def _unwritable(self, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{self._path}: can't be written ({reason}); make room and run again, finished parts are kept")


def file_sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def open_corpus(folder: Path, *, verify: bool = False) -> Corpus:
  """Opens a folder that `prepare` wrote. Sizes are always checked, checksums where `verify`.

  Raises:
    InputError: there is no manifest, or it, a shard or the tokenizer is missing or changed.
  """
  manifest = _read_manifest(folder)
  for split in manifest.splits.values():
    for shard in split.shards:
      _check_shard(folder, shard, verify=verify)
  return Corpus(folder, manifest, _stored_tokenizer(folder, manifest))


def _stored_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
  path = folder / TOKENIZER
  if not path.is_file():
    raise _changed(path, "is missing")
  tokenizer = load_tokenizer(manifest.tokenizer, path.read_bytes(), str(path))
  if content_hash(tokenizer) != manifest.tokenizer_sha256 or tokenizer.vocab_size != manifest.vocab_size:
    raise _changed(path, "is not the tokenizer that made the records")
  return tokenizer


def named_tokenizer(name: str) -> Tokenizer:
  """The tokenizer that config.data.tokenizer names, where that is not one to be trained.

  Raises:
    InputError: it can't be read or is no tokenizer.
  """
  if name == BYTES:
    return ByteTokenizer()
  if name.startswith(RECORDS):
    folder = Path(name.removeprefix(RECORDS)).expanduser()
    return _stored_tokenizer(folder, _read_manifest(folder))
  return read_tokenizer(name)


def _changed(path: Path, problem: str) -> InputError:
  return InputError(
    f"config.data.directory: {path} {problem}; restore it, or delete the folder and run `python -m "
    "mixln_jax prepare` again"
  )


def _read_manifest(folder: Path) -> Manifest:
  path = folder / MANIFEST
  if not path.is_file():
    raise InputError(
      f"config.data.directory: no records in {folder}; run `python -m mixln_jax prepare` with the same --config first"
    )
  try:
    data = json.loads(path.read_text())
    if (form := data.pop("format")) != FORMAT:
      raise _changed(path, f"has format {form}, this version reads format {FORMAT}")
    fingerprint = data.pop("fingerprint")
    splits = {
      name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
      for name, split in data.pop("splits").items()
    }
    manifest = Manifest(splits=splits, **{**data, "bytes_per_token": tuple(data["bytes_per_token"])})
  except InputError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _changed(path, f"is damaged ({type(error).__name__}: {error})") from error
  if fingerprint != manifest.fingerprint:
    raise _changed(path, "was changed by hand: its fingerprint does not match its contents")
  if max(split.largest_id for split in splits.values()) >= manifest.vocab_size:
    raise _changed(path, f"has ids beyond its vocabulary of {manifest.vocab_size}")
  for shard in (shard for split in splits.values() for shard in split.shards):
    if Path(shard.file).name != shard.file:
      raise _changed(path, f"names a shard outside its folder ({shard.file!r})")
  return manifest


def _check_shard(folder: Path, shard: Shard, *, verify: bool) -> None:
  path = folder / shard.file
  if not path.is_file():
    raise _changed(path, "is missing")
  if path.stat().st_size != shard.bytes:
    raise _changed(path, f"has {path.stat().st_size} bytes, the manifest says {shard.bytes}")
  if verify and file_sha256(path) != shard.sha256:
    raise _changed(path, "has another checksum than the manifest says")

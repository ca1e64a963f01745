"""Fixed-length records of tokens in ArrayRecord shards, and the manifest that describes them.

A record holds T tokens (position t predicts t + 1), how many of them are real, and at which of them a document starts:

    tokens: T × the smallest unsigned type that holds the vocabulary, little-endian
    length: uint32; positions from it on are padding
    starts: T bits, most significant first

Padded records hold one document each, truncated and padded. Packed records cut the concatenated documents of a part of
the corpus every T - 1 tokens and overlap by one, so that each of its tokens but the first is predicted exactly once.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from mixln_jax.data.tokenizer import Tokenizer, content_hash, load_tokenizer
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


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest unsigned type that holds ids below `vocab_size`."""
  return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def encode_record(record: Record, dtype: np.dtype) -> bytes:
  starts = np.packbits(record.starts).tobytes()
  return record.tokens.astype(dtype).tobytes() + record.length.to_bytes(4, "little") + starts


def decode_record(data: bytes, sequence_length: int, dtype: np.dtype) -> Record:
  end = sequence_length * dtype.itemsize
  tokens = np.frombuffer(data, dtype, sequence_length).astype(np.int32)
  length = int(np.frombuffer(data, "<u4", 1, end)[0])
  bits = np.frombuffer(data, np.uint8, -1, end + 4)
  return Record(tokens, length, np.unpackbits(bits, count=sequence_length).astype(bool))


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


PACKERS = {"pad": Padder, "pack": Packer}


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
  counted: int  # positions that are predicted
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

  @property
  def fingerprint(self) -> str:
    """Hash over all of it but names of where it came from, which may move: what a run's data is."""
    names = ("source", "validation_source", "text_field", "tokenizer_source")
    content = {name: value for name, value in dataclasses.asdict(self).items() if name not in names}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  def to_json(self) -> str:
    return json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, **dataclasses.asdict(self)}, indent=1) + "\n"


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
    self.counted += max(0, record.length - 1)

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
  path = folder / TOKENIZER
  if not path.is_file():
    raise _changed(path, "is missing")
  tokenizer = load_tokenizer(manifest.tokenizer, path.read_bytes(), str(path))
  if content_hash(tokenizer) != manifest.tokenizer_sha256 or tokenizer.vocab_size != manifest.vocab_size:
    raise _changed(path, "is not the tokenizer that made the records")
  return Corpus(folder, manifest, tokenizer)


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

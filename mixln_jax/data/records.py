"""Fixed-length records of tokens in ArrayRecord shards, and the manifest that describes them.

A record holds T tokens (position t predicts t + 1), how many of them are real, and at which of them a document starts:

    tokens: T × the smallest unsigned type that holds the vocabulary, little-endian
    length: uint32; positions from it on are padding
    starts: T bits, most significant first

Padded records hold one document each, truncated and padded. Packed records cut the concatenated documents every T - 1
tokens and overlap by one, so that each token but the first is predicted exactly once.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from mixln_jax.data.tokenizer import Tokenizer, content_hash, load_tokenizer
from mixln_jax.errors import InputError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.bin"
FORMAT = 1
SPLITS = ("train", "validation")
RECORDS_PER_SHARD = 65_536


class Record(NamedTuple):
  tokens: np.ndarray  # [T]
  length: int
  starts: np.ndarray  # [T] bool


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest unsigned type that holds ids below `vocab_size`."""
  return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def encode_record(record: Record, dtype: np.dtype) -> bytes:
  return (
    record.tokens.astype(dtype).tobytes() + np.uint32(record.length).tobytes() + np.packbits(record.starts).tobytes()
  )


def decode_record(data: bytes, sequence_length: int, dtype: np.dtype) -> Record:
  end = sequence_length * dtype.itemsize
  tokens = np.frombuffer(data, dtype, sequence_length).astype(np.int32)
  length = int(np.frombuffer(data, "<u4", 1, end)[0])
  bits = np.frombuffer(data, np.uint8, -1, end + 4)
  return Record(tokens, length, np.unpackbits(bits, count=sequence_length).astype(bool))


def padded_records(documents: Iterable[list[int]], sequence_length: int, pad_id: int) -> Iterator[Record]:
  """One record a document: truncated to T tokens, padded at the right; the rest of the document is dropped."""
  starts = np.arange(sequence_length) == 0
  for ids in documents:
    kept = ids[:sequence_length]
    tokens = np.full(sequence_length, pad_id, np.int64)
    tokens[: len(kept)] = kept
    yield Record(tokens, len(kept), starts)


def packed_records(documents: Iterable[list[int]], sequence_length: int, pad_id: int) -> Iterator[Record]:
  """The documents end to end, cut every T - 1 tokens into records that overlap by one; the last one is padded."""
  tokens = np.empty(0, np.int64)
  starts = np.empty(0, bool)
  for ids in documents:
    tokens = np.concatenate((tokens, np.asarray(ids, np.int64)))
    starts = np.concatenate((starts, np.arange(len(ids)) == 0))
    begin = 0
    while begin + sequence_length <= len(tokens):
      window = slice(begin, begin + sequence_length)
      yield Record(tokens[window], sequence_length, starts[window])
      begin += sequence_length - 1
    tokens, starts = tokens[begin:], starts[begin:]
  if len(tokens) > 1:
    missing = sequence_length - len(tokens)
    yield Record(np.pad(tokens, (0, missing), constant_values=pad_id), len(tokens), np.pad(starts, (0, missing)))


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
  largest_id: int
  shards: tuple[Shard, ...]

  @property
  def records(self) -> int:
    return sum(shard.records for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder of records is. Written last, so a folder with a manifest is whole."""

  source: str
  source_sha256: str  # over the names and texts of all documents
  tokenizer: str
  tokenizer_sha256: str
  vocab_size: int
  sequence_length: int
  mode: str
  bytes_per_token: tuple[int, ...]  # [vocab_size]
  splits: dict[str, Split]

  @property
  def fingerprint(self) -> str:
    """Hash over all of it but the name of the source, which may move: what a run's data is."""
    content = {name: value for name, value in dataclasses.asdict(self).items() if name != "source"}
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


class SplitWriter:
  """Writes one split's shards and counts what goes into them."""

  def __init__(self, folder: Path, split: str, dtype: np.dtype):
    self._folder, self._split, self._dtype = folder, split, dtype
    self._counts: list[int] = []
    self._writer: Any = None
    self.counted = 0
    self.largest_id = 0

  def write(self, record: Record) -> None:
    if self._writer is None or self._counts[-1] == RECORDS_PER_SHARD:
      self._close()
      self._writer = array_record_module.ArrayRecordWriter(str(self._path(len(self._counts))), "group_size:1")
      self._counts.append(0)
    self._writer.write(encode_record(record, self._dtype))
    self._counts[-1] += 1
    self.counted += max(0, record.length - 1)
    self.largest_id = max(self.largest_id, int(record.tokens.max()))

  def finish(self, documents: int, tokens: int) -> Split:
    self._close()
    shards = []
    for index, records in enumerate(self._counts):
      path = self._path(index).rename(
        self._folder / f"{self._split}-{index:05d}-of-{len(self._counts):05d}.array_record"
      )
      shards.append(Shard(path.name, records, path.stat().st_size, file_sha256(path)))
    return Split(documents, tokens, self.counted, self.largest_id, tuple(shards))

  def _path(self, index: int) -> Path:
    return self._folder / f"{self._split}-{index:05d}"

  def _close(self) -> None:
    if self._writer is not None:
      self._writer.close()


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
    form, fingerprint = data.pop("format"), data.pop("fingerprint")
    splits = {
      name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
      for name, split in data.pop("splits").items()
    }
    manifest = Manifest(splits=splits, **{**data, "bytes_per_token": tuple(data["bytes_per_token"])})
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _changed(path, f"is damaged ({type(error).__name__}: {error})") from error
  if form != FORMAT:
    raise _changed(path, f"has format {form}, this version reads format {FORMAT}")
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

"""Converts one part of a corpus to records, in a worker process of `prepare`."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import instructions, preferences
from mixln_jax.data import records as records_lib
from mixln_jax.data.corpus import Bad, Document, Part
from mixln_jax.data.instructions import Example
from mixln_jax.data.preferences import Pair
from mixln_jax.data.records import SPLITS, Record, Split
from mixln_jax.data.tokenizer import PAD, Tokenizer
from mixln_jax.data.tokenizer_files import load_tokenizer
from mixln_jax.errors import InputError
from mixln_jax.files import json_object, write_whole

RESULTS = "parts"  # folder of the results of the parts
EXAMPLES = 3  # how many bad documents of a part its result names
TRAIN, VALIDATION = SPLITS


Text = Document | Example | Pair  # what a corpus is made of


class SplitPart(NamedTuple):
  """A part of the corpus, and the split of its documents."""

  part: Part
  split: str | None  # None = decided by the hash of each document's name


class Job(NamedTuple):
  """One part to write, with everything that a worker needs to know."""

  part: Part
  number: int
  total: int  # parts of the whole corpus
  split: str | None  # as in SplitPart
  folder: Path
  sequence_length: int
  mode: str
  text_field: str
  validation_fraction: float
  tokenizer: str  # the kind of the tokenizer, whose content is in the folder
  end_token: str | None  # the token that ends a document, if the tokenizer's content does not define it

  @property
  def result(self) -> Path:
    """The file of the result; the part is finished once it exists."""
    return self.folder / RESULTS / f"{self.number:05d}.json"


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of writing a part."""

  splits: dict[str, Split]
  sha256: str  # over the names and texts of the part's documents
  skipped: dict[str, int]  # reason -> documents that could not be used
  where: list[str]  # where up to EXAMPLES of them are
  cut_prompts: int  # examples whose prompt lost its beginning

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: bytes, where: str) -> "Result | None":
    """The inverse of `to_json`; None if the file is invalid or of another version, and the part is to be redone."""
    try:
      value = json_object(text, where)
      splits = {name: Split.from_json(split) for name, split in value["splits"].items()}
      return cls(**{**value, "splits": splits})
    except (InputError, KeyError, TypeError, AttributeError):
      return None


def write_part(job: Job, count: Callable[[int], object] = lambda _: None) -> Result:
  """Writes the shards of one part, and finally its result, which marks the part as finished.

  Args:
    job: the part.
    count: called with the number of documents finished since the last call.

  Raises:
    InputError: a file of the corpus is damaged, the tokenizer does not fit, or a shard can't be written.
  """
  path = job.folder / records_lib.TOKENIZER
  tokenizer = load_tokenizer(job.tokenizer, path.read_bytes(), str(path), job.end_token)
  writers = {split: _SplitWriter(job, split, tokenizer) for split in SPLITS}
  skipped: Counter[str] = Counter()
  where: list[str] = []
  digest = hashlib.sha256()
  for document in read_part(job.part, job.mode, job.text_field):
    if isinstance(document, Bad):
      bad = document
    else:
      hash_document(digest, document)
      split = job.split or split_of(document, job.validation_fraction)
      bad = writers[split].add(document)
    if bad is None:
      count(1)
      continue
    skipped[bad.reason] += 1
    if len(where) < EXAMPLES:
      where.append(f"{bad.reason}: {bad.where}")
  result = Result(
    splits={split: writer.finish() for split, writer in writers.items()},
    sha256=digest.hexdigest(),
    skipped=dict(skipped),
    where=where,
    cut_prompts=sum(writer.cut_prompts for writer in writers.values()),
  )
  write_whole(job.result, result.to_json())
  return result


def finished(job: Job) -> Result | None:
  """The result of a part that an earlier process finished; None if there is none, or if a shard is missing."""
  if not job.result.is_file():
    return None
  result = Result.from_json(job.result.read_bytes(), str(job.result))
  if result is None:
    return None
  for split in result.splits.values():
    for shard in split.shards:
      path = job.folder / shard.file
      if not path.is_file() or path.stat().st_size != shard.bytes:
        return None
  return result


class _SplitWriter:
  """Writes the documents of one split of one part to a shard."""

  def __init__(self, job: Job, split: str, tokenizer: Tokenizer):
    path = job.folder / f"{split}-{job.number:05d}-of-{job.total:05d}.array_record"
    self._tokenizer = tokenizer
    self._writer = records_lib.ShardWriter(path, records_lib.token_dtype(tokenizer.vocab_size))
    self._packer = records_lib.PACKERS[job.mode](job.sequence_length, PAD)
    self._length = job.sequence_length
    self._documents = self._tokens = self._largest_id = 0
    self.cut_prompts = 0

  def add(self, document: Text) -> Bad | None:
    """Writes a document; returns a Bad if it does not fit into a record."""
    if isinstance(document, Document):
      ids = [*self._tokenizer.encode(document.text), self._tokenizer.eos_id]
      self._write(document.name, ids, self._packer.add(ids))
      return None
    if isinstance(document, Pair):
      return self._add_pair(document)
    tokens = instructions.tokenize(document, self._tokenizer, self._length)
    if tokens is None:
      return Bad(instructions.ANSWER_TOO_LONG, f"the example that answers {document.answer[:60]!r}")
    self.cut_prompts += tokens.num_cut > 0
    self._tokens += tokens.num_cut
    self._write(document.name, tokens.ids, self._packer.add(tokens.ids, tokens.num_answer))
    return None

  def _add_pair(self, pair: Pair) -> Bad | None:
    tokens = preferences.tokenize(pair, self._tokenizer, self._length)
    if isinstance(tokens, str):
      return Bad(tokens, f"the pair whose chosen answer is {pair.chosen[:60]!r}")
    self.cut_prompts += tokens.num_cut > 0
    self._tokens += 2 * tokens.num_cut
    ids = [*tokens.chosen.ids, *tokens.rejected.ids]
    self._write(pair.name, ids, self._packer.add(tokens.chosen, tokens.rejected))
    return None

  def _write(self, name: str, ids: Sequence[int], full: Iterable[Record]) -> None:
    largest = max(ids)
    if largest >= self._tokenizer.vocab_size:
      raise InputError(
        f"config.data.tokenizer: gives id {largest} for document {name!r}, beyond its vocabulary of "
        f"{self._tokenizer.vocab_size}; choose another"
      )
    self._documents += 1
    self._tokens += len(ids)
    self._largest_id = max(self._largest_id, largest)
    for record in full:
      self._writer.write(record)

  def finish(self) -> Split:
    """Writes the last records; returns the facts of the split."""
    for record in self._packer.finish():
      self._writer.write(record)
    shards = self._writer.finish()
    return Split(self._documents, self._tokens, self._writer.counted, self._largest_id, shards)


def read_part(part: Part, mode: str, text_field: str) -> Iterator[Text | Bad]:
  """The documents, examples or pairs of a part, by config.data.mode, with a Bad for each that can't be used."""
  if mode == instructions.KIND:
    return instructions.read(part)
  if mode == preferences.MODE:
    return preferences.read(part)
  return corpus_lib.read(part, text_field)


def hash_of_part(part: Part, mode: str, text_field: str) -> str:
  """The hash of the names and texts of a part's documents (Result.sha256), without writing anything."""
  digest = hashlib.sha256()
  for document in read_part(part, mode, text_field):
    if not isinstance(document, Bad):
      hash_document(digest, document)
  return digest.hexdigest()


def hash_document(digest: Any, document: Text) -> None:
  """Adds the fields of a document to a hash, each after its length."""
  for text in document:
    data = text.encode(errors="surrogateescape")
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def split_of(document: Text, validation_fraction: float) -> str:
  """The split of a document, decided by the hash of its name."""
  return VALIDATION if corpus_lib.is_validation(document.name, validation_fraction) else TRAIN

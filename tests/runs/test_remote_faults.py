"""A run in a bucket that fails: at each moment, with each fault, it ends with a named error and resumes to the same
bits, or nobody notices."""

import contextlib
import json
import re
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from mixln_jax import __main__, waiting
from mixln_jax.errors import InputError, LostLockError, UnreachableError
from mixln_jax.runs import gcs
from mixln_jax.runs.checkpoint import Checkpoints, DamagedError
from mixln_jax.runs.folder import RunFolder
from runs import buckets, random_faults
from runs.buckets import curve, finish, remote_curve

pytestmark = pytest.mark.skipif(buckets.server_binary() is None, reason="fake-gcs-server is not installed here")

# What a request is about, and so when it is made.
MOMENTS = {
  "start": lambda request: True,
  "resume": lambda request: re.search(r"/checkpoints/\d+/", request.name) and request.kind in ("list", "read", "stat"),
  "save": lambda request: "/checkpoints/4/" in request.name and request.kind == "upload",
  "commit": lambda request: request.kind == "copy",
  "copy": lambda request: request.name.endswith("/metrics.jsonl") and request.kind == "upload",
  "end": lambda request: request.name.endswith("/outcome.json") and request.kind == "upload",
}


def trees(step):
  params = {"a": jnp.arange(4.0) * step, "b": jnp.ones(3)}
  return {"params": params, "rest": {"m": jnp.ones(4), "step": jnp.int32(step)}}


def abstract(tree):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.fixture
def held(bucket, request):
  """A run's folder whose lock this process holds, and its checkpoints."""
  folder = RunFolder(f"gs://bucket/{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower())}")
  folder.create("{}")
  with folder.lock():
    yield folder, Checkpoints(folder.place("checkpoints"), keep_last=1, check_held=folder.check_held)


def test_a_checkpoint_takes_few_requests(held, bucket):
  """Through gcsfs it took 218, a quarter of them answered with 404 and a fifth listings."""
  _, checkpoints = held
  checkpoints.save(1, trees(1), {})
  checkpoints.wait()
  before = len(bucket.proxy.requests)
  checkpoints.save(2, trees(2), {}, 1.0)
  checkpoints.wait()
  counts = bucket.proxy.counts(before)
  assert counts["all"] <= 109, counts
  assert counts["missing"] <= 16, counts
  assert counts["list"] <= 32, counts


@pytest.mark.parametrize("fault", ["401", "403"])
@pytest.mark.parametrize("reader", ["epath", "tensorstore"])
def test_a_checkpoint_that_can_not_be_read_is_not_damaged(held, bucket, fault, reader):
  """A whole checkpoint was called damaged and moved away after an outage."""
  folder, checkpoints = held
  checkpoints.save(1, trees(1), {})
  checkpoints.wait()
  name = "_METADATA" if reader == "epath" else "manifest.ocdbt"
  with (
    bucket.proxy.fault(fault, lambda request: request.name.endswith(name)),
    pytest.raises(UnreachableError, match=rf"workdir={folder.address}/checkpoints: can't be reached \(.*{fault}"),
  ):
    checkpoints.restore(1, abstract(trees(1)))
  assert checkpoints.restore(1, abstract(trees(1)))["params"]["a"].shape == (4,)


def test_a_checkpoint_whose_bytes_are_wrong_or_gone_is_damaged(held, bucket):
  folder, checkpoints = held
  checkpoints.save(1, trees(1), {})
  checkpoints.wait()
  data = max(bucket.names(f"{folder.name}/checkpoints/1/params/d/"), key=lambda name: len(bucket.read(name)))
  bucket.write(data, b"")
  with pytest.raises(DamagedError, match=r"gs://bucket/.*/checkpoints/1: the checkpoint is damaged"):
    checkpoints.restore(1, abstract(trees(1)))


@pytest.mark.parametrize("fault", ["401", "403"])
def test_a_refusal_is_not_taken_for_a_missing_checkpoint(held, bucket, fault):
  """gcsfs reads a refusal as "no such folder": the run would start anew beside its checkpoints."""
  folder, checkpoints = held
  checkpoints.save(1, trees(1), {})
  checkpoints.wait()
  with bucket.proxy.fault(fault, lambda request: "/checkpoints" in request.name), pytest.raises(UnreachableError):
    Checkpoints(folder.place("checkpoints"))


def test_a_bucket_that_stays_away_is_named_and_ends_the_wait(held, bucket, quick, monkeypatch, capsys):
  """A save said nothing for 14 minutes, which is how long tensorstore tries."""
  monkeypatch.setattr(waiting, "SECONDS_TO_A_LINE", 0.5)
  _, checkpoints = held
  with bucket.proxy.fault("drop"):
    with pytest.raises((LostLockError, UnreachableError)):
      _save_and_wait(checkpoints)
    time.sleep(1)
  assert re.search(r"waiting    for .* \(gs://bucket/.*/checkpoints\), since \d\d:\d\d:\d\d", capsys.readouterr().out)


def _save_and_wait(checkpoints):
  checkpoints.save(1, trees(1), {})
  checkpoints.wait()


def test_an_old_checkpoint_is_removed_commit_first(held, bucket):
  """One that was half removed when the process was killed passed for a checkpoint."""
  folder, checkpoints = held
  checkpoints.save(1, trees(1), {})
  checkpoints.wait()
  before = len(bucket.proxy.requests)
  gcs.Storage().rm(f"{folder.address}/checkpoints/1", recursive=True)
  removals = [request for request in bucket.proxy.requests[before:] if request.kind in ("delete", "batch")]
  assert [request.kind for request in removals] == ["delete", "batch"]
  assert removals[0].name.endswith("checkpoints/1/commit_success.txt")
  assert not bucket.names(f"{folder.name}/checkpoints/")


@pytest.mark.parametrize("place", ["gs:/bucket/x", "gs:bucket/x", "s3:/bucket/x"])
@pytest.mark.parametrize(
  "arguments",
  [
    ("train", "--workdir=PLACE", "--config=configs/tiny.py"),
    ("report", "--workdir=PLACE", "--output=out"),
    ("report", "--workdir=run", "--output=PLACE"),
    ("convert", "--workdir=run", "--output=PLACE"),
    ("convert", "--workdir=run", "--input=PLACE", "--config=configs/tiny.py"),
    ("prepare", "--config=configs/tiny.py", "--train_tokenizer=PLACE"),
    ("prepare", "--config=configs/tiny.py", "--config.data.directory=PLACE"),
    ("prepare", "--config=configs/tiny.py", "--config.data.source=PLACE"),
    ("train", "--workdir=run", "--config=configs/tiny.py", "--config.data.mixture=PLACE:1.0"),
    ("finetune", "--workdir=run", "--config=configs/tiny.py", "--config.train.start_from=PLACE"),
    ("generate", "--workdir=PLACE"),
    ("evaluate", "--workdir=PLACE"),
    ("diagnose", "--workdir=PLACE"),
    ("sweep", "--workdir=PLACE", "--config=configs/tiny.py", "--axis=model.placement=pre,post"),
  ],
)
def test_a_url_that_lost_a_slash_is_rejected_everywhere(arguments, place, tmp_path, monkeypatch, capsys):
  """It became a local folder `gs:`, with status 0."""
  argv = [argument.replace("PLACE", place).replace("configs/", f"{buckets.ROOT}/configs/") for argument in arguments]
  monkeypatch.chdir(tmp_path)
  assert __main__.main(argv) == 2
  errors = capsys.readouterr().err
  assert re.search(rf"error: (--)?[\w.]+={place}\b.*: not a URL and hardly a folder; write (gs|s3)://bucket/x", errors)
  assert errors.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "arguments",
  [
    ("prepare", "--config=configs/tiny.py", "--config.data.directory=gs://bucket/x"),
    ("train", "--workdir=run", "--config=configs/tiny.py", "--config.data.mixture=gs://bucket/x:1.0"),
    ("train", "--workdir=run", "--config=configs/tiny.py", "--config.data.tokenizer=gs://bucket/x.model"),
    ("sweep", "--workdir=gs://bucket/x", "--config=configs/tiny.py", "--axis=model.placement=pre,post"),
  ],
)
def test_what_must_lie_on_a_disk_is_rejected_in_a_bucket(arguments, tmp_path, monkeypatch, capsys):
  argv = [argument.replace("configs/", f"{buckets.ROOT}/configs/") for argument in arguments]
  monkeypatch.chdir(tmp_path)
  assert __main__.main(argv) == 2
  assert re.search(r"error: .*gs://bucket/x.*: must be on this machine", capsys.readouterr().err)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["gs://", "gs:///x", "gs://bucket/a//b", "gs://bucket/a/../b", "gs://bucket/a*"])
def test_a_folder_that_a_bucket_and_a_disk_would_read_differently_is_rejected(url):
  with pytest.raises(InputError, match=rf"workdir='?{re.escape(url)}"):
    RunFolder(url)


@pytest.fixture(scope="module")
def expected(command, tmp_path_factory):
  """The metrics of the run that nothing happened to."""
  folder = tmp_path_factory.mktemp("untouched") / "run"
  finish(command("train", f"--config={command.recipe}", f"--workdir={folder}"))
  return curve(folder / "metrics.jsonl")


def wait_for(condition, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.005)


def train(command, run):
  return command("train", f"--config={command.recipe}", f"--workdir=gs://bucket/{run}", stale_seconds=6.0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "500", "429", "drop", "delay", "lost"])
def test_a_fault_that_passes_is_not_noticed(bucket, command, expected, fault):
  """At each moment of a run that is resumed, the first two requests meet it."""
  run = f"passes-{fault}"
  killed = train(command, run)
  wait_for(lambda: bucket.exists(f"{run}/checkpoints/2/{gcs.COMMIT}"))
  killed.kill()
  killed.communicate()
  with contextlib.ExitStack() as stack:
    for matches in reversed(MOMENTS.values()):  # the first rule that matches is used, and start matches all
      stack.enter_context(bucket.proxy.fault(fault, matches, times=2, seconds=2.0))
    output = finish(train(command, run))
  assert remote_curve(bucket, run) == expected
  assert "Traceback" not in output
  assert not bucket.names(f"{run}/damaged")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["401", "403"])
@pytest.mark.parametrize("moment", [name for name in MOMENTS if name != "resume"])
def test_a_fault_that_stays_ends_the_run_in_one_line_and_it_resumes(bucket, command, expected, fault, moment):
  """It ended with 67 to 980 lines of four libraries, the useful one in the middle."""
  run = f"stays-{fault}-{moment}"
  refused_at_once = (fault, moment) == ("403", "start")  # no rights: nobody tries that again
  with bucket.proxy.fault(fault, MOMENTS[moment]):
    output = finish(train(command, run), 2 if refused_at_once else 1)
  last = output.strip().splitlines()[-1]
  reason = "can't be used" if refused_at_once else "can't be reached"
  assert re.search(rf"error: .*gs://bucket/{run}.*: {reason} \(.*{fault}", last), output
  assert refused_at_once or last.endswith("run the same command to resume")
  assert len(output.splitlines()) < 30, output
  if moment not in ("start", "copy"):  # there is a checkpoint: it is not read now, and not damaged
    with bucket.proxy.fault(fault, MOMENTS["resume"]):
      output = finish(train(command, run), 1)
    assert "can't be reached" in output.splitlines()[-1]
    assert not bucket.names(f"{run}/damaged")
  finish(train(command, run))
  assert remote_curve(bucket, run) == expected
  assert json.loads(bucket.read(f"{run}/outcome.json"))["status"] == "finished"
  assert not bucket.exists(f"{run}/.lock")


@pytest.mark.slow
def test_a_store_that_is_switched_off_is_named_in_the_last_line(command, expected):
  process = command(
    "train",
    f"--config={command.recipe}",
    "--workdir=gs://bucket/off",
    env={"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9", "TENSORSTORE_GCS_HTTP_URL": "http://127.0.0.1:9"},
  )
  output = finish(process, 1)
  assert re.fullmatch(
    r"error: workdir=gs://bucket/off: can't be reached \(.*refused.*; run the same command to resume",
    output.strip().splitlines()[-1],
  ), output


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_process_that_slept_while_another_finished_the_run_changes_nothing(bucket, command, expected, stopped_at):
  """`outcome.json` "finished, 6" became "failed, 0", and the metrics lost their last steps."""
  run = f"slept-{stopped_at}"
  with bucket.proxy.fault("delay", MOMENTS["save"], seconds=0.3):
    sleeper = train(command, run)
    wait_for(lambda: bucket.exists(f"{run}/checkpoints/{stopped_at}/"))
    sleeper.send_signal(signal.SIGSTOP)
  finish(train(command, run))
  before = {name: bucket.read(name) for name in bucket.names(f"{run}/")}
  sleeper.send_signal(signal.SIGCONT)
  output = finish(sleeper, 1)
  assert "the run's lock was lost" in output.strip().splitlines()[-1], output
  names = [name for name in before if "/checkpoints/" not in name or name.endswith("commit_success.txt")]
  assert {name: bucket.read(name) for name in names} == {name: before[name] for name in names}
  assert remote_curve(bucket, run) == expected
  assert "all 6 steps were done already" in finish(train(command, run))
  assert remote_curve(bucket, run) == expected


@pytest.mark.slow
def test_a_report_is_read_from_and_written_to_a_bucket(bucket, command, tmp_path):
  finish(train(command, "reported"))
  arguments = ("report", "--workdir=gs://bucket/reported")
  output = finish(command(*arguments, "--output=gs://bucket/report"))
  assert "report     gs://bucket/report/report.html" in output
  finish(command(*arguments, f"--output={tmp_path / 'report'}"))
  written = [path for path in (tmp_path / "report").rglob("*") if path.is_file()]
  local = {path.relative_to(tmp_path / "report").as_posix() for path in written}
  assert {name.removeprefix("report/") for name in bucket.names("report/")} == local


@pytest.mark.slow
def test_runs_that_meet_random_faults_end_as_the_one_that_meets_none():
  """`python -m runs.random_faults` tries more of them."""
  assert random_faults.try_seeds(range(2, 5), steps=60, every=10) == {}

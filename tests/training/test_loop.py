"""The loop: exactly num_steps updates, and a run that was stopped anywhere equals one that never was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import Killed, saved_params

from mixln_jax import config as config_lib
from mixln_jax.data.prepare import prepare
from mixln_jax.errors import InputError
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.runs import lock as lock_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.runs.outcome import read_outcome
from mixln_jax.training import loop, member
from mixln_jax.training import step as step_lib
from mixln_jax.training.resume import resume_point
from mixln_jax.training.stopping import StopRequest

ROOT = Path(__file__).parents[2]


def slow(value):
  return pytest.param(value, marks=pytest.mark.slow)


def final_params(workdir, step=None):
  folder = RunFolder(workdir)
  params = saved_params(folder, step)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def curve(workdir):
  """What metrics.jsonl says, less the speed; each (split, step) once, in order of steps."""
  lines = read_metrics(Path(workdir) / "metrics.jsonl")
  keys = [(line["split"], line["step"]) for line in lines]
  assert len(keys) == len(set(keys))
  assert [step for split, step in keys if split == "train"] == list(
    range(1, len([k for k in keys if k[0] == "train"]) + 1)
  )
  return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def assert_same_run(workdir, other):
  assert curve(workdir) == curve(other)
  first, second = final_params(workdir), final_params(other)
  assert first.keys() == second.keys()
  for name, leaf in first.items():
    np.testing.assert_array_equal(leaf, second[name], err_msg=name)


@pytest.fixture
def stop_after(monkeypatch):
  """`stop_after(n)`: the run that starts next is asked to stop once n of its steps have been dispatched."""

  def arrange(count):
    asked = []

    class Counting(StopRequest):
      @property
      def requested_by(self):
        asked.append(None)  # the loop asks once a step
        return "SIGTERM" if len(asked) >= count else None

      @requested_by.setter
      def requested_by(self, value):
        pass

    monkeypatch.setattr("mixln_jax.training.stopping.StopRequest", Counting)

  return arrange


@pytest.fixture(scope="module")
def untouched(make_config, tmp_path_factory):
  """A run of six steps that nobody stopped."""
  workdir = tmp_path_factory.mktemp("untouched") / "run"
  outcome = loop.train(make_config(), workdir)
  assert (outcome.status, outcome.step, outcome.last_checkpoint) == ("finished", 6, 6)
  return workdir


def test_a_run_leaves_its_facts(untouched, make_config):
  assert config_lib.from_json((untouched / "config.json").read_text()) == make_config()
  assert (untouched / "placement.txt").read_text() == "post pre\n"
  table = (untouched / "parameters.txt").read_text()
  assert "layers/query" in table
  count = sum(leaf.size for leaf in final_params(untouched).values())
  assert table.endswith(f"stored {count:,}, of which a device holds {count:,}\nparameters {count:,}\n")
  environment = json.loads((untouched / "environment.json").read_text())
  assert environment["packages"]["jax"] == jax.__version__
  assert environment["devices"] == ["cpu:cpu"]
  assert re.fullmatch("[0-9a-f]{16}", environment["train_step"])
  outcome = json.loads((untouched / "outcome.json").read_text())
  assert (outcome["status"], outcome["step"]) == ("finished", 6)
  lines = read_metrics(untouched / "metrics.jsonl")
  assert [line["step"] for line in lines if line["split"] == "validation"] == [3, 6]
  train = [line for line in lines if line["split"] == "train"]
  assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
  assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second"} <= train[0].keys()
  assert outcome["validation"]["loss"] == lines[-1]["loss"]
  assert outcome["best_validation"]["loss"] == min(line["loss"] for line in lines if line["split"] == "validation")
  seconds = outcome["seconds"]
  parts = ("compile", "input", "evaluation", "checkpoint", "steps")
  assert abs(sum(seconds[part] for part in parts) - seconds["total"]) < 0.01
  assert 0 < seconds["goodput"] < 1


@pytest.mark.parametrize("dispatched", [slow(1), slow(2), 3, 4, slow(5)])
def test_stopped_after_any_step_and_run_again_is_the_untouched_run(
  dispatched, untouched, make_config, stop_after, tmp_path, monkeypatch
):
  stop_after(dispatched)
  outcome = loop.train(make_config(), tmp_path / "run")
  assert (outcome.status, outcome.step, outcome.last_checkpoint) == ("stopped", dispatched, dispatched)
  monkeypatch.undo()
  assert loop.train(make_config(), tmp_path / "run").status == "finished"
  assert_same_run(tmp_path / "run", untouched)


def test_a_crash_between_checkpoints_loses_nothing_but_time(untouched, make_config, tmp_path, monkeypatch):
  """An exception in step 4 leaves lines of metrics behind the checkpoint of step 2; a torn one is added."""
  calls = []
  real = loop.global_batch

  def crash(*arguments):
    calls.append(None)
    if len(calls) == 4:
      raise RuntimeError("out of the blue")
    return real(*arguments)

  monkeypatch.setattr(loop, "global_batch", crash)
  with pytest.raises(RuntimeError, match="out of the blue"):
    loop.train(make_config(), tmp_path / "run")
  monkeypatch.undo()
  path = tmp_path / "run" / "metrics.jsonl"
  assert read_metrics(path)[-1]["step"] == 3
  with path.open("a") as file:
    file.write('{"step": 4, "spl')
  assert loop.train(make_config(), tmp_path / "run").status == "finished"
  assert_same_run(tmp_path / "run", untouched)


@pytest.mark.parametrize("killer", [signal.SIGKILL, slow(signal.SIGTERM)])
def test_a_killed_process_run_again_is_the_untouched_run(untouched, make_config, tmp_path, killer):
  """A real process and a real signal, sent while it trains."""
  del untouched
  recipe = tmp_path / "recipe.py"
  config = make_config(**{"train.num_steps": 250, "checkpoint.every_steps": 20, "evaluate.every_steps": 100})
  recipe.write_text(
    "from mixln_jax.config import from_json\n\n\ndef get_config():\n"
    f"  return from_json({config_lib.to_json(config)!r})\n"
  )

  def command(workdir):
    return [sys.executable, "-m", "mixln_jax", "train", f"--config={recipe}", f"--workdir={workdir}"]

  options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.DEVNULL}
  subprocess.run(command(tmp_path / "a"), check=True, timeout=300, **options)
  with subprocess.Popen(command(tmp_path / "b"), **options) as process:
    metrics = tmp_path / "b" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 70) and time.monotonic() < deadline:
      time.sleep(0.01)
    process.send_signal(killer)
    status = process.wait(timeout=60)
  assert status == (75 if killer == signal.SIGTERM else -signal.SIGKILL)
  assert len(read_metrics(metrics)) < 250
  subprocess.run(command(tmp_path / "b"), check=True, timeout=300, **options)
  assert_same_run(tmp_path / "b", tmp_path / "a")


def test_run_again_after_the_end_does_nothing(untouched, make_config):
  before = (untouched / "metrics.jsonl").read_bytes(), final_params(untouched)
  outcome = loop.train(make_config(), untouched)
  assert (outcome.status, outcome.step) == ("finished", 6)
  assert "already" in outcome.message
  assert outcome.validation["step"] == 6
  assert (untouched / "metrics.jsonl").read_bytes() == before[0]


@pytest.mark.parametrize(
  "changes",
  [{"model.placement": "pre"}, {"seed": 1}, {"data.seed": 3, "train.batch_size": 16}, {"optimizer.b2": 0.95}],
  ids=str,
)
def test_another_config_in_the_same_workdir_is_refused_field_by_field(untouched, make_config, changes):
  def times():
    return {path: path.stat().st_mtime_ns for path in untouched.rglob("*") if path.name != ".lock"}

  before = times()
  with pytest.raises(InputError) as error:
    loop.train(make_config(**changes), untouched)
  for name, value in changes.items():
    assert f"config.{name}: " in str(error.value)
    assert f"{value!r} now" in str(error.value)
  assert times() == before


def test_a_schedule_stated_as_it_was_is_no_change(untouched, make_config, tmp_path):
  shutil.copytree(untouched, tmp_path / "run")
  same = make_config(**{"optimizer.decay_steps": 5})  # of a wsd schedule; this is a cosine
  assert loop.train(same, tmp_path / "run").step == 6


def test_a_shard_that_changed_is_named(make_config, tmp_path):
  """By opening, which compares a sample; where the manifest is of an earlier version and has none, by the reader."""
  config = make_config(**{"data.directory": str(tmp_path / "records")})
  prepare(config, progress=False)
  (shard,) = (tmp_path / "records").glob("train-*")
  data = bytearray(shard.read_bytes())
  for position in range(2000, len(data) // 4):
    data[position] ^= 0x5A
  shard.write_bytes(bytes(data))
  with pytest.raises(InputError, match=rf"{shard.name} is not the shard that the manifest names"):
    loop.train(config, tmp_path / "run")
  manifest = tmp_path / "records" / "manifest.json"
  manifest.write_text(re.sub('"sample": "[^"]*"', '"sample": ""', manifest.read_text()))
  with pytest.raises(InputError, match=r"a record can't be read .*config.data.verify"):
    loop.train(config, tmp_path / "run")
  config.data.verify = True
  with pytest.raises(InputError, match=rf"{shard.name} has another checksum"):
    loop.train(config, tmp_path / "other")


def test_what_can_not_change_the_result_may_change(untouched, make_config, tmp_path, capsys, stop_after, monkeypatch):
  stop_after(4)
  loop.train(make_config(), tmp_path / "run")
  monkeypatch.undo()
  changed = make_config(**{"checkpoint.every_steps": 5, "data.num_threads": 1})
  assert loop.train(changed, tmp_path / "run").status == "finished"
  assert "config.checkpoint.every_steps: 2 -> 5" in capsys.readouterr().out
  (record,) = map(json.loads, (tmp_path / "run" / "changes.jsonl").read_text().splitlines())
  assert record["step"] == 4
  assert record["changes"] == ["config.data.num_threads: 2 -> 1", "config.checkpoint.every_steps: 2 -> 5"]
  assert_same_run(tmp_path / "run", untouched)


def test_other_data_is_refused(make_config, tmp_path):
  """The same source, whose text has changed since the run began."""
  source = tmp_path / "source"
  source.mkdir()
  for index in range(120):
    (source / f"{index:03d}.txt").write_text(f"some text {index} " * 5)
  changes = {"data.source": str(source), "optimizer.schedule": "constant"}
  first = make_config(**changes, **{"data.directory": str(tmp_path / "first")})
  prepare(first, progress=False)
  loop.train(first, tmp_path / "run")
  (source / "000.txt").write_text("another text")
  second = make_config(**changes, **{"data.directory": str(tmp_path / "second"), "train.num_steps": 9})
  prepare(second, progress=False)
  with pytest.raises(InputError, match="the run was trained on data"):
    loop.train(second, tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused(make_config, tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(InputError, match=r"not empty and holds no run \(it has 'thesis.tex'\)"):
    loop.train(make_config(), tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_learning_rates_that_differ_are_told_with_digits_that_differ(make_config):
  """Would catch "had learning rate 0.001, it would have been 0.001", where a run is extended by a little."""
  old, new = (make_config(**{"train.num_steps": steps}) for steps in (3000, 3002))
  with pytest.raises(InputError) as refusal:
    resume_point(old, new, [3000], "run")
  before, after = re.findall(r"had learning rate (\S+), .* would have been (\S+);", str(refusal.value))[0]
  assert before != after


def test_a_cosine_can_not_be_extended_and_a_constant_can(make_config, tmp_path):
  cosine = make_config()
  loop.train(cosine, tmp_path / "cosine")
  with pytest.raises(InputError, match=r"num_steps 6 -> 9.*had learning rate .* would have been"):
    loop.train(make_config(**{"train.num_steps": 9}), tmp_path / "cosine")
  for fewer in (4, 5):
    with pytest.raises(InputError, match="has done 6 steps already"):
      loop.train(make_config(**{"train.num_steps": fewer}), tmp_path / "cosine")

  constant = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 2}
  loop.train(make_config(**constant), tmp_path / "constant")
  outcome = loop.train(make_config(**constant, **{"train.num_steps": 9}), tmp_path / "constant")
  assert (outcome.status, outcome.step) == ("finished", 9)
  loop.train(make_config(**constant, **{"train.num_steps": 9}), tmp_path / "whole")
  first, second = final_params(tmp_path / "constant"), final_params(tmp_path / "whole")
  for name, leaf in first.items():
    np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def test_a_decayed_wsd_run_goes_on_from_where_its_decay_began(make_config, tmp_path):
  wsd = {"optimizer.schedule": "wsd", "optimizer.decay_steps": 3, "checkpoint.keep_last": 1, "checkpoint.keep_best": 0}
  short, long = {**wsd, "train.num_steps": 8}, {**wsd, "train.num_steps": 12}
  loop.train(make_config(**short), tmp_path / "run")
  decayed = final_params(tmp_path / "run")
  assert loop.train(make_config(**long), tmp_path / "run").status == "finished"
  loop.train(make_config(**long), tmp_path / "whole")
  first, second = final_params(tmp_path / "run"), final_params(tmp_path / "whole")
  for name, leaf in first.items():
    np.testing.assert_array_equal(leaf, second[name], err_msg=name)
  # The decayed model is not lost.
  kept = tmp_path / "run" / "superseded_at_5"
  assert [line["step"] for line in read_metrics(kept / "metrics.jsonl") if line["split"] == "train"][-1] == 8
  (tmp_path / "old").mkdir()
  shutil.copy(tmp_path / "run" / "config.json", tmp_path / "old")
  shutil.copytree(kept / "8", tmp_path / "old" / "checkpoints" / "8")
  for name, leaf in final_params(tmp_path / "old").items():
    np.testing.assert_array_equal(leaf, decayed[name], err_msg=name)


@pytest.fixture
def poison(monkeypatch):
  """`poison(steps)`: the batches of those steps give a loss and a gradient that are not finite."""
  real = loop.global_batch

  def arrange(*steps):
    seen = []

    def poisoned(batch, mesh):
      if len(batch["tokens_BT"]) == 8 and "bad" not in batch:
        seen.append(None)
        if len(seen) in steps:
          batch = batch | {"weights_BT": batch["weights_BT"] * np.float32("nan")}
      return real(batch, mesh)

    monkeypatch.setattr(loop, "global_batch", poisoned)

  return arrange


@pytest.mark.parametrize("bad_step", [1, slow(3), 4, slow(6)])
def test_an_update_that_is_not_finite_is_skipped_and_counted(make_config, tmp_path, poison, bad_step, capsys):
  poison(bad_step)
  config = make_config(**{"checkpoint.every_steps": 1, "checkpoint.keep_last": 9})
  outcome = loop.train(config, tmp_path / "run")
  assert (outcome.status, outcome.step, outcome.skipped_updates) == ("finished", 6, 1)
  assert f"skipped    step {bad_step}: loss nan" in capsys.readouterr().out
  lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["split"] == "train"]
  assert [line["skipped_in_a_row"] for line in lines] == [float(step == bad_step) for step in range(1, 7)]
  assert [line["step"] for line in lines if line["loss"] == "nan"] == [bad_step]
  if bad_step > 1:
    before, after = (state_at(config, tmp_path / "run", step) for step in (bad_step - 1, bad_step))
    for name, leaf in before.items():
      if name.split("/")[-1] in ("step", "skipped", "skipped_in_a_row"):
        assert after[name] == leaf + 1
      else:
        np.testing.assert_array_equal(after[name], leaf, err_msg=name)


def state_at(config, workdir, step):
  from mixln_jax.training.checkpoints import open_checkpoints, restore_state, split

  checkpoints = open_checkpoints(config, RunFolder(workdir))
  state = restore_state(config, step_lib.state_shardings(config, make_mesh(config.mesh)), checkpoints, step)
  checkpoints.close()
  leaves = jax.tree_util.tree_leaves_with_path(split(state))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_too_many_in_a_row_end_the_run_with_what_is_needed_to_do_the_step_again(make_config, tmp_path, poison):
  poison(2, 4, 5)
  config = make_config(**{"train.max_skipped_in_a_row": 2, "train.num_steps": 8})
  outcome = loop.train(config, tmp_path / "run")
  assert (outcome.status, outcome.step, outcome.skipped_updates) == ("non_finite", 5, 3)
  assert "2 consecutive updates skipped" in outcome.message
  assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "non_finite"
  last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
  assert (last["step"], last["loss"]) == (5, "nan")
  assert outcome.last_checkpoint == 5
  before, after = state_at(config, tmp_path / "run", 4), state_at(config, tmp_path / "run", 5)
  for name in before:
    if name.startswith(("params", "rest/opt_state")):
      np.testing.assert_array_equal(after[name], before[name], err_msg=name)
  dump = tmp_path / "run" / "non_finite_5"
  report = json.loads((dump / "report.json").read_text())
  assert len(report["gradient_norms"]["layers/query"]) == 2
  assert float(report["loss"]) > 0  # the batch itself is sound: here it was poisoned on the way to the device
  from mixln_jax.opening import make_loader, set_up

  with np.load(dump / "batch.npz", allow_pickle=False) as batch:
    expected = next(make_loader(set_up(config), 8).train(4))
    np.testing.assert_array_equal(batch["tokens_BT"], expected["tokens_BT"])
  poison()  # run again, it goes on after the step that could not be made
  assert loop.train(config, tmp_path / "run").step == 8


@pytest.mark.parametrize("where", ["dump", "checkpoint"])
def test_killed_while_it_ends_a_run_has_ended_all_the_same(make_config, tmp_path, poison, monkeypatch, where):
  """With the checkpoint of its end and no outcome it resumed from there, and a study had it as finished."""
  poison(4, 5)
  config = make_config(**{"train.max_skipped_in_a_row": 2, "train.num_steps": 8})

  def killed(*arguments):
    raise Killed

  def save(self, step, *arguments, save=member.Member.save):
    save(self, step, *arguments)
    if step == 5:
      self.checkpoints.wait()
      raise Killed

  with monkeypatch.context() as patch:
    if where == "dump":
      patch.setattr(loop, "write_dump", killed)
    else:
      patch.setattr(member.Member, "save", save)
    with pytest.raises(Killed):
      loop.train(config, tmp_path / "run")
  if where == "dump":  # it resumes from the checkpoint before
    poison(1)
    loop.train(config, tmp_path / "run")
  outcome = read_outcome(RunFolder(tmp_path / "run"))
  assert outcome is not None  # with which a study or a search takes the run for done
  assert (outcome.status, outcome.step) == ("non_finite", 5)


def test_skipping_is_the_same_whether_the_run_was_stopped_or_not(
  make_config, tmp_path, poison, stop_after, monkeypatch
):
  poison(3)
  loop.train(make_config(), tmp_path / "whole")
  poison(3)
  stop_after(4)
  loop.train(make_config(), tmp_path / "run")
  monkeypatch.undo()
  assert loop.train(make_config(), tmp_path / "run").skipped_updates == 1
  assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_at_the_unigram_entropy_has_diverged(make_config, tmp_path):
  """A learning rate of 0 keeps the model at the uniform loss, above the entropy: what a collapsed run looks like."""
  changes = {"optimizer.learning_rate": 0.0, "optimizer.warmup_steps": 0, "evaluate.every_steps": 1}
  outcome = loop.train(make_config(**changes), tmp_path / "run")
  assert (outcome.status, outcome.step, outcome.diverged) == ("finished", 6, True)
  line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
  assert 2.0 < line["unigram_entropy"] < line["loss"]
  stopped = loop.train(make_config(**changes, **{"train.stop_when_diverged": True}), tmp_path / "early")
  assert (stopped.status, stopped.step, stopped.last_checkpoint) == ("diverged", 3, 3)  # it did not fall, twice
  # One that learns has not.
  good = {
    "optimizer.learning_rate": 3e-2,
    "train.num_steps": 60,
    "evaluate.every_steps": 30,
    "checkpoint.every_steps": 60,
  }
  assert not loop.train(make_config(**good), tmp_path / "good").diverged


def test_a_validation_loss_that_is_not_finite_ends_the_run_before_its_checkpoint(make_config, tmp_path, capsys):
  config = make_config(
    **{"optimizer.learning_rate": 1e38, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
  )
  config.train.num_steps = 1
  outcome = loop.train(config, tmp_path / "run")
  assert (outcome.status, outcome.step, outcome.last_checkpoint) == ("non_finite", 1, None)
  assert "validation loss" in outcome.message
  assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["split"] == "validation"


def test_a_second_process_is_kept_out(make_config, tmp_path, monkeypatch):
  folder = RunFolder(tmp_path / "run")
  config = make_config()
  folder.create(config_lib.to_json(config))
  with folder.lock(), pytest.raises(InputError, match=rf"another process trains there \(host .*process {os.getpid()}"):
    loop.train(config, tmp_path / "run")
  # One on another machine, which this machine's lock knows nothing of: alive while it touches its file.
  lock = tmp_path / "run" / ".lock"
  lock.write_text(json.dumps({"host": "another", "process": 7, "since": "today"}))
  os.utime(lock, (time.time() - 500, time.time() - 500))  # by the file server's clock
  holder = threading.Timer(0.5, lambda: os.utime(lock, (time.time() + 5, time.time() + 5)))
  holder.start()
  monkeypatch.setattr(lock_lib, "POLL_SECONDS", 0.1)
  with pytest.raises(InputError, match="host another, process 7, since today"), folder.lock():
    pass
  holder.join()
  lock.write_text(json.dumps({"host": "another", "process": 7, "since": "today"}))
  monkeypatch.setattr(lock_lib, "STALE_SECONDS", 0.3)
  assert loop.train(config, tmp_path / "run").status == "finished"


def test_a_first_start_that_failed_pins_nothing(make_config, tmp_path):
  RunFolder(tmp_path / "run").create(config_lib.to_json(make_config(**{"train.batch_size": 16})))
  assert loop.train(make_config(), tmp_path / "run").status == "finished"
  assert config_lib.from_json((tmp_path / "run" / "config.json").read_text()) == make_config()


def test_a_profile_of_chosen_steps(make_config, tmp_path):
  loop.train(make_config(**{"profile.start_step": 2, "profile.num_steps": 2}), tmp_path / "run")
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_tensorboard_files_hold_the_metrics(make_config, tmp_path):
  loop.train(make_config(**{"logging.tensorboard": True}), tmp_path / "run")
  (events,) = (tmp_path / "run" / "tensorboard").glob("events.*")
  content = events.read_bytes()
  for tag in (b"train/loss", b"train/gradient_norm", b"validation/perplexity"):
    assert tag in content


def test_a_tracker_that_fails_never_stops_a_run(make_config, tmp_path, capsys, monkeypatch):
  class Broken:
    def __init__(self, *arguments):
      pass

    def write(self, *_):
      raise OSError("no quota left")

    def close(self):
      raise OSError("no quota left")

  monkeypatch.setattr(member, "TensorBoardMirror", Broken)
  config = make_config(**{"logging.tensorboard": True, "logging.wandb_project": "nowhere"})
  assert loop.train(config, tmp_path / "run").status == "finished"
  complaints = capsys.readouterr().err
  assert complaints.count("no quota left") == 1
  assert "WandbMirror is off" in complaints
  assert len(curve(tmp_path / "run")) == 8


def test_a_run_that_fails_says_at_which_step(make_config, tmp_path, monkeypatch):
  """It was recorded at the step that it had been resumed from."""
  config = make_config(**{"checkpoint.every_steps": 2})
  loop.train(make_config(**{"train.num_steps": 6}), tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  real, calls = loop.global_batch, []

  def failing(batch, mesh):
    calls.append(None)
    if len(calls) == 2:
      raise OSError("the network is gone")
    return real(batch, mesh)

  monkeypatch.setattr(loop, "global_batch", failing)
  with pytest.raises(OSError, match="the network is gone"):
    loop.train(config, tmp_path / "run")
  outcome = read_outcome(RunFolder(tmp_path / "run"))
  assert (outcome.status, outcome.step) == ("failed", 5)  # resumed from 4, and one more was done

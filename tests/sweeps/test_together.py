"""Runs trained as one program are the runs that they would have been alone."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import Killed, saved_params

import mixln_jax
from mixln_jax import config as config_lib
from mixln_jax.__main__ import main
from mixln_jax.errors import InputError
from mixln_jax.runs import outcome as outcomes_lib
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.sweeps.joint import joint_set, train_together
from mixln_jax.sweeps.sequence import open_study
from mixln_jax.sweeps.study import make_study, parse_axes
from mixln_jax.training import loop
from mixln_jax.training.member import Member
from mixln_jax.training.stopping import StopRequest

PLACEMENTS = "pre mix:0.5 sandwich+gpas"


def study_of(config, *axes):
  return make_study(config, [parse_axes(axes)])


def values(run, split="train"):
  return [line for line in read_metrics(run.folder / "metrics.jsonl") if line["split"] == split]


def params(folder, config):
  return saved_params(folder)


def assert_same_runs(actual, expected):
  """Two metrics files are equal to the last bit but for the time."""
  for line, other in zip(actual, expected, strict=True):
    assert {k: v for k, v in line.items() if k != "tokens_per_second"} == {
      k: v for k, v in other.items() if k != "tokens_per_second"
    }


@pytest.fixture(scope="module")
def trained(make_config, tmp_path_factory):
  """Three placements, two seeds, as one program."""
  study = study_of(make_config(), f"placement={PLACEMENTS}", "seed=0 1")
  runs = open_study(study, tmp_path_factory.mktemp("together") / "study")
  return study, runs, train_together(study, runs)


def assert_equal_to_alone(run, outcome, folder):
  alone = loop.train(run.config, folder)
  assert outcome.status == alone.status == outcomes_lib.FINISHED
  initial = json.loads((folder / "initial_weights.json").read_text())
  assert json.loads(run.folder.read("initial_weights.json")) == initial  # to the last bit
  for split in ("train", "validation"):
    own = [line for line in read_metrics(folder / "metrics.jsonl") if line["split"] == split]
    for line, other in zip(values(run, split), own, strict=True):
      assert line["step"] == other["step"]
      for name in {"loss", "gradient_norm", "learning_rate", "perplexity"} & line.keys():
        np.testing.assert_allclose(line[name], other[name], rtol=2e-5, err_msg=f"{run.name} {name}")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    params(run.folder.path, run.config),
    params(folder, run.config),
  )


@pytest.mark.parametrize("index", [1, 2, 5])
def test_together_equals_apart(trained, tmp_path, index):
  _, runs, outcomes = trained
  assert len(runs) == 6
  assert_equal_to_alone(runs[index], outcomes[index], tmp_path / "alone")


@pytest.mark.slow
def test_five_placements_two_seeds_two_rates_equal_apart(make_config, tmp_path):
  study = study_of(make_config(), "placement=pre post mix:0.5 lns deepnorm", "seed=0 1", "learning_rate=1e-3 3e-3")
  runs = open_study(study, tmp_path / "study")
  for run, outcome in zip(runs, train_together(study, runs), strict=True):
    assert_equal_to_alone(run, outcome, tmp_path / run.name)


def test_a_run_of_them_goes_on_alone(trained, tmp_path):
  _, runs, _ = trained
  shutil.copytree(runs[3].folder.path, tmp_path / "alone")
  for step in (4, 6):  # back to step 2
    shutil.rmtree(tmp_path / "alone" / "checkpoints" / str(step))
  assert loop.train(runs[3].config, tmp_path / "alone").status == outcomes_lib.FINISHED
  losses = [line["loss"] for line in read_metrics(tmp_path / "alone" / "metrics.jsonl") if line["split"] == "train"]
  np.testing.assert_allclose(losses, [line["loss"] for line in values(runs[3])], rtol=2e-5)


def test_stopped_anywhere_it_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch):
  study, expected, _ = trained

  class AfterThreeSteps(StopRequest):
    asked = 0

    @property
    def requested_by(self):
      self.asked += 1
      return "SIGTERM" if self.asked >= 3 else None

    @requested_by.setter
    def requested_by(self, _):
      pass

  runs = open_study(study, tmp_path / "study")
  assert joint_set(runs) == runs
  with monkeypatch.context() as patch:
    patch.setattr(loop, "stop_on_signals", lambda: contextlib.nullcontext(AfterThreeSteps()))
    assert {outcome.status for outcome in train_together(study, runs)} == {outcomes_lib.STOPPED}
  # As a kill would leave it that came between the checkpoints of two runs.
  shutil.rmtree(runs[4].folder / "checkpoints" / "3")
  assert joint_set(runs) == runs
  assert {outcome.status for outcome in train_together(study, runs)} == {outcomes_lib.FINISHED}
  for run, other in zip(runs, expected, strict=True):
    for split in ("train", "validation"):
      assert_same_runs(values(run, split), values(other, split))
    jax.tree.map(
      np.testing.assert_array_equal, params(run.folder.path, run.config), params(other.folder.path, run.config)
    )
  assert [path.name for path in (runs[0].folder / "superseded_at_2").iterdir() if path.name.isdigit()] == ["3"]
  assert joint_set(runs) == []


def test_a_run_that_is_not_finite_is_frozen_and_the_others_go_on(make_config, tmp_path):
  config = make_config(**{"train.max_skipped_in_a_row": 2, "optimizer.clip_norm": 0.0})
  study = study_of(config, "learning_rate=1e-3 1e30", "placement=post")
  runs = open_study(study, tmp_path / "study")
  outcomes = train_together(study, runs)
  status = {run.name: outcome.status for run, outcome in zip(runs, outcomes, strict=True)}
  frozen = [run for run in runs if run.config.optimizer.learning_rate > 1]
  assert {status[run.name] for run in runs if run not in frozen} == {outcomes_lib.FINISHED}
  assert {status[run.name] for run in frozen} == {outcomes_lib.NON_FINITE}
  for run, outcome in zip(runs, outcomes, strict=True):
    assert json.loads(run.folder.read("outcome.json"))["status"] == outcome.status
    if outcome.status == outcomes_lib.NON_FINITE:
      assert values(run)[-1]["step"] == outcome.step < config.train.num_steps
      assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params(run.folder.path, run.config)))
      assert (run.folder / f"non_finite_{outcome.step}").is_dir()
  alone = loop.train(runs[0].config, tmp_path / "alone")
  np.testing.assert_allclose(alone.validation["loss"], outcomes[0].validation["loss"], rtol=2e-5)


@pytest.mark.slow
def test_all_may_freeze_and_a_finished_run_is_never_trained_again(make_config, tmp_path):
  config = make_config(
    **{"train.max_skipped_in_a_row": 2, "optimizer.clip_norm": 0.0, "evaluate.every_steps": 0, "train.num_steps": 5}
  )
  config.checkpoint.every_steps = 5
  study = study_of(config, "learning_rate=1e30", "placement=post pre", "seed=0")
  runs = open_study(study, tmp_path / "study")
  loop.train(runs[1].config.copy_and_resolve_references(), runs[1].folder.path)  # one of them alone, to its end
  before = runs[1].folder.read("outcome.json")
  assert json.loads(before)["status"] == outcomes_lib.NON_FINITE
  outcomes = train_together(study, joint_set(runs))
  assert [outcome.status for outcome in outcomes] == [outcomes_lib.NON_FINITE]
  assert outcomes[0].skipped_updates == json.loads(before)["skipped_updates"]
  assert runs[1].folder.read("outcome.json") == before
  assert joint_set(runs) == []


@pytest.mark.parametrize("number", [1, 4], ids=["first saves", "later saves"])
def test_killed_between_the_saves_of_two_runs_they_resume(make_config, tmp_path, monkeypatch, number):
  """One run has a checkpoint that the other lacks: nobody could go on, or one of them would at another step."""
  config = make_config(**{"checkpoint.every_steps": 1, "train.num_steps": 4})
  study = study_of(config, "placement=pre post")
  expected = open_study(study, tmp_path / "whole")
  train_together(study, joint_set(expected))
  runs = open_study(study, tmp_path / "study")
  saves = []

  def save(self, *arguments, save=Member.save):
    saves.append(self.index)
    if len(saves) == 2 * number:  # the second run's, of that step
      raise Killed
    save(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(Member, "save", save)
    with pytest.raises(Killed):
      train_together(study, joint_set(runs))
  train_together(study, joint_set(runs))
  for run, whole in zip(runs, expected, strict=True):
    assert_same_runs(read_metrics(run.folder / "metrics.jsonl"), read_metrics(whole.folder / "metrics.jsonl"))


def test_no_run_saves_before_all_have_written_their_last_checkpoint(make_config, tmp_path, monkeypatch):
  """One run would remove an older checkpoint for a new one while another's newest is unwritten: no step of both."""
  config = make_config(**{"checkpoint.every_steps": 1, "train.num_steps": 3, "evaluate.every_steps": 0})
  study = study_of(config, "placement=pre post")
  runs = open_study(study, tmp_path / "study")
  events = []

  def wait(self, wait=Checkpoints.wait):
    events.append(self)
    wait(self)

  def save(self, step, *arguments, save=Member.save):
    events.append(step)
    save(self, step, *arguments)

  monkeypatch.setattr(Checkpoints, "wait", wait)
  monkeypatch.setattr(Member, "save", save)
  train_together(study, joint_set(runs))
  all_checkpoints = {event for event in events if isinstance(event, Checkpoints)}
  assert len(all_checkpoints) == 2
  for step in (2, 3):
    last_save_before = max(number for number, event in enumerate(events) if event == step - 1)
    # The save of the second run waits for its own; what counts is that the first one waited for both.
    own_wait = 1
    between = events[last_save_before + 1 + own_wait : events.index(step)]
    assert all_checkpoints <= set(between)


def test_a_damaged_checkpoint_of_a_frozen_run_stops_nobody(make_config, tmp_path, monkeypatch):
  """It was looked for, found damaged and looked for again, without an end."""
  config = make_config(**{"train.max_skipped_in_a_row": 1, "optimizer.clip_norm": 0.0, "checkpoint.every_steps": 1})
  study = study_of(config, "learning_rate=1e-3 1e30", "placement=post")
  runs = open_study(study, tmp_path / "study")
  train_together(study, runs)
  frozen = runs[1].folder
  outcome = frozen.read("outcome.json")
  assert json.loads(outcome)["status"] == outcomes_lib.NON_FINITE
  (runs[0].folder / "outcome.json").unlink()  # as of a process that was killed before it wrote it
  facts = frozen / "checkpoints" / str(json.loads(outcome)["last_checkpoint"]) / "facts" / "metadata"
  facts.write_text(facts.read_text().replace('"version"', '"Version"'))
  restored = []

  def restore(self, step, restore=Member.restore):
    restored.append(step)
    assert len(restored) < 10
    return restore(self, step)

  monkeypatch.setattr(Member, "restore", restore)
  assert {one.status for one in train_together(study, runs)} == {outcomes_lib.FINISHED, outcomes_lib.NON_FINITE}
  assert frozen.read("outcome.json") == outcome


def test_a_lock_left_behind_does_not_bring_a_finished_run_back(make_config, tmp_path):
  """Killed on another machine with its outcome written, it was trained once more beside runs that were added."""
  first, more = (study_of(make_config(), f"placement={names}") for names in ("pre", "pre post"))
  open_study(first, tmp_path / "study")
  finished, added = open_study(more, tmp_path / "study")
  finished.folder.create(config_lib.to_json(finished.config))
  outcomes_lib.write_outcome(finished.folder, outcomes_lib.Outcome(outcomes_lib.FINISHED, 6))
  (finished.folder / ".lock").write_text('{"host": "another"}')
  assert joint_set([finished, added]) == [added]


def test_one_checkpoint_of_each_is_too_few(make_config, tmp_path, capsys):
  """A kill between two saves would leave no step of both, and a refusal leaves no study.json."""
  command = ["sweep", "--config=configs/tiny.py", "--axis=model.placement=pre post", "--together"]
  assert main([*command, "--config.checkpoint.keep_last=1", f"--workdir={tmp_path / 'study'}"]) == 2
  assert "set it to 2 or more" in capsys.readouterr().err
  assert not (tmp_path / "study").exists()
  study = study_of(make_config(**{"checkpoint.keep_last": 1}), "placement=pre post")
  with pytest.raises(InputError, match=r"keep_last=1: runs that are trained together.*set it to 2 or more"):
    train_together(study, study.runs(tmp_path / "study"))
  assert not (tmp_path / "study").exists()


def test_without_a_common_step_it_is_refused_and_nothing_is_lost(make_config, tmp_path):
  study = study_of(make_config(), "placement=pre post")
  runs = open_study(study, tmp_path / "study")
  half = runs[0].config.copy_and_resolve_references()
  loop.train(half, runs[0].folder.path)
  (runs[0].folder / "outcome.json").unlink()  # as of a run that was killed on its way
  checkpoints = sorted(path.name for path in (runs[0].folder / "checkpoints").iterdir())
  with pytest.raises(InputError, match="no step of which all of the runs have a whole checkpoint"):
    train_together(study, joint_set(runs))
  assert sorted(path.name for path in (runs[0].folder / "checkpoints").iterdir()) == checkpoints


def test_a_run_that_was_stopped_alone_is_not_begun_again_with_others(make_config, tmp_path, monkeypatch):
  """Its one checkpoint looks like a first one that a kill left, and all its updates were made once more."""
  study = study_of(make_config(**{"checkpoint.every_steps": 100}), "placement=pre post")
  runs = open_study(study, tmp_path / "study")
  stopped = types.SimpleNamespace(requested_by="SIGTERM")
  with monkeypatch.context() as patch:
    patch.setattr(loop, "stop_on_signals", lambda: contextlib.nullcontext(stopped))
    loop.train(runs[0].config.copy_and_resolve_references(), runs[0].folder.path)
  outcome = runs[0].folder.read("outcome.json")
  with pytest.raises(InputError, match="no step of which all of the runs have a whole checkpoint"):
    train_together(study, joint_set(runs))
  assert runs[0].folder.read("outcome.json") == outcome


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    (("placement=pre", "weight_decay=0.0 0.1"), r"differ in config\.optimizer\.weight_decay, which is compiled"),
    (("placement=pre", "embed_dim=16 32"), r"config\.model\.embed_dim"),
    (("placement=pre admin",), "admin needs a profiling pass"),
    (("placement=pre", "start_from=work/runs/another"), "work/runs/another.*no run there"),
  ],
)
def test_sets_that_are_not_one_program_are_refused(make_config, tmp_path, axes, message):
  study = study_of(make_config(), *axes)
  runs = study.runs(tmp_path / "study")
  with pytest.raises(InputError, match=message):
    train_together(study, runs)
  assert not (tmp_path / "study").exists()


def test_runs_that_start_from_another_are_trained_together(make_config, tmp_path):
  """They begin with a checkpoint of step 0, so the loop does not know that they are fine-tuned."""
  loop.train(make_config(**{"model.placement": "pre"}), tmp_path / "first")
  config = make_config(**{"train.start_from": str(tmp_path / "first"), "model.placement": "pre"})
  study = study_of(config, "learning_rate=1e-3 3e-3")
  runs = open_study(study, tmp_path / "study")
  outcomes = train_together(study, runs)
  assert {outcome.status for outcome in outcomes} == {outcomes_lib.FINISHED}
  for run in runs:
    assert json.loads(run.folder.read("start.json"))["step"] == 6
    alone = loop.train(run.config, tmp_path / run.name)
    np.testing.assert_allclose(alone.validation["loss"], values(run, "validation")[-1]["loss"], rtol=2e-5)
  first = [line["loss"] for line in read_metrics(tmp_path / "first" / "metrics.jsonl") if line["split"] == "train"]
  assert values(runs[0])[0]["loss"] < first[0] - 0.01  # it began with what was trained


@pytest.mark.slow
def test_cut_over_devices_they_are_the_same_runs(make_config, tmp_path):
  """Two runs a device pair: mesh run 2 × fsdp 2, in a process with 4 devices."""
  config = make_config()
  (tmp_path / "config.json").write_text(config_lib.to_json(config))
  read = f"config.from_json(Path({str(tmp_path / 'config.json')!r}).read_text())"
  recipe = f"from pathlib import Path\nfrom mixln_jax import config\ndef get_config():\n  return {read}\n"
  (tmp_path / "recipe.py").write_text(recipe)
  axes = ("--axis=model.placement=pre mix:0.5", "--axis=seed=0 1")
  mesh = ("--config.mesh.run=2", "--config.mesh.data=1", "--config.mesh.fsdp=2")
  command = [sys.executable, "-m", "mixln_jax", "sweep", f"--config={tmp_path / 'recipe.py'}", "--together"]
  environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "JAX_PLATFORMS": "cpu"}
  environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
  command += [f"--workdir={tmp_path / 'study'}", *axes, *mesh]
  subprocess.run(command, env=environment, check=True)
  for run in study_of(config, *(axis.removeprefix("--axis=") for axis in axes)).runs(tmp_path / "study"):
    alone = loop.train(run.config, tmp_path / run.name)
    np.testing.assert_allclose(values(run, "validation")[-1]["loss"], alone.validation["loss"], rtol=2e-5)
    there, here = (json.loads((f / "initial_weights.json").read_text()) for f in (run.folder.path, tmp_path / run.name))
    assert there == here


def test_the_axis_run_must_divide_the_runs(make_config, tmp_path):
  study = study_of(make_config(**{"mesh.run": 2, "mesh.data": 1}), "placement=pre post")
  with pytest.raises(InputError, match=r"2 devices|multiple of 2"):
    train_together(study, study.runs(tmp_path / "study"))


def test_runs_together_leave_what_a_run_alone_leaves(make_config, tmp_path, capsys):
  """Diagnostics by layer, a profile, the lines a person reads: the loop is one, so nothing is missing for several."""
  changes = {"diagnostics.every_steps": 3, "profile.start_step": 2, "profile.num_steps": 2}
  study = study_of(make_config(**changes), "placement=pre sandwich+gpas")
  runs = open_study(study, tmp_path / "study")
  train_together(study, runs)
  output = capsys.readouterr().out
  assert "of 2 runs" in output
  assert "validation step 6" in output
  assert list((runs[0].folder / "profile").rglob("*.xplane.pb"))
  for run in runs:
    loop.train(run.config, tmp_path / run.name)
    together, alone = (
      [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
      for folder in (run.folder.path, tmp_path / run.name)
    )
    assert [line["step"] for line in together] == [1, 3, 6]
    for line, other in zip(together, alone, strict=True):
      for name, value in other.items():
        # What only the other placement has is null for every layer.
        expected = np.array(value, float)
        np.testing.assert_allclose(np.array(line[name], float), expected, rtol=2e-3, atol=1e-6, err_msg=name)
      for name in line.keys() - other.keys():
        assert line[name] == [None, None], name
    facts = json.loads(run.folder.read("environment.json"))
    assert facts["train_step"] == json.loads(runs[0].folder.read("environment.json"))["train_step"]


def test_a_diverged_run_is_saved_with_its_validation_loss(make_config, tmp_path):
  """Without it the checkpoint could be neither the best one nor kept as such."""
  changes = {"train.stop_when_diverged": True, "evaluate.every_steps": 1, "checkpoint.every_steps": 100}
  config = make_config(**changes, **{"optimizer.learning_rate": 0.0})  # stuck above the unigram entropy
  study = study_of(config, "placement=pre post")
  runs = open_study(study, tmp_path / "study")
  for run, outcome in zip(runs, train_together(study, runs), strict=True):
    assert (outcome.status, outcome.step) == (outcomes_lib.DIVERGED, 4)
    with mixln_jax.open_run(run.folder.path, "best") as opened:
      assert opened.step == 4


def test_killed_while_one_freezes_the_others_resume(make_config, tmp_path, monkeypatch):
  """Its checkpoint was written before its outcome: it counted as one that trains, at a step that nobody else had."""
  changes = {"train.stop_when_diverged": True, "evaluate.every_steps": 1, "checkpoint.every_steps": 3}
  study = study_of(make_config(**changes), "learning_rate=0.0 1e-2", "placement=pre")
  runs = open_study(study, tmp_path / "study")
  late = []

  def save(self, step, *arguments, save=Member.save):
    if self.index == 1:  # its background thread is slow: nothing is on the disk yet
      late.append(step)
      return
    save(self, step, *arguments)
    if step == 4:
      self.checkpoints.wait()
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(Member, "save", save)
    with pytest.raises(Killed):
      train_together(study, joint_set(runs))
  assert late == [3]
  assert [outcome.status for outcome in train_together(study, joint_set(runs))] == [
    outcomes_lib.DIVERGED,
    outcomes_lib.FINISHED,
  ]

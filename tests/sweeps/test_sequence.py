"""The command: what is done is skipped, what failed is said, a signal ends it well."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixln_jax import config as config_lib
from mixln_jax.commands import sweep
from mixln_jax.errors import InputError
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.outcome import Outcome, write_outcome
from mixln_jax.sweeps import sequence
from mixln_jax.training import loop

RECIPE = """
from pathlib import Path
from mixln_jax import config

STUDY = {"grids": [{"model.placement": ("pre", "post"), "seed": (0, 1)}], "question": "which?"}

def get_config():
  return config.from_json(Path(%r).read_text())
"""

STAGES = (
  '{"model.placement": ("pre",), "seed": (0,), "optimizer.learning_rate": (1e-3, 3e-3)}], '
  '"then": {"best": "optimizer.learning_rate", "grid": {"seed": (0, 1)}}, '
)


@pytest.fixture
def arguments(make_config, tmp_path):
  """The flags of a study of four runs."""
  (tmp_path / "config.json").write_text(
    config_lib.to_json(make_config(**{"train.num_steps": 2, "optimizer.warmup_steps": 0}))
  )
  (tmp_path / "recipe.py").write_text(RECIPE % str(tmp_path / "config.json"))
  return [f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'study'}"]


@pytest.fixture
def in_process(monkeypatch):
  """Trains in this process; returns the names of the runs that were trained, and those that are to fail."""
  trained, failing = [], set()

  def train_run(run, seen):
    trained.append(run.name)
    if run.name in failing:
      if not run.folder.has_run:
        run.folder.create(config_lib.to_json(run.config))
      (run.folder / sequence.LOG).write_text("step 1\nMemoryError: no more\n")
      return 1
    seen("step 1/2  loss 5.0  lr 0")
    loop.train(run.config, run.folder.path)
    return 0

  monkeypatch.setattr(sequence, "train_run", train_run)
  return trained, failing


def test_what_is_done_is_skipped_and_what_failed_is_said_and_tried_again(arguments, in_process, tmp_path, capsys):
  trained, failing = in_process
  assert sweep.main([*arguments, "--list"]) == 0
  assert trained == []
  assert sweep.main([*arguments, "--index=3"]) == 0
  assert trained == ["post-seed0"]
  assert re.search(r"^ +3  post-seed0 ", capsys.readouterr().out, re.MULTILINE)  # its number in the study, not 1
  with pytest.raises(InputError, match="the last one is 4"):
    sweep.main([*arguments, "--index=5"])
  failing.add("pre-seed1")
  assert sweep.main(arguments) == 1
  assert trained[1:] == ["pre-seed0", "pre-seed1", "post-seed1"]
  output = capsys.readouterr()
  assert re.search(r"report     python -m mixln_jax report \S+study --output=\S+study/report", output.out)
  assert "run        1/4 pre-seed0\n           step 1/2  loss 5.0  left ?  study ?" in output.out
  assert "MemoryError: no more" in output.out
  assert "1 runs failed: pre-seed1" in output.err
  failing.clear()
  assert sweep.main(arguments) == 0
  assert trained[4:] == ["pre-seed1"]
  lines = [line for line in capsys.readouterr().out.splitlines() if "finished at step 2  loss" in line]
  assert len(lines) == 5  # the one that was trained, and the table of four
  assert sweep.main(arguments) == 0
  assert len(trained) == 5
  # The study against its own record, against one that is off, and against what is none.
  record = tmp_path / "record.csv"
  assert sweep.main([*arguments, f"--export={record}"]) == 0
  assert sweep.main([*arguments, f"--compare={record}", "--tolerance=1e-6"]) == 0
  lines = record.read_text().splitlines()
  assert len(lines) == 1 + 4 * (2 + 1)  # two steps and one evaluation a run
  name, split, step, loss = lines[-1].split(",")
  record.write_text("\n".join([*lines[:-1], f"{name},{split},{step},{float(loss) + 0.1}"]))
  capsys.readouterr()
  assert sweep.main([*arguments, f"--compare={record}"]) == 1
  assert "-0.1000  more than 0.05 off" in capsys.readouterr().out
  record.write_text("thesis")
  with pytest.raises(InputError, match="no validation loss"):
    sweep.main([*arguments, f"--compare={record}"])


def test_a_run_that_another_process_trains_is_left_to_it(arguments, in_process, tmp_path, capsys):
  trained, failing = in_process
  failing.update(("pre-seed0", "post-seed0", "post-seed1"))
  config = config_lib.from_json((tmp_path / "config.json").read_text())
  config.model.placement, config.seed, config.mesh.run = "pre", 1, 1
  folder = RunFolder(tmp_path / "study" / "runs" / "pre-seed1")
  sweep.main([*arguments, "--index=1"])
  folder.create(config_lib.to_json(config))
  with folder.lock():
    assert sweep.main([*arguments, "--index=2"]) == 75
  assert trained == ["pre-seed0"]
  assert "pre-seed1  busy" in capsys.readouterr().out


def test_the_second_stage_begins_by_itself_and_is_there_the_next_time(tmp_path, make_config, monkeypatch, capsys):
  """Seeds that have to be asked for again; a study that calls its own second stage another study."""
  (tmp_path / "config.json").write_text(
    config_lib.to_json(make_config(**{"train.num_steps": 2, "optimizer.warmup_steps": 0}))
  )
  text = RECIPE.replace('{"model.placement": ("pre", "post"), "seed": (0, 1)}], ', STAGES)
  (tmp_path / "recipe.py").write_text(text % str(tmp_path / "config.json"))
  losses = {"pre-learning_rate0.001-seed0": 3.0, "pre-learning_rate0.003-seed0": 2.0}
  trained = []

  def train_run(run, _):
    trained.append(run.name)
    run.folder.create(config_lib.to_json(run.config))
    write_outcome(run.folder, Outcome("finished", 2, validation={"step": 2, "loss": losses.get(run.name, 2.5)}))
    return 0

  monkeypatch.setattr(sequence, "train_run", train_run)
  arguments = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'study'}"]
  assert sweep.main(arguments) == 0
  assert trained == [*losses, "pre-learning_rate0.003-seed1"]
  assert "now those of its next stage" in capsys.readouterr().out
  assert sweep.main(arguments) == 0
  assert len(trained) == 3
  assert len(json.loads((tmp_path / "study" / "study.json").read_text())["runs"]) == 3


@pytest.mark.slow
def test_a_real_sweep_is_stopped_by_a_signal_and_goes_on(arguments, tmp_path):
  command = [sys.executable, "-m", "mixln_jax", "sweep", *arguments]
  environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "JAX_PLATFORMS": "cpu"}
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  metrics = tmp_path / "study" / "runs" / "pre-seed0" / "metrics.jsonl"
  while not (metrics.exists() and metrics.read_text()):
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  output = process.communicate()[0]
  assert process.returncode == 75
  assert "run the same command" in output
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  assert "post-seed1  finished at step 2" in done.stdout
  for name in ("pre-seed0", "pre-seed1", "post-seed0", "post-seed1"):
    folder = tmp_path / "study" / "runs" / name
    assert json.loads((folder / "outcome.json").read_text())["status"] == "finished"
    steps = [
      json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "train" in line
    ]
    assert steps == list(range(1, 3))
    assert "finished" in (folder / sequence.LOG).read_text()

"""2 and 4 processes through the front door (gloo) are one run: trained, evaluated, killed, gone on with by others."""

import json
import os
import platform
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from model.rounding import NETWORK

from mixln_jax import config as config_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics
from parallel import pod

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, make_config):
  config = make_config(
    **{
      "model.vocab_size": 264,
      "train.micro_batches": 2,
      "checkpoint.every_steps": 2,
      "train.sample_tokens": 3,
      "parallel.join_timeout": 200,
      "parallel.heartbeat_timeout": 20,
      "data.num_threads": 1,
    }
  )
  return pod.write_recipe(config, tmp_path_factory.mktemp("recipe"))


def train(recipe, workdir, count, *, devices=1, **fields):
  overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
  return pod.start(["-m", "mixln_jax", "train", recipe, f"--workdir={workdir}", *overrides], count, devices=devices)


def losses(workdir):
  lines = read_metrics(workdir / "metrics.jsonl")
  assert [(line["step"], line["split"]) for line in lines] == [
    *((1, "train"), (2, "train"), (3, "train"), (3, "validation")),
    *((4, "train"), (5, "train"), (6, "train"), (6, "validation")),
  ]
  return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
  """The run of one process with one device."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  pod.finish(train(recipe, workdir, 1))
  return workdir


@pytest.mark.parametrize(
  ("count", "devices", "mesh"),
  [
    (2, 2, {"mesh__data": 2, "mesh__fsdp": 2}),
    (4, 1, {"mesh__data": 1, "mesh__fsdp": -1}),
    (2, 1, {"mesh__data": 1, "mesh__tensor": 2}),  # both processes hold all rows
    (2, 2, {"mesh__data": 1, "mesh__sequence": 2, "mesh__tensor": 2}),
    (2, 2, {"mesh__data": 1, "mesh__fsdp": 2, "mesh__dcn_data": 2}),  # a process for a slice
  ],
)
def test_many_processes_train_as_one_does(recipe, one, tmp_path, count, devices, mesh):
  outputs = pod.finish(train(recipe, tmp_path / "run", count, devices=devices, **mesh))
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=NETWORK)
  assert "finished   all 6 steps are done" in outputs[0]
  assert "sample     " in outputs[0]
  assert "step " not in outputs[1]  # the first one speaks and writes
  hashes = [json.loads((run / "initial_weights.json").read_text())["hash"] for run in (tmp_path / "run", one)]
  assert hashes[0] == hashes[1]


def test_one_of_four_is_killed_two_go_on_and_two_evaluate(recipe, one, tmp_path):
  workdir = tmp_path / "run"
  processes = train(recipe, workdir, 4, mesh__data=1, mesh__fsdp=-1)
  deadline = time.monotonic() + 240
  while not list(workdir.glob("checkpoints/2/commit_success.txt")) and time.monotonic() < deadline:
    time.sleep(0.01)
  processes[-1].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  outputs = [process.communicate(timeout=240)[0] for process in processes]
  print("the others ended after", time.monotonic() - killed, [process.returncode for process in processes])
  print(*[output[-1500:] for output in outputs], sep="\n----\n")
  assert processes[-1].returncode == -signal.SIGKILL
  assert all(process.returncode not in (0, 2, 75) for process in processes)  # none takes it for an end
  again = pod.finish(train(recipe, workdir, 2, mesh__data=-1))
  assert "resumed from step" in again[0]
  np.testing.assert_allclose(losses(workdir), losses(one), rtol=NETWORK)
  evaluate = ["-m", "mixln_jax", "evaluate", f"--workdir={workdir}"]
  (first, second), (alone,) = pod.finish(pod.start(evaluate, 2)), pod.finish(pod.start(evaluate, 1))
  assert second.count("\n") <= first.count("\n") - 3  # only the first one speaks
  two, single = (json.loads(output.splitlines()[-1]) for output in (first, alone))
  assert two == pytest.approx(single, rel=1e-6)


def test_a_run_that_another_trains_is_refused_to_all(recipe, tmp_path):
  """Only the first one tries the lock; the others must not wait for it where orbax does, for ever."""
  config = config_lib.from_json((Path(recipe.partition("=")[2]).parent / "config.json").read_text())
  folder = RunFolder(tmp_path / "run")
  folder.create(config_lib.to_json(config))
  with folder.lock():
    outputs = pod.finish(train(recipe, folder.path, 2), [2, 2])
  for output in outputs:
    assert f"another process trains there (host {platform.node()}, process {os.getpid()}" in output
  assert not (folder / "checkpoints").exists()


def test_different_commands_are_refused(recipe, tmp_path):
  def command(index):
    rate = f"--config.optimizer.learning_rate={0.001 * (1 + index)}"
    return ["-m", "mixln_jax", "train", recipe, f"--workdir={tmp_path / 'run'}", rate]

  for output in pod.finish(pod.start(command, 2), [2, 2]):
    assert "config.optimizer.learning_rate is 0.002 in process 1, 0.001 in process 0" in output
  assert not (tmp_path / "run").exists()

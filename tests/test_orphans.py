"""Whatever a process starts ends with it, also where it is killed and can't say so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parallel import pod

from mixln_jax import config as config_lib

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def is_alive(pid):
  """Whether a process is there and no zombie."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
  except OSError:
    return False


def descendants(pid):
  """The processes that a process has started, and those that these have."""
  found = []
  for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split():
    found += [int(child), *descendants(child)]
  return found


def assert_gone(pids, seconds=30):
  deadline = time.monotonic() + seconds
  while left := [pid for pid in pids if is_alive(pid)]:
    assert time.monotonic() < deadline, left
    time.sleep(0.1)


def wait_until(condition, process, seconds=180):
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.1)


def test_a_worker_leaves_signals_to_its_parent_and_ends_with_it():
  """A launcher signals every process, and a run needs its data up to its last step; a killed parent can't end it."""
  worker = (
    "import os, time; from mixln_jax import signals; signals.start_worker(os.getppid()); print(1); time.sleep(600)"
  )
  parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-uc', {worker!r}]); print(p.pid); p.wait()"
  process = subprocess.Popen(
    [sys.executable, "-uc", parent], env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True
  )
  pid = int(process.stdout.readline())
  assert process.stdout.readline() == "1\n"
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    os.kill(pid, number)
  time.sleep(0.3)
  assert is_alive(pid)
  process.kill()
  process.wait()
  process.stdout.close()
  assert_gone([pid], seconds=10)


@pytest.mark.slow
def test_processes_that_read_ahead_end_with_a_killed_run(make_config, tmp_path):
  """They would keep their memory, and the files that they read, for ever."""
  config = make_config(**{"train.num_steps": 100_000, "data.num_workers": 2, "evaluate.every_steps": 0})
  recipe = pod.write_recipe(config, tmp_path)
  (process,) = pod.start(
    ["-m", "mixln_jax", "train", recipe, f"--workdir={tmp_path / 'run'}"], 1, variables=ENVIRONMENT
  )
  wait_until((tmp_path / "run" / "checkpoints" / "2").is_dir, process)
  workers = descendants(process.pid)
  assert len(workers) >= 2
  process.kill()
  process.communicate()
  assert_gone(workers)


@pytest.mark.slow
def test_the_run_of_a_killed_sweep_ends_with_a_checkpoint(make_config, tmp_path):
  """It would train on without anybody who knows of it, and the sweep that is started again could only wait."""
  recipe = pod.write_recipe(make_config(**{"train.num_steps": 100_000, "checkpoint.every_steps": 100_000}), tmp_path)
  command = ["-m", "mixln_jax", "sweep", recipe, f"--workdir={tmp_path / 'study'}", "--axis=seed=0 1"]
  (process,) = pod.start(command, 1, variables=ENVIRONMENT)
  run = tmp_path / "study" / "runs" / "seed0"
  wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), process)
  started = descendants(process.pid)
  assert started
  process.kill()
  process.communicate()
  assert_gone(started)
  outcome = json.loads((run / "outcome.json").read_text())
  assert outcome["status"] == "stopped"
  assert outcome["step"] == outcome["last_checkpoint"] > 0


def test_the_number_of_threads_and_processes_has_a_sensible_limit():
  """A typing error of two digits would start processes until the machine stands still."""
  assert not config_lib.FIELDS["data.num_workers"].admits(1000)
  assert not config_lib.FIELDS["data.num_threads"].admits(1000)

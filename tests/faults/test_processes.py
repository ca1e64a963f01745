"""Two processes as one run: equal to one process, and nothing lost when one is killed or all are told to stop."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from faults.suite import ROOT, Suite
from mixln_jax.runs.metrics import read_metrics


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
  suite = Suite(tmp_path_factory.mktemp("processes"))
  finish(start(suite, suite.folder / "two"))
  return suite


def start(suite, workdir, fault="none", number=1, count=2):
  """Processes of one run; the fault is in the last one."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": str(count),
  }
  return [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "faults.victim", str(suite.folder / "config.json"), str(workdir)),
        *((fault, str(number)) if index == count - 1 else ("none", "1")),
      ],
      env=environment | {"JAX_PROCESS_ID": str(index)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(count)
  ]


def finish(processes):
  outputs = [process.communicate(timeout=240)[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output[-3000:]
  return outputs


def let_the_last_die(processes):
  processes[-1].communicate(timeout=240)
  assert processes[-1].returncode == -signal.SIGKILL
  for process in processes[:-1]:  # as a launcher does: what is left waits for the other in vain
    process.kill()
    process.communicate()


def assert_same(suite, workdir):
  expected, actual = suite.result(suite.folder / "two"), suite.result(workdir)
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one_does(suite):
  one, two = (read_metrics(suite.folder / name / "metrics.jsonl") for name in ("untouched", "two"))
  assert [(line["step"], line["split"]) for line in one] == [(line["step"], line["split"]) for line in two]
  np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5)
  assert (suite.folder / "two" / "outcome.json").is_file()


@pytest.mark.slow
def test_one_of_two_is_killed_and_both_run_again(suite, tmp_path):
  processes = start(suite, tmp_path / "run", "kill before a step", 4)
  let_the_last_die(processes)
  finish(start(suite, tmp_path / "run"))
  assert_same(suite, tmp_path / "run")


@pytest.mark.slow
def test_a_run_of_two_goes_on_with_one(suite, tmp_path):
  processes = start(suite, tmp_path / "run", "kill before a step", 5)
  let_the_last_die(processes)
  again = suite.run(tmp_path / "run", "none", 1)
  assert again.returncode == 0, again.stderr[-3000:]
  expected = [line["loss"] for line in read_metrics(suite.folder / "two" / "metrics.jsonl")]
  np.testing.assert_allclose(
    [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")], expected, rtol=1e-5
  )


@pytest.mark.slow
def test_all_are_told_to_stop_and_stop_at_the_same_step(suite, tmp_path):
  processes = start(suite, tmp_path / "run", "SIGTERM", 3)
  metrics = tmp_path / "run" / "metrics.jsonl"
  deadline = time.monotonic() + 120
  while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
    time.sleep(0.01)
  processes[0].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=240)[0] for process in processes]
  statuses = [process.returncode for process in processes]
  assert statuses[0] == statuses[1]
  assert statuses[0] in (75, 0), outputs[0][-3000:]  # 0: the step that they agreed on lay behind the end
  finish(start(suite, tmp_path / "run"))
  assert_same(suite, tmp_path / "run")

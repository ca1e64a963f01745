"""Processes that start as one run: all go on, or all end in time with an error that says why."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.parallel import processes
from parallel import pod

TIMEOUT = "3"
SILENT = "waited 3 seconds (config.parallel.join_timeout) for the other processes at 'the start'"


def meet(behaviour, **options):
  """Two processes, of which the second one behaves badly."""
  return pod.start(lambda index: ["-m", "parallel.meet", behaviour if index else "meets", TIMEOUT], 2, **options)


def test_one_that_never_starts_is_waited_for_no_longer_than_said():
  started = time.monotonic()
  first = pod.start(["-m", "parallel.meet", "meets", TIMEOUT], 1, of=2)  # as process 1
  (output,) = pod.finish(first, [1])
  assert "not all processes of the run joined at 127.0.0.1:" in output
  assert "config.parallel.join_timeout=3 seconds" in output
  assert time.monotonic() - started < 60


@pytest.mark.parametrize(
  ("behaviour", "statuses", "words"),
  [
    pytest.param("meets", [0, 0], ["met", "met"], marks=pytest.mark.slow),
    (
      "differs",
      [2, 2],
      ["config.optimizer.learning_rate is 0.002 in process 1, 0.001 in process 0; start all with the same command"] * 2,
    ),
    ("is refused", [2, 2], ["process 1 refused to start: config.data.directory='gone'", "error: config.data"]),
    pytest.param(
      *("crashes", [1, 1], ["process 1 failed: RuntimeError: disk on fire", "RuntimeError: disk on fire"]),
      marks=pytest.mark.slow,
    ),
    ("dies", [1, -signal.SIGKILL], [SILENT, ""]),
  ],
)
def test_both_go_on_or_both_end(behaviour, statuses, words):
  for output, part in zip(pod.finish(meet(behaviour), statuses), words, strict=True):
    assert part in output


def test_processes_of_slurm_find_one_another():
  """JAX's detector reads what srun sets in each task."""
  port, tasks = pod.free_port(), []
  for index in range(2):
    variables = {
      "SLURM_JOB_ID": "12345",
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_PROCID": str(index),
      "SLURM_LOCALID": str(index),
      "JAX_COORDINATOR_PORT": str(port),
    }
    tasks += pod.start(["-m", "parallel.meet", "differs" if index else "meets", TIMEOUT], 1, variables=variables)
  for output in pod.finish(tasks, [2, 2]):
    assert "0.002 in process 1, 0.001 in process 0" in output


@pytest.mark.parametrize(
  ("variables", "words"),
  [
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES set, but not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
    (
      {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
      "JAX_PROCESS_ID=2 must be a whole number below JAX_NUM_PROCESSES=2",
    ),
  ],
)
def test_variables_that_contradict_one_another_are_refused(monkeypatch, variables, words):
  for name, value in variables.items():
    monkeypatch.setitem(os.environ, name, value)
  with pytest.raises(InputError, match=words):
    processes.join(config_lib.base().parallel)


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("expect_platform", "tpu", r"expect_platform='tpu': JAX found 1 × cpu \(cpu\) in 1 processes"),
    ("expect_devices", 16, r"expect_devices=16: JAX found 1 × cpu .*start the run on all hosts"),
  ],
)
def test_other_devices_than_expected_are_refused(field, value, words):
  parallel = config_lib.base().parallel
  processes.check_devices(parallel)
  parallel.update(expect_platform="cpu", expect_devices=1)
  processes.check_devices(parallel)
  parallel[field] = value
  with pytest.raises(InputError, match=words):
    processes.check_devices(parallel)


@pytest.mark.parametrize(
  ("address", "count", "words"),
  [
    ("localhost", "2", "write HOST:PORT with a port from 1 to 65535"),
    ("localhost:0", "2", "write HOST:PORT"),
    ("localhost:99999", "2", "write HOST:PORT"),
    (":1234", "2", "write HOST:PORT"),
    ("a b:1234", "2", "write HOST:PORT"),
    ("no-such-host.invalid:1234", "2", "process 0 can't listen there"),
    ("localhost:1234", "1000000000", "JAX_NUM_PROCESSES=1000000000 must be a whole number, at most 100,000"),
    ("localhost:1234", "9" * 5000, "must be a whole number, at most 100,000"),
  ],
)
def test_an_address_or_a_number_that_nobody_can_come_to_is_refused(monkeypatch, address, count, words):
  """JAX would end with an empty line, wait for ever without a word, or crash."""
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
  monkeypatch.setenv("JAX_NUM_PROCESSES", count)
  monkeypatch.setenv("JAX_PROCESS_ID", "0")
  with pytest.raises(InputError, match=words):
    processes.join(config_lib.base().parallel)


def test_a_port_that_is_taken_is_refused(monkeypatch):
  """JAX's service ends the process with a segmentation fault."""
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{taken.getsockname()[1]}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(InputError, match=r"process 0 can't listen there .*in use"):
      processes.join(config_lib.base().parallel)


def test_a_platform_without_a_device_is_named():
  """JAX answers `JAX_PLATFORMS=cuda` with an assertion that says nothing."""
  code = (
    "from mixln_jax import config; from mixln_jax.parallel import processes; processes.join(config.base().parallel)"
  )
  for platform in ("cuda", "tpu", "garbage"):
    environment = os.environ | {"JAX_PLATFORMS": platform}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert f"InputError: JAX finds no device with JAX_PLATFORMS={platform} (" in result.stderr

"""Signals and streams as a launcher meets them: real processes of the front door, told to stop at every moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parallel import pod

from mixln_jax import signals

ROOT = Path(__file__).parents[1]
# Uncached, so that the compilation is there to be met.
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_ENABLE_COMPILATION_CACHE": "0"}


@pytest.fixture
def train(make_config, tmp_path):
  """`train("--flag", VARIABLE="value")`: starts `train` of a small config in `tmp_path / "run"`."""
  config = make_config(**{"train.num_steps": 3000, "evaluate.every_steps": 0, "checkpoint.every_steps": 3000})
  recipe = pod.write_recipe(config, tmp_path)
  started = []

  def start(*flags, stdout=subprocess.PIPE, wrapper=(), **variables):
    command = [*wrapper, sys.executable, "-m", "mixln_jax", "train", recipe, f"--workdir={tmp_path / 'run'}", *flags]
    environment = os.environ | ENVIRONMENT | variables
    started.append(subprocess.Popen(command, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True))
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.wait()
    if process.stdout is not None:
      process.stdout.close()


def wait_for(process, words):
  """Reads what a process prints up to a line with these words; returns it."""
  read = []
  for line in process.stdout:
    read.append(line)
    if words in line:
      return "".join(read)
  raise AssertionError("".join(read))


def outcome(tmp_path):
  return json.loads((tmp_path / "run" / "outcome.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variables", [{}, {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}], ids=["alone", "joined"])
def test_a_signal_while_it_compiles_ends_a_run_with_75(train, tmp_path, number, variables):
  """Would be 143 (the system's own end), or no end at all where JAX's service has taken SIGTERM from the program."""
  if variables:
    variables = variables | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{pod.free_port()}"}
  process = train(**variables)
  wait_for(process, "weights    initial")
  process.send_signal(number)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == signals.STOPPED_STATUS, output
  assert f"stopped    by {number.name}" in output


@pytest.mark.parametrize("seconds", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.6, 1.5, 2, 3))])
def test_a_signal_at_the_start_ends_a_run_with_75(train, seconds):
  """The moment of the imports: handlers that are set only by the loop come too late for it, and one that raises while a
  module in C++ is imported ends the process with SIGABRT."""
  process = train()
  time.sleep(seconds)
  process.send_signal(signal.SIGTERM)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == signals.STOPPED_STATUS, output


@pytest.mark.slow
def test_hangup_saves_a_checkpoint_and_an_ignored_one_is_ignored(train, tmp_path):
  """A terminal that is closed must cost no step; `nohup` must stay what it is."""
  process = train()
  wait_for(process, "step    3/")
  process.send_signal(signal.SIGHUP)
  process.send_signal(signal.SIGHUP)  # the shell and the kernel both send it
  output = process.communicate(timeout=60)[0]
  assert process.returncode == signals.STOPPED_STATUS, output
  stopped = outcome(tmp_path)
  assert (stopped["status"], stopped["step"]) == ("stopped", stopped["last_checkpoint"])
  process = train(wrapper=["nohup"])
  assert f"resumed from step {stopped['step']}" in wait_for(process, "step  ")
  process.send_signal(signal.SIGHUP)
  for _ in range(20):
    assert "step  " in process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert outcome(tmp_path)["step"] > stopped["step"] + 10


def test_a_second_signal_ends_a_process_whose_main_thread_does_not_listen():
  """A save into a bucket that is away waits in C++ for ever, where no handler of Python's runs."""
  code = "\n".join(
    [
      "import threading",
      "from mixln_jax import signals",
      "signals.AT_ONCE_SECONDS = 0.2",
      "signals.watch_to_the_end()",
      "signals.only_note()",
      "print('ready', flush=True)",
      "while True:",
      "  try:",
      "    threading.Event().wait()",
      "  except KeyboardInterrupt:",
      "    pass  # as code that waits for the background does",
    ]
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code], env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  time.sleep(0.5)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == signals.AT_ONCE_STATUS
  process.stdout.close()


@pytest.mark.slow
def test_two_processes_stop_together_before_the_first_step_and_after_it(make_config, tmp_path):
  """One that stops alone leaves the other in a collective until JAX aborts it."""
  config = make_config(**{"train.num_steps": 3000, "evaluate.every_steps": 0, "checkpoint.every_steps": 3000})
  recipe = pod.write_recipe(config, tmp_path)
  command = ["-m", "mixln_jax", "train", recipe, f"--workdir={tmp_path / 'run'}"]
  both = pod.start(command, 2, variables=ENVIRONMENT)
  wait_for(both[0], "weights    initial")
  both[1].send_signal(signal.SIGTERM)
  assert "stopped    by SIGTERM" in pod.finish(both, [signals.STOPPED_STATUS] * 2)[0]
  assert outcome(tmp_path)["step"] == (outcome(tmp_path)["last_checkpoint"] or 0)
  both = pod.start(command, 2, variables=ENVIRONMENT)
  wait_for(both[0], "step    2/")
  both[1].send_signal(signal.SIGTERM)
  first, _ = pod.finish(both, [signals.STOPPED_STATUS] * 2)
  stopped = outcome(tmp_path)
  assert 2 < stopped["step"] == stopped["last_checkpoint"]
  assert f"stopped    by SIGTERM after step {stopped['step']}" in first


def test_a_reader_that_is_gone_ends_no_run(train, tmp_path):
  """`train … | head -3` used to end without a checkpoint."""
  process = train("--config.train.num_steps=20")
  wait_for(process, "model   ")
  process.stdout.close()
  assert process.wait(timeout=120) == 0
  assert (outcome(tmp_path)["status"], outcome(tmp_path)["step"]) == ("finished", 20)


def test_help_into_head_and_a_full_disk():
  """Help prints no traceback where nobody reads it; a result that could not be written is no success."""
  environment = os.environ | ENVIRONMENT
  help_ = [sys.executable, "-m", "mixln_jax", "train", "--help"]
  process = subprocess.Popen(help_, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  process.stdout.close()
  assert process.stderr.read() == ""
  assert process.wait(timeout=60) == 0
  process.stderr.close()
  with Path("/dev/full").open("w") as full:
    result = subprocess.run(help_[:3], env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
  assert result.returncode == 1
  assert "a part of the output is lost: [Errno 28] No space left on device" in result.stderr


def test_characters_that_a_locale_lacks_are_escaped():
  """`√` has no bytes in Latin 1: a finished run used to end with a traceback there."""
  code = "from mixln_jax import printing; printing.never_fail(); print('×√')"
  environment = os.environ | ENVIRONMENT | {"PYTHONIOENCODING": "latin-1"}
  result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
  assert result.stdout == "×".encode("latin-1") + b"\\u221a\n"


def test_files_are_utf_8_in_every_locale(tmp_path):
  """In another locale a recipe could not be read, and a report ended half-way at the first `×`."""
  (tmp_path / "recipe.py").write_text("raise ValueError('√α')\n", encoding="utf-8")
  command = [sys.executable, "-m", "mixln_jax", "train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path}"]
  locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
  result = subprocess.run(command, env=os.environ | ENVIRONMENT | locale, capture_output=True, check=False)
  assert result.returncode == 2
  assert b"\\u221a\\u03b1" in result.stderr  # escaped, since this terminal has ASCII
  assert b"Traceback" not in result.stderr

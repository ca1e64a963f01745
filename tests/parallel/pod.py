"""Several processes of the front door on this machine as one run (gloo between their CPU devices)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from mixln_jax import config as config_lib

ROOT = Path(__file__).parents[2]


def write_recipe(config, folder):
  """A recipe file of a config; returns its flag."""
  (folder / "config.json").write_text(config_lib.to_json(config))
  (folder / "recipe.py").write_text(
    "from pathlib import Path\nfrom mixln_jax import config\n\n\ndef get_config():\n"
    f"  return config.from_json(Path({str(folder / 'config.json')!r}).read_text())\n"
  )
  return f"--config={folder / 'recipe.py'}"


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def start(command, count, devices=1, variables=None, of=None):
  """Starts `count` processes of `devices` CPU devices each.

  Args:
    command: what follows `python`, or a function from a process's index to it.
    count: how many to start.
    devices: CPU devices of each.
    variables: environment of all besides.
    of: how many they believe to be; by default `count`. One alone is told nothing of others.
  """
  port, of = free_port(), of or count
  processes = []
  for index in range(count):
    by_hand = {
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": str(of),
      "JAX_PROCESS_ID": str(of - count + index),
    }
    environment = {
      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
      **(by_hand if of > 1 else {}),
      **(variables or {}),
    }
    arguments = command(index) if callable(command) else command
    processes.append(
      subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  return processes


def finish(processes, statuses=None):
  """Waits for all and returns what they printed; their exit statuses must be these (by default 0)."""
  outputs = [process.communicate(timeout=280)[0] for process in processes]
  assert [process.returncode for process in processes] == (statuses or [0] * len(processes)), "\n\n".join(
    output[-2500:] for output in outputs
  )
  return outputs

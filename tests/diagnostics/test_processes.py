"""Two processes as one run: one of them writes, and what it writes is what one process would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixln_jax import config as config_lib

ROOT = Path(__file__).parents[2]


def run(count, *arguments):
  """The outputs of a command in so many processes."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
  if count > 1:
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "mixln_jax", *map(str, arguments)],
      env=environment | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]
  outputs = [process.communicate(timeout=400) for process in processes]
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors[-3000:]
  return [output for output, _ in outputs]


def numbers(value):
  """The numbers in JSON, in order; nan where there is none."""
  if isinstance(value, dict):
    return [number for key in sorted(value) for number in numbers(value[key])]
  if isinstance(value, list):
    return [number for item in value for number in numbers(item)]
  return [] if isinstance(value, str) else [float("nan") if value is None else value]


@pytest.mark.slow
def test_two_processes_diagnose_as_one_does(make_config, tmp_path):
  recipe = tmp_path / "recipe.py"
  config = make_config(**{"diagnostics.every_steps": 3, "model.placement": "post*1,admin*1"})
  recipe.write_text(
    "from mixln_jax.config import from_json\n\n\ndef get_config():\n"
    f"  return from_json({config_lib.to_json(config)!r})\n"
  )
  lines, results = [], []
  for count in (1, 2):
    workdir = tmp_path / f"run{count}"
    run(count, "train", f"--config={recipe}", f"--workdir={workdir}")
    lines.append([json.loads(line) for line in (workdir / "diagnostics.jsonl").read_text().splitlines()])
    outputs = run(count, "diagnose", f"--workdir={workdir}", "--tokens=500")
    assert ["wrote" in output for output in outputs] == [True, False][:count]
    results.append(json.loads((workdir / "diagnose" / "6" / "diagnose.json").read_text()))
  assert [line["step"] for line in lines[1]] == [1, 3, 6]
  assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
  # After six updates, which spread the rounding of another order of summation; angles and ranks (test_depth.py) are
  # the least exact. A process that counted only its own rows would be off by tens of per cent.
  np.testing.assert_allclose(numbers(lines[1]), numbers(lines[0]), rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(numbers(results[1]), numbers(results[0]), rtol=1e-3, atol=3e-4)

"""`launch/slurm.sh` on a real Slurm of one node: through a time limit and a requeue to the end, equal to a run that
nobody interrupted."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs.buckets import curve
from runs.random_faults import make_recipe

from launch import slurm_cluster

ROOT = Path(__file__).parents[2]
STEPS, SECONDS_A_STEP = 330, 0.4  # 132 s: past the signal, which comes 120 s after the start of a job of five minutes

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(slurm_cluster.missing() is not None, reason="Slurm (Debian's slurm-wlm) is not installed"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  with slurm_cluster.serve(tmp_path_factory.mktemp("slurm")) as variables:
    yield variables


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
  """The code as a user has it, but that each step takes a while, and that .venv is this environment."""
  folder = tmp_path_factory.mktemp("clone")
  for name in ("launch", "mixln_jax"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  for path in ROOT.glob("requirements*.txt"):
    shutil.copy(path, folder)
  loop = folder / "mixln_jax/training/loop.py"
  line = "    self.step += 1\n"
  slowed = loop.read_text().replace(line, f"{line}    time.sleep({SECONDS_A_STEP})\n", 1)
  assert slowed != loop.read_text()
  loop.write_text(slowed)
  python = folder / ".venv/bin/python"
  python.parent.mkdir(parents=True)
  python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  python.chmod(0o755)
  stamp = "installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-requirements-gpu.txt"
  subprocess.run(["bash", "-c", f'touch ".venv/{stamp}"'], cwd=folder, check=True)
  make_recipe(folder, STEPS, every=50)
  return folder


def environment(**more):
  """Without what the tests' own start-up set for JAX's distributed service or Slurm."""
  kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_COORD", "VENV"))}
  return kept | {"JAX_PLATFORMS": "cpu"} | more


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_job_that_meets_its_time_limit_is_requeued_and_ends_as_one_that_does_not(cluster, clone, tmp_path, tasks):
  workdir = tmp_path / "requeued"
  submit = ["bash", "launch/slurm.sh", "--nodes=1", f"--gpus={tasks}", "--time=5", f"--name=tasks{tasks}"]
  recipe = [f"--config={clone / 'recipe.py'}", f"--workdir={workdir}", "--config.parallel.expect_platform=cpu"]
  subprocess.run([*submit, *recipe], cwd=clone, env=environment(**cluster), check=True, capture_output=True, text=True)
  deadline = time.monotonic() + 900
  while _is_queued(cluster) and time.monotonic() < deadline:
    time.sleep(1)
  log = next((clone / "work/slurm").glob(f"tasks{tasks}-*.log")).read_text()
  assert "training ended with exit status 75" in log, log[-3000:]
  assert "resumed from step" in log, log[-3000:]
  assert log.rstrip().endswith("training ended with exit status 0"), log[-3000:]
  _train_uninterrupted(clone / "recipe.py", tmp_path / "untouched", tasks)
  assert curve(workdir / "metrics.jsonl") == curve(tmp_path / "untouched" / "metrics.jsonl")


def _is_queued(cluster):
  command = ["squeue", "--noheader"]
  return bool(subprocess.run(command, env=environment(**cluster), capture_output=True, check=True).stdout.strip())


def _train_uninterrupted(recipe, workdir, tasks):
  command = [sys.executable, "-m", "mixln_jax", "train", f"--config={recipe}", f"--workdir={workdir}"]
  by_task = [{} for _ in range(tasks)]
  if tasks > 1:
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    for task, variables in enumerate(by_task):
      variables |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(tasks), "JAX_PROCESS_ID": str(task)}
  expect = f"--config.parallel.expect_devices={tasks}"
  processes = [
    subprocess.Popen([*command, expect], cwd=ROOT, env=environment(**variables), stdout=subprocess.DEVNULL)
    for variables in by_task
  ]
  assert [process.wait(400) for process in processes] == [0] * tasks

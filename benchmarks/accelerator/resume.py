"""Whether a run that is stopped in the middle ends as one that is not, to the bit; its argument is JSON.

    {"fields": ["model.dtype=bfloat16", …], "steps": 12, "folder": "…"}

The run is stopped by SIGTERM once it has shown half of its steps, resumed by the same command, and the bit sum of each
tensor of the last checkpoint is compared with that of an uninterrupted run.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mixln_jax.runs.checkpoint import SUMS, Checkpoints
from mixln_jax.runs.folder import CHECKPOINTS
from mixln_jax.signals import STOPPED_STATUS


def train(command: list[str], stop_at: str | None) -> int:
  """The exit status of a run that gets SIGTERM when a line of it begins with `stop_at`."""
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert process.stdout
  for line in process.stdout:
    if stop_at is not None and line.startswith(stop_at):
      process.send_signal(signal.SIGTERM)
      stop_at = None
  return process.wait()


def sums(run: Path, step: int) -> Any:
  checkpoints = Checkpoints(run / CHECKPOINTS, read_only=True)
  try:
    return checkpoints.facts(step)[SUMS]
  finally:
    checkpoints.close()


def main() -> None:
  request = json.loads(sys.argv[1])
  steps, folder = request["steps"], Path(request["folder"])
  front = [sys.executable, "-m", "mixln_jax"]
  fields = [f"--config.{field}" for field in (*request["fields"], f"train.num_steps={steps}")]
  fields += ["--config.train.sample_tokens=0", "--config.logging.tensorboard=False"]
  subprocess.run([*front, "prepare", "--config=configs/tiny.py", *fields], check=True, capture_output=True)
  command = [*front, "train", "--config=configs/tiny.py", *fields]
  whole = train([*command, f"--workdir={folder / 'whole'}"], None)
  stopped = train([*command, f"--workdir={folder / 'stopped'}"], f"step {steps // 2}/")
  resumed = train([*command, f"--workdir={folder / 'stopped'}"], None)
  if (whole, stopped, resumed) != (0, STOPPED_STATUS, 0):
    raise SystemExit(f"error: exit statuses {whole}, {stopped}, {resumed}, not 0, {STOPPED_STATUS}, 0")
  expected, found = sums(folder / "whole", steps), sums(folder / "stopped", steps)
  tensors = {name: (tree, found[name]) for name, tree in expected.items()}
  differing = [f"{name}/{path}" for name, (a, b) in tensors.items() for path in a if a[path] != b.get(path)]
  print(json.dumps({"tensors": sum(len(tree) for tree in expected.values()), "differing": differing}))


if __name__ == "__main__":
  main()

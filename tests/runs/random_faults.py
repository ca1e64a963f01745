"""Runs in a bucket that meets random faults, each started again with the same command until it is done.

  PYTHONPATH=.:tests python -m runs.random_faults --seeds=0-29 --steps=60

Prints a line a seed, and why one differs from the run that nothing happened to.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from mixln_jax import config as config_lib
from mixln_jax.data.prepare import prepare
from runs import buckets

ROOT = Path(__file__).parents[2]
STORE_FAULTS = ("503", "429", "401", "drop", "delay", "lost")
SIGNALS = ("SIGSTOP", "SIGKILL", "SIGTERM")
STALE_SECONDS, MOST_STARTS, MOST_LINES = 8.0, 25, 60
ALLOWED = {0, 1, 75, -signal.SIGKILL, -signal.SIGTERM}  # the last: before Python is up


def make_recipe(folder, steps, every):
  """A recipe of a small model on prepared records, in a folder."""
  words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "cafés", "serve", "tea"]
  (folder / "source").mkdir()
  for index in range(120):
    text = " ".join(words[(index * 7 + place * place) % len(words)] for place in range(3 + index * 13 % 58))
    (folder / "source" / f"{index:03d}.txt").write_text(text)
  config = config_lib.base()
  config.model.update(vocab_size=259, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=2, placement="mix:0.5")
  config.data.update(source=str(folder / "source"), tokenizer="bytes", sequence_length=32, num_threads=1)
  config.data.directory = str(folder / "records")
  config.train.update(num_steps=steps, batch_size=8)
  config.optimizer.warmup_steps = 2
  config.checkpoint.update(every_steps=every, keep_last=2)
  config.evaluate.update(every_steps=every, batch_size=8)
  config.logging.tensorboard = False
  prepare(config, progress=False)
  (folder / "config.json").write_text(config_lib.to_json(config))
  (folder / "recipe.py").write_text(
    f"from pathlib import Path\nfrom mixln_jax import config\ndef get_config():\n"
    f"  return config.from_json(Path({str(folder / 'config.json')!r}).read_text())\n"
  )
  return folder / "recipe.py"


def start(store, recipe, workdir, machine):
  """The front door in a process of its own, whose locks time out soon."""
  script = (
    "import sys; from mixln_jax import __main__; from mixln_jax.runs import lock; "
    f"lock.STALE_SECONDS, lock.TOUCH_SECONDS, lock.POLL_SECONDS = {STALE_SECONDS}, 1.0, 0.3; "
    "sys.exit(__main__.main(sys.argv[1:]))"
  )
  return subprocess.Popen(
    [sys.executable, "-c", script, "train", f"--config={recipe}", f"--workdir={workdir}"],
    env=os.environ | store.variables | {"PYTHONPATH": str(ROOT), "TMPDIR": str(machine)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def metrics_of(text):
  lines = [json.loads(line) for line in text.splitlines()]
  return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def result(read, steps):
  """What must be equal to the bit: all metrics, how it ended, and the sum of the last checkpoint's bits."""
  outcome = json.loads(read("outcome.json"))
  facts = json.loads(read(f"checkpoints/{steps}/facts/metadata"))
  return {
    "metrics": metrics_of(read("metrics.jsonl")),
    "outcome": {name: outcome[name] for name in ("status", "step", "last_checkpoint", "validation")},
    "bits": facts["bit_sums"],
  }


class Trial:
  """One run and the faults that meet it, all of them decided by the seed (but for the scheduler's part)."""

  def __init__(self, store, recipe, steps, seed, machine, faults):
    self.store, self.recipe, self.steps, self.seed, self.machine = store, recipe, steps, seed, machine
    self.random = random.Random(seed)
    self.name = f"seed{seed}"
    self.workdir = f"gs://bucket/{self.name}"
    self.happened, self.outputs, self.problems = [], [], []
    self.faults = [self.random.choice(STORE_FAULTS + SIGNALS) for _ in range(faults)]

  def run(self):
    rival = None
    for _ in range(MOST_STARTS):
      process = start(self.store, self.recipe, self.workdir, self.machine)
      with contextlib.ExitStack() as stack:
        if self.faults:
          rival = self._strike(self.faults.pop(0), process, stack)
        self._finish(process)
      if rival is not None:
        self._finish(rival)
        rival = None
      if process.returncode == 0 and not self.faults:
        break
    else:
      self.problems.append(f"not done after {MOST_STARTS} starts")

  def _finish(self, process):
    timer = threading.Timer(400, process.kill)
    timer.start()
    output = process.communicate()[0]
    timer.cancel()
    self.outputs.append(output)
    status, lines = process.returncode, output.strip().splitlines()
    last = lines[-1] if lines else ""
    if status == 2 and ("another process trains there" in last):
      return output  # the rival of one that was stopped, or of one whose lock has not timed out
    if status not in ALLOWED:
      self.problems.append(f"status {status}: {last[:300]}")
    elif status == 1 and not re.match(r"error: .*(can't be reached|lock was lost).*run the same command", last):
      self.problems.append(f"status 1, and the last line is: {last[:300]}")
    if len(lines) > MOST_LINES + self.steps:
      self.problems.append(f"{len(lines)} lines")
    return output

  def _strike(self, fault, process, stack):
    """Waits for the fault's moment and makes it; returns a second process where one was started."""
    proxy, began = self.store.proxy, len(self.store.proxy.requests)
    moment = self.random.choice((self.random.randrange(8), self.random.randrange(400), self.random.randrange(1000)))
    deadline = time.monotonic() + 120
    while len(proxy.requests) - began < moment and process.poll() is None and time.monotonic() < deadline:
      time.sleep(0.002)
    self.happened.append(f"{fault}@{len(proxy.requests) - began}")
    if fault in STORE_FAULTS:
      times = self.random.choice((1, 2, 5, 40, float("inf")))
      seconds = self.random.choice((0.5, 2.0, 6.0, 20.0))
      rule = stack.enter_context(contextlib.ExitStack())
      rule.enter_context(proxy.fault(fault, times=times, seconds=0.4))
      timer = threading.Timer(seconds, rule.close)
      timer.start()
      stack.callback(timer.cancel)
      return None
    process.send_signal(getattr(signal, fault))
    if fault != "SIGSTOP":
      return None
    rival = None
    if self.random.random() < 0.6:  # another takes the run over meanwhile, and may finish it
      rival = start(self.store, self.recipe, self.workdir, self.machine)
      self.happened[-1] += "+rival"
    time.sleep(self.random.choice((1.0, STALE_SECONDS + 2, STALE_SECONDS + 25)))
    process.send_signal(signal.SIGCONT)
    return rival

  def compare(self, expected):
    """Adds to the problems where the run is not the one that nothing happened to."""
    try:
      found = result(lambda name: self.store.read(f"{self.name}/{name}").decode(), self.steps)
    except FileNotFoundError as error:
      self.problems.append(f"lacks {error}")
      return
    for part, value in expected.items():
      if found[part] != value:
        self.problems.append(f"{part} differ")
    if self.store.exists(f"{self.name}/.lock"):
      self.problems.append("the lock is still there")


def try_seeds(seeds, steps, every, most_faults=5, shown=print):
  """Runs all trials; returns the problems by seed, of those that have some."""
  problems = {}
  with tempfile.TemporaryDirectory(prefix="random_faults_") as name, buckets.serve() as store:
    place = Path(name)
    recipe = make_recipe(place, steps, every)
    reference = place / "reference"
    subprocess.run(
      [sys.executable, "-m", "mixln_jax", "train", f"--config={recipe}", f"--workdir={reference}"],
      cwd=ROOT,
      check=True,
      capture_output=True,
    )
    expected = result(lambda name: (reference / name).read_text(), steps)
    for seed in seeds:
      machine = place / f"machine{seed}"
      machine.mkdir()
      began = time.monotonic()
      trial = Trial(store, recipe, steps, seed, machine, 1 + seed % most_faults)
      trial.run()
      trial.compare(expected)
      seconds = time.monotonic() - began
      verdict = "; ".join(trial.problems) or "equal"
      shown(f"seed {seed:>3}  {seconds:5.0f} s  {len(trial.outputs)} starts  {' '.join(trial.happened)}  {verdict}")
      if trial.problems:
        problems[seed] = trial.problems
        folder = os.environ.get("RANDOM_FAULTS_LOGS")
        if folder:
          (Path(folder) / f"seed{seed}.txt").write_text("\n-----\n".join(trial.outputs))
  return problems


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", default="0-29")
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--every", type=int, default=10)
  values = parser.parse_args()
  first, _, last = values.seeds.partition("-")
  problems = try_seeds(
    range(int(first), int(last or first) + 1), values.steps, values.every, shown=lambda line: print(line, flush=True)
  )
  print(f"{len(problems)} of them differ" if problems else "all equal")
  return 1 if problems else 0


if __name__ == "__main__":
  sys.exit(main())

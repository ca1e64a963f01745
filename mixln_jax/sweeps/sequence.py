"""The runs of a study one after another, each in a process of its own; any number of machines share them."""

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.runs.folder import LOCK, OUTCOME, RunFolder
from mixln_jax.runs.remote import STALE_SECONDS, holder_of
from mixln_jax.sweeps.study import STUDY, Run, Study, check_comparable, check_initial_weights
from mixln_jax.training.loop import DIVERGED, FINISHED, NON_FINITE

LOG = "log.txt"
OPEN, BUSY, DONE = "open", "busy", "done"


class State(NamedTuple):
  """How a run of a study stands."""

  state: str  # open, busy (another process trains it), or done
  outcome: dict[str, Any] | None  # its outcome.json

  def describe(self) -> str:
    """In a few words, for a table."""
    if self.outcome is None or self.state == BUSY:
      return self.state
    best = self.outcome["validation"]
    loss = f"  loss {float(best['loss']):.4f}" if best else ""
    diverged = "  diverged" if self.outcome["diverged"] else ""
    return f"{self.outcome['status']} at step {self.outcome['step']}{loss}{diverged}"


def open_study(study: Study, workdir: str | Path, *, write: bool = True) -> list[Run]:
  """Makes the study's folder, or checks that the one there is the same study; returns its runs.

  Runs may be added to a study; what it started from can't change. Of several processes that train as one, one writes.

  Raises:
    InputError: the folder holds something else, or runs that would not be comparable.
  """
  folder = Path(workdir).expanduser().absolute()
  runs = study.runs(folder)
  if (folder / STUDY).exists():
    _check_same(study, json.loads((folder / STUDY).read_text()), folder)
  elif folder.exists() and (not folder.is_dir() or any(not _is_partial(path) for path in folder.iterdir())):
    raise InputError(f"--workdir={folder}: not empty and holds no study; choose another folder, nothing was written")
  check_comparable(runs)
  if write:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / STUDY, study.to_json(runs))
  return runs


def write_whole(path: Path, text: str) -> None:
  """Writes a file, whole or not at all; several processes may do it at once."""
  partial = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.partial")
  partial.write_text(text)
  partial.replace(path)


def _check_same(study: Study, old: dict[str, Any], folder: Path) -> None:
  """Refuses another base: a run added to a study must be comparable with those that it has."""
  flat = config_lib.flatten(study.base)
  wrong = [
    f"config.{field}: {old['base'].get(field)!r} there, {flat[field]!r} now"
    for field, spec in config_lib.FIELDS.items()
    if old["base"].get(field) != flat[field] and spec.on_resume != config_lib.FREE and field not in study.axes
  ]
  missing = sorted({run["name"] for run in old["runs"]} - {run.name for run in study.runs(folder)})
  if missing:
    wrong.append(f"it has runs that this one lacks: {', '.join(missing)}")
  if wrong:
    raise InputError(f"--workdir={folder} holds another study: {'; '.join(wrong)}; use another --workdir")


def _is_partial(path: Path) -> bool:
  return path.name.startswith(".") and path.name.endswith(".partial")


def _is_busy(folder: RunFolder) -> bool:
  """Whether another process trains there; looks, and takes nothing that a run could miss."""
  try:
    with (folder / LOCK).open() as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      holder = holder_of(file.read())
  except BlockingIOError:
    return True
  except OSError:
    return False
  age = time.time() - (folder / LOCK).stat().st_mtime
  return holder.get("host", platform.node()) != platform.node() and age < STALE_SECONDS


def state_of(run: Run) -> State:
  """How a run stands."""
  outcome = json.loads((run.folder / OUTCOME).read_text()) if (run.folder / OUTCOME).exists() else None
  if _is_busy(run.folder):
    return State(BUSY, outcome)
  finished = outcome is not None and (
    outcome["status"] in (DIVERGED, NON_FINITE)
    or (outcome["status"] == FINISHED and outcome["step"] == run.config.train.num_steps)
  )
  return State(DONE if finished else OPEN, outcome)


class Stopped(Exception):
  """A signal ended the sweep; `args[0]` names it."""


class Signals:
  """While the context is open, SIGTERM and Ctrl-C go on to the run that is being trained, as SIGTERM: it ends with a
  checkpoint. Between two runs they end the sweep at once."""

  def __init__(self) -> None:
    self.child: subprocess.Popen[str] | None = None
    self.name: str | None = None

  def _handle(self, number: int, _: FrameType | None) -> None:
    self.name = signal.Signals(number).name
    if self.child is not None:
      self.child.terminate()

  def __enter__(self) -> "Signals":
    self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def check(self) -> None:
    """Raises Stopped where a signal came."""
    if self.name is not None:
      raise Stopped(self.name)


def train_run(run: Run, seen: Callable[[str], None], signals: Signals) -> int:
  """Trains one run in a process of its own, from where it is; returns its exit status.

  What it prints is appended to its `log.txt`, and each line given to `seen`.

  Raises:
    Stopped: a signal came; the run has ended.
  """
  signals.check()
  _make(run)
  command = [sys.executable, "-m", "mixln_jax", "train", f"--workdir={run.folder.path}"]
  with (run.folder / LOG).open("a") as log:
    # In a session of its own: Ctrl-C reaches it once, from here.
    child = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    signals.child = child
    try:
      if signals.name is not None:  # it came while the process was made
        child.terminate()
      for line in child.stdout or ():
        log.write(line)
        log.flush()
        seen(line.rstrip("\n"))
      status = child.wait()
    finally:
      signals.child = None
      if child.poll() is None:
        child.terminate()
        child.wait()
      if child.stdout is not None:
        child.stdout.close()
  signals.check()
  return status


def _make(run: Run) -> None:
  """Makes the run's folder, where no other machine has just done so."""
  if run.folder.has_run:
    return
  try:
    run.folder.create(config_lib.to_json(run.config))
  except InputError:
    if not run.folder.has_run:
      raise


def next_run(runs: Sequence[Run], tried: set[str]) -> Run | None:
  """The first run that nobody trains, is not done, and was not tried."""
  return next((run for run in runs if run.name not in tried and state_of(run).state == OPEN), None)


def weights_line(runs: Sequence[Run]) -> str:
  """What the runs start from, in a line; raises InputError where runs that should share numbers don't."""
  hashes = check_initial_weights(runs)
  groups: dict[str, list[str]] = {}
  for name, value in hashes.items():
    groups.setdefault(value, []).append(name)
  return "; ".join(f"{value}: {len(names)} runs" for value, names in groups.items())

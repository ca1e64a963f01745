"""The runs of a study in order, each in a process of its own; any number of machines divide them up."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.files import is_partial, json_object, local_path, write_whole
from mixln_jax.runs.folder import LOCK
from mixln_jax.runs.lock import Liveness, is_held, is_held_elsewhere
from mixln_jax.runs.outcome import ENDED_ITSELF, FINISHED, Outcome, read_outcome
from mixln_jax.sweeps.study import STUDY, Run, Study, check_comparable, check_initial_weights

LOG = "log.txt"
OPEN, BUSY, DONE = "open", "busy", "done"
_liveness = Liveness()  # what this process has seen of the locks of other machines


class State(NamedTuple):
  """How a run of a study stands."""

  state: str  # open, busy (another process trains it), or done
  outcome: Outcome | None

  def describe(self) -> str:
    """In a few words, for a table."""
    outcome = self.outcome
    if outcome is None or self.state == BUSY:
      return self.state
    loss = f"  loss {float(outcome.validation['loss']):.4f}" if outcome.validation else ""
    diverged = "  diverged" if outcome.diverged else ""
    return f"{outcome.status} at step {outcome.step}{loss}{diverged}"


def open_study(study: Study, workdir: str | Path, *, write: bool = True) -> list[Run]:
  """Makes the study's folder, or checks that the one there is the same study; returns its runs.

  Runs may be added to a study; what it started from can't change. Of several processes that train as one, one writes.

  Raises:
    InputError: the folder holds something else, or runs that would not be comparable.
  """
  folder = local_path(workdir).absolute()
  runs = study.runs(folder)
  if (folder / STUDY).exists():
    _check_same(study, json_object((folder / STUDY).read_text(errors="replace"), str(folder / STUDY)), folder)
  elif folder.exists() and (not folder.is_dir() or any(not is_partial(path.name) for path in folder.iterdir())):
    raise InputError(f"workdir={folder}: not empty and holds no study; choose another folder, nothing was written")
  check_comparable(runs)
  if write:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / STUDY, study.to_json(runs))
  return runs


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
    raise InputError(f"workdir={folder} holds another study: {'; '.join(wrong)}; use another workdir")


def state_of(run: Run) -> State:
  """How a run stands."""
  outcome = read_outcome(run.folder)
  if is_held(run.folder / LOCK, _liveness):
    return State(BUSY, outcome)
  done = False
  if outcome is not None:
    all_steps = outcome.step == run.config.train.num_steps
    done = outcome.status in ENDED_ITSELF or (outcome.status == FINISHED and all_steps)
  return State(DONE if done else OPEN, outcome)


class Stopped(Exception):
  """A signal ended the sweep; `args[0]` names it."""


class Signals:
  """While the context is open, SIGTERM and Ctrl-C are passed, as SIGTERM, to the run that is being trained, which ends
  with a checkpoint. Between two runs they end the sweep at once."""

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
  command = [sys.executable, "-m", "mixln_jax", "train", f"workdir={run.folder.path}"]
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
  """The first run that nobody trains, is not done, and was not tried; None where there is none.

  A run whose holder is on another machine counts as trained there. Before giving up, the silent ones are watched until
  they are known to live or presumed dead.
  """
  watched: set[str] = set()
  while True:
    left = [run for run in runs if run.name not in tried]
    states = {run.name: state_of(run).state for run in left}
    for run in left:
      if states[run.name] == OPEN:
        return run
    unsure = [run for run in left if states[run.name] == BUSY and run.name not in watched and _is_elsewhere(run)]
    if not unsure:
      return None
    _liveness.wait(unsure[0].folder / LOCK)
    watched.add(unsure[0].name)


def _is_elsewhere(run: Run) -> bool:
  """Whether the run's lock names a process on another machine, dead or alive."""
  try:
    return is_held_elsewhere(run.folder / LOCK)
  except OSError:
    return False


def weights_line(runs: Sequence[Run]) -> str:
  """What the runs start from, in a line; raises InputError where runs that should share numbers don't."""
  hashes = check_initial_weights(runs)
  groups: dict[str, list[str]] = {}
  for name, value in hashes.items():
    groups.setdefault(value, []).append(name)
  return "; ".join(f"{value}: {len(names)} runs" for value, names in groups.items())

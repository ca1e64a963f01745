"""The runs of a study in order, each in a process of its own; any number of machines divide them up."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax import config as config_lib
from mixln_jax import signals
from mixln_jax.errors import InputError
from mixln_jax.files import (
  OBJECT,
  OBJECTS,
  TEXT,
  check_folder_name,
  check_kinds,
  is_partial,
  local_path,
  read_json,
  write_whole,
)
from mixln_jax.runs.folder import LOCK, METRICS
from mixln_jax.runs.lock import Liveness, describe_holder, is_held, is_held_elsewhere, read_holder
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.runs.outcome import ENDED_ITSELF, FINISHED, Outcome, read_outcome
from mixln_jax.sweeps.study import STUDY, STUDY_PLACE, Run, Study, check_comparable, check_initial_weights

LOG = "log.txt"
OPEN, BUSY, DONE = "open", "busy", "done"
_liveness = Liveness()  # what this process has seen of the locks of other machines


class State(NamedTuple):
  """How a run of a study stands."""

  state: str  # open, busy (another process trains it), or done
  outcome: Outcome | None
  holder: str = ""  # the process that trains it, in words
  step: int = 0  # the last one in its metrics
  num_steps: int = 0

  def describe(self) -> str:
    """In a few words, for a table."""
    outcome = self.outcome
    if self.state == BUSY:
      who = self.holder or "one that does not say who it is"
      return f"{BUSY}: a process trains it ({who}), step {self.step} of {self.num_steps}"
    if outcome is None:
      return f"{self.state}, step {self.step} of {self.num_steps}" if self.step else self.state
    loss = f"  loss {float(outcome.validation['loss']):.4f}" if outcome.validation else ""
    diverged = "  diverged" if outcome.diverged else ""
    return f"{outcome.status} at step {outcome.step}{loss}{diverged}"


def open_study(study: Study, workdir: str | Path, *, write: bool = True) -> list[Run]:
  """Makes the study's folder, or checks that the one there is the same study; returns its runs.

  Runs may be added to a study; what it started from can't change. Of several processes that train as one, one writes.

  Raises:
    InputError: the folder holds something else, or runs that would not be comparable.
  """
  folder = local_path(workdir, "workdir", STUDY_PLACE).absolute()
  runs = study.runs(folder)
  if (folder / STUDY).exists():
    _check_same(study, read_study(folder / STUDY), folder)
  elif folder.exists() and (not folder.is_dir() or any(not is_partial(path.name) for path in folder.iterdir())):
    raise InputError(f"workdir={folder}: not empty and holds no study; choose another folder, nothing was written")
  check_comparable(runs)
  if write:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / STUDY, study.to_json(runs))
  return runs


def open_with_stages(first: Study, workdir: str | Path, *, write: bool = True) -> list[Run]:
  """Opens the study with the runs of the stages that can begin; see `open_study`.

  Another process may end a stage's last run, and write the next one's runs, after this one looked which are done. So
  where the folder does not fit, this one looks again, and only a folder that still does not fit is another study's.
  """
  study = with_stages(first, workdir)
  while True:
    try:
      return open_study(study, workdir, write=write)
    except InputError:
      newer = with_stages(first, workdir)
      if len(newer.planned()) == len(study.planned()):
        raise
      study = newer


def read_study(path: Path) -> dict[str, Any]:
  """What a study.json says of its base and its runs; raises InputError where it is damaged."""
  value = read_json(path, {"base": OBJECT, "runs": OBJECTS})
  for number, run in enumerate(value["runs"], start=1):
    check_kinds(run, f"{path}: run {number}", {"name": TEXT, "values": OBJECT})
    check_folder_name(run["name"], f"{path}: run {number}")
  return value


def _check_same(study: Study, old: dict[str, Any], folder: Path) -> None:
  """Refuses another base: a run added to a study must be comparable with those that it has."""
  wrong = [
    f"config.{field}: {there!r} there, {here!r} now"
    for field, there, here in config_lib.refused_differences(old["base"], study.base)
    if field not in study.axes
  ]
  missing = sorted({run["name"] for run in old["runs"]} - {run.name for run in study.runs(folder)})
  if missing:
    wrong.append(f"it has runs that this one lacks: {', '.join(missing)}")
  if wrong:
    raise InputError(f"workdir={folder} holds another study: {'; '.join(wrong)}; use another workdir")


def state_of(run: Run) -> State:
  """How a run stands."""
  outcome = read_outcome(run.folder)
  num_steps = run.config.train.num_steps
  if is_held(run.folder / LOCK, _liveness):
    return State(BUSY, outcome, describe_holder(read_holder(run.folder / LOCK)), _last_step(run), num_steps)
  done = _is_end(outcome, num_steps)
  return State(DONE if done else OPEN, outcome, step=_last_step(run) if outcome is None else 0, num_steps=num_steps)


def has_ended(run: Run) -> bool:
  """Whether a run has nothing left to be trained, by its outcome alone: also where a lock was left behind."""
  return _is_end(read_outcome(run.folder), run.config.train.num_steps)


def _is_end(outcome: Outcome | None, num_steps: int) -> bool:
  if outcome is None:
    return False
  all_steps = outcome.step == num_steps
  return outcome.status in ENDED_ITSELF or (outcome.status == FINISHED and all_steps)


def _last_step(run: Run) -> int:
  """The last step in a run's metrics; 0 before the first, or where another process is writing them anew."""
  try:
    return max((line["step"] for line in read_metrics(run.folder / METRICS)), default=0)
  except (InputError, OSError):
    return 0


def steps_left(run: Run) -> int:
  """Updates that a run still needs; none of one that is done, or that another process trains."""
  state = state_of(run)
  if state.state != OPEN:
    return 0
  done = state.step if state.outcome is None else state.outcome.step
  return max(0, run.config.train.num_steps - done)


def with_stages(study: Study, workdir: str | Path) -> Study:
  """The study with the runs that follow from how its earlier ones ended, stage by stage, as far as those are done."""
  losses: dict[str, float] = {}
  while True:
    so_far = study.with_stages(losses)
    later = {name: values for name, values in so_far.planned().items() if name not in losses}
    found = _final_losses([so_far.run_of(name, values, workdir) for name, values in later.items()])
    if not found:
      return so_far
    losses |= found


def _final_losses(runs: Sequence[Run]) -> dict[str, float]:
  """The final loss of each run that is done, NaN where it diverged."""
  losses: dict[str, float] = {}
  for run in runs:
    # By its outcome alone: a lock that a killed machine left does not make a run that has ended one that trains.
    outcome = read_outcome(run.folder) if run.folder.has_run else None
    if outcome is not None and _is_end(outcome, run.config.train.num_steps):
      validation = {} if outcome.diverged else outcome.validation or {}
      losses[run.name] = float(validation.get("loss", math.nan))
  return losses


def train_run(run: Run, seen: Callable[[str], None]) -> int:
  """Trains one run in a process of its own, from where it is; returns its exit status.

  What it prints is appended to its `log.txt`, and each line given to `seen`. A signal that asks this process to stop is
  passed to the run as SIGTERM, and the run ends with a checkpoint; it ends in the same way if this process is killed.

  Raises:
    Stopped: a signal came; the run has ended.
  """
  _make(run)
  command = [sys.executable, "-m", "mixln_jax", "train", f"--workdir={run.folder.path}"]
  children: list[subprocess.Popen[str]] = []

  def terminate() -> None:
    for child in children:
      child.terminate()

  with (run.folder / LOG).open("a", encoding="utf-8") as log, signals.noting(terminate):
    # In a session of its own: Ctrl-C and a closed terminal reach it once, from here.
    child = subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      encoding="utf-8",
      errors="replace",
      start_new_session=True,
      env=os.environ | {signals.PARENT: str(os.getpid()), "PYTHONIOENCODING": "utf-8"},
    )
    children.append(child)
    try:
      if signals.requested_by() is not None:  # it came while the process was made
        child.terminate()
      for line in child.stdout or ():
        log.write(line)
        log.flush()
        seen(line.rstrip("\n"))
      status = child.wait()
    finally:
      if child.poll() is None:
        child.terminate()
        child.wait()
      if child.stdout is not None:
        child.stdout.close()
    stopped_by = signals.requested_by()
  if stopped_by is not None:
    raise signals.Stopped(stopped_by)
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

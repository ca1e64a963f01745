"""What a run leaves on disk.

config.json        the config, one flat field a line
placement.txt      the strip, first layer first: post post post pre …
parameters.txt     name, shape, type, sharding and size of each tensor
environment.json   versions, devices, git revision, command
initial_weights.json  a hash of the weights before the first update, and the sum of bits of each tensor
metrics.jsonl      the truth: one object a line, each (split, step) once
diagnostics.jsonl  statistics by layer, one object a line, each diagnostic step once
changes.jsonl      fields that were changed when the run went on, and from which step
non_finite_STEP/   batch and gradient norms of a step that could not be made
damaged_STEP/      checkpoints that were not what was written
diagnose/STEP/     what `diagnose` measured on the checkpoint of that step
outcome.json       why the run ended, and with what
checkpoints/       one folder a step
tensorboard/  profile/
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from mixln_jax.errors import InputError
from mixln_jax.parallel.processes import is_first

CONFIG, PLACEMENT, PARAMETERS = "config.json", "placement.txt", "parameters.txt"
ENVIRONMENT, METRICS, OUTCOME = "environment.json", "metrics.jsonl", "outcome.json"
INITIAL_WEIGHTS, CHANGES, DIAGNOSTICS = "initial_weights.json", "changes.jsonl", "diagnostics.jsonl"
CHECKPOINTS, TENSORBOARD, PROFILE, LOCK = "checkpoints", "tensorboard", "profile", ".lock"
DIAGNOSE = "diagnose"
PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "array-record",
  "ml_collections",
  "numpy",
  "sentencepiece",
)


STALE_SECONDS, TOUCH_SECONDS = 120.0, 15.0


def _holder(text: str) -> dict[str, Any]:
  """Who a lock file says holds it; empty where it does not."""
  try:
    value = json.loads(text)
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}


def _overwrite(file: Any, text: str) -> None:
  file.truncate(0)
  file.write(text)
  file.flush()


@contextlib.contextmanager
def _touched(path: Path) -> Iterator[None]:
  """Touches a file now and then, until the context is left or the process is gone."""
  done = threading.Event()

  def touch() -> None:
    while not done.wait(TOUCH_SECONDS):
      with contextlib.suppress(OSError):
        os.utime(path)

  thread = threading.Thread(target=touch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


class RunFolder:
  """A run's folder."""

  def __init__(self, path: str | Path):
    self.path = Path(path).expanduser().absolute()

  def __truediv__(self, name: str) -> Path:
    return self.path / name

  @property
  def has_run(self) -> bool:
    return (self / CONFIG).is_file()

  def create(self, config_json: str) -> None:
    """Makes the folder for a new run and writes its config, which makes it one; of several processes the first does.

    Raises:
      InputError: the path is not a folder, can't be written, or holds something else.
    """
    if not is_first():
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      # What a process that died while it wrote the config left behind is no reason to refuse.
      occupied = [entry.name for entry in self.path.iterdir() if entry.name != f".{CONFIG}.partial"]
    except OSError as error:
      raise InputError(
        f"--workdir={self.path}: can't be used ({error.strerror}); choose a folder that you can write to"
      ) from error
    if occupied:
      raise InputError(
        f"--workdir={self.path}: not empty and holds no run (it has {sorted(occupied)[0]!r}); choose "
        "another folder, nothing was written"
      )
    try:
      self.write(CONFIG, config_json)
    except OSError as error:
      raise InputError(f"--workdir={self.path}: not writable ({error.strerror}); choose another folder") from error

  def unused(self, name: str) -> Path:
    """A path in the folder that does not exist: `name`, or `name_2`, …"""
    candidates = (self / (name if number == 1 else f"{name}_{number}") for number in itertools.count(1))
    return next(path for path in candidates if not path.exists())

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Keeps a second process from writing to the run.

    The file says who holds it and since when, and is touched while the holder lives. On one machine the system frees
    the lock of a process that died; a holder on another machine is believed dead once its file is STALE_SECONDS old.

    Of several processes of one run the first one holds it for all.

    Raises:
      InputError: another process holds it, or the folder can't be written.
    """
    if not is_first():
      yield
      return
    with contextlib.ExitStack() as stack:
      try:
        file = stack.enter_context((self / LOCK).open("a+"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise InputError(self._held(_holder((self / LOCK).read_text()))) from error
      except OSError as error:
        raise InputError(
          f"--workdir={self.path}: can't be locked ({error.strerror}); choose a folder that you can write to"
        ) from error
      file.seek(0)
      holder = _holder(file.read())
      age = time.time() - (self / LOCK).stat().st_mtime
      if holder.get("host", platform.node()) != platform.node() and 0 <= age < STALE_SECONDS:
        raise InputError(self._held(holder))
      me = {"host": platform.node(), "process": os.getpid(), "since": datetime.datetime.now().astimezone().isoformat()}
      _overwrite(file, json.dumps(me))
      stack.callback(_overwrite, file, "")
      stack.enter_context(_touched(self / LOCK))
      yield

  def _held(self, holder: Mapping[str, Any]) -> str:
    who = ", ".join(f"{name} {value}" for name, value in holder.items()) or "one that does not say who it is"
    return f"--workdir={self.path}: another process trains there ({who}); wait for it, or stop it"

  def read(self, name: str) -> str:
    """A file of facts.

    Raises:
      InputError: the folder holds no run, or the file can't be read.
    """
    try:
      return (self / name).read_text()
    except OSError as error:
      raise InputError(
        f"--workdir={self.path}: no run there ({name}: {error.strerror}); give the folder of a run"
      ) from error

  def write(self, name: str, text: str) -> None:
    """Writes a file of facts, whole or not at all; of several processes the first one does."""
    if not is_first():
      return
    partial = (self / name).with_name(f".{Path(name).name}.partial")
    partial.write_text(text)
    partial.replace(self / name)

  def write_json(self, name: str, value: Mapping[str, Any]) -> None:
    self.write(name, json.dumps(value, indent=1) + "\n")


def environment() -> dict[str, Any]:
  """Versions, devices and code revision of this process."""
  return {
    "python": platform.python_version(),
    "platform": platform.platform(),
    "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
    "processes": jax.process_count(),
    "cpus": os.cpu_count(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "git": _git_revision(),
    "command": sys.argv,
  }


def _git_revision() -> str | None:
  root = Path(__file__).parent
  try:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(describe, cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


def parameter_table(params: Any, count: int) -> str:
  """parameters.txt: a line a tensor (name, shape, type, sharding, size) as stored, and the model's own count.

  Args:
    params: a tree of arrays, or of shapes with shardings.
    count: parameters that the model has, without what is only stored (columns that pad the MLP, unused gains).
  """
  rows = [("name", "shape", "dtype", "sharding", "size")]
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = getattr(leaf.sharding, "spec", None)
    rows.append((name, str(tuple(leaf.shape)), str(leaf.dtype), str(spec), f"{leaf.size:,}"))
    total += leaf.size
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  return "\n".join([*lines, f"stored {total:,}", f"parameters {count:,}"]) + "\n"

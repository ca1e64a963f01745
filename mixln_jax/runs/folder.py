"""What a run leaves on disk.

config.json        the config, one flat field a line
placement.txt      the strip, first layer first: post post post pre …
parameters.txt     name, shape, type and size of each tensor, how it is sharded, what one device holds
data.json          the records that it is trained on: their fingerprint, folder and tokenizer
start.json         of a fine-tuned run: the run and checkpoint that it started from, a hash of its weights' bits
environment.json   versions, devices, git revision, command, hash of the training step's program
initial_weights.json  a hash of the weights before the first update, and the sum of bits of each tensor
metrics.jsonl      the truth: one object a line, each (split, step) once
diagnostics.jsonl  statistics by layer, one object a line, each diagnostic step once
changes.jsonl      fields that were changed when the run went on, and from which step
non_finite_STEP/   batch and gradient norms of a step that could not be made
damaged_STEP/      checkpoints that were not what was written
diagnose/STEP/     what `diagnose` measured on the checkpoint of that step
tasks/STEP/        what `evaluate --tasks` measured on it
outcome.json       why the run ended, and with what
checkpoints/       one folder a step
tensorboard/  profile/
"""

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mixln_jax.errors import InputError
from mixln_jax.parallel.processes import is_first, wait_for_all
from mixln_jax.parallel.rules import mesh_axes
from mixln_jax.runs import remote as remote_lib
from mixln_jax.runs.remote import Lock, Remote, Spool, held

CONFIG, PLACEMENT, PARAMETERS = "config.json", "placement.txt", "parameters.txt"
ENVIRONMENT, METRICS, OUTCOME = "environment.json", "metrics.jsonl", "outcome.json"
INITIAL_WEIGHTS, CHANGES, DATA, START = "initial_weights.json", "changes.jsonl", "data.json", "start.json"
DIAGNOSTICS = "diagnostics.jsonl"
CHECKPOINTS, TENSORBOARD, PROFILE, LOCK = "checkpoints", "tensorboard", "profile", ".lock"
DIAGNOSE, TASKS = "diagnose", "tasks"
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


def _me() -> dict[str, Any]:
  """What a lock says of its holder."""
  return {"host": platform.node(), "process": os.getpid(), "since": datetime.datetime.now().astimezone().isoformat()}


def _overwrite(file: Any, text: str) -> None:
  file.truncate(0)
  file.write(text)
  file.flush()


@contextlib.contextmanager
def _touched(path: Path) -> Iterator[None]:
  """Touches a file now and then, until the context is left or the process is gone."""
  done = threading.Event()

  def touch() -> None:
    while not done.wait(remote_lib.TOUCH_SECONDS):
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
  """A run's folder: on a disk, or `gs://BUCKET/FOLDER`.

  Attributes:
    remote: the folder in a bucket; None on a disk.
    address: the path or URL, as people and messages name it.
  """

  def __init__(self, path: str | Path):
    """Raises InputError for a URL that can't be a work directory."""
    self.remote = Remote(str(path)) if "://" in str(path) else None
    self._spool: Spool | None = None
    self._lock: Lock | None = None
    self._local = Path(path).expanduser().absolute()
    self.address = self.remote.url if self.remote else str(self._local)

  @property
  def path(self) -> Path:
    """Where its small files lie on this machine: the folder itself; of one in a bucket, the copy of this process."""
    return self._local if self.remote is None else self.spool.folder

  @property
  def spool(self) -> Spool:
    assert self.remote is not None
    if self._spool is None:
      self._spool = Spool(self.remote, Path(tempfile.mkdtemp(prefix="mixln_jax_")))
    return self._spool

  @property
  def name(self) -> str:
    return self.address.rsplit("/", 1)[-1]

  def __truediv__(self, name: str) -> Path:
    return self.path / name

  def place(self, name: str) -> epath.Path:
    """Where something large (checkpoints) of this name lies, which is never copied: on the disk, or in the bucket."""
    return epath.Path(self.address) / name

  @property
  def has_run(self) -> bool:
    return self.remote.exists(CONFIG) if self.remote else (self / CONFIG).is_file()

  def occupants(self) -> list[str]:
    """What lies in the folder; empty where there is none, or no folder.

    Raises:
      InputError: the path is not a folder, or can't be read.
    """
    if self.remote is not None:
      return self.remote.entries()
    try:
      return [entry.name for entry in self.path.iterdir()]
    except FileNotFoundError:
      return []
    except OSError as error:
      raise InputError(
        f"--workdir={self.path}: can't be used ({error.strerror}); choose a folder that you can write to"
      ) from error

  def create(self, config_json: str) -> None:
    """Makes the folder for a new run and writes its config, which makes it one; of several processes the first does.

    Raises:
      InputError: the path is not a folder, can't be written, or holds something else.
    """
    if not is_first():
      return
    # What a process that died while it wrote the config left behind is no reason to refuse.
    occupied = [name for name in self.occupants() if name != f".{CONFIG}.partial"]
    if occupied:
      raise InputError(
        f"--workdir={self.address}: not empty and holds no run (it has {sorted(occupied)[0]!r}); choose "
        "another folder, nothing was written"
      )
    if self.remote is not None:
      self.remote.write(CONFIG, config_json.encode())
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self.write(CONFIG, config_json)
    except OSError as error:
      raise InputError(f"--workdir={self.path}: not writable ({error.strerror}); choose another folder") from error

  def check_shared(self, seconds: float = 60.0) -> None:
    """Refuses a folder that another process made and that is not to be seen here.

    Raises:
      InputError: it does not appear in so many seconds (a network file system may be late).
    """
    deadline = time.monotonic() + seconds
    while not self.has_run:
      if time.monotonic() > deadline:
        raise InputError(
          f"--workdir={self.address}: process 0 made the run there, and process {jax.process_index()} on "
          f"{platform.node()} does not see it; give a folder that all processes share, or gs://…"
        )
      time.sleep(0.5)

  def unused(self, name: str) -> Path:
    """A path in the folder that does not exist: `name`, or `name_2`, …"""
    candidates = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    return self / next(name for name in candidates if not ((self / name).exists() or self.place(name).exists()))

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Keeps a second process from writing to the run. Of several processes of one run the first one holds it for all;
    the others meet it at `wait_for_all` after they entered, so that they hear of a lock that was refused.

    The lock says who holds it and since when, and its holder touches it while it lives. On one machine the system frees
    the lock of a process that died; a holder on another machine is believed dead once it was silent for STALE_SECONDS.

    Of a run in a bucket, the small files are there (`path`) while the lock is held, and all processes enter together.

    Raises:
      InputError: another process holds it, or the folder can't be written.
    """
    if self.remote is not None:
      with self._remote_lock():
        yield
      return
    if not is_first():
      yield
      return
    with contextlib.ExitStack() as stack:
      try:
        file = stack.enter_context((self / LOCK).open("a+"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise held(self.address, remote_lib.holder_of((self / LOCK).read_text())) from error
      except OSError as error:
        raise InputError(
          f"--workdir={self.path}: can't be locked ({error.strerror}); choose a folder that you can write to"
        ) from error
      file.seek(0)
      holder = remote_lib.holder_of(file.read())
      if holder.get("host", platform.node()) != platform.node() and self._is_touched():
        raise held(self.address, holder)
      _overwrite(file, json.dumps(_me()))
      stack.callback(_overwrite, file, "")
      stack.enter_context(_touched(self / LOCK))
      yield

  def _is_touched(self) -> bool:
    """Whether the holder of the lock file, on another machine, lives: it is watched until it would be stale."""
    # Its age would be the file server's clock against this machine's, and a clock that is ahead would rob the living.
    seen = (self / LOCK).stat().st_mtime
    until = time.monotonic() + remote_lib.STALE_SECONDS
    print(f"waiting    to see whether the holder of {self.address} is alive", flush=True)
    while time.monotonic() < until:
      time.sleep(min(1.0, remote_lib.POLL_SECONDS))
      if (self / LOCK).stat().st_mtime != seen:
        return True
    return False

  @contextlib.contextmanager
  def _remote_lock(self) -> Iterator[None]:
    assert self.remote is not None
    with contextlib.ExitStack() as stack:
      if is_first():
        self._lock = Lock(self.remote, LOCK, _me())
        stack.enter_context(self._lock())
      wait_for_all("the lock of the run in the bucket")  # before, another run may still write what is fetched
      self.spool.fetch(skip=LOCK)
      try:
        yield
      except BaseException:
        try:
          self.copy_out()
        except Exception as error:  # the first error is the one to tell
          print(f"warning: {self.address} lacks what lies in {self.path} ({error})", file=sys.stderr)
        raise
      self.copy_out()
      shutil.rmtree(self.path, ignore_errors=True)
      self._spool = None

  def copy_out(self) -> None:
    """Copies what changed to the bucket; of several processes the first one does. Nothing is to be done on a disk.

    Raises:
      InputError: another process has taken the run over.
      OSError: it can't be copied.
    """
    if self.remote is not None and is_first():
      if self._lock is not None:
        self._lock.check()
      self.spool.copy_out()

  def read(self, name: str) -> str:
    """A file of facts.

    Raises:
      InputError: the folder holds no run, or the file can't be read.
    """
    try:
      return self.remote.read(name).decode() if self.remote else (self / name).read_text()
    except OSError as error:
      if self.remote is not None and not isinstance(error, FileNotFoundError):
        raise  # of the network: it may pass
      reason = error.strerror or " ".join(str(error).split())[:200]
      raise InputError(
        f"--workdir={self.address}: no run there ({name}: {reason}); give the folder of a run"
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

  def make_writable(self, name: str, flag: str = "--output") -> None:
    """Makes the folder, before anything is measured that `name` is to hold. Of several processes the first one does.

    Raises:
      InputError: nothing can be written there; `flag` is what it was given as.
    """
    probe = f".{name}.partial"
    try:
      if is_first():
        if self.remote is not None:
          self.remote.write(probe, b"")
          self.remote.remove(probe)
        self.path.mkdir(parents=True, exist_ok=True)
        (self / probe).write_text("")
        (self / probe).unlink()
    except OSError as error:
      raise InputError(f"{flag}={self.path}: can't be written ({error.strerror}); choose another folder") from error


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
    "code": code_hash(),
    "command": sys.argv,
  }


def code_hash() -> str:
  """A hash of this package's source files: what runs, whether or not it lies in a repository."""
  root = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
  return digest.hexdigest()[:16]


def _git_revision() -> str | None:
  root = Path(__file__).parents[2]
  if (root / "REVISION").is_file():  # code that launch/common.sh shipped without git
    return (root / "REVISION").read_text().strip()
  try:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(describe, cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


def parameter_table(params: Any, count: int) -> str:
  """parameters.txt: a line a tensor (name, shape, type, how it is sharded, what one device holds of it, its size), as
  stored, and the model's own count.

  Args:
    params: a tree of arrays, or of shapes with shardings.
    count: parameters that the model has, without what is only stored (columns that pad the MLP, unused gains).
  """
  rows = [("name", "shape", "dtype", "sharding", "on a device", "size")]
  total = held = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    shape, piece = tuple(leaf.shape), leaf.sharding.shard_shape(leaf.shape)
    rows.append((name, str(shape), str(leaf.dtype), describe_sharding(leaf.sharding), str(piece), f"{leaf.size:,}"))
    total += leaf.size
    held += math.prod(piece)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  return "\n".join([*lines, f"stored {total:,}, of which a device holds {held:,}", f"parameters {count:,}"]) + "\n"


def describe_sharding(sharding: Any) -> str:
  """How a tensor lies on the mesh, in words: `axis 1 over fsdp 4, axis 2 over tensor 2`; `whole on every device`."""
  cuts = []
  for number, entry in enumerate(getattr(sharding, "spec", ())):
    over = [f"{axis} {sharding.mesh.shape[axis]}" for axis in mesh_axes(entry) if sharding.mesh.shape[axis] > 1]
    if over:
      cuts.append(f"axis {number} over {' × '.join(over)}")
  return ", ".join(cuts) or "whole on every device"

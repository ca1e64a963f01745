"""The folder of a run.

config.json        the config, one flat field per line
placement.txt      the layer list, from the first layer: post post post pre …
parameters.txt     name, shape, type and size of each tensor, its sharding, and its shape on one device
data.json          the records that the run is trained on: their fingerprint, folder (absolute) and tokenizer
tokenizer/         the tokenizer in its own format, so that a copied run can generate anywhere
start.json         for a fine-tuned run: the run and checkpoint that it started from, and a hash of those weights' bits
imported.json      for a run that `convert` made: where its weights come from, and how they were stored there
environment.json   versions, devices, git revision, command, hash of the training step's program
initial_weights.json  a hash of the weights before the first update, and the sum of bits of each tensor
metrics.jsonl      the metrics of record: one object per line, each (split, step) once
diagnostics.jsonl  statistics by layer, one object per line, each diagnostic step once
changes.jsonl      the fields that were changed when the run was resumed, and the step
non_finite_STEP/   batch and gradient norms of a step whose update was not finite
damaged_STEP/      quarantined checkpoints that differ from what was written
diagnose/STEP/     the results of `diagnose` on the checkpoint of that step
tasks/STEP/        the results of `evaluate --tasks` on that checkpoint
corpora/STEP/      the results of `evaluate --corpus` on that checkpoint
outcome.json       how the run ended, with its last results
checkpoints/       one folder per step
tensorboard/  profile/
"""

import contextlib
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mixln_jax.errors import InputError, LostLockError, UnreachableError, one_line
from mixln_jax.files import (
  LARGEST_FACTS,
  Kinds,
  decoded,
  is_partial,
  json_object,
  local_path,
  read_regular,
  write_whole,
)
from mixln_jax.parallel.processes import is_first, wait_for_all
from mixln_jax.places import check_scheme, is_url
from mixln_jax.runs.lock import identity, lock
from mixln_jax.runs.remote import Remote, Spool
from mixln_jax.runs.remote_lock import Lock

CONFIG, PLACEMENT, PARAMETERS = "config.json", "placement.txt", "parameters.txt"
ENVIRONMENT, METRICS, OUTCOME = "environment.json", "metrics.jsonl", "outcome.json"
INITIAL_WEIGHTS, CHANGES, DATA, START = "initial_weights.json", "changes.jsonl", "data.json", "start.json"
DIAGNOSTICS, IMPORTED = "diagnostics.jsonl", "imported.json"
CHECKPOINTS, TENSORBOARD, PROFILE, LOCK = "checkpoints", "tensorboard", "profile", ".lock"
DIAGNOSE, TASKS, TOKENIZER = "diagnose", "tasks", "tokenizer"
CORPORA, CORPORA_FILE = "corpora", "corpora.json"


class RunFolder:
  """A run's folder: on a disk, or `gs://BUCKET/FOLDER`.

  Attributes:
    remote: the folder in a bucket; None if the run is on a disk.
    address: the path or URL, for messages.
  """

  def __init__(self, path: str | Path):
    """Raises InputError for a path that can't be a work directory: an unsupported URL, or one that lost a slash."""
    check_scheme(path, "workdir")
    self.remote = Remote(str(path)) if is_url(path) else None
    self._spool: Spool | None = None
    self._lock: Lock | None = None
    self._local = Path(path) if self.remote else local_path(path).absolute()
    self.address = self.remote.url if self.remote else str(self._local)

  @property
  def path(self) -> Path:
    """The folder of the small files on this machine: the run's folder, or this process's copy of it if in a bucket."""
    return self._local if self.remote is None else self.spool.folder

  @property
  def spool(self) -> Spool:
    assert self.remote is not None
    if self._spool is None:
      self._spool = Spool(self.remote)
    return self._spool

  @property
  def name(self) -> str:
    return self.address.rsplit("/", 1)[-1]

  def __truediv__(self, name: str) -> Path:
    return self.path / name

  def place(self, name: str) -> epath.Path:
    """The path of a large entry (checkpoints), on the disk or in the bucket; large entries are never copied."""
    return epath.Path(self.address) / name

  def shown(self, path: Path) -> str:
    """A path in the folder (`folder / name`) for messages; for a run in a bucket, its future URL there."""
    return f"{self.address}/{path.relative_to(self.path).as_posix()}"

  @property
  def has_run(self) -> bool:
    return self.remote.exists(CONFIG) if self.remote else (self / CONFIG).is_file()

  def occupants(self) -> list[str]:
    """The names of the entries of the folder; empty if there are none, or no folder.

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
        f"workdir={self.path}: can't be used ({error.strerror}); choose a folder that you can write to"
      ) from error

  def create(self, config_json: str) -> None:
    """Creates the folder of a new run with its config.json, in the first process only.

    Raises:
      InputError: the path is not a folder, can't be written, or holds something else.
    """
    if not is_first():
      return
    # Partial files, left by a process that died while writing the config, are ignored.
    occupied = [name for name in self.occupants() if not is_partial(name)]
    if occupied:
      raise InputError(
        f"workdir={self.address}: not empty and holds no run (it has {sorted(occupied)[0]!r}); choose "
        "another folder, nothing was written"
      )
    if self.remote is not None:
      self.remote.write(CONFIG, config_json.encode())
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self.write(CONFIG, config_json)
    except OSError as error:
      raise InputError(f"workdir={self.path}: not writable ({error.strerror}); choose another folder") from error

  def check_shared(self, seconds: float = 60.0) -> None:
    """Checks that this process sees the folder that process 0 created.

    Raises:
      InputError: it does not appear within this time (a network file system may be late).
    """
    deadline = time.monotonic() + seconds
    while not self.has_run:
      if time.monotonic() > deadline:
        raise InputError(
          f"workdir={self.address}: process 0 created the run there, but process {jax.process_index()} on "
          f"{platform.node()} does not see it; give a folder that all processes share, or gs://…"
        )
      time.sleep(0.5)

  def unused(self, name: str) -> Path:
    """A path in the folder that does not exist yet: `name`, or `name_2`, … (use `shown` for messages)."""
    candidates = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    return self / next(name for name in candidates if not ((self / name).exists() or self.place(name).exists()))

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Holds the run's lock while the context is open, so that no other process writes to the run.

    If the run has several processes, the first one holds the lock for all. On a disk, the others enter at once; they
    learn at their next `wait_for_all` whether the lock was refused. In a bucket, all processes enter together, and the
    copy of the small files (`path`) exists while the lock is held.

    The lock file says who holds it and since when, and the holder touches it regularly (`runs/lock.py`).

    Raises:
      InputError: another process holds the lock, or the folder can't be written.
    """
    if self.remote is not None:
      with self._remote_lock():
        yield
      return
    if not is_first():
      yield
      return
    with lock(self / LOCK, self.address):
      yield

  @contextlib.contextmanager
  def _remote_lock(self) -> Iterator[None]:
    assert self.remote is not None
    try:
      with contextlib.ExitStack() as stack:
        if is_first():
          self._lock = Lock(self.remote, LOCK, identity())
          stack.enter_context(self._lock())
        wait_for_all("the lock of the run in the bucket")  # only then is no other run writing the files to fetch
        self.spool.fetch(skip=LOCK)
        if self._lock is not None and self._lock.taken_over:
          self.spool.claim(self._lock.check)
        try:
          yield
        except (LostLockError, UnreachableError):
          raise  # nothing may or can be copied; the files of the newest checkpoint were copied before it
        except BaseException:
          try:
            self.copy_out()
          except Exception as error:  # the original error is raised below, this one only printed
            print(f"warning: {self.address} lacks what changed since the last checkpoint ({error})", file=sys.stderr)
          raise
        self.copy_out()
    finally:
      self._lock = None
      self.leave()

  def leave(self) -> None:
    """Removes this machine's copy of a run in a bucket."""
    if self._spool is not None:
      self._spool.remove()
      self._spool = None

  def check_held(self) -> None:
    """Raises LostLockError if this process knows that it no longer holds the run; it makes no request."""
    if self._lock is not None:
      self._lock.check_clock()

  def copy_out(self) -> None:
    """Copies changed files to the bucket, in the first process only; does nothing for a run on a disk.

    Raises:
      LostLockError: another process has taken over the run, or may have.
      UnreachableError: the bucket can't be reached.
    """
    if self.remote is None or not is_first():
      return
    if self._lock is None:
      self.spool.copy_out()
    else:
      self.spool.copy_out(self._lock.check)

  def read(self, name: str) -> str:
    """The text of a file of facts.

    Raises:
      InputError: the folder holds no run, or the file can't be read.
    """
    try:
      content = self.remote.read(name) if self.remote else read_regular(self / name, LARGEST_FACTS)
      return decoded(content, f"{self.address}/{name}")
    except OSError as error:
      reason = error.strerror or one_line(error, 200)
      raise InputError(f"workdir={self.address}: no run there ({name}: {reason}); give the folder of a run") from error

  def fetched(self, name: str) -> Path:
    """The path where the current content of a file can be read, a copy if the run is in a bucket. It may not exist."""
    if self.remote is not None and self._lock is None:
      with contextlib.suppress(FileNotFoundError):
        self.remote.get(name, self.path / name)
    return self.path / name

  def facts(self, name: str, kinds: Kinds | None = None) -> dict[str, Any] | None:
    """The JSON object in a file of facts; None if there is no such file.

    Args:
      name: the name of the file.
      kinds: the required kinds of its members.

    Raises:
      InputError: the file can't be read, or its content is invalid.
    """
    try:
      text = self.read(name)
    except InputError as error:
      if isinstance(error.__cause__, FileNotFoundError):
        return None
      raise
    return json_object(text, f"{self.address}/{name}", kinds)

  def write(self, name: str, text: str) -> None:
    """Writes a file of facts atomically, in the first process only."""
    if not is_first():
      return
    write_whole(self / name, text)

  def write_json(self, name: str, value: Mapping[str, Any]) -> None:
    self.write(name, json.dumps(value, indent=1) + "\n")

  def make_writable(self, name: str, parameter: str = "output") -> None:
    """Creates the folder and checks that it can be written, in the first process only.

    Call it before a long measurement whose result goes to the file `name`.

    Raises:
      InputError: nothing can be written there; `parameter` is the name of the parameter in the message.
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
      raise InputError(
        f"{parameter}={self.path}: can't be written ({error.strerror}); choose another folder"
      ) from error

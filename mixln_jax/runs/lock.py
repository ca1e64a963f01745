"""The lock of a run on a disk: which process writes to the run, and whether that process is alive."""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mixln_jax import waiting
from mixln_jax.errors import InputError, one_line
from mixln_jax.files import TEXT, json_object
from mixln_jax.text import printable

STALE_SECONDS = 120.0  # a holder that did not touch its lock for this long is presumed dead
TOUCH_SECONDS = 15.0  # how often a holder touches its lock
POLL_SECONDS = 2.0


def identity() -> dict[str, Any]:
  """The description of this process as the holder of a lock."""
  return {"host": platform.node(), "process": os.getpid(), "since": datetime.datetime.now().astimezone().isoformat()}


def holder_of(content: bytes | str) -> dict[str, Any]:
  """The holder that the content of a lock names; empty if it names none."""
  try:
    return json_object(content, "the lock", {"host": TEXT.optional()})
  except InputError:
    return {}


def read_holder(path: Path) -> dict[str, Any]:
  """The holder that a lock file names; empty if there is no such file, or if it names none."""
  try:
    return holder_of(path.read_bytes())
  except OSError:
    return {}


def describe_holder(holder: Mapping[str, Any]) -> str:
  """A holder as a phrase for messages."""
  words = ", ".join(f"{name} {value}" for name, value in holder.items() if name not in ("beat", "nonce"))
  return one_line(printable(words))


def held_error(workdir: str, holder: Mapping[str, Any]) -> InputError:
  """The error for a work directory that another process writes to."""
  who = describe_holder(holder) or "unidentified"
  return InputError(f"workdir={workdir}: another process trains there ({who}); wait for it, or stop it")


class Liveness:
  """Whether the holders of lock files on other machines are alive.

  A living holder touches its file every TOUCH_SECONDS. A holder whose file did not change for STALE_SECONDS *by this
  machine's clock* is presumed dead. The file's modification time is never compared with this clock: it comes from the
  file server, and if one clock is ahead of the other, the lock of a living holder would be taken.
  """

  def __init__(self) -> None:
    self._seen: dict[Path, tuple[float, float]] = {}  # path -> the file's time, and when this process first saw it

  def is_dead(self, path: Path) -> bool:
    """Whether the file has been watched for STALE_SECONDS without a change."""
    seen, since = self._look(path)
    return path.stat().st_mtime == seen and time.monotonic() - since >= STALE_SECONDS

  def wait(self, path: Path) -> bool:
    """Watches a file until its holder touches it (True) or is presumed dead (False)."""
    seen, _ = self._look(path)
    while path.stat().st_mtime == seen:
      if self.is_dead(path):
        return False
      time.sleep(min(1.0, POLL_SECONDS))
    return True

  def _look(self, path: Path) -> tuple[float, float]:
    changed = path.stat().st_mtime
    if path not in self._seen or self._seen[path][0] != changed:
      self._seen[path] = (changed, time.monotonic())
    return self._seen[path]


@contextlib.contextmanager
def lock(path: Path, workdir: str) -> Iterator[None]:
  """Holds a lock file while the context is open, and touches it so that other machines see that this process lives.

  The system frees the lock of a process on this machine that died. A holder on another machine is watched (`Liveness`).

  Args:
    path: the lock file.
    workdir: the folder that it locks, for messages.

  Raises:
    InputError: another process holds the lock, or the folder can't be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(path.open("a+", encoding="utf-8", errors="replace"))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise held_error(workdir, read_holder(path)) from error
    except OSError as error:
      raise InputError(
        f"workdir={workdir}: can't be locked ({error.strerror}); choose a folder that you can write to"
      ) from error
    file.seek(0)
    holder = holder_of(file.read())
    if _is_elsewhere(holder):
      print(f"waiting    to see whether the holder of {workdir} is alive", flush=True)
      if Liveness().wait(path):
        raise held_error(workdir, holder)
    _overwrite(file, json.dumps(identity()))
    stack.callback(_overwrite, file, "")
    stack.enter_context(_touched(path))
    yield


def is_held(path: Path, liveness: Liveness) -> bool:
  """Whether another process holds a lock file; it never blocks a run from taking the lock.

  A holder on another machine counts as alive until `liveness` has watched it for STALE_SECONDS.
  """
  try:
    return is_held_elsewhere(path) and not liveness.is_dead(path)
  except BlockingIOError:
    return True
  except OSError:
    return False


def is_held_elsewhere(path: Path) -> bool:
  """Whether a lock file names a holder on another machine, dead or alive.

  Raises:
    BlockingIOError: a process on this machine holds it, so it is alive.
    OSError: there is no such file.
  """
  with path.open("rb") as file:
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return _is_elsewhere(holder_of(file.read()))


def _is_elsewhere(holder: Mapping[str, Any]) -> bool:
  return holder.get("host", platform.node()) != platform.node()


def _overwrite(file: IO[str], text: str) -> None:
  file.truncate(0)
  file.write(text)
  file.flush()


@contextlib.contextmanager
def _touched(path: Path) -> Iterator[None]:
  """Touches a file every TOUCH_SECONDS while the context is open."""

  def touch() -> None:
    with contextlib.suppress(OSError):
      os.utime(path)

  with waiting.every(TOUCH_SECONDS, touch):
    yield

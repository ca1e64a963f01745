"""A work directory in a bucket: its small files, its lock, and what a bucket does instead of a disk.

Buckets know no appending. What a run writes bit by bit lies in a local folder, the spool, and process 0 copies what
changed at each checkpoint and at the end; checkpoints are written to the bucket itself, by orbax.
"""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from mixln_jax.errors import InputError, one_line
from mixln_jax.files import is_partial
from mixln_jax.runs import lock as lock_lib

PROTOCOLS = {"gs": "gcsfs"}  # what orbax and tensorstore write to, and the package that lists and copies there
SETTLE_SECONDS = 2.0  # after a lock was taken over: the last one to write has it


class Remote:
  """A folder in a bucket."""

  def __init__(self, url: str):
    """`url`: `gs://BUCKET/FOLDER`.

    Raises:
      InputError: the protocol is not one of PROTOCOLS, its package is not installed, or no folder is named.
    """
    self.url = url.rstrip("/")
    protocol, _, place = self.url.partition("://")
    if protocol not in PROTOCOLS:
      known = ", ".join(f"{name}://" for name in PROTOCOLS)
      raise InputError(f"workdir={url}: can't be written to; give a local folder, or one of {known}")
    if "/" not in place:
      raise InputError(f"workdir={url}: names a bucket; give a folder in it, {self.url}/NAME")
    try:
      self._fs, self._root = url_to_fs(self.url, use_listings_cache=False)
    except ImportError as error:
      package = PROTOCOLS[protocol]
      raise InputError(f"workdir={url}: needs the package {package}; run `pip install {package}`") from error

  def path(self, name: str) -> str:
    return f"{self._root}/{name}"

  def exists(self, name: str) -> bool:
    with self._named():
      return self._fs.exists(self.path(name))

  def entries(self) -> list[str]:
    """What lies directly in the folder; empty where there is none."""
    return [name for name, _ in self._listed()]

  def files(self) -> list[str]:
    """The files directly in the folder."""
    return [name for name, kind in self._listed() if kind == "file"]

  def _listed(self) -> list[tuple[str, str]]:
    """Name and kind (`file`, `directory`) of what lies directly in the folder."""
    with self._named():
      try:
        return [(entry["name"].rsplit("/", 1)[-1], entry["type"]) for entry in self._fs.ls(self._root, detail=True)]
      except FileNotFoundError:
        return []

  def read(self, name: str) -> bytes:
    """Raises FileNotFoundError where there is no such object."""
    with self._named(FileNotFoundError):
      return self._fs.cat_file(self.path(name))

  def write(self, name: str, content: bytes) -> None:
    with self._named():
      self._fs.pipe_file(self.path(name), content)

  def create(self, name: str, content: bytes) -> bool:
    """Writes an object that does not exist; False where it does. Of several at once one gets True."""
    with self._named():
      try:
        self._fs.pipe_file(self.path(name), content, mode="create")
      except FileExistsError:
        return False
      return True

  def get(self, name: str, local: Path) -> None:
    self._fs.get_file(self.path(name), str(local))

  def put(self, local: Path, name: str) -> None:
    self._fs.put_file(str(local), self.path(name))

  def remove(self, name: str) -> None:
    with self._named(), contextlib.suppress(FileNotFoundError):
      self._fs.rm_file(self.path(name))

  @contextlib.contextmanager
  def _named(self, *expected: type[Exception]) -> Iterator[None]:
    """What a bucket refuses (no such bucket, no rights) as an error that names it; what may pass is let through.

    Args:
      expected: errors that the caller looks at.

    Raises:
      InputError: it is refused.
    """
    try:
      yield
    except Exception as error:  # gcsfs raises OSErrors, HttpErrors and Google's own
      if isinstance(error, expected) or not _is_refusal(error):
        raise
      raise InputError(
        f"workdir={self.url}: can't be used ({type(error).__name__}: {one_line(error, 200)}); see that "
        "the bucket exists and that this machine may read and write it"
      ) from error


def _is_refusal(error: Exception) -> bool:
  """Whether a bucket says that something is missing or forbidden, which it would say again. A network that fails, a
  server that is busy and credentials that expired may pass."""
  return (
    isinstance(error, (FileNotFoundError, PermissionError))
    or type(error).__name__ == "DefaultCredentialsError"  # there are none
    or str(getattr(error, "code", "")) in ("403", "404")
    or (isinstance(error, OSError) and str(error).startswith("Forbidden"))  # gcsfs, of a status 403
  )


class Lock:
  """An object that only one process can create, and that its holder writes anew again and again."""

  def __init__(self, remote: Remote, name: str, me: Mapping[str, Any]):
    self._remote, self._name, self._me = remote, name, dict(me)
    self._beat = itertools.count()
    self.taken_by: dict[str, Any] | None = None  # who holds it in our place

  @contextlib.contextmanager
  def __call__(self) -> Iterator[None]:
    """Holds the lock.

    One that lies there is watched for STALE_SECONDS: where its holder speaks it is held, else it is taken over.

    Raises:
      InputError: another process holds it.
    """
    self._acquire()
    done = threading.Event()
    thread = threading.Thread(target=self._speak, args=(done,), daemon=True)
    thread.start()
    try:
      yield
    finally:
      done.set()
      thread.join()
      with contextlib.suppress(Exception):  # it goes stale by itself
        if self._is_mine(self._remote.read(self._name)):  # another may have taken it since we last spoke
          self._remote.remove(self._name)

  def check(self) -> None:
    """Raises InputError where another process took the lock over, since this one was silent for too long."""
    if self.taken_by is not None:
      raise self._held(self.taken_by)

  def _acquire(self) -> None:
    seen, since, taken_over = None, 0.0, False
    while not self._remote.create(self._name, self._content()):
      try:
        content = self._remote.read(self._name)
      except FileNotFoundError:
        continue
      if seen is None:
        seen, since = content, time.monotonic()
        who = lock_lib.describe_holder(lock_lib.holder_of(content))
        print(f"waiting    to see whether the holder of {self._remote.url} is alive ({who})", flush=True)
      elif content != seen:
        raise self._held(lock_lib.holder_of(content))
      if time.monotonic() - since >= lock_lib.STALE_SECONDS:  # by this clock alone: the bucket's may be another
        self._remove_if(content)
        seen, taken_over = None, True
      else:
        time.sleep(lock_lib.POLL_SECONDS)
    if taken_over:  # another may have removed ours between its look and its removal: the last one to write has it
      time.sleep(SETTLE_SECONDS)
      content = b""
      with contextlib.suppress(FileNotFoundError):  # that other one has removed ours and not yet written its own
        content = self._remote.read(self._name)
      if not self._is_mine(content):
        raise self._held(lock_lib.holder_of(content))

  def _remove_if(self, stale: bytes) -> None:
    """Removes the lock where it is still that one: another process may have taken it over in the meantime."""
    with contextlib.suppress(FileNotFoundError):
      if self._remote.read(self._name) == stale:
        self._remote.remove(self._name)

  def _speak(self, done: threading.Event) -> None:
    while not done.wait(lock_lib.TOUCH_SECONDS):
      with contextlib.suppress(Exception):  # of the network: the next time
        try:
          content = self._remote.read(self._name)
        except FileNotFoundError:
          content = self._content()  # somebody cleared up: it is ours still
        if not self._is_mine(content):
          self.taken_by = lock_lib.holder_of(content)
          return
        self._remote.write(self._name, self._content())

  def _content(self) -> bytes:
    return json.dumps({**self._me, "beat": next(self._beat)}).encode()

  def _is_mine(self, content: bytes) -> bool:
    return {name: value for name, value in lock_lib.holder_of(content).items() if name != "beat"} == self._me

  def _held(self, holder: Mapping[str, Any]) -> InputError:
    return lock_lib.held_error(self._remote.url, holder)


class Spool:
  """The small files of a run in a bucket, as they lie on this machine while it runs."""

  def __init__(self, remote: Remote, folder: Path):
    self._remote, self.folder = remote, folder
    self._copied: dict[str, tuple[int, int]] = {}  # name -> time and size of what the bucket has

  def fetch(self, skip: str) -> None:
    """Brings the files that lie directly in the run's folder, all but `skip`."""
    for name in self._remote.files():
      if name != skip:
        self._remote.get(name, self.folder / name)
        self._copied[name] = _stamp(self.folder / name)

  def copy_out(self) -> None:
    """Copies what changed since the last time, and removes what is gone. Files in the making (`.NAME.partial`) stay."""
    files = {
      path.relative_to(self.folder).as_posix(): path
      for path in sorted(self.folder.rglob("*"))
      if path.is_file() and not is_partial(path.name)
    }
    for name in self._copied.keys() - files.keys():
      self._remote.remove(name)
      del self._copied[name]
    for name, path in files.items():
      stamp = _stamp(path)
      if self._copied.get(name) != stamp:
        self._remote.put(path, name)
        self._copied[name] = stamp


def _stamp(path: Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_mtime_ns, status.st_size

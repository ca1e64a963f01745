"""A folder in a bucket: the small files of a run, and what a bucket does instead of a disk.

Buckets know no appending. What a run writes bit by bit lies in a local folder, the spool, and process 0 copies what
changed at each checkpoint and at the end; checkpoints are written to the bucket itself, by orbax (`runs/gcs.py`).
"""

import contextlib
import fcntl
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixln_jax import waiting
from mixln_jax.errors import InputError, TryAgainError, UnreachableError, one_line
from mixln_jax.files import is_partial, local_path
from mixln_jax.places import check_bucket_folder, check_scheme, is_url
from mixln_jax.reach import code_of, why_unreachable
from mixln_jax.runs import gcs

SPOOL_PREFIX, SPOOL_LOCK = "mixln_jax_", ".spool.partial"


class ChangedError(Exception):
  """An object is not of the generation that a request was meant for."""


class Remote:
  """A folder in a bucket."""

  def __init__(self, url: str, parameter: str = "workdir"):
    """`url`: `gs://BUCKET/FOLDER`; `parameter`: what it was given as, for messages.

    Raises:
      InputError: it is no such URL, or Google's client is not installed.
    """
    self.url, self.parameter = url.rstrip("/"), parameter
    self.bucket, self.folder = check_bucket_folder(url, parameter)
    try:
      gcs.register()
    except InputError as error:
      raise InputError(f"{parameter}={url}: needs the package gcsfs; run `pip install gcsfs`") from error
    self._allowed: set[str] = set()  # of read and write, what the bucket has let us do already

  def key(self, name: str) -> str:
    return f"{self.folder}/{name}"

  def _blob(self, name: str) -> Any:
    return gcs.client().bucket(self.bucket).blob(self.key(name))

  def exists(self, name: str) -> bool:
    """Raises InputError where the bucket itself does not exist."""
    return self.generation(name) != 0

  def entries(self) -> list[str]:
    """What lies directly in the folder; empty where there is none."""
    return [name for name, _ in self._listed()]

  def files(self) -> list[str]:
    """The files directly in the folder."""
    return [name for name, kind in self._listed() if kind == "file"]

  def _listed(self) -> list[tuple[str, str]]:
    """Name and kind (`file`, `directory`) of what lies directly in the folder."""
    with self._named("read"):
      try:
        entries = gcs.Storage().ls(f"{self.bucket}/{self.folder}")
      except FileNotFoundError:
        return []
    return [(entry["name"].rsplit("/", 1)[-1], entry["type"]) for entry in entries]

  def all_files(self) -> list[str]:
    """All files below the folder, by their path in it."""
    with self._named("read"):
      listed, _ = gcs.listed(self.bucket, f"{self.folder}/", delimiter=None)
    return [entry["name"].removeprefix(f"{self.bucket}/{self.folder}/") for entry in listed]

  def generation(self, name: str, seconds: float | None = None) -> int:
    """Which version of the object is there: the bucket gives each a number of its own; 0 where there is none."""
    with self._named("read", FileNotFoundError):
      blob = self._blob(name)
      try:
        with gcs.not_found(name):
          blob.reload(**gcs.options(seconds))
      except FileNotFoundError:
        self._check_bucket()
        return 0
    return int(blob.generation)

  def read(self, name: str) -> bytes:
    """Raises FileNotFoundError where there is no such object."""
    return self.read_version(name)[0]

  def read_version(self, name: str, seconds: float | None = None) -> tuple[bytes, int]:
    """The content and its generation; raises FileNotFoundError where there is no such object."""
    with self._named("read", FileNotFoundError):
      blob = self._blob(name)
      try:
        with gcs.not_found(name):
          content = blob.download_as_bytes(raw_download=True, **gcs.options(seconds))
      except FileNotFoundError:
        self._check_bucket()
        raise
    return content, int(blob.generation)

  def _check_bucket(self) -> None:
    """Looks whether the bucket exists: a missing one answers as a missing object does."""
    if "read" not in self._allowed:
      gcs.listed(self.bucket, f"{self.folder}/", delimiter="/")

  def write(self, name: str, content: bytes, generation: int | None = None, seconds: float | None = None) -> int:
    """Writes an object; returns its generation.

    Args:
      name: in the folder.
      content: what it will hold.
      generation: of what is replaced, 0 = nothing; None = whatever is there.
      seconds: how long it is tried.

    Raises:
      ChangedError: something else is there. After a lost answer that may be what this very call wrote.
    """
    with self._named("write", ChangedError), _unchanged():
      blob = self._blob(name)
      blob.upload_from_string(content, if_generation_match=generation, **gcs.options(seconds))
    return int(blob.generation)

  def copy(self, name: str, key: str, generation: int) -> None:
    """Copies an object to another key of the bucket that does not exist, in one step: only if it is of `generation`.

    Raises:
      ChangedError: it is not, or the other exists.
    """
    with self._named("write", ChangedError), _unchanged():
      place = gcs.client().bucket(self.bucket)
      place.copy_blob(
        self._blob(name), place, key, if_source_generation_match=generation, if_generation_match=0, **gcs.options()
      )

  def get(self, name: str, local: Path) -> int:
    """Brings an object; returns its generation. Raises FileNotFoundError where there is no such object."""
    with self._named("read", FileNotFoundError), gcs.not_found(name):
      blob = self._blob(name)
      blob.download_to_filename(str(local), raw_download=True, **gcs.options())
    return int(blob.generation)

  def put(self, local: Path, name: str, generation: int | None = None) -> int:
    """Writes a file to an object, as `write`."""
    with self._named("write", ChangedError), _unchanged():
      blob = self._blob(name)
      blob.upload_from_filename(str(local), if_generation_match=generation, **gcs.options())
    return int(blob.generation)

  def remove(self, name: str, generation: int | None = None, seconds: float | None = None) -> None:
    """Raises ChangedError where another version is there; an object that is not there is removed already."""
    with self._named("write", ChangedError), contextlib.suppress(FileNotFoundError), gcs.not_found(name), _unchanged():
      self._blob(name).delete(if_generation_match=generation, **gcs.options(seconds))

  @contextlib.contextmanager
  def _named(self, act: str, *expected: type[Exception]) -> Iterator[None]:
    """What a bucket refuses or does not answer as an error that names it.

    Args:
      act: read or write.
      expected: errors that the caller looks at.

    Raises:
      InputError: it is refused (no such bucket, no rights), and was never allowed before.
      UnreachableError: the bucket is not reached, or no longer lets us in.
    """
    try:
      with waiting.said(f"an answer of {self.url}"):
        yield
    except (*expected, InputError, TryAgainError):
      self._allowed.add(act)
      raise
    except Exception as error:  # of Google's client, its credentials and its connections
      if act not in self._allowed and _is_refusal(error):
        raise InputError(
          f"{self.parameter}={self.url}: can't be used ({type(error).__name__}: {one_line(error, 200)}); see that "
          f"the bucket {self.bucket} exists and that this machine may read and write it"
        ) from error
      raise as_unreachable(error, self.url, self.parameter) from error
    self._allowed.add(act)


def as_unreachable(error: Exception, url: str, parameter: str = "workdir") -> Exception:
  """The error of a bucket that can't be reached, or the same error where it says something else."""
  reason = why_unreachable(error)
  if reason is None:
    return error
  return UnreachableError(f"{parameter}={url}: can't be reached ({reason}); run the same command to resume")


def _is_refusal(error: Exception) -> bool:
  """Whether a bucket says that something is missing or forbidden, which it would say again. A network that fails, a
  server that is busy and credentials that expired may pass."""
  no_credentials = type(error).__name__ == "DefaultCredentialsError"
  return no_credentials or code_of(error) in (403, 404) or isinstance(error, FileNotFoundError)


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
  from google.api_core.exceptions import PreconditionFailed

  try:
    yield
  except PreconditionFailed as error:
    raise ChangedError(one_line(error)) from error


class Spool:
  """The small files of a run in a bucket, as they lie on this machine while it runs; `remove()` removes them here."""

  def __init__(self, remote: Remote):
    self._remote = remote
    _remove_abandoned(Path(tempfile.gettempdir()))
    self.folder = Path(tempfile.mkdtemp(prefix=SPOOL_PREFIX))
    lock = os.open(self.folder / SPOOL_LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_SH)  # the system lets go of it however this process ends
    self.remove = weakref.finalize(self, _remove, self.folder, lock)  # also at the end of the process
    self._copied: dict[str, tuple[int, int]] = {}  # name -> time and size of what the bucket has
    self._generations: dict[str, int] = {}  # name -> version of what the bucket has

  def fetch(self, skip: str) -> None:
    """Brings the files that lie directly in the run's folder, all but `skip`."""
    for name in self._remote.files():
      if name != skip:
        self._generations[name] = self._remote.get(name, self.folder / name)
        self._copied[name] = _stamp(self.folder / name)

  def claim(self, check: Callable[[], None]) -> None:
    """Writes anew all that was fetched. Their generations change, so that a holder of the run that was presumed dead,
    and is not, can't replace any of them from then on."""
    self._copied.clear()
    self.copy_out(check)

  def copy_out(self, check: Callable[[], None] = lambda: None) -> None:
    """Copies what changed since the last time, and removes what is gone. Files in the making (`.NAME.partial`) stay.

    An object is replaced only where it is the one that was last read or written here.

    Args:
      check: raises where this process no longer holds the run; asked before, and where an object is another one.
    """
    files = {
      path.relative_to(self.folder).as_posix(): path
      for path in sorted(self.folder.rglob("*"))
      if path.is_file() and not is_partial(path.name)
    }
    gone = self._copied.keys() - files.keys()
    changed = {name: path for name, path in files.items() if self._copied.get(name) != _stamp(path)}
    if not gone and not changed:
      return
    check()
    for name in sorted(gone):
      self._conditionally(lambda known, name=name: self._remote.remove(name, known), name, check)
      del self._copied[name], self._generations[name]
    for name, path in changed.items():
      stamp = _stamp(path)
      generation = self._conditionally(lambda known, n=name, p=path: self._remote.put(p, n, known), name, check)
      self._copied[name], self._generations[name] = stamp, generation

  def _conditionally(self, act: Callable[[int], Any], name: str, check: Callable[[], None]) -> Any:
    try:
      return act(self._generations.get(name, 0))
    except ChangedError:
      check()  # not ours any more, or an answer of the bucket was lost
      return act(self._remote.generation(name))


def _stamp(path: Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_mtime_ns, status.st_size


def _remove(folder: Path, lock: int) -> None:
  os.close(lock)
  shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(temporary: Path) -> None:
  """Removes the spools of processes that were killed: nobody holds their locks."""
  for folder in temporary.glob(f"{SPOOL_PREFIX}*"):
    with contextlib.suppress(OSError), (folder / SPOOL_LOCK).open("r+") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writable_place(place: str, parameter: str) -> Iterator[Path]:
  """Where to write a file or a folder that is meant for `place`: there; of one in a bucket, a temporary path whose
  files are uploaded when the context is left without an error.

  Raises:
    InputError: it is no place to write to; `parameter` is what it was given as.
    UnreachableError: the bucket can't be reached.
  """
  check_scheme(place, parameter)
  if not is_url(place):
    yield local_path(place, parameter)
    return
  remote = Remote(place, parameter)
  probe = f".{SPOOL_PREFIX}probe"
  remote.write(probe, b"")  # before the work: what can't be written is said at once
  remote.remove(probe)
  with tempfile.TemporaryDirectory(prefix="mixln_jax_output_") as temporary:
    local = Path(temporary) / remote.url.rsplit("/", 1)[-1]
    yield local
    if local.is_file():
      folder, _, name = remote.url.rpartition("/")
      if folder.count("/") == 2:  # a file directly in the bucket
        gcs.upload(remote.bucket, name, local)
      else:
        Remote(folder, parameter).put(local, name)
      return
    paths = [path for path in sorted(local.rglob("*")) if path.is_file() and not is_partial(path.name)]
    for number, path in enumerate(paths, start=1):
      remote.put(path, path.relative_to(local).as_posix())
      if path.stat().st_size > 1 << 28:
        print(f"upload     {number} of {len(paths)} files, {path.name}", file=sys.stderr)


@contextlib.contextmanager
def readable_place(place: str, parameter: str, skip: str = r"$^") -> Iterator[Path]:
  """Where the files of `place` can be read: there; of a folder in a bucket, a copy that goes with the context.

  Args:
    place: what was given.
    parameter: what it was given as.
    skip: a pattern; files whose path in the folder begins so are not copied.

  Raises:
    InputError: it is no place to read from, or nothing is there.
    UnreachableError: the bucket can't be reached.
  """
  check_scheme(place, parameter)
  if not is_url(place):
    yield local_path(place, parameter)
    return
  remote = Remote(place, parameter)
  names = [name for name in remote.all_files() if not re.match(skip, name)]
  if not names:
    raise InputError(f"{parameter}={place}: nothing is there; give a folder that holds something")
  with tempfile.TemporaryDirectory(prefix="mixln_jax_input_") as temporary:
    local = Path(temporary) / remote.url.rsplit("/", 1)[-1]
    for name in names:
      (local / name).parent.mkdir(parents=True, exist_ok=True)
      remote.get(name, local / name)
    yield local

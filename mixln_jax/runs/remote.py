"""A run's folder in a bucket: its small files, and the operations that replace those of a disk.

Objects in a bucket can't be appended to. So a run writes its small files to a local folder, the spool, and process 0
copies changed files to the bucket at each checkpoint and at the end. orbax writes checkpoints to the bucket directly
(`runs/gcs.py`).
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
  """An object has another generation than a request requires."""


class Remote:
  """A folder in a bucket."""

  def __init__(self, url: str, parameter: str = "workdir"):
    """`url`: `gs://BUCKET/FOLDER`; `parameter`: the name of the parameter, for messages.

    Raises:
      InputError: the URL is invalid, or Google's client is not installed.
    """
    self.url, self.parameter = url.rstrip("/"), parameter
    self.bucket, self.folder = check_bucket_folder(url, parameter)
    try:
      gcs.register()
    except InputError as error:
      raise InputError(f"{parameter}={url}: needs the package gcsfs; run `pip install gcsfs`") from error
    self._allowed: set[str] = set()  # which of "read" and "write" have succeeded before

  def key(self, name: str) -> str:
    return f"{self.folder}/{name}"

  def _blob(self, name: str) -> Any:
    return gcs.client().bucket(self.bucket).blob(self.key(name))

  def exists(self, name: str) -> bool:
    """Raises InputError if the bucket itself does not exist."""
    return self.generation(name) != 0

  def entries(self) -> list[str]:
    """The names of the entries directly in the folder; empty if there is no folder."""
    return [name for name, _ in self._listed()]

  def files(self) -> list[str]:
    """The files directly in the folder."""
    return [name for name, kind in self._listed() if kind == "file"]

  def _listed(self) -> list[tuple[str, str]]:
    """Name and kind (`file`, `directory`) of each entry directly in the folder."""
    with self._named("read"):
      try:
        entries = gcs.Storage().ls(f"{self.bucket}/{self.folder}")
      except FileNotFoundError:
        return []
    return [(entry["name"].rsplit("/", 1)[-1], entry["type"]) for entry in entries]

  def all_files(self) -> list[str]:
    """The relative paths of all files below the folder."""
    with self._named("read"):
      listed, _ = gcs.listed(self.bucket, f"{self.folder}/", delimiter=None)
    return [entry["name"].removeprefix(f"{self.bucket}/{self.folder}/") for entry in listed]

  def generation(self, name: str, seconds: float | None = None) -> int:
    """The version number that the bucket gave to the object; 0 if there is no object."""
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
    """The content; raises FileNotFoundError if there is no such object."""
    return self.read_version(name)[0]

  def read_version(self, name: str, seconds: float | None = None) -> tuple[bytes, int]:
    """The content and its generation; raises FileNotFoundError if there is no such object."""
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
    """Checks that the bucket exists, because a missing bucket gives the same answer as a missing object."""
    if "read" not in self._allowed:
      gcs.listed(self.bucket, f"{self.folder}/", delimiter="/")

  def write(self, name: str, content: bytes, generation: int | None = None, seconds: float | None = None) -> int:
    """Writes an object; returns its generation.

    Args:
      name: the name in the folder.
      content: the new content.
      generation: the required generation of the replaced object, 0 = there must be none; None = any.
      seconds: how long the request is retried.

    Raises:
      ChangedError: the object has another generation. After a lost answer it may be the one that this call wrote.
    """
    with self._named("write", ChangedError), _unchanged():
      blob = self._blob(name)
      blob.upload_from_string(content, if_generation_match=generation, **gcs.options(seconds))
    return int(blob.generation)

  def copy(self, name: str, key: str, generation: int) -> None:
    """Copies an object to a new key of the bucket, atomically, on the condition that it has this generation.

    Raises:
      ChangedError: it has another generation, or the new key exists.
    """
    with self._named("write", ChangedError), _unchanged():
      bucket = gcs.client().bucket(self.bucket)
      bucket.copy_blob(
        self._blob(name), bucket, key, if_source_generation_match=generation, if_generation_match=0, **gcs.options()
      )

  def get(self, name: str, local: Path) -> int:
    """Downloads an object; returns its generation. Raises FileNotFoundError if there is no such object."""
    with self._named("read", FileNotFoundError), gcs.not_found(name):
      blob = self._blob(name)
      blob.download_to_filename(str(local), raw_download=True, **gcs.options())
    return int(blob.generation)

  def put(self, local: Path, name: str, generation: int | None = None) -> int:
    """Uploads a file to an object, like `write`."""
    with self._named("write", ChangedError), _unchanged():
      blob = self._blob(name)
      blob.upload_from_filename(str(local), if_generation_match=generation, **gcs.options())
    return int(blob.generation)

  def remove(self, name: str, generation: int | None = None, seconds: float | None = None) -> None:
    """Removes an object, if there is one. Raises ChangedError if it has another generation."""
    with self._named("write", ChangedError), contextlib.suppress(FileNotFoundError), gcs.not_found(name), _unchanged():
      self._blob(name).delete(if_generation_match=generation, **gcs.options(seconds))

  @contextlib.contextmanager
  def _named(self, act: str, *expected: type[Exception]) -> Iterator[None]:
    """Converts errors of a request to errors that name the bucket.

    Args:
      act: read or write.
      expected: errors that the caller handles; they are not converted.

    Raises:
      InputError: the request was rejected (no such bucket, no permission) and no such request succeeded before.
      UnreachableError: the bucket can't be reached, or no longer grants access.
    """
    try:
      with waiting.said(f"an answer of {self.url}"):
        yield
    except (*expected, InputError, TryAgainError):
      self._allowed.add(act)
      raise
    except Exception as error:  # from Google's client, its credentials or its connections
      if act not in self._allowed and _is_refusal(error):
        raise InputError(
          f"{self.parameter}={self.url}: can't be used ({type(error).__name__}: {one_line(error, 200)}); check that "
          f"the bucket {self.bucket} exists and that this machine may read and write it"
        ) from error
      raise as_unreachable(error, self.url, self.parameter) from error
    self._allowed.add(act)


def as_unreachable(error: Exception, url: str, parameter: str = "workdir") -> Exception:
  """UnreachableError if the error means that the bucket can't be reached, else the error itself."""
  reason = why_unreachable(error)
  if reason is None:
    return error
  return UnreachableError(f"{parameter}={url}: can't be reached ({reason}); run the same command to resume")


def _is_refusal(error: Exception) -> bool:
  """Whether an error is permanent: something is missing or forbidden.

  A failing network, a busy server and expired credentials may recover.
  """
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
  """The local copy of the small files of a run in a bucket, while it runs; `remove()` removes the copy."""

  def __init__(self, remote: Remote):
    self._remote = remote
    _remove_abandoned(Path(tempfile.gettempdir()))
    self.folder = Path(tempfile.mkdtemp(prefix=SPOOL_PREFIX))
    lock = os.open(self.folder / SPOOL_LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_SH)  # the system releases it however this process ends
    self.remove = weakref.finalize(self, _remove, self.folder, lock)  # also at the end of the process
    self._copied: dict[str, tuple[int, int]] = {}  # name -> local time and size when it was last copied
    self._generations: dict[str, int] = {}  # name -> generation of the object in the bucket

  def fetch(self, skip: str) -> None:
    """Downloads the files directly in the run's folder, except `skip`."""
    for name in self._remote.files():
      if name != skip:
        self._generations[name] = self._remote.get(name, self.folder / name)
        self._copied[name] = _stamp(self.folder / name)

  def claim(self, check: Callable[[], None]) -> None:
    """Writes all fetched files again, which changes their generations.

    A previous holder of the run that was presumed dead but is alive can then no longer replace any of them.
    """
    self._copied.clear()
    self.copy_out(check)

  def copy_out(self, check: Callable[[], None] = lambda: None) -> None:
    """Copies files that changed since the last call, and removes deleted ones; skips partial files (`.NAME.partial`).

    An object is replaced only if it is the version that this process last read or wrote.

    Args:
      check: raises if this process no longer holds the run; called before copying, and when an object has changed.
    """
    files: dict[str, Path] = {}
    for path in sorted(self.folder.rglob("*")):
      if path.is_file() and not is_partial(path.name):
        files[path.relative_to(self.folder).as_posix()] = path
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
      check()  # raises if the run is another process's; otherwise an answer of the bucket was lost
      return act(self._remote.generation(name))


def _stamp(path: Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_mtime_ns, status.st_size


def _remove(folder: Path, lock: int) -> None:
  os.close(lock)
  shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(temporary: Path) -> None:
  """Removes the spools of processes that were killed, whose locks nobody holds."""
  for folder in temporary.glob(f"{SPOOL_PREFIX}*"):
    with contextlib.suppress(OSError), (folder / SPOOL_LOCK).open("r+") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writable_place(place: str, parameter: str) -> Iterator[Path]:
  """The local path at which to write the file or folder `place`.

  It is the place itself or, for a place in a bucket, a temporary path whose files are uploaded when the context is left
  without an error.

  Raises:
    InputError: the place can't be written; `parameter` is the name of the parameter in the message.
    UnreachableError: the bucket can't be reached.
  """
  check_scheme(place, parameter)
  if not is_url(place):
    yield local_path(place, parameter)
    return
  remote = Remote(place, parameter)
  probe = f".{SPOOL_PREFIX}probe"
  remote.write(probe, b"")  # fails before the work if the place can't be written
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
  """The local path at which to read the files of `place`.

  It is the place itself or, for a folder in a bucket, a copy that is removed when the context is left.

  Args:
    place: a path or a URL.
    parameter: the name of the parameter, for messages.
    skip: a regular expression; files whose relative path matches it from the start are not copied.

  Raises:
    InputError: the place can't be read, or it is empty.
    UnreachableError: the bucket can't be reached.
  """
  check_scheme(place, parameter)
  if not is_url(place):
    yield local_path(place, parameter)
    return
  remote = Remote(place, parameter)
  names = [name for name in remote.all_files() if not re.match(skip, name)]
  if not names:
    raise InputError(f"{parameter}={place}: the folder is empty or does not exist; give another one")
  with tempfile.TemporaryDirectory(prefix="mixln_jax_input_") as temporary:
    local = Path(temporary) / remote.url.rsplit("/", 1)[-1]
    for name in names:
      (local / name).parent.mkdir(parents=True, exist_ok=True)
      remote.get(name, local / name)
    yield local

"""Google Cloud Storage for orbax: Google's own client behind the few calls that fsspec and etils make.

gcsfs is not used for this. It reports a denied request or an outage as "there is no such folder" (a run would start
from scratch beside its checkpoints), writes each small file in two requests, and repeats requests whose answer is
known: 218 requests per checkpoint of a small model, against fewer than half here.

Writes below a *guarded* folder are allowed only while its lock is held: removing and moving check the lock first, and
the lock itself creates a checkpoint's commit file (`runs/remote_lock.py`).
"""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
from fsspec.spec import AbstractFileSystem

from mixln_jax.errors import InputError
from mixln_jax.reach import code_of, why_unreachable

COMMIT = "commit_success.txt"  # orbax: a checkpoint in a bucket is complete once this file exists
PATIENCE_SECONDS = 90.0  # how long a request is retried while the bucket is unreachable or busy
TIMEOUT_SECONDS = (10.0, 60.0)  # of one attempt: to connect, and between two parts of the answer
FIELDS = "items(name,size,updated,generation),prefixes,nextPageToken"
BATCH = 100  # deletions per request; Google's maximum


class Guard(Protocol):
  """Checks whether this process may write below a folder."""

  def check_clock(self) -> None:
    """Raises if it is known that this process may no longer write; makes no request."""
    ...

  def check(self) -> None:
    """Raises if this process may no longer write; asks the bucket."""
    ...

  def commit(self, key: str) -> None:
    """Creates the object, atomically on the condition that this process may still write."""
    ...


class _Guarded(NamedTuple):
  """A folder that only this process may write below."""

  place: str  # BUCKET/FOLDER
  guard: Guard
  seen: dict[str, dict[str, Any]]  # cache, BUCKET/KEY -> info; valid because nobody else removes anything

  def is_commit(self, path: str) -> bool:
    """Whether a path is the commit file of one of the folder's checkpoints."""
    return re.fullmatch(rf"{re.escape(self.place)}/(.*/)?\d+/{COMMIT}", path) is not None


_guarded: list[_Guarded] = []


@contextlib.contextmanager
def guarded(bucket: str, folder: str, guard: Guard) -> Iterator[None]:
  """Within the context, `guard` controls this process's writes below a folder."""
  guarded_folder = _Guarded(f"{bucket}/{folder}", guard, {})
  _guarded.append(guarded_folder)
  try:
    yield
  finally:
    _guarded.remove(guarded_folder)


def _guarded_at(path: str) -> _Guarded | None:
  """The guarded folder that contains BUCKET/KEY."""
  for guarded_folder in tuple(_guarded):
    if path == guarded_folder.place or path.startswith(f"{guarded_folder.place}/"):
      return guarded_folder
  return None


def _check_removal(path: str) -> None:
  """Checks before a removal whether this process may do it, and clears the cache of the folder."""
  guarded_folder = _guarded_at(path)
  if guarded_folder is not None:
    guarded_folder.guard.check()
    guarded_folder.seen.clear()


def client() -> Any:
  """Google's client, one for each process and for each emulator that the tests start.

  Raises:
    ImportError: the package is not installed.
  """
  return _client(os.environ.get("STORAGE_EMULATOR_HOST", ""), os.getpid())


@functools.cache
def _client(address: str, process: int) -> Any:
  from google.cloud import storage

  del process  # only a key of the cache
  # After each 404 the client's tracing would query the bucket itself, which needs rights that a run need not have.
  os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
  credentials = _emulators_credentials() if address else None  # None: those of the machine
  return storage.Client(project=None, credentials=credentials)  # objects need no project


def _emulators_credentials() -> Any:
  from google.auth.credentials import AnonymousCredentials

  class Credentials(AnonymousCredentials):
    def refresh(self, request: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
      """Does nothing. Without this method a status 401 would end in an error about refreshing credentials."""

  return Credentials()


def options(seconds: float | None = None) -> dict[str, Any]:
  """Options of each request: retry while the bucket is unreachable or busy, for `seconds` (PATIENCE_SECONDS)."""
  from google.api_core.retry import Retry

  retry = Retry(_may_pass, initial=0.5, maximum=8.0, multiplier=2.0, timeout=seconds or PATIENCE_SECONDS)
  return {"retry": retry, "timeout": TIMEOUT_SECONDS}


def _may_pass(error: Exception) -> bool:
  """Whether a request is retried after an error; raises if this process may no longer write."""
  for guarded_folder in tuple(_guarded):
    guarded_folder.guard.check_clock()
  return why_unreachable(error) is not None and code_of(error) not in (401, 403, 407)


class Storage(AbstractFileSystem):
  """`gs://` for etils, and thus for orbax. Paths are BUCKET/KEY; a folder is a common prefix of keys."""

  protocol = ("gcs", "gs")
  cachable = False  # instances have no state

  def info(self, path: str, **_: Any) -> dict[str, Any]:
    """Raises FileNotFoundError if there is neither an object nor a folder."""
    bucket, key = _split(path)
    if not key:
      return {"name": bucket, "size": 0, "type": "directory"}
    place = f"{bucket}/{key}"
    guarded_folder = _guarded_at(place)
    seen = {} if guarded_folder is None else guarded_folder.seen
    if place not in seen:
      # One listing finds both: the object itself, and the folder as the key with a slash.
      objects, folders = listed(bucket, key, delimiter="/")
      seen.update({entry["name"]: entry for entry in objects})
      seen.update({f"{bucket}/{folder.rstrip('/')}": _folder(f"{bucket}/{folder}") for folder in folders})
    if place not in seen:
      raise FileNotFoundError(f"gs://{place}")
    return seen[place]

  def exists(self, path: str, **_: Any) -> bool:  # fsspec's own method returns False on any error
    return self._type(path) is not None

  def isdir(self, path: str) -> bool:
    return self._type(path) == "directory"

  def isfile(self, path: str) -> bool:
    return self._type(path) == "file"

  def _type(self, path: str) -> str | None:
    try:
      return self.info(path)["type"]
    except FileNotFoundError:
      return None

  def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
    """Raises FileNotFoundError if there is no such folder."""
    bucket, key = _split(path)
    objects, folders = listed(bucket, f"{key}/" if key else "", delimiter="/")
    entries = [*objects, *(_folder(f"{bucket}/{name}") for name in sorted(folders))]
    if not entries:
      entries = [self.info(path)]  # a file, or FileNotFoundError
    return entries if detail else [entry["name"] for entry in entries]

  def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
    """Does nothing: a folder exists once it contains an object."""

  def makedirs(self, path: str, exist_ok: bool = False) -> None:
    """Does nothing, like `mkdir`."""

  def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
    blob = _blob(path)
    with not_found(path):
      return blob.download_as_bytes(raw_download=True, **options())[slice(start, end)]

  def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:  # noqa: ARG002
    bucket, key = _split(path)
    guarded_folder = _guarded_at(f"{bucket}/{key}")
    if guarded_folder is not None:
      guarded_folder.seen.pop(f"{bucket}/{key}", None)
      if guarded_folder.is_commit(f"{bucket}/{key}"):
        guarded_folder.guard.commit(key)
        return
    client().bucket(bucket).blob(key).upload_from_string(value, **options())

  def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:  # pyright: ignore[reportIncompatibleMethodOverride]
    if mode == "rb":
      return io.BytesIO(self.cat_file(path))
    if mode not in ("wb", "xb"):
      raise NotImplementedError(f"{path}: a bucket has no mode {mode!r}")
    return _Written(self, path)

  def rm_file(self, path: str) -> None:
    """Raises FileNotFoundError if there is no such object."""
    place = "/".join(_split(path))
    guarded_folder = _guarded_at(place)
    if guarded_folder is not None:
      guarded_folder.guard.check_clock()
      guarded_folder.seen.pop(place, None)
      if _is_commit(place):
        # orbax removes a commit file before it writes one. If one existed here, it would be another process's.
        raise FileNotFoundError(path)
    with not_found(path):
      _blob(path).delete(**options())

  def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:  # noqa: ARG002
    """Removes an object, or with `recursive` a folder. The commit file goes first: the rest is no checkpoint."""
    if not recursive:
      self.rm_file(path)
      return
    bucket, key = _split(path)
    _check_removal(f"{bucket}/{key}")
    names = _names_below(bucket, key)
    if not names:
      raise FileNotFoundError(path)
    _remove(bucket, names)

  def mv(self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **_: Any) -> None:  # noqa: ARG002
    """Moves an object or a folder. The commit file is copied last, so that a partial copy is not a checkpoint."""
    (bucket, source), (target_bucket, target) = _split(path1), _split(path2)
    _check_removal(f"{bucket}/{source}")
    names = _names_below(bucket, source)
    if not names:
      raise FileNotFoundError(path1)
    source_bucket, destination = client().bucket(bucket), client().bucket(target_bucket)
    for name in sorted(names, key=_is_commit):
      copied, token = destination.blob(target + name.removeprefix(source)), None
      while True:
        token, _, _ = copied.rewrite(source_bucket.blob(name), token=token, **options())
        if token is None:
          break
    _remove(bucket, names)


class _Written(io.BytesIO):
  """A file that is uploaded when it is closed."""

  def __init__(self, storage: Storage, path: str):
    super().__init__()
    self._storage, self._path = storage, path

  def __exit__(self, *error: Any) -> None:
    if error[0] is not None:
      super().close()  # a partial file is never uploaded
    super().__exit__(*error)

  def close(self) -> None:
    if not self.closed:
      content = self.getvalue()
      super().close()
      self._storage.pipe_file(self._path, content)


def _split(path: Any) -> tuple[str, str]:
  bucket, _, key = re.sub(r"^gc?s://", "", os.fspath(path)).partition("/")
  return bucket, key.strip("/")


def _folder(place: str) -> dict[str, Any]:
  return {"name": place.rstrip("/"), "size": 0, "type": "directory"}


def _blob(path: str) -> Any:
  bucket, key = _split(path)
  return client().bucket(bucket).blob(key)


def listed(bucket: str, prefix: str, delimiter: str | None) -> tuple[list[dict[str, Any]], set[str]]:
  """The objects whose keys begin with a prefix and have no delimiter after it, and the folders among them."""
  blobs = client().list_blobs(bucket, prefix=prefix, delimiter=delimiter, fields=FIELDS, **options())
  objects = []
  for blob in blobs:
    if not blob.name.endswith("/"):
      entry = {"name": f"{bucket}/{blob.name}", "size": blob.size or 0, "type": "file", "mtime": blob.updated}
      objects.append(entry)
  return objects, set(blobs.prefixes)


def _names_below(bucket: str, key: str) -> list[str]:
  """The keys of all objects at or below a key."""
  blobs = client().list_blobs(bucket, prefix=key, fields=FIELDS, **options())
  return [blob.name for blob in blobs if blob.name == key or blob.name.startswith(f"{key}/")]


def upload(bucket: str, key: str, local: Path) -> None:
  """Uploads a file to an object."""
  client().bucket(bucket).blob(key).upload_from_filename(str(local), **options())


def _is_commit(name: str) -> bool:
  return name.rsplit("/", 1)[-1] == COMMIT


def _remove(bucket: str, names: list[str]) -> None:
  place = client().bucket(bucket)
  first = sorted((name for name in names if _is_commit(name)), key=lambda name: name.count("/"))[:1]
  for name in first:
    _remove_one(place, name)
  rest = [name for name in names if name not in first]
  for begin in range(0, len(rest), BATCH):
    _remove_batch(place, rest[begin : begin + BATCH])


def _remove_batch(place: Any, names: list[str]) -> None:
  try:
    with client().batch():
      for name in names:
        place.blob(name).delete(timeout=TIMEOUT_SECONDS)
  except Exception:  # an object is gone, or the bucket was unreachable; the requests of a batch are not retried
    for name in names:
      _remove_one(place, name)


def _remove_one(place: Any, name: str) -> None:
  from google.api_core.exceptions import NotFound

  with contextlib.suppress(NotFound):
    place.blob(name).delete(**options())


@contextlib.contextmanager
def not_found(path: str) -> Iterator[None]:
  """Converts Google's error for a missing object to FileNotFoundError."""
  from google.api_core.exceptions import NotFound

  try:
    yield
  except NotFound as error:
    raise FileNotFoundError(path) from error


def register() -> None:
  """Makes etils, and thus orbax, use `Storage` for `gs://`. Raises InputError if Google's client is not installed."""
  try:
    import google.cloud.storage  # noqa: F401
  except ImportError as error:
    raise InputError("gs://: needs the package gcsfs; run `pip install gcsfs`") from error
  fsspec.register_implementation("gcs", Storage, clobber=True)
  sys.unraisablehook = _without_late_results


_unraisablehook = sys.unraisablehook


def _without_late_results(unraisable: Any) -> None:
  """Hides the tracebacks of results that tensorstore passes to orbax's closed event loops after a failed save."""
  error = unraisable.exc_value
  if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
    _unraisablehook(unraisable)

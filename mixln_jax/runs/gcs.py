"""Google Cloud Storage as orbax sees it: Google's own client behind the few calls that fsspec and etils make.

gcsfs is not used for this. It reads a refusal or an outage as "there is no such folder" (a run would start anew beside
its checkpoints), writes each small file in two requests, and asks for what is known: 218 requests a checkpoint of a
small model against fewer than half here.

Writes below a *guarded* folder are allowed only while its lock is held: what removes or moves asks first, and a
checkpoint's commit file is made by the lock itself (`runs/remote_lock.py`).
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

COMMIT = "commit_success.txt"  # orbax: what makes a checkpoint in a bucket a checkpoint
PATIENCE_SECONDS = 90.0  # how long a request is tried again while the bucket is away or busy
TIMEOUT_SECONDS = (10.0, 60.0)  # of one try: to connect, and between two pieces of the answer
FIELDS = "items(name,size,updated,generation),prefixes,nextPageToken"
BATCH = 100  # deletions in a request; the most that Google takes


class Guard(Protocol):
  """Who may write below a folder."""

  def check_clock(self) -> None:
    """Raises where this process is known not to be allowed any more."""
    ...

  def check(self) -> None:
    """Raises where this process no longer may; it asks the bucket."""
    ...

  def commit(self, key: str) -> None:
    """Makes the object, if this process still may at the moment in which it appears."""
    ...


class _Guarded(NamedTuple):
  """A folder that this process alone may write below."""

  place: str  # BUCKET/FOLDER
  guard: Guard
  seen: dict[str, dict[str, Any]]  # BUCKET/KEY -> what lies there: nobody else removes it, so it is asked for once

  def is_commit(self, path: str) -> bool:
    """Whether a path is what makes one of the folder's checkpoints a checkpoint."""
    return re.fullmatch(rf"{re.escape(self.place)}/(.*/)?\d+/{COMMIT}", path) is not None


_guarded: list[_Guarded] = []


@contextlib.contextmanager
def guarded(bucket: str, folder: str, guard: Guard) -> Iterator[None]:
  """While the context is open, what this process writes below a folder is subject to `guard`."""
  one = _Guarded(f"{bucket}/{folder}", guard, {})
  _guarded.append(one)
  try:
    yield
  finally:
    _guarded.remove(one)


def _guarded_at(path: str) -> _Guarded | None:
  """The guarded folder that BUCKET/KEY lies in."""
  for one in tuple(_guarded):
    if path == one.place or path.startswith(f"{one.place}/"):
      return one
  return None


def _check_removal(path: str) -> None:
  """Before something is removed: whether this process may; what is known of the folder no longer holds."""
  guarded_folder = _guarded_at(path)
  if guarded_folder is not None:
    guarded_folder.guard.check()
    guarded_folder.seen.clear()


def client() -> Any:
  """Google's client for this process; one for each emulator that the tests start.

  Raises:
    ImportError: the package is not installed.
  """
  return _client(os.environ.get("STORAGE_EMULATOR_HOST", ""), os.getpid())


@functools.cache
def _client(address: str, process: int) -> Any:
  from google.cloud import storage

  del process  # it only tells the clients apart
  # For its tracing, the client looks the bucket itself up after each 404, which takes rights that a run does not need.
  os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
  credentials = _emulators_credentials() if address else None  # of the machine
  return storage.Client(project=None, credentials=credentials)  # objects need no project


def _emulators_credentials() -> Any:
  from google.auth.credentials import AnonymousCredentials

  class Credentials(AnonymousCredentials):
    def refresh(self, request: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
      """None are needed; without this a status 401 would become an error that does not say so."""

  return Credentials()


def options(seconds: float | None = None) -> dict[str, Any]:
  """How each request is made: again while the bucket is away or busy, for so many seconds (PATIENCE_SECONDS)."""
  from google.api_core.retry import Retry

  retry = Retry(_may_pass, initial=0.5, maximum=8.0, multiplier=2.0, timeout=seconds or PATIENCE_SECONDS)
  return {"retry": retry, "timeout": TIMEOUT_SECONDS}


def _may_pass(error: Exception) -> bool:
  """Whether a request is made again after an error; raises where this process may no longer write anyway."""
  for one in tuple(_guarded):
    one.guard.check_clock()
  return why_unreachable(error) is not None and code_of(error) not in (401, 403, 407)


class Storage(AbstractFileSystem):
  """`gs://` for etils, and so for orbax. Paths are BUCKET/KEY; a folder is what keys share."""

  protocol = ("gcs", "gs")
  cachable = False  # instances hold nothing

  def info(self, path: str, **_: Any) -> dict[str, Any]:
    """Raises FileNotFoundError where there is neither an object nor a folder."""
    bucket, key = _split(path)
    if not key:
      return {"name": bucket, "size": 0, "type": "directory"}
    place = f"{bucket}/{key}"
    guarded_folder = _guarded_at(place)
    seen = {} if guarded_folder is None else guarded_folder.seen
    if place not in seen:
      # One listing answers for both: the object itself, and the folder as the key with a slash.
      objects, folders = listed(bucket, key, delimiter="/")
      seen.update({one["name"]: one for one in objects})
      seen.update({f"{bucket}/{folder.rstrip('/')}": _folder(f"{bucket}/{folder}") for folder in folders})
    if place not in seen:
      raise FileNotFoundError(f"gs://{place}")
    return seen[place]

  def exists(self, path: str, **_: Any) -> bool:  # fsspec's own takes any error for a no
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
    """Raises FileNotFoundError where there is no such folder."""
    bucket, key = _split(path)
    objects, folders = listed(bucket, f"{key}/" if key else "", delimiter="/")
    entries = [*objects, *(_folder(f"{bucket}/{name}") for name in sorted(folders))]
    if not entries:
      entries = [self.info(path)]  # a file, or nothing
    return entries if detail else [entry["name"] for entry in entries]

  def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
    """Folders are not made: they are there with their first object."""

  def makedirs(self, path: str, exist_ok: bool = False) -> None:
    """As `mkdir`."""

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
    """Raises FileNotFoundError where there is no such object."""
    place = "/".join(_split(path))
    guarded_folder = _guarded_at(place)
    if guarded_folder is not None:
      guarded_folder.guard.check_clock()
      guarded_folder.seen.pop(place, None)
      if _is_commit(place):
        # orbax removes what it is about to write. There is none; and if there were, it would be another process's.
        raise FileNotFoundError(path)
    with not_found(path):
      _blob(path).delete(**options())

  def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:  # noqa: ARG002
    """Removes an object, or with `recursive` all below a folder, its commit file first: it is no checkpoint then."""
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
    """Moves an object or a folder, its commit file last: a half is no checkpoint, neither here nor there."""
    (bucket, source), (target_bucket, target) = _split(path1), _split(path2)
    _check_removal(f"{bucket}/{source}")
    names = _names_below(bucket, source)
    if not names:
      raise FileNotFoundError(path1)
    places = client().bucket(bucket), client().bucket(target_bucket)
    for name in sorted(names, key=_is_commit):
      copied, token = places[1].blob(target + name.removeprefix(source)), None
      while True:
        token, _, _ = copied.rewrite(places[0].blob(name), token=token, **options())
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
      super().close()  # a half is never written
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
  """The objects that begin with a prefix, up to the delimiter behind it, and the folders among them."""
  found = client().list_blobs(bucket, prefix=prefix, delimiter=delimiter, fields=FIELDS, **options())
  objects = [
    {"name": f"{bucket}/{blob.name}", "size": blob.size or 0, "type": "file", "mtime": blob.updated} for blob in found
  ]
  return [one for one in objects if not one["name"].endswith("/")], set(found.prefixes)


def _names_below(bucket: str, key: str) -> list[str]:
  """The keys of all objects at or below a key."""
  found = client().list_blobs(bucket, prefix=key, fields=FIELDS, **options())
  return [blob.name for blob in found if blob.name == key or blob.name.startswith(f"{key}/")]


def upload(bucket: str, key: str, local: Path) -> None:
  """Writes a file to an object."""
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
  except Exception:  # one of them is gone, or the bucket was away: the requests of a batch are not tried again
    for name in names:
      _remove_one(place, name)


def _remove_one(place: Any, name: str) -> None:
  from google.api_core.exceptions import NotFound

  with contextlib.suppress(NotFound):
    place.blob(name).delete(**options())


@contextlib.contextmanager
def not_found(path: str) -> Iterator[None]:
  """Google's error for what is not there as Python's."""
  from google.api_core.exceptions import NotFound

  try:
    yield
  except NotFound as error:
    raise FileNotFoundError(path) from error


def register() -> None:
  """Makes etils, and so orbax, use this for `gs://`; raises InputError where Google's client is not installed."""
  try:
    import google.cloud.storage  # noqa: F401
  except ImportError as error:
    raise InputError("gs://: needs the package gcsfs; run `pip install gcsfs`") from error
  fsspec.register_implementation("gcs", Storage, clobber=True)
  sys.unraisablehook = _without_late_results


_unraisablehook = sys.unraisablehook


def _without_late_results(unraisable: Any) -> None:
  """Of a save that failed, tensorstore still gives results to orbax's event loops, which are closed: a page each."""
  error = unraisable.exc_value
  if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
    _unraisablehook(unraisable)

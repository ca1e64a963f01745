"""Files as every room writes and reads them: whole or not at all, and JSON lines whose last one may be torn."""

import json
import math
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax.errors import InputError, one_line
from mixln_jax.places import check_local
from mixln_jax.text import shown

UNFINISHED, WHOLE = ".unfinished.partial", ".whole.partial"  # in a folder that is there: what is made, what is moved
LAST = "last-"  # in front of the name of the file that is moved last


def local_path(path: str | Path, parameter: str = "path", hint: str = "give one on a disk") -> Path:
  """A path that somebody wrote, with `~` and `~USER` replaced by the home folder that they mean.

  Args:
    path: what was written.
    parameter: what it was given as, for messages.
    hint: what to do where it is a URL.

  Raises:
    InputError: it is a URL, that user has no home folder here, or the path can't name a file (a NUL).
  """
  check_local(path, parameter, hint)
  if "\0" in str(path):
    raise InputError(f"path {str(path)!r}: contains a NUL, which no file's name can; mend it")
  try:
    return Path(path).expanduser()
  except RuntimeError as error:
    raise InputError(f"path {str(path)!r}: no such user has a home folder here; write the folder out") from error


def check_regular(path: str | Path) -> None:
  """Rejects what is neither a folder nor a regular file: a pipe or a device may be without an end.

  Raises:
    OSError: nothing is there, or it can't be looked at.
    InputError: it is a pipe, a socket or a device, or a link to one.
  """
  mode = Path(path).stat().st_mode
  if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
    raise InputError(f"{path}: is {kind_of_file(mode)}, not a regular file; copy what it gives into a file")


def kind_of_file(mode: int) -> str:
  """What a file is that is not a regular one, in words, from its `st_mode`."""
  kinds = {
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    "a folder": stat.S_ISDIR,
  }
  return next((name for name, fits in kinds.items() if fits(mode)), "of an unknown kind")


def read_regular(path: str | Path, limit: int) -> bytes:
  """The bytes of a regular file.

  Raises:
    OSError: it can't be read.
    InputError: it is a pipe, a socket or a device, or is larger than `limit` bytes.
  """
  check_regular(path)
  with Path(path).open("rb") as file:
    content = file.read(limit + 1)
  if len(content) > limit:
    raise InputError(f"{path}: has more than {limit:,} bytes, far too many for what it should be; give another file")
  return content


def write_whole(path: Path, content: str | bytes) -> None:
  """Writes a file so that a reader, or a process killed in between, finds the old content or the new one.

  The partial file is named after machine and process: several of them may write the same file at once.

  Raises:
    OSError: it can't be written; the old content is still there.
  """
  partial = partial_of(path)
  try:
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
  except OSError as error:
    partial.unlink(missing_ok=True)  # of a disk that is full
    error.filename = error.filename or str(path)  # a write that fails does not say where
    raise


def partial_of(path: Path) -> Path:
  """Where this process writes what will be renamed to `path`."""
  return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.partial")


def is_partial(name: str) -> bool:
  """Whether a file name is that of something unfinished, of this process or of one that died."""
  return name.startswith(".") and name.endswith(".partial")


def remove_partials_of_the_dead(folder: Path) -> None:
  """Removes what processes of this machine that are gone left unfinished in a folder (`partial_of`)."""
  own = re.compile(rf"\..+\.{re.escape(platform.node())}-(\d{{1,9}})\.partial")
  for path in list(folder.iterdir()):
    match = own.fullmatch(path.name)
    # What bears this process's own number was left by an earlier one that had it, or by work that failed.
    if match is None or (int(match.group(1)) != os.getpid() and _is_alive(int(match.group(1)))):
      continue
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:  # somebody else's
    return True
  return True


# Folders that appear whole.


def work_folder(folder: Path) -> Path:
  """Where a folder is made until it is whole: beside its place; inside it where it is there, and empty.

  A folder that is there may be a mount or a link to one, which nothing can be renamed to. `settle` moves what was made
  into its place; what an earlier `settle` did not finish is finished here.

  Raises:
    InputError: the path is a link that leads nowhere.
    OSError: the folder can't be written.
  """
  if folder.is_symlink() and not folder.exists():
    raise InputError(f"path {str(folder)!r}: is a link that leads nowhere; make the folder that it names, or remove it")
  if not folder.is_dir():
    return folder.with_name(f".{folder.name}.partial")
  whole = folder / WHOLE
  if whole.is_dir():
    _move_entries(whole, folder)
  return folder / UNFINISHED


def occupants(folder: Path) -> list[str]:
  """What lies in a folder, without what is unfinished; empty where there is no folder.

  Raises:
    OSError: it is no folder, or can't be read.
  """
  if not folder.exists():
    return []
  return sorted(entry.name for entry in folder.iterdir() if not is_partial(entry.name))


def settle(work: Path, folder: Path, last: str) -> None:
  """Moves what was made in `work_folder(folder)` into its place.

  Args:
    work: the work folder, whole by now.
    folder: where it belongs.
    last: the file that makes the folder what it is: where entries are moved one by one, it comes last.

  Raises:
    OSError: it can't be moved; the work is all there.
  """
  if work.parent != folder:
    work.rename(folder)
    return
  whole = work.rename(folder / WHOLE)
  (whole / last).replace(whole / f"{LAST}{last}")
  _move_entries(whole, folder)


def _move_entries(whole: Path, folder: Path) -> None:
  for entry in sorted(whole.iterdir(), key=lambda entry: entry.name.startswith(LAST)):
    entry.replace(folder / entry.name.removeprefix(LAST))
  whole.rmdir()


def json_number(value: float) -> float | str:
  """The number, or where it is not finite its name: JSON has no NaN or infinity, and other readers reject Python's."""
  return value if math.isfinite(value) else str(value)


def check_folder_name(name: str, where: str) -> None:
  """Rejects what is not the name of a folder: a path could lead out of where it belongs.

  Raises:
    InputError: it is empty, blank, `.`, `..`, a path, too long, or has control characters; `where` says whose it is.
  """
  long = len(name.encode(errors="replace")) > 200
  if not name.strip() or name != name.strip() or name in (".", "..") or "/" in name or long or not name.isprintable():
    raise InputError(f"{where}: damaged, {shown(name)} is not the name of a folder; restore or remove it")


# JSON: one door for every file of a run or study, which a person or another program may have changed.

DEEPEST_JSON = 64  # levels; what reads the values goes down with them
LARGEST_FACTS = 2**28  # bytes of a file of facts


def _is_number(value: Any) -> bool:
  """Whether a value is a number, or the name of one that is not finite (`json_number`)."""
  if isinstance(value, bool):
    return False
  if isinstance(value, int):
    return abs(value) < 2**1023  # a float can hold it
  return isinstance(value, float) or value in ("nan", "inf", "-inf")


class Kind(NamedTuple):
  """What a member of an object must be."""

  words: str
  fits: Callable[[Any], bool]
  needed: bool = True

  def optional(self) -> "Kind":
    """The same, or null, or absent."""
    return Kind(f"{self.words} or nothing", lambda value: value is None or self.fits(value), needed=False)


Kinds = Mapping[str, Kind]
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number", lambda value: type(value) is int and 0 <= value < 2**53)
NUMBER = Kind("a number", _is_number)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NUMBERS = Kind("an object of numbers", lambda value: OBJECT.fits(value) and all(map(_is_number, value.values())))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
OBJECTS = Kind("a list of objects", lambda value: isinstance(value, list) and all(map(OBJECT.fits, value)))


def check_kinds(value: Mapping[str, Any], where: str, kinds: Kinds) -> None:
  """Raises InputError for the first member of an object that is missing or not what it must be."""
  for name, kind in kinds.items():
    if name not in value and kind.needed:
      raise InputError(f"{where}: damaged, it has no {name}; restore or remove it")
    if name in value and not kind.fits(value[name]):
      raise InputError(f"{where}: damaged, {name} is {shown(value[name])} and not {kind.words}; restore or remove it")


def decoded(content: bytes, where: str) -> str:
  """The text that bytes are in UTF-8; raises InputError where they are not, naming `where`."""
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise InputError(f"{where}: damaged, not UTF-8 (byte {error.start}); restore or remove it") from error


def json_value(text: str | bytes, where: str) -> Any:
  """The value that a JSON text is.

  Raises:
    InputError: it is not UTF-8, not JSON, or nested too deep; `where` names the file.
  """
  if isinstance(text, bytes):
    text = decoded(text, where)
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{where}: damaged, not JSON ({one_line(error, 100)}); restore or remove it") from error
  level, depth = _members_of([[value]]), 0
  while level := _members_of(level):
    depth += 1
    if depth > DEEPEST_JSON:
      raise InputError(f"{where}: damaged, JSON nested over {DEEPEST_JSON} levels deep; restore or remove it")
  return value


def _members_of(values: Sequence[Any]) -> list[Any]:
  """The lists and objects that lie directly in lists and objects."""
  members: list[Any] = []
  for value in values:
    inner = value.values() if isinstance(value, dict) else value
    members += [member for member in inner if isinstance(member, (dict, list))]
  return members


def json_object(text: str | bytes, where: str, kinds: Kinds | None = None) -> dict[str, Any]:
  """The object that a JSON text is.

  Args:
    text: the JSON.
    where: what messages name.
    kinds: what its members must be; one that is not named may be anything.

  Raises:
    InputError: it is not JSON, no object, or a member is of another kind.
  """
  value = json_value(text, where)
  if not isinstance(value, dict):
    raise InputError(f"{where}: damaged, a JSON {type(value).__name__} and not an object; restore or remove it")
  check_kinds(value, where, kinds or {})
  return value


def read_json(path: Path, kinds: Kinds | None = None) -> dict[str, Any]:
  """The object that a file of JSON holds; `kinds`: as `json_object`.

  Raises:
    FileNotFoundError: there is no such file.
    InputError: it can't be read, or holds something else.
  """
  try:
    content = read_regular(path, LARGEST_FACTS)
  except FileNotFoundError:
    raise
  except OSError as error:
    raise InputError(f"{path}: can't be read ({error.strerror}); restore or remove it") from error
  return json_object(content, str(path), kinds)


def read_json_lines(path: Path, kinds: Kinds | None = None) -> list[dict[str, Any]]:
  """All whole lines of a file of JSON objects; none where there is no file. A torn last line is left out.

  Args:
    path: the file.
    kinds: what the members of each object must be.

  Raises:
    InputError: the file can't be read, or another line is not such an object.
  """
  try:
    check_regular(path)
    lines = path.read_bytes().split(b"\n")
  except FileNotFoundError:
    return []
  except OSError as error:
    raise InputError(f"{path}: can't be read ({error.strerror}); mend or remove the file") from error
  result = []
  for number, line in enumerate(lines, start=1):
    where = f"{path}: line {number}"
    try:
      value = json_value(line, where)
    except InputError:
      if number == len(lines):  # torn, or nothing after the last newline
        break
      raise
    if not isinstance(value, dict):
      raise InputError(f"{where} is not an object; mend or remove the file")
    check_kinds(value, where, kinds or {})
    result.append(value)
  return result

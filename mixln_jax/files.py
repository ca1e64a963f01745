"""Files as every room writes and reads them: whole or not at all, and JSON lines whose last one may be torn."""

import json
import math
import os
import platform
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixln_jax.errors import InputError, one_line


def local_path(path: str | Path) -> Path:
  """A path that somebody wrote, with `~` and `~USER` replaced by the home folder that they mean.

  Raises:
    InputError: that user has no home folder here, or the path can't name a file (a NUL).
  """
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
  except OSError:
    partial.unlink(missing_ok=True)  # of a disk that is full
    raise


def partial_of(path: Path) -> Path:
  """Where this process writes what will be renamed to `path`."""
  return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.partial")


def is_partial(name: str) -> bool:
  """Whether a file name is that of something unfinished, of this process or of one that died."""
  return name.startswith(".") and name.endswith(".partial")


def json_number(value: float) -> float | str:
  """The number, or where it is not finite its name: JSON has no NaN or infinity, and other readers reject Python's."""
  return value if math.isfinite(value) else str(value)


def read_json_lines(path: Path, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
  """All whole lines of a file of JSON objects; none where there is no file. A torn last line is left out.

  Args:
    path: the file.
    needs: keys that each object must have.

  Raises:
    InputError: another line is not JSON, or not an object with those keys.
  """
  lines = path.read_bytes().split(b"\n") if path.exists() else []
  result = []
  for number, line in enumerate(lines, start=1):
    try:
      value = json.loads(line)
    except ValueError as error:
      if number == len(lines):  # torn, or nothing after the last newline
        break
      raise InputError(f"{path}: line {number} is not JSON; mend or remove the file") from error
    if not isinstance(value, dict) or not set(needs) <= value.keys():
      wanted = f"an object with {' and '.join(needs)}" if needs else "an object"
      raise InputError(f"{path}: line {number} is not {wanted}; mend or remove the file")
    result.append(value)
  return result


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
  """The object that a JSON text is.

  Raises:
    InputError: it is not JSON, or no object; `where` names the file.
  """
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{where}: damaged, not JSON ({one_line(error, 100)})") from error
  if not isinstance(value, dict):
    raise InputError(f"{where}: damaged, a JSON {type(value).__name__} and not an object")
  return value

"""The files that a path, a folder or a glob of `config.data.source` means, and what is left out of it, and why.

Links are followed. Each file and each folder is read once, whatever its names: a link that leads back into the folder
would never end, and a text with two names could land on both sides of the split. Hidden names (`.ipynb_checkpoints`,
`._x.parquet`, `.x.txt.swp`) are what editors and file managers leave behind, and no part of a corpus unless the source
itself names them.
"""

import fnmatch
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from mixln_jax.data.files import filesystem
from mixln_jax.files import check_regular, kind_of_file

MAGIC = "*?["
# Why something is left out; other files are counted by their suffix.
HIDDEN = "hidden"
NOWHERE = "a link that leads nowhere"
TWICE = "another name of what is read already"
FOLDER = "a folder that the glob matches (name the folder, or end in /**)"
SHOWN = 8  # reasons that a line names
PACKED = (".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z")  # such a suffix alone says little


class Found(NamedTuple):
  """What a source means."""

  files: list[tuple[str, str]]  # (name, path), sorted; the name is relative to the folder, or the path's last part
  left_out: Counter[str]  # reason -> files, links and folders


class _Entry(NamedTuple):
  """A file, or what stands in a file's place, of a folder that is searched."""

  name: str  # relative to the folder
  path: str
  is_link: bool
  hidden: bool
  status: os.stat_result | None  # of what a link leads to; None = nothing is there


def find(pattern: str, suffixes: tuple[str, ...]) -> Found:
  """The files of a path, a glob, or a folder (those in it, at any depth, that have one of the suffixes in any case).

  Raises:
    OSError: a folder can't be read.
    InputError: the path is a pipe or a device.
  """
  fs, path = filesystem(pattern)
  path = path.rstrip("/") or path
  local = isinstance(fs, LocalFileSystem)
  if fs.isdir(path):
    found = _of_local_folder(path, suffixes) if local else _of_remote_folder(fs, path, suffixes)
  elif fs.exists(path):  # before it is a glob: a file's name may hold a bracket
    if local:
      check_regular(path)
    found = Found([(_last(path), path)], Counter())
  elif any(sign in path for sign in MAGIC):
    found = _of_local_glob(path) if local else _of_remote_glob(fs, path)
  else:
    found = Found([], Counter())
  files = found.files
  if "://" in pattern:  # fsspec strips it
    files = [(name, fs.unstrip_protocol(full)) for name, full in files]
  return Found(sorted(files), found.left_out)


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
  """Whether a path ends with one of the suffixes, in any case."""
  return path.lower().endswith(suffixes)


def describe(left_out: Mapping[str, int]) -> str:
  """One line that counts what was left out, by its reasons, the most frequent first."""
  ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
  parts = [f"{count:,} {reason}" for reason, count in ordered[:SHOWN]]
  rest = sum(count for _, count in ordered[SHOWN:])
  if rest:
    parts.append(f"{rest:,} of other kinds")
  return ", ".join(parts)


def identity(path: str) -> Any:
  """What two names of one file have in common: the file's number where it lies here, else its whole address."""
  fs, stripped = filesystem(path)
  if isinstance(fs, LocalFileSystem):
    return _number(Path(stripped).stat()) or os.path.realpath(stripped)
  return fs.unstrip_protocol(stripped)


def _number(status: os.stat_result) -> tuple[int, int] | None:
  """Device and inode; None on file systems that number nothing."""
  return (status.st_dev, status.st_ino) if status.st_ino else None


def _last(path: str) -> str:
  return path.rsplit("/", 1)[-1]


def _is_hidden(name: str) -> bool:
  return any(part.startswith(".") for part in name.split("/"))


def _kind(name: str) -> str:
  """What a file of another kind is counted as: its suffix, and the one before where it only says how it is packed."""
  suffixes = Path(name).suffixes
  if not suffixes:
    return "without a suffix"
  return "".join(suffixes[-2:] if suffixes[-1].lower() in PACKED else suffixes[-1:])


# Here


def _of_local_folder(folder: str, suffixes: tuple[str, ...]) -> Found:
  left_out: Counter[str] = Counter()
  entries = []
  for entry in _entries(folder, left_out, lambda _: True):
    if entry.hidden:
      left_out[HIDDEN] += 1
    elif has_suffix(entry.name, suffixes):
      entries.append(entry)
    else:
      left_out[_kind(entry.name)] += 1
  return Found([(entry.name, entry.path) for entry in _readable(entries, left_out)], left_out)


def _of_local_glob(pattern: str) -> Found:
  parts = pattern.split("/")
  start = next(index for index, part in enumerate(parts) if any(sign in part for sign in MAGIC))
  folder, rest = "/".join(parts[:start]) or "/", parts[start:]
  if not Path(folder).is_dir():
    return Found([], Counter())
  left_out: Counter[str] = Counter()
  names_hidden = any(part.startswith(".") for part in rest)
  matches = re.compile(glob_translate("/".join(rest))).match

  def enters(name: str) -> bool:
    if "**" in rest:
      return names_hidden or not _is_hidden(name)
    so_far = name.split("/")
    if matches(name):
      left_out[FOLDER] += 1
    return len(so_far) < len(rest) and all(map(fnmatch.fnmatchcase, so_far, rest))

  entries = []
  for entry in _entries(folder, left_out, enters, hidden_too=names_hidden):
    if not matches(entry.name):
      continue
    if entry.hidden and not names_hidden:
      left_out[HIDDEN] += 1
    else:
      entries.append(entry)
  return Found([(_last(entry.name), entry.path) for entry in _readable(entries, left_out)], left_out)


def _readable(entries: list[_Entry], left_out: Counter[str]) -> Iterator[_Entry]:
  """The regular files among entries, each once, by its own name rather than by that of a link."""
  seen = set()
  for entry in sorted(entries, key=lambda entry: (entry.is_link, entry.name)):
    if entry.status is None:
      left_out[NOWHERE] += 1
    elif not stat.S_ISREG(entry.status.st_mode):
      left_out[kind_of_file(entry.status.st_mode)] += 1
    elif (number := _number(entry.status)) in seen:
      left_out[TWICE] += 1
    else:
      if number is not None:
        seen.add(number)
      yield entry


def _entries(
  root: str, left_out: Counter[str], enters: Callable[[str], bool], *, hidden_too: bool = False
) -> Iterator[_Entry]:
  """All that lies under a folder but folders; through links, each folder once.

  Args:
    root: the folder.
    left_out: counts the links to folders that are read already.
    enters: whether a folder, by its name relative to the root, is searched.
    hidden_too: whether hidden folders are searched; else such a folder is an entry.
  """
  seen: set[tuple[int, int]] = set()
  pending = deque([("", root)])  # (prefix of names, folder)
  linked: deque[tuple[str, str]] = deque()  # searched last: a folder keeps its own name
  while pending or linked:
    prefix, folder = (pending or linked).popleft()
    number = _number(Path(folder).stat())
    if number in seen:
      left_out[TWICE] += 1
      continue
    if number is not None:
      seen.add(number)
    with os.scandir(folder) as scan:
      entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
      name = prefix + entry.name
      hidden = entry.name.startswith(".")
      status = _status(entry)
      is_folder = status is not None and stat.S_ISDIR(status.st_mode)
      if not is_folder or (hidden and not hidden_too):
        yield _Entry(name, entry.path, entry.is_symlink(), hidden, status)
      elif enters(name):
        (linked if entry.is_symlink() else pending).append((f"{name}/", entry.path))


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
  try:
    return entry.stat()
  except PermissionError:
    raise
  except OSError:  # nothing is there, or a link to itself
    return None


# In a bucket or on a server, which have no links


def _of_remote_folder(fs: Any, folder: str, suffixes: tuple[str, ...]) -> Found:
  left_out: Counter[str] = Counter()
  files = []
  for full in fs.find(folder):
    name = full.removeprefix(folder).lstrip("/")
    if _is_hidden(name):
      left_out[HIDDEN] += 1
    elif has_suffix(name, suffixes):
      files.append((name, full))
    else:
      left_out[_kind(name)] += 1
  return Found(files, left_out)


def _of_remote_glob(fs: Any, pattern: str) -> Found:
  left_out: Counter[str] = Counter()
  files = []
  names_hidden = _is_hidden(_last(pattern))
  for full in fs.glob(pattern):
    if fs.isdir(full):
      if "**" not in pattern:
        left_out[FOLDER] += 1
    elif _is_hidden(_last(full)) and not names_hidden:
      left_out[HIDDEN] += 1
    else:
      files.append((_last(full), full))
  return Found(files, left_out)

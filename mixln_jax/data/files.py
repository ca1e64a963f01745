"""Files of text, local or remote, plain or compressed, read by line within bounds (fsspec finds and opens them)."""

import zlib
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from mixln_jax.errors import InputError
from mixln_jax.places import check_scheme

CHUNK_BYTES = 1 << 20
LONGEST_DOCUMENT = 64 << 20  # bytes; a longer line or file is not a document
# A file that unpacks to more than BOMB_BYTES and to more than BOMB_RATIO times its size is a decompression bomb: text
# packs 3 to 10 ×.
BOMB_BYTES, BOMB_RATIO = 1 << 30, 100
# How much packed data is unpacked at once. A byte of zstd can stand for 32 kB and its library has no limit for its
# output; zlib's has one.
READ_BYTES = {"gzip": 1 << 16, "zstd": 1 << 10}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class File:
  """A file of `config.data.source`."""

  def __init__(self, path: str):
    self.path = path

  def __str__(self) -> str:
    return self.path

  @property
  def compression(self) -> str | None:
    """How the file is compressed, by its suffix: a value of COMPRESSIONS, or None."""
    for suffix, kind in COMPRESSIONS.items():
      if self.path.endswith(suffix):
        return kind
    return None

  def stat(self) -> tuple[int, str]:
    """The size in bytes, and a text that differs once the file has changed (its time, or a bucket's equivalent)."""
    fs, path = _filesystem(self.path)
    info = fs.info(path)
    stamps = [str(info[name]) for name in ("mtime", "etag", "updated") if name in info]
    return int(info["size"] or 0), next(iter(stamps), "")

  def open(self) -> Any:
    fs, path = _filesystem(self.path)
    return fs.open(path, "rb")

  def chunks(self, begin: int = 0) -> Iterator[bytes]:
    """The unpacked bytes; of a file that is not compressed, those from byte `begin` on.

    Raises:
      InputError: the file ends in the middle of its compressed data, is damaged, or is a decompression bomb.
    """
    with self.open() as raw:
      if self.compression is None:
        raw.seek(begin)
        while chunk := raw.read(CHUNK_BYTES):
          yield chunk
      else:
        yield from self._unpacked(raw, self.compression)

  def _unpacked(self, raw: Any, compression: str) -> Iterator[bytes]:
    # The libraries' own reader objects are not used: zstandard's reads a truncated file as if it were whole.
    limit = max(BOMB_BYTES, BOMB_RATIO * self.stat()[0])
    unpacker, total, pending = None, 0, False
    while data := raw.read(READ_BYTES[compression]):
      while data or pending:
        if unpacker is None:  # a file may have several members, one behind the other
          data = data.lstrip(b"\0")  # some tools pad with zeros
          if not data:
            break
          unpacker = _Unpacker(compression)
        try:
          chunk, data = unpacker.unpack(data)
        except Exception as error:  # zlib.error, zstandard.ZstdError
          raise InputError(f"config.data.source: {self} is damaged ({error}); download it again") from error
        total += len(chunk)
        if total > limit:
          raise InputError(
            f"config.data.source: {self} unpacks to more than {limit:,} bytes, {BOMB_RATIO} times its size: no text "
            "does; remove it, or unpack it yourself"
          )
        yield chunk
        if unpacker.eof:
          unpacker = None
        pending = unpacker is not None and len(chunk) == CHUNK_BYTES  # a full chunk: there may be more output
    if unpacker is not None:
      raise InputError(f"config.data.source: {self} ends in the middle of its compressed data; download it again")

  def lines(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """(byte at which it starts, line without its end), for the lines that start in [begin, end).

    A line over LONGEST_DOCUMENT bytes comes as None; it is never held in memory.
    """
    # A line belongs to the range in which it starts. Reading starts a byte early, and what it finds up to the first
    # newline is the end of a line of the range before.
    at = max(0, begin - 1)
    skipping = begin > 0
    pending: list[bytes] = []  # pieces of the line that the chunks so far have not ended
    size = 0  # bytes of that line so far
    for chunk in self.chunks(at):
      *whole, rest = chunk.split(b"\n")
      for piece in whole:
        length = size + len(piece) + 1
        if not skipping:
          if end is not None and at >= end:
            return
          yield at, _whole_line([*pending, piece], length)
        at, skipping, pending, size = at + length, False, [], 0
      size += len(rest)
      if skipping or size > LONGEST_DOCUMENT:
        pending = []
      else:
        pending.append(rest)
    if size and not skipping and (end is None or at < end):  # the last line need not end with a newline
      yield at, _whole_line(pending, size)


def _whole_line(pieces: list[bytes], length: int) -> bytes | None:
  """A line from its pieces; None if it is too long, and some of its pieces were dropped."""
  return b"".join(pieces) if length <= LONGEST_DOCUMENT else None


class _Unpacker:
  """Unpacks one member of a compressed file, never much more at a time than CHUNK_BYTES."""

  def __init__(self, compression: str):
    self._gzip = compression == "gzip"
    if self._gzip:
      self._object: Any = zlib.decompressobj(wbits=31)
    else:
      import zstandard

      self._object = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

  @property
  def eof(self) -> bool:
    return self._object.eof

  def unpack(self, data: bytes) -> tuple[bytes, bytes]:
    """Unpacked bytes of the member, and the rest of `data`: of this member, or of the next one."""
    if not self._gzip:
      return self._object.decompress(data), self._object.unused_data
    chunk = self._object.decompress(data, CHUNK_BYTES)
    rest = self._object.unused_data if self._object.eof else self._object.unconsumed_tail
    return chunk, rest


def _filesystem(path: str) -> tuple[Any, str]:
  check_scheme(path, "config.data.source")
  try:
    return url_to_fs(path)
  except ImportError as error:
    raise InputError(f"config.data.source={path!r}: {error}") from error
  except ValueError as error:
    raise InputError(f"config.data.source={path!r}: {error}; known protocols: {', '.join(_protocols())}") from error


def _protocols() -> list[str]:
  return sorted(name for name in fsspec.available_protocols() if name in ("file", "gs", "s3", "https", "hf", "memory"))


def find(pattern: str, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
  """The files of a path, a glob, or a folder (files in it, at any depth, that have one of the suffixes), sorted.

  Returns:
    (name, path) of each file. The name is relative to the folder; without a folder it is the last part of the path.
  """
  fs, path = _filesystem(pattern)
  path = path.rstrip("/") or path
  found = []
  if fs.isdir(path):
    for full in fs.find(path):
      if full.endswith(suffixes):
        found.append((full.removeprefix(path).lstrip("/"), full))
  else:
    for full in _matches(fs, path):
      if not fs.isdir(full):
        found.append((full.rsplit("/", 1)[-1], full))
  if "://" in pattern:  # fsspec strips it
    found = [(name, fs.unstrip_protocol(full)) for name, full in found]
  return sorted(found)


def _matches(fs: Any, path: str) -> list[str]:
  if fs.exists(path):  # first: a file's name may hold a bracket
    return [path]
  if any(sign in path for sign in "*?["):
    return fs.glob(path)
  return []

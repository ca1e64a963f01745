"""Files of text, local or remote, plain or compressed, read by line within bounds (fsspec finds and opens them)."""

import zlib
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from mixln_jax.errors import InputError

CHUNK_BYTES = 1 << 20
LONGEST_DOCUMENT = 64 << 20  # bytes; a longer line or file is no document
# What unpacks to more than this, and to more than RATIO times its size, is a decompression bomb: text packs 3 to 10 ×.
BOMB_BYTES, BOMB_RATIO = 1 << 30, 100
# A byte of zstd can stand for 32 kB, and its library unpacks all that it is given; zlib stops where it is told to.
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
    return next((kind for suffix, kind in COMPRESSIONS.items() if self.path.endswith(suffix)), None)

  def stat(self) -> tuple[int, str]:
    """Its size in bytes, and what says that it changed (its time, or what a bucket has instead)."""
    fs, path = _filesystem(self.path)
    info = fs.info(path)
    return int(info["size"] or 0), str(info.get("mtime", info.get("etag", info.get("updated", ""))))

  def open(self) -> Any:
    fs, path = _filesystem(self.path)
    return fs.open(path, "rb")

  def chunks(self, begin: int = 0) -> Iterator[bytes]:
    """Its unpacked bytes, from byte `begin` on where it is not compressed.

    Raises:
      InputError: it ends in the middle of its compressed data, is damaged, or is a decompression bomb.
    """
    with self.open() as raw:
      if self.compression is None:
        raw.seek(begin)
        while chunk := raw.read(CHUNK_BYTES):
          yield chunk
      else:
        yield from self._unpacked(raw)

  def _unpacked(self, raw: Any) -> Iterator[bytes]:
    # Not a reader object of either library: zstandard's takes a file that was cut off for one that ended.
    limit = max(BOMB_BYTES, BOMB_RATIO * self.stat()[0])
    unpacker, total, pending = None, 0, False
    while data := raw.read(READ_BYTES[str(self.compression)]):
      while data or pending:
        if unpacker is None:
          data = data.lstrip(b"\0")  # some tools pad with zeros
          if not data:
            break
          unpacker = _Unpacker(self.compression)
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
        unpacker = None if unpacker.eof else unpacker
        pending = unpacker is not None and len(chunk) == CHUNK_BYTES  # more may come out than went in
    if unpacker is not None:
      raise InputError(f"config.data.source: {self} ends in the middle of its compressed data; download it again")

  def lines(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """(byte at which it starts, line without its end), for the lines that start in [begin, end).

    A line over LONGEST_DOCUMENT bytes comes as None; it is never held in memory.
    """
    # A line belongs to the range in which it starts: what precedes the first newline from begin - 1 on is another's.
    at = max(0, begin - 1)
    skipping, pending, size = begin > 0, [], 0
    for chunk in self.chunks(at):
      *whole, rest = chunk.split(b"\n")
      for piece in whole:
        length = size + len(piece) + 1
        if not skipping:
          if end is not None and at >= end:
            return
          yield at, (b"".join((*pending, piece)) if length <= LONGEST_DOCUMENT else None)
        at, skipping, pending, size = at + length, False, [], 0
      size += len(rest)
      if size <= LONGEST_DOCUMENT and not skipping:
        pending.append(rest)
      else:
        pending = []
    if size and not skipping and (end is None or at < end):
      yield at, (b"".join(pending) if size <= LONGEST_DOCUMENT else None)


class _Unpacker:
  """Unpacks one member of a compressed file, never much more at a time than CHUNK_BYTES."""

  def __init__(self, compression: str | None):
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
    """Some bytes of the member, and what is left of `data`: of this member, or of the next one."""
    if not self._gzip:
      return self._object.decompress(data), self._object.unused_data
    chunk = self._object.decompress(data, CHUNK_BYTES)
    return chunk, self._object.unused_data if self._object.eof else self._object.unconsumed_tail


def _filesystem(path: str) -> tuple[Any, str]:
  try:
    return url_to_fs(path)
  except ImportError as error:
    raise InputError(f"config.data.source={path!r}: {error}") from error
  except ValueError as error:
    raise InputError(f"config.data.source={path!r}: {error}; known protocols: {', '.join(_protocols())}") from error


def _protocols() -> list[str]:
  return sorted(name for name in fsspec.available_protocols() if name in ("file", "gs", "s3", "https", "hf", "memory"))


def find(pattern: str, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
  """The files of a path, a glob, or a folder (those in it, at any depth, that have one of the suffixes), sorted.

  Returns:
    (name within the folder, or the last part of the path; path).
  """
  fs, path = _filesystem(pattern)
  path = path.rstrip("/") or path
  if fs.isdir(path):
    found = [(name.removeprefix(path).lstrip("/"), name) for name in fs.find(path) if name.endswith(suffixes)]
  else:
    names = [path] if fs.exists(path) else fs.glob(path) if any(sign in path for sign in "*?[") else []
    found = [(name.rsplit("/", 1)[-1], name) for name in names if not fs.isdir(name)]
  return sorted((name, fs.unstrip_protocol(full) if "://" in pattern else full) for name, full in found)

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
    unpacker, total = None, 0
    while data := raw.read(CHUNK_BYTES >> 4):
      while data:
        unpacker = unpacker or _unpacker(self.compression)
        try:
          chunk = unpacker.decompress(data)
        except Exception as error:  # zlib.error, zstandard.ZstdError
          raise InputError(f"config.data.source: {self} is damaged ({error}); download it again") from error
        total += len(chunk)
        if total > limit:
          raise InputError(
            f"config.data.source: {self} unpacks to more than {limit:,} bytes, {BOMB_RATIO} times its size: no text "
            "does; remove it, or unpack it yourself"
          )
        yield chunk
        data = unpacker.unused_data.lstrip(b"\0")  # of the next member; some tools pad the last one with zeros
        unpacker = None if unpacker.eof else unpacker
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


def _unpacker(compression: str | None) -> Any:
  if compression == "gzip":
    return zlib.decompressobj(wbits=31)
  import zstandard

  return zstandard.ZstdDecompressor().decompressobj()


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
    names = fs.glob(path) if any(sign in path for sign in "*?[") else [path] if fs.exists(path) else []
    found = [(name.rsplit("/", 1)[-1], name) for name in names if not fs.isdir(name)]
  return sorted((name, fs.unstrip_protocol(full) if "://" in pattern else full) for name, full in found)

"""Files of text, local or remote, plain or compressed, read by line within bounds (fsspec opens them)."""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mixln_jax.errors import InputError
from mixln_jax.files import check_regular, local_path
from mixln_jax.places import check_scheme

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 20
LONGEST_DOCUMENT = 64 << 20  # bytes; a longer line or file is not a document
# A file that unpacks to more than BOMB_BYTES and to more than BOMB_RATIO times its size is a decompression bomb: text
# packs 3 to 10 ×.
BOMB_BYTES, BOMB_RATIO = 1 << 30, 100
# How much packed data is unpacked at once. A byte of zstd can stand for 32 kB and its library has no limit for its
# output; the others have one.
READ_BYTES = {"gzip": 1 << 16, "zstd": 1 << 10, "xz": 1 << 16, "bzip2": 1 << 16}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
PADDING = b"\0 \t\r\n"  # what tools leave behind a compressed file's end, and none of the formats begins with
XZ_MEMORY = 1 << 30  # bytes that a file may ask for; its strongest preset asks for 65 MiB
# A compressed file of blank lines, or of empty members, is read for hours without a document. Each chunk costs some
# time whatever it holds.
MOST_BLANK, COST_OF_CHUNK = 64 << 20, 1 << 12  # bytes
LONGEST_LINE = 1 << 30  # bytes; a longer line is not skipped as too long a document: the file is no text


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
      if self.path.lower().endswith(suffix):
        return kind
    return None

  def stat(self) -> tuple[int, str]:
    """The size in bytes, and a text that differs once the file has changed (its time, or a bucket's equivalent)."""
    fs, path = filesystem(self.path)
    info = fs.info(path)
    stamps = [str(info[name]) for name in ("mtime", "etag", "updated") if name in info]
    return int(info["size"] or 0), next(iter(stamps), "")

  def open(self) -> Any:
    """The file, opened to read bytes; raises InputError for a pipe or a device."""
    fs, path = filesystem(self.path)
    if isinstance(fs, LocalFileSystem):
      check_regular(path)
    return fs.open(path, "rb")

  def begins_with(self, sign: bytes) -> bool:
    """Whether its first byte, but for white space and a byte order mark, is `sign`."""
    for chunk in self.chunks():
      if text := chunk.removeprefix(BYTE_ORDER_MARK).lstrip():
        return text.startswith(sign)
    return False

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

  def content(self, limit: int) -> bytes:
    """The unpacked bytes; of a file that has more than `limit`, the beginning, a little more than that.

    Raises:
      InputError: as `chunks`.
    """
    content = bytearray()
    for chunk in self.chunks():
      content += chunk
      if len(content) > limit:
        break
    return bytes(content)

  def _unpacked(self, raw: Any, compression: str) -> Iterator[bytes]:
    # The libraries' own reader objects are not used: zstandard's reads a truncated file as if it were whole.
    limit = max(BOMB_BYTES, BOMB_RATIO * self.stat()[0])
    unpacker, total, pending = None, 0, False
    while data := raw.read(READ_BYTES[compression]):
      while data or pending:
        if unpacker is None:  # a file may have several members, one behind the other
          data = data.lstrip(PADDING)
          if not data:
            break
          unpacker = _Unpacker(compression)
        try:
          chunk, data = unpacker.unpack(data)
        except Exception as error:  # zlib.error, zstandard.ZstdError, lzma.LZMAError
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

    A line over LONGEST_DOCUMENT bytes comes as None; it is never held in memory. Blank lines may be left out.

    Raises:
      InputError: MOST_BLANK bytes hold nothing but blank lines, or LONGEST_LINE no end of a line.
    """
    # A line belongs to the range in which it starts. Reading starts a byte early, and what it finds up to the first
    # newline is the end of a line of the range before.
    at = max(0, begin - 1)
    skipping = begin > 0
    pending: list[bytes] = []  # pieces of the line that the chunks so far have not ended
    size = 0  # bytes of that line so far
    blank = 0  # bytes since the last that was no white space, with what their chunks cost
    for chunk in self.chunks(at):
      blank = 0 if chunk.strip() else blank + len(chunk) + COST_OF_CHUNK
      if blank > MOST_BLANK or size > LONGEST_LINE:
        what = "nothing but blank lines" if blank > MOST_BLANK else f"no end of a line in {size >> 20:,} MiB"
        raise InputError(
          f"config.data.source: {self} has {what} before byte {at + size:,}: that is no text; remove it, or mend it"
        )
      passed = 0  # bytes of blank lines, which nobody needs one by one
      if blank and b"\n" in chunk:
        first, last = chunk.index(b"\n"), chunk.rindex(b"\n")
        whole, rest, passed = [chunk[:first]], chunk[last + 1 :], last - first
      else:
        *whole, rest = chunk.split(b"\n")
      for piece in whole:
        length = size + len(piece) + 1
        if not skipping:
          if end is not None and at >= end:
            return
          yield at, _whole_line([*pending, piece], length)
        at, skipping, pending, size = at + length, False, [], 0
      at += passed
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
    self._compression = compression
    self._object: Any
    if compression == "gzip":
      self._object = zlib.decompressobj(wbits=31)
    elif compression == "xz":
      self._object = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
    elif compression == "bzip2":
      self._object = bz2.BZ2Decompressor()
    else:
      import zstandard

      self._object = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

  @property
  def eof(self) -> bool:
    return self._object.eof

  def unpack(self, data: bytes) -> tuple[bytes, bytes]:
    """Unpacked bytes of the member, and the rest of `data`: of this member, or of the next one."""
    if self._compression == "zstd":
      return self._object.decompress(data), self._object.unused_data
    chunk = self._object.decompress(data, CHUNK_BYTES)
    if self._object.eof:
      return chunk, self._object.unused_data
    # gzip's gives back what it has not read yet; the others hold it, and are asked again with nothing new.
    return chunk, self._object.unconsumed_tail if self._compression == "gzip" else b""


def filesystem(path: str) -> tuple[Any, str]:
  """fsspec's file system of a path or address, and the path in it.

  Raises:
    InputError: the protocol is unknown, or its library is not installed, or a home folder is nobody's.
  """
  check_scheme(path, "config.data.source")
  if path.startswith("~"):
    path = str(local_path(path))
  try:
    return url_to_fs(path)
  except ImportError as error:
    raise InputError(f"config.data.source={path!r}: {error}") from error
  except ValueError as error:
    raise InputError(f"config.data.source={path!r}: {error}; known protocols: {', '.join(_protocols())}") from error


def _protocols() -> list[str]:
  return sorted(name for name in fsspec.available_protocols() if name in ("file", "gs", "s3", "https", "hf", "memory"))

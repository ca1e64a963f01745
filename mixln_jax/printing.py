"""What the program prints: a line that can't be printed never ends the work, and no encoding fails.

The reader of a pipe may be gone (`| head`), a terminal closed, a disk full of logs; and in a locale that is not UTF-8
some characters have no bytes: they are printed as escapes.
"""

import contextlib
import errno
import io
import locale
import logging
import os
import sys
from typing import Any, TextIO

READER_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET)  # nobody is there to read


class _Lossy(io.FileIO):
  """A stream whose writes never fail.

  Attributes:
    lost: the first error, of a reader that is still there (a full disk); None where there was none.
  """

  lost: OSError | None = None

  def write(self, content: Any, /) -> int:
    size = memoryview(content).nbytes
    try:
      written = super().write(content)
    except OSError as error:
      if error.errno not in READER_GONE:
        self.lost = self.lost or error
      return size
    return size if written is None else written  # None: a pipe that is full and does not block


def use_utf8() -> None:
  """Starts the program again in Python's UTF-8 mode where the locale has another encoding; the front door's first step.

  Else files of a run would be in that encoding, and a recipe, a task or a prompt would be read in it, by us and by
  libraries. What is printed stays in the terminal's encoding.
  """
  if sys.flags.utf8_mode or locale.getencoding().lower().replace("-", "") == "utf8" or not sys.executable:
    return
  terminal = getattr(sys.stdout, "encoding", None) or "ascii"
  os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
  os.environ.setdefault("PYTHONIOENCODING", f"{terminal}:backslashreplace")
  os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def never_fail() -> None:
  """Makes stdout and stderr streams that never fail; the front door does it first."""
  sys.stdout = _lossy(sys.stdout)
  sys.stderr = _lossy(sys.stderr)


def _lossy(stream: TextIO | None) -> TextIO:
  try:
    descriptor = stream.fileno() if stream is not None else None
  except (OSError, ValueError):
    descriptor = None
  if descriptor is None or stream is None:  # closed by who started us
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
  raw = _Lossy(descriptor, "w", closefd=False)
  return io.TextIOWrapper(
    io.BufferedWriter(raw),
    encoding=stream.encoding or "utf-8",
    errors="backslashreplace",
    line_buffering=getattr(stream, "line_buffering", False),
    write_through=getattr(stream, "write_through", False),
  )


def hush_libraries() -> None:
  """Keeps back what libraries print of a failure that they also raise, or that follows from one.

  Where a checkpoint can't be written (a full disk, a quota), Orbax loses one task a tensor, each of which asyncio would
  log, and TensorStore tells a loop that is closed already: hundreds of lines around the one that says what is wrong.
  """
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  usual = sys.unraisablehook  # of what is raised where nobody can catch it, as in a callback from C++

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      usual(unraisable)

  sys.unraisablehook = hook


def lost_output() -> OSError | None:
  """Why a part of what went to stdout is lost, where its reader is still there; None where nothing is."""
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
  raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
  return raw.lost if isinstance(raw, _Lossy) else None

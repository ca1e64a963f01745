"""What the front door prints without a traceback: what a person can put right, and what another process met."""

import errno
import os
import re


class InputError(ValueError):
  """Bad input: a wrong config, a damaged folder, a missing file.

  The message is one line: the thing, its value, what is allowed and what to do.

  The front door prints it without a traceback and exits with status 2.
  """


class TryAgainError(Exception):
  """Nothing is wrong with the input: something outside failed, and the same command can be run again. Exit status 1.

  Attributes:
    at_once: an orderly end, which waits for other processes and for the libraries' threads, would wait in vain.
  """

  at_once = False


class OtherProcessError(TryAgainError):
  """Another process of the run failed or is gone; the run can be started again.

  Attributes:
    gone: it said nothing, so that an orderly end, which waits for it, would wait in vain.
  """

  def __init__(self, message: str, *, gone: bool = False):
    super().__init__(message)
    self.gone = self.at_once = gone


class UnreachableError(TryAgainError):
  """A bucket could not be reached, or no longer lets us in."""

  at_once = True  # threads of the libraries still try


class LostLockError(TryAgainError):
  """This process no longer holds its run: another may have taken it over. It must not write there any more."""

  at_once = True


class MachineError(TryAgainError):
  """The machine has no more of something (disk, open files)."""


EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EROFS)
EXHAUSTED_WORDS = re.compile("|".join(re.escape(os.strerror(number)) for number in EXHAUSTED))


def exhausted(error: BaseException | None) -> str | None:
  """What the machine has no more of, in words, where an error or one that it came from says so; else None.

  Libraries in C++ (tensorstore) say it in the text of an error of their own.
  """
  while error is not None:
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
      where = f" ({error.filename})" if error.filename else ""
      return f"{os.strerror(error.errno)}{where}"
    found = EXHAUSTED_WORDS.search(str(error))
    if found:
      return f"{found.group()} ({one_line(error, 120)})"
    error = error.__cause__ or error.__context__
  return None


BAD_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)


def bad_path(error: BaseException) -> str | None:
  """What is wrong with a path that somebody gave, where an error says so in the system's words; else None."""
  if isinstance(error, OSError) and error.errno in BAD_PATH and error.filename:
    return f"{one_line(str(error.filename), 100)}: {os.strerror(error.errno)}; give another path"
  return None


def advice(reason: str) -> str:
  """What to do about `exhausted`."""
  if os.strerror(errno.EMFILE) in reason or os.strerror(errno.ENFILE) in reason:
    return "allow more open files (`ulimit -n`), and run the same command again"
  return "make room, and run the same command again"


def one_line(error: BaseException | str, limit: int = 300) -> str:
  """The words of an error on one line, at most `limit` characters of them: libraries put whole pages into theirs."""
  return " ".join(str(error).split())[:limit]

"""What the front door prints without a traceback: what a person can put right, and what another process met."""


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


def one_line(error: BaseException | str, limit: int = 300) -> str:
  """The words of an error on one line, at most `limit` characters of them: libraries put whole pages into theirs."""
  return " ".join(str(error).split())[:limit]

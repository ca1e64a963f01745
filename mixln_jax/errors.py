"""What the front door prints without a traceback: what a person can put right, and what another process met."""


class InputError(ValueError):
  """Bad input: a wrong config, a damaged folder, a missing file.

  The message is one line: the thing, its value, what is allowed and what to do.

  The front door prints it without a traceback and exits with status 2.
  """


class OtherProcessError(Exception):
  """Another process of the run failed or is gone; the run can be started again. Exit status 1.

  Attributes:
    gone: it said nothing, so that an orderly end, which waits for it, would wait in vain.
  """

  def __init__(self, message: str, *, gone: bool = False):
    super().__init__(message)
    self.gone = gone


def one_line(error: BaseException | str, limit: int = 300) -> str:
  """The words of an error on one line, at most `limit` characters of them: libraries put whole pages into theirs."""
  return " ".join(str(error).split())[:limit]

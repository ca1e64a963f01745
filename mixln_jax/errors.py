"""The one exception for whatever a person can put right: a wrong config, a damaged folder, a missing file."""


class InputError(ValueError):
  """Bad input. The message is one line: the thing, its value, what is allowed and what to do.

  The front door prints it without a traceback and exits with status 2.
  """

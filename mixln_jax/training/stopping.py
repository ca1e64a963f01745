"""Leaving well: the first SIGTERM or Ctrl-C ends the run after its step, the second one at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED_STATUS = 75  # EX_TEMPFAIL: run the same command again


class StopRequest:
  """Whether somebody asked the run to stop."""

  def __init__(self) -> None:
    self.requested_by: str | None = None

  def _handle(self, number: int, _: FrameType | None) -> None:
    if self.requested_by is not None:
      raise KeyboardInterrupt
    self.requested_by = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
  """Watches the signals while the context is open; off the main thread Python allows no handlers, and none is set.

  With several processes none is set either: JAX handles SIGTERM for all (`processes.all_stop_at`).
  """
  request = StopRequest()
  previous = {}
  try:
    for number in SIGNALS if jax.process_count() == 1 else ():
      previous[number] = signal.signal(number, request._handle)
  except ValueError:
    pass
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)

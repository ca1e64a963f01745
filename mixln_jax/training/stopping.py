"""Leaving well: the first SIGTERM, SIGHUP or Ctrl-C ends the run after its step, a second one at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from mixln_jax import signals


class StopRequest:
  """Whether somebody asked the run to stop."""

  @property
  def requested_by(self) -> str | None:
    """The signal's name; None where there was none."""
    return signals.requested_by()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
  """While the context is open, signals only note the request, which the loop reads after each step."""
  with signals.noting():
    yield StopRequest()

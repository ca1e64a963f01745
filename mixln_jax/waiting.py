"""Waiting for something outside this process, and saying so."""

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterator

SECONDS_TO_A_LINE = 60.0


@contextlib.contextmanager
def every(seconds: float, act: Callable[[], object]) -> Iterator[None]:
  """Calls `act` now and then, in a thread of its own, until the context is left or the process is gone."""
  done = threading.Event()

  def repeat() -> None:
    while not done.wait(seconds):
      act()

  thread = threading.Thread(target=repeat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
  """While the context is open, prints a line each minute that says what is waited for, and since when."""
  start = datetime.datetime.now().astimezone()

  def say() -> None:
    minutes = (datetime.datetime.now().astimezone() - start).total_seconds() / 60
    print(f"waiting    for {what}, since {start:%H:%M:%S} ({minutes:.0f} min)", flush=True)

  with every(SECONDS_TO_A_LINE, say):
    yield


def until_done(act: Callable[[], None], check: Callable[[], None], seconds: float = 0.5) -> None:
  """Runs `act` in a thread of its own and waits for it, and leaves it behind where `check` raises in the meantime.

  Raises what either of them raises.
  """
  raised: list[BaseException] = []

  def run() -> None:
    try:
      act()
    except BaseException as error:  # for the thread that waits
      raised.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  while thread.is_alive():
    thread.join(seconds)
    check()
  if raised:
    raise raised[0]

"""Waiting for something outside this process, and saying so."""

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterator

SECONDS_TO_A_LINE = 60.0


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
  """While the context is open, prints a line each minute that says what is waited for, and since when."""
  since = datetime.datetime.now().astimezone().strftime("%H:%M:%S")
  done = threading.Event()

  def say() -> None:
    minutes = 0
    while not done.wait(SECONDS_TO_A_LINE):
      minutes += 1
      print(f"waiting    for {what}, since {since} ({minutes * SECONDS_TO_A_LINE / 60:g} min)", flush=True)

  thread = threading.Thread(target=say, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


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

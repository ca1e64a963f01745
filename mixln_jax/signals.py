"""Signals: one mechanism, from the first line of the program to its last, for one process and for many.

SIGTERM, SIGHUP (unless it is ignored, as under nohup) and Ctrl-C ask the program to stop.

* Where there is nothing to save, the request raises `Stopped` in the main thread (Ctrl-C: KeyboardInterrupt).
* Where a stop has to be prepared (`noting`: a loop that saves a checkpoint first, or several processes that have to
  stop together), it is only noted; who works there asks `requested_by()`.
* A second SIGTERM or Ctrl-C raises KeyboardInterrupt. (A second SIGHUP does not: a shell and the kernel both send one
  where a terminal is closed.)

Python runs a handler only between two instructions of the main thread, which may wait in C++ for minutes. A thread that
the signal itself wakes up sees to it that the process ends all the same.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

STOPPED_STATUS = 75  # EX_TEMPFAIL: run the same command again
AT_ONCE_STATUS = 130
CLEANUP_SECONDS = 30.0  # that a process which stops may take to release what it holds
AT_ONCE_SECONDS = 3.0  # the same after a second signal
LAST_BATCH_SECONDS = 60.0
POLL_SECONDS = 0.1
PARENT = "MIXLN_JAX_PARENT"  # the environment variable that names the process to end with

T = TypeVar("T")


class Stopped(BaseException):
  """A signal asked the program to stop, and there was nothing to save; `args[0]` names it.

  Like KeyboardInterrupt it is no Exception: libraries catch those, and would carry on.
  """


class _State:
  """What has been asked of this process.

  Attributes:
    requested_by: the first signal's name.
    insistent: SIGTERMs and Ctrl-Cs so far.
    noting: how many contexts want requests to be noted only.
    acts: what these contexts do when a request comes.
    many: whether this process stops together with others, so that nothing is raised where a signal happens to arrive.
    prepared: whether the work that saves something has begun; from then on meetings of processes raise nothing.
    previous: the handlers from before, by signal; empty while signals are not watched.
    wake_up: the descriptor that a signal writes a byte to, and the one from before.
  """

  def __init__(self) -> None:
    self.requested_by: str | None = None
    self.insistent = 0
    self.noting = 0
    self.acts: list[Callable[[], object]] = []
    self.many = False
    self.prepared = False
    self.previous: dict[int, Any] = {}
    self.wake_up: tuple[int, int] = (-1, -1)

  @property
  def raises(self) -> bool:
    return not (self.noting or self.many)


_state = _State()


def requested_by() -> str | None:
  """The signal that asked this process, or one of those that stop with it, to stop; None where none did."""
  return _state.requested_by


def note(name: str) -> None:
  """Notes a request that did not come as a signal of this process: another one has had it."""
  _state.requested_by = _state.requested_by or name


def stop_with_others() -> None:
  """From here on requests are only noted: several processes stop together, at the places where they meet."""
  _state.many = True


def to_stop_now() -> str | None:
  """At a meeting of processes: what asked this one to stop, where nothing has to be saved yet; else None."""
  return None if _state.prepared else _state.requested_by


def _handle(number: int, frame: FrameType | None) -> None:
  if _state.raises and _in_an_import(frame):
    # Modules in C++ end the process where Python raises while they are imported: again in a moment.
    signal.signal(signal.SIGALRM, lambda _, later: _handle(number, later))
    signal.setitimer(signal.ITIMER_REAL, POLL_SECONDS)
    return
  insists = number != signal.SIGHUP
  _state.insistent += insists
  first = _state.requested_by is None
  if insists and _state.insistent > 1:
    raise KeyboardInterrupt
  note(signal.Signals(number).name)
  if not first:
    return
  for act in _state.acts:
    act()
  if _state.raises:
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(signal.Signals(number).name)


def _in_an_import(frame: FrameType | None) -> bool:
  """Whether a module is being imported there."""
  while frame is not None:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      return True
    frame = frame.f_back
  return False


def _watched_signals() -> list[signal.Signals]:
  chosen = [signal.SIGTERM, signal.SIGINT]
  if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    chosen.append(signal.SIGHUP)
  return chosen


def watch_to_the_end() -> None:
  """Watches signals until the process ends; for the front door. To be called in the main thread."""
  for number in _watched_signals():
    _state.previous[number] = signal.signal(number, _handle)
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  _state.wake_up = (writing, signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
  threading.Thread(target=_see_to_the_end, args=(reading,), daemon=True).start()


@contextlib.contextmanager
def watching() -> Iterator[None]:
  """Watches signals while the context is open, where nobody does already.

  Off the main thread Python allows no handlers, and none is set.
  """
  if _state.previous or threading.current_thread() is not threading.main_thread():
    yield
    return
  watch_to_the_end()
  try:
    yield
  finally:
    _stop_watching()


def only_note() -> None:
  """From here on requests are only noted: the work is done, and the process ends by itself."""
  _state.noting += 1


@contextlib.contextmanager
def noting(act: Callable[[], object] = lambda: None) -> Iterator[None]:
  """While the context is open, requests to stop are only noted; who works inside asks `requested_by()`.

  Args:
    act: is called in the main thread when a request comes.
  """
  with watching():
    _state.noting += 1
    _state.acts.append(act)
    _state.prepared = True
    try:
      yield
    finally:
      _state.noting -= 1
      _state.acts.pop()


def _stop_watching() -> None:
  """Leaves the signals to whom they belonged before, and forgets what was asked."""
  writing, previous = _state.wake_up
  signal.setitimer(signal.ITIMER_REAL, 0.0)
  signal.set_wakeup_fd(previous)
  for number, handler in _state.previous.items():
    signal.signal(number, handler)
  os.close(writing)  # which ends the thread
  many = _state.many
  _state.__init__()
  _state.many = many


def _forget_in_child() -> None:
  """A forked child is no part of this: a byte of its own signals would wake up the parent's thread."""
  if _state.previous:
    _stop_watching()


os.register_at_fork(after_in_child=_forget_in_child)


def _see_to_the_end(reading: int) -> None:
  """Ends a process that was asked to stop at once and does not, since its main thread waits in C++ or swallowed it."""
  insistent, stopping = 0, False
  while numbers := os.read(reading, 64):
    for number in numbers:
      if number not in _state.previous:
        continue
      insistent += number != signal.SIGHUP
      if insistent > 1:
        _end_in(AT_ONCE_SECONDS, AT_ONCE_STATUS)
      elif _state.raises and not stopping:
        stopping = True
        _end_in(CLEANUP_SECONDS, AT_ONCE_STATUS if number == signal.SIGINT else STOPPED_STATUS)
  os.close(reading)


def _end_in(seconds: float, status: int) -> None:
  timer = threading.Timer(seconds, os._exit, (status,))
  timer.daemon = True
  timer.start()


def run_interruptibly(function: Callable[[], T]) -> T | None:
  """The result of a function that runs in C++ for long, as a compilation does; signals are acted on meanwhile.

  The function runs in a thread of its own, and can't be ended there: a process that leaves it behind ends with
  `leave_at_once`.

  Returns:
    Its result; None where a request to stop was noted meanwhile.

  Raises:
    Stopped: a signal came, and requests are not only noted.
    Exception: as the function.
  """
  results: list[T] = []
  errors: list[BaseException] = []
  done = threading.Event()

  def run() -> None:
    try:
      results.append(function())
    except BaseException as error:
      errors.append(error)
    finally:
      done.set()

  threading.Thread(target=run, daemon=True).start()
  while not done.wait(POLL_SECONDS):
    if _state.many and to_stop_now():
      return None
  if errors:
    raise errors[0]
  return results[0]


# Processes that this program starts.


def end_with(parent: int, act: Callable[[], Any] = lambda: os._exit(1)) -> None:
  """Acts once the process `parent`, which started this one, is gone: killed, it could not tell us.

  (Linux's PR_SET_PDEATHSIG would not do: it tells of the end of the *thread* that started the process.)
  """

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1)
    act()

  threading.Thread(target=watch, daemon=True).start()


def start_worker(parent: int) -> None:
  """To be called first in a process that reads or prepares data for `parent`.

  It leaves signals to its parent (a launcher sends them to all, and a run needs its data up to its last step), and
  ends with it. After a SIGTERM it stays for LAST_BATCH_SECONDS at most.
  """
  signal.signal(signal.SIGTERM, lambda *_: _end_in(LAST_BATCH_SECONDS, 1))
  for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  end_with(parent)


def end_with_named_parent() -> None:
  """Where the variable PARENT names the process that started this one, its end is a SIGTERM to this one."""
  named = os.environ.pop(PARENT, "")
  if named.isdecimal() and len(named) < 20:
    end_with(int(named), lambda: os.kill(os.getpid(), signal.SIGTERM))


def leave_at_once(status: int) -> None:
  """Ends the process once all that was printed is out, without the interpreter's own end.

  That would wait for threads of libraries which wait themselves, or crash in one that still runs in C++.
  """
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(status)

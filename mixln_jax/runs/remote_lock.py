"""The lock of a run in a bucket: an object of which the bucket itself says which version is there.

The bucket numbers the versions of an object (generations) and does what a request asks only if the object is of the
number that the request names. All that the lock promises rests on that: of several processes one creates it, one takes
over from a holder that is presumed dead, and a holder that lost it can't write it, remove it or commit a checkpoint,
however long it slept between a look and an act.
"""

import contextlib
import itertools
import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from mixln_jax.errors import InputError, LostLockError, UnreachableError
from mixln_jax.runs import gcs
from mixln_jax.runs import lock as lock_lib
from mixln_jax.runs.remote import ChangedError, Remote


def clock() -> float:
  """Seconds that also pass while the machine is suspended, where the system counts them."""
  if hasattr(time, "CLOCK_BOOTTIME"):
    return time.clock_gettime(time.CLOCK_BOOTTIME)
  return time.monotonic()


class Lock:
  """An object that only one process can create, and that its holder writes anew again and again.

  Attributes:
    lost: why this process holds it no longer; None while it does.
    taken_over: it was another's, which was presumed dead.
  """

  def __init__(self, remote: Remote, name: str, me: Mapping[str, Any]):
    self._remote, self._name = remote, name
    self._me = {**me, "nonce": uuid.uuid4().hex}  # tells what an earlier process of the same number wrote
    self._beat = itertools.count()
    self._generation = 0
    self._spoken = 0.0  # when the last request began that proved the lock to be ours
    self._mutex = threading.RLock()  # between the thread that speaks and a check or a commit
    self.lost: LostLockError | None = None
    self.taken_over = False

  @contextlib.contextmanager
  def __call__(self) -> Iterator[None]:
    """Holds the lock.

    One that lies there is watched for STALE_SECONDS: where its holder speaks it is held, else it is taken over.

    Raises:
      InputError: another process holds it.
    """
    self._acquire()
    done = threading.Event()
    thread = threading.Thread(target=self._speak, args=(done,), daemon=True)
    thread.start()
    try:
      with gcs.guarded(self._remote.bucket, self._remote.folder, self):
        yield
    finally:
      done.set()
      thread.join(timeout=lock_lib.TOUCH_SECONDS)  # it may wait for a bucket that is away
      if self.lost is None and not thread.is_alive():
        with contextlib.suppress(Exception):  # another's, or it times out by itself
          self._remote.remove(self._name, self._generation, lock_lib.TOUCH_SECONDS)

  def check_clock(self) -> None:
    """Asks nobody: raises LostLockError where the lock is known to be lost, or this process was silent for too long."""
    # Without the mutex, which the speaking thread holds while a bucket is away: training goes on meanwhile.
    silent = clock() - self._spoken
    if self.lost is None and silent >= lock_lib.STALE_SECONDS:
      self._lose(
        f"this process could not say that it lives for {silent:.0f} s (it was suspended, or the bucket was away), so "
        "that another may have taken the run over"
      )
    if self.lost is not None:
      raise LostLockError(str(self.lost))

  def check(self) -> None:
    """Asks the bucket.

    Raises:
      LostLockError: the lock is another's, is gone, or this process was silent for too long.
      UnreachableError: the bucket does not answer.
    """
    with self._mutex:
      self.check_clock()
      began = clock()
      if self._remote.generation(self._name) == self._generation:
        self._spoken = began
      else:
        self._look()

  def commit(self, key: str) -> None:
    """Makes an object as a copy of the lock, in one step of the bucket: only if the lock is still ours.

    Raises:
      LostLockError: it is not.
      UnreachableError: the bucket does not answer.
    """
    with self._mutex:
      self.check_clock()
      try:
        self._remote.copy(self._name, key, self._generation)
      except ChangedError:
        self.check()  # still ours: the object is there, since an answer was lost
        if not gcs.Storage().exists(f"{self._remote.bucket}/{key}"):
          self._remote.copy(self._name, key, self._generation)

  def _acquire(self) -> None:
    seen, since = 0, 0.0
    while True:
      began, content = clock(), self._content()
      try:
        self._generation = self._remote.write(self._name, content, generation=0)
        self._spoken = began
        return
      except ChangedError:
        pass
      try:
        found, generation = self._remote.read_version(self._name)
      except FileNotFoundError:
        continue
      if self._is_mine(found):  # the answer to our writing it was lost
        self._generation, self._spoken = generation, began
        return
      holder = lock_lib.holder_of(found)
      if not seen:
        seen, since = generation, time.monotonic()
        who = lock_lib.describe_holder(holder)
        print(f"waiting    to see whether the holder of {self._remote.url} is alive ({who})", flush=True)
      elif generation != seen:
        raise lock_lib.held_error(self._remote.url, holder)
      if time.monotonic() - since >= lock_lib.STALE_SECONDS:  # by this clock alone: the bucket's may be another
        self._take_over(seen)
        return
      time.sleep(lock_lib.POLL_SECONDS)

  def _take_over(self, stale: int) -> None:
    """Replaces a lock whose holder is presumed dead; of several processes that do, the bucket lets one."""
    began = clock()
    try:
      self._generation = self._remote.write(self._name, self._content(), generation=stale)
    except ChangedError as error:
      try:
        content, self._generation = self._remote.read_version(self._name)
      except FileNotFoundError:
        content = b""
      if not self._is_mine(content):
        raise lock_lib.held_error(self._remote.url, lock_lib.holder_of(content)) from error
    self._spoken, self.taken_over = began, True

  def _speak(self, done: threading.Event) -> None:
    while not done.wait(lock_lib.TOUCH_SECONDS):
      try:
        with self._mutex:
          if done.is_set():
            return
          self.check_clock()
          began = clock()
          try:
            # Tried for less than a lifetime: a check that waits for this thread must not wait for long.
            self._generation = self._remote.write(self._name, self._content(), self._generation, lock_lib.TOUCH_SECONDS)
            self._spoken = began
          except ChangedError:
            self._look()
      except LostLockError:
        return
      except (InputError, UnreachableError):
        continue  # the next time

  def _look(self) -> None:
    """After the bucket said that the lock is of another generation: ours, since an answer was lost, or another's."""
    began = clock()
    try:
      content, generation = self._remote.read_version(self._name, lock_lib.TOUCH_SECONDS)
    except FileNotFoundError:
      self._lose("the lock is gone, so that another process took the run over and ended")
      raise LostLockError(str(self.lost)) from None
    if not self._is_mine(content):
      who = lock_lib.describe_holder(lock_lib.holder_of(content)) or "one that does not say who it is"
      self._lose(f"another process trains there ({who})")
      raise LostLockError(str(self.lost))
    self._generation, self._spoken = generation, began

  def _lose(self, reason: str) -> None:
    self.lost = LostLockError(
      f"workdir={self._remote.url}: the run's lock was lost: {reason}; nothing more was written; run the same command "
      "to resume from the newest checkpoint"
    )

  def _content(self) -> bytes:
    return json.dumps({**self._me, "beat": next(self._beat)}).encode()

  def _is_mine(self, content: bytes) -> bool:
    return lock_lib.holder_of(content).get("nonce") == self._me["nonce"]

"""The lock of a run in a bucket: an object whose version the bucket itself checks in each request.

The bucket numbers the versions of an object (generations), and executes a conditional request only if the object has
the generation that the request names. All guarantees of the lock rest on that: only one of several processes can create
it; only one can take it over from a holder that is presumed dead; and a holder that lost it can't write it, remove it
or commit a checkpoint, no matter how long it was suspended between a check and an action.
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
  """A clock in seconds that keeps running while the machine is suspended, if the system has one."""
  if hasattr(time, "CLOCK_BOOTTIME"):
    return time.clock_gettime(time.CLOCK_BOOTTIME)
  return time.monotonic()


class Lock:
  """An object that only one process can create, and that its holder rewrites regularly to show that it is alive.

  Attributes:
    lost: the error that says why this process no longer holds the lock; None while it does.
    taken_over: whether the lock was taken from a holder that was presumed dead.
  """

  def __init__(self, remote: Remote, name: str, me: Mapping[str, Any]):
    self._remote, self._name = remote, name
    self._me = {**me, "nonce": uuid.uuid4().hex}  # distinguishes this process from an earlier one with the same id
    self._beat = itertools.count()
    self._generation = 0
    self._spoken = 0.0  # start time of the last request that proved that this process holds the lock
    self._mutex = threading.RLock()  # between the heartbeat thread and a check or a commit
    self.lost: LostLockError | None = None
    self.taken_over = False

  @contextlib.contextmanager
  def __call__(self) -> Iterator[None]:
    """Holds the lock.

    An existing lock is watched for STALE_SECONDS. If its holder rewrites it, it is held; otherwise it is taken over.

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
      thread.join(timeout=lock_lib.TOUCH_SECONDS)  # the thread may be waiting for an unreachable bucket
      if self.lost is None and not thread.is_alive():
        with contextlib.suppress(Exception):  # if this fails, the lock is another process's or times out by itself
          self._remote.remove(self._name, self._generation, lock_lib.TOUCH_SECONDS)

  def check_clock(self) -> None:
    """Raises LostLockError if the lock is known to be lost or was not renewed for too long; makes no request."""
    # No mutex here: the heartbeat thread holds it while the bucket is unreachable, and training must not wait.
    silent = clock() - self._spoken
    if self.lost is None and silent >= lock_lib.STALE_SECONDS:
      self._lose(
        f"this process could not renew it for {silent:.0f} s (it was suspended, or the bucket was unreachable), so "
        "another process may have taken over the run"
      )
    if self.lost is not None:
      raise LostLockError(str(self.lost))

  def check(self) -> None:
    """Asks the bucket whether this process still holds the lock.

    Raises:
      LostLockError: another process holds it, it is gone, or it was not renewed for too long.
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
    """Creates an object as a copy of the lock, atomically on the condition that this process still holds the lock.

    Raises:
      LostLockError: it does not.
      UnreachableError: the bucket does not answer.
    """
    with self._mutex:
      self.check_clock()
      try:
        self._remote.copy(self._name, key, self._generation)
      except ChangedError:
        self.check()  # still held: then an answer was lost, and the object may exist
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
        content, generation = self._remote.read_version(self._name)
      except FileNotFoundError:
        continue
      if self._is_mine(content):  # this process wrote it, and the answer was lost
        self._generation, self._spoken = generation, began
        return
      holder = lock_lib.holder_of(content)
      if not seen:
        seen, since = generation, time.monotonic()
        who = lock_lib.describe_holder(holder)
        print(f"waiting    to see whether the holder of {self._remote.url} is alive ({who})", flush=True)
      elif generation != seen:
        raise lock_lib.held_error(self._remote.url, holder)
      if time.monotonic() - since >= lock_lib.STALE_SECONDS:  # by this machine's clock only
        self._take_over(seen)
        return
      time.sleep(lock_lib.POLL_SECONDS)

  def _take_over(self, stale: int) -> None:
    """Replaces a lock whose holder is presumed dead. If several processes try, the bucket lets only one succeed."""
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
            # Retried for a short time only, because a check has to wait for this thread.
            self._generation = self._remote.write(self._name, self._content(), self._generation, lock_lib.TOUCH_SECONDS)
            self._spoken = began
          except ChangedError:
            self._look()
      except LostLockError:
        return
      except (InputError, UnreachableError):
        continue  # try again at the next heartbeat

  def _look(self) -> None:
    """Finds out why the lock has another generation: an answer was lost, or another process holds it.

    Raises:
      LostLockError: another process holds it, or it is gone.
    """
    began = clock()
    try:
      content, generation = self._remote.read_version(self._name, lock_lib.TOUCH_SECONDS)
    except FileNotFoundError:
      self._lose("the lock is gone, so another process took over the run and ended")
      raise LostLockError(str(self.lost)) from None
    if not self._is_mine(content):
      who = lock_lib.describe_holder(lock_lib.holder_of(content)) or "unidentified"
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

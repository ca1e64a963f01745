"""Checkpoints with orbax: written in the background, atomic, and restorable onto any mesh.

A checkpoint has named trees (`params`, and `rest` of the train state, so that parameters can be read alone) and the
facts that describe them (config, placement table, data fingerprint).
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from mixln_jax import waiting
from mixln_jax.errors import InputError, TryAgainError, one_line
from mixln_jax.files import NUMBER, OBJECT, TEXT, Kinds, check_kinds, json_object
from mixln_jax.parallel.bits import bit_sums
from mixln_jax.places import is_url
from mixln_jax.reach import chain, why_unreachable
from mixln_jax.runs.remote import as_unreachable

T = TypeVar("T")

METRIC = "validation_loss"
SUMS, SEAL = "bit_sums", "sha256"  # facts to verify the trees and the other facts

_DESCRIPTIONS = ("metrics/metrics", "_CHECKPOINT_METADATA")  # the files that orbax reads to list checkpoints
_FACTS: Kinds = {"config": OBJECT.optional(), "fingerprint": TEXT.optional(), SUMS: OBJECT}

# A reader has no lock: the training process may remove the checkpoint that it reads, file by file.
REMOVAL_SECONDS, POLL_SECONDS = 3.0, 0.05


class DamagedError(InputError):
  """A checkpoint differs from what was written."""


class RemovedError(InputError):
  """A checkpoint was removed while it was read, because the run is training and has newer ones."""


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(
    self,
    folder: epath.PathLike,
    *,
    keep_last: int = 1,
    keep_best: int = 0,
    keep_steps: Sequence[int] = (),
    read_only: bool = False,
    check_held: Callable[[], None] = lambda: None,
  ):
    """Opens the checkpoints of a folder.

    Args:
      folder: the folder, on a disk or in a bucket.
      keep_last: how many of the newest checkpoints to keep.
      keep_best: how many of the checkpoints with the lowest validation loss to keep.
      keep_steps: steps whose checkpoints are always kept.
      read_only: create and remove nothing.
      check_held: raises if this process no longer holds the run's lock; it is called while waiting.
    """
    self._folder, self._check_held = str(folder).rstrip("/"), check_held
    managers = checkpoint_managers
    policies: list[Any] = [managers.LatestN(keep_last), managers.CustomSteps(list(keep_steps))]
    if keep_best:
      best = managers.BestN(
        get_metric_fn=lambda metrics: metrics[METRIC], reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
      )
      policies.append(best)
    with _hints_silenced():
      options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics[METRIC],  # makes orbax store the metrics that BestN reads
        best_mode="min",
        preservation_policy=managers.AnyPreservationPolicy(policies),
        save_decision_policy=managers.FixedIntervalPolicy(1),
        read_only=read_only,
      )
      self._read_only = read_only
      try:
        with self._reached("the checkpoints to be listed"):
          self._manager = self._looking(lambda: ocp.CheckpointManager(folder, options=options))
      except (ValueError, TypeError, LookupError, RecursionError) as error:
        if isinstance(error, InputError) or why_unreachable(error) is not None:
          raise
        raise _damaged_description(epath.Path(folder), error) from error

  @contextlib.contextmanager
  def _reached(self, what: str) -> Iterator[None]:
    """Prints once a minute what is waited for; converts errors as `_named` does."""
    with self._named(), waiting.said(f"{what} ({self._folder})"):
      yield

  @contextlib.contextmanager
  def _named(self) -> Iterator[None]:
    """Converts errors of orbax and tensorstore.

    Raises:
      UnreachableError: the checkpoints are in a bucket that can't be reached.
      TryAgainError: one was raised in a thread of orbax, for instance because the lock was lost.
    """
    try:
      yield
    except Exception as error:
      self._check_held()
      for one in chain(error):
        if isinstance(one, TryAgainError):
          raise one from None
      if is_url(self._folder):
        raise as_unreachable(error, self._folder) from error
      raise

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """The step of lowest validation loss; None if no checkpoint was evaluated."""
    try:
      return self._manager.best_step()
    except (TypeError, LookupError) as error:
      raise _damaged_description(epath.Path(self._manager.directory), error) from error

  def _looking(self, look: Callable[[], T]) -> T:
    """Calls `look`, which reads the folder; a reader calls it again if a checkpoint was removed meanwhile."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    while True:
      try:
        return look()
      except (FileNotFoundError, NotADirectoryError):
        if not self._read_only or time.monotonic() > deadline:
          raise

  def save(
    self, step: int, trees: Mapping[str, Any], facts: Mapping[str, Any], validation_loss: float | None = None
  ) -> None:
    """Starts to write a checkpoint; returns once the trees are copied.

    The facts include the exact sum of each tensor's bits, because orbax does not detect flipped bits on restore.

    Raises:
      UnreachableError: the bucket can't be reached.
      LostLockError: this process no longer holds the run.
    """
    self.wait()
    facts = {**facts, SUMS: {name: _sums(tree) for name, tree in trees.items()}}
    facts[SEAL] = _seal(facts)
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    args = ocp.args.Composite(**items, facts=ocp.args.JsonSave(dict(facts)))
    metrics = None if validation_loss is None else {METRIC: validation_loss}
    with self._reached(f"the checkpoint of step {step} to be begun"):
      saved = self._manager.save(step, args=args, metrics=metrics)
    if not saved:
      raise RuntimeError(f"orbax did not save the checkpoint of step {step}; the folder has {self.all_steps()}")

  def facts(self, step: int) -> dict[str, Any]:
    """The facts of a checkpoint: `config`, `placement`, `fingerprint`, …

    Raises:
      DamagedError: they can't be read, or differ from what was written.
      RemovedError: the training process has removed the checkpoint.
      UnreachableError: the bucket can't be reached.
      Exception: an error of orbax, unchanged, if a disk could not be reached or denied access.
    """
    facts = self._restore(step, facts=ocp.args.JsonRestore())["facts"]
    try:
      if not isinstance(facts, dict) or facts.get(SEAL) != _seal(facts):
        raise self._unreadable(step, "its facts differ from what was written")
      check_kinds(facts, "facts", _FACTS)
    except (TypeError, RecursionError) as error:
      raise self._unreadable(step, one_line(error)) from error
    return facts

  def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The trees named in `abstract`, with its shapes, types and shardings.

    Raises:
      DamagedError: the trees can't be read, have other shapes, or differ by any bit from what was written.
      RemovedError, UnreachableError, Exception: as in `facts`.
    """
    expected = self.facts(step)[SUMS]
    restored = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
    trees = {name: restored[name] for name in abstract}
    for tree_name, tree in trees.items():
      for name, total in _sums(tree).items():
        if expected.get(tree_name, {}).get(name) != total:
          raise self._unreadable(step, f"{tree_name}/{name} differs from what was written")
    return trees

  def _restore(self, step: int, **items: Any) -> Any:
    try:
      with self._reached(f"the checkpoint of step {step} to be read"):
        return self._manager.restore(step, args=ocp.args.Composite(**items))
    except TryAgainError:
      raise
    except Exception as error:  # orbax raises bare Exceptions, KeyErrors and ValueErrors for damaged files
      if why_unreachable(error) is not None:
        raise
      reason = one_line(error)
      raise self._unreadable(step, reason) from error

  def _unreadable(self, step: int, reason: str) -> DamagedError | RemovedError:
    """The error for a checkpoint that can't be read: it is damaged, unless it has been or is being removed."""
    folder = epath.Path(self._manager.directory) / str(step)
    deadline = time.monotonic() + (REMOVAL_SECONDS if self._read_only else 0.0)
    while folder.exists():
      if time.monotonic() >= deadline:
        return DamagedError(f"{folder}: the checkpoint is damaged ({reason})")
      time.sleep(POLL_SECONDS)
    return RemovedError(f"{folder}: the checkpoint was removed while it was read; name a step that the run keeps")

  def move(self, steps: Iterable[int], target: epath.PathLike) -> None:
    """Moves checkpoints into the existing folder `target`."""
    with self._reached("checkpoints to be moved"):
      for step in steps:
        (epath.Path(self._manager.directory) / str(step)).rename(epath.Path(target) / str(step))
      self._manager.reload()

  def reload(self) -> None:
    """Reads the folder again, after another process changed it."""
    with self._reached("the checkpoints to be listed"):
      self._looking(self._manager.reload)

  def check(self) -> None:
    """Raises errors of background saves, and LostLockError if this process no longer holds the run."""
    self._check_held()
    with self._named():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until everything is written; raises errors of background saves, as `save` does."""
    with self._reached("a checkpoint to be written"):
      waiting.until_done(self._manager.wait_until_finished, self._check_held)

  def close(self) -> None:
    """Waits and closes; raises errors of background saves."""
    self.wait()
    with self._reached("the checkpoints to be closed"):
      self._manager.close()


def _damaged_description(folder: epath.Path, error: Exception) -> InputError:
  """The error for checkpoints that orbax can't list because the metadata of one of them is damaged."""
  for step in sorted(folder.iterdir()):
    for name in _DESCRIPTIONS:
      file = step / name
      try:
        value = json_object(file.read_bytes(), str(file)) if file.exists() else {}
        check_kinds(value, str(file), {METRIC: NUMBER.optional()})
      except InputError as damage:
        return InputError(f"{damage}, or move the folder {step} away")
  return InputError(f"{folder}: the checkpoints can't be listed ({one_line(error)}); move away what is damaged")


@contextlib.contextmanager
def _hints_silenced() -> Iterator[None]:
  """Within the context, orbax does not warn that read-only checkpoints can't be written."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


def _sums(tree: Any) -> dict[str, int]:
  return {name: int(total) for name, total in jax.device_get(jax.jit(bit_sums)(tree)).items()}


def _seal(facts: Mapping[str, Any]) -> str:
  """A hash of all facts except the seal itself."""
  content = {name: value for name, value in facts.items() if name != SEAL}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Checkpoints through orbax: written in the background, atomic, restored onto any mesh.

A checkpoint is one thing: named trees (`params`, and `rest` of the train state, so that parameters can be read alone)
and the facts that say what they are (config, placement table, data fingerprint).
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
SUMS, SEAL = "bit_sums", "sha256"  # facts that say whether the rest is what was written


_DESCRIPTIONS = ("metrics/metrics", "_CHECKPOINT_METADATA")  # files of a checkpoint that orbax reads to list it
_FACTS: Kinds = {"config": OBJECT.optional(), "fingerprint": TEXT.optional(), SUMS: OBJECT}

# A reader has no lock: the process that trains may remove what it reads, file by file.
REMOVAL_SECONDS, POLL_SECONDS = 3.0, 0.05


class DamagedError(InputError):
  """A checkpoint is not what was written."""


class RemovedError(InputError):
  """A checkpoint was removed while it was read: the run trains, and has newer ones."""


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
    """Keeps the `keep_last` newest, the `keep_best` of lowest validation loss, and those of `keep_steps`.

    Args:
      folder: on a disk or in a bucket.
      keep_last, keep_best, keep_steps: as above.
      read_only: nothing is made or removed.
      check_held: raises where this process no longer holds the run; asked while something is waited for.
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
    """Says each minute what is waited for; raises as `_named`."""
    with self._named(), waiting.said(f"{what} ({self._folder})"):
      yield

  @contextlib.contextmanager
  def _named(self) -> Iterator[None]:
    """What orbax and tensorstore raise as what it is.

    Raises:
      UnreachableError: the checkpoints lie in a bucket that can't be reached.
      TryAgainError: a thread of orbax met it, for instance that the lock was lost.
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
    """The one of lowest validation loss; None where none was evaluated."""
    try:
      return self._manager.best_step()
    except (TypeError, LookupError) as error:
      raise _damaged_description(epath.Path(self._manager.directory), error) from error

  def _looking(self, look: Callable[[], T]) -> T:
    """The result of a look at the folder; a reader's is repeated where a checkpoint was removed during it."""
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

    With it goes the exact sum of each tensor's bits: orbax restores a flipped bit as another number without a word.

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
    """What a checkpoint is: `config`, `placement`, `fingerprint`.

    Raises:
      DamagedError: they can't be read, or are not those that were written.
      RemovedError: the process that trains has removed the checkpoint.
      UnreachableError: the bucket can't be reached.
      Exception: of orbax, as it is, where a disk could not be reached or did not let us in.
    """
    facts = self._restore(step, facts=ocp.args.JsonRestore())["facts"]
    try:
      if not isinstance(facts, dict) or facts.get(SEAL) != _seal(facts):
        raise self._unreadable(step, "its facts are not those that were written")
      check_kinds(facts, "facts", _FACTS)
    except (TypeError, RecursionError) as error:
      raise self._unreadable(step, one_line(error)) from error
    return facts

  def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Some or all of the trees, in the shapes, types and shardings of `abstract`.

    Raises:
      DamagedError: they can't be read, are of other shapes, or a tensor is not what was written, bit for bit.
      RemovedError: the process that trains has removed the checkpoint.
      UnreachableError: the bucket can't be reached.
      Exception: of orbax, as it is, where a disk could not be reached or did not let us in.
    """
    expected = self.facts(step)[SUMS]
    restored = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
    trees = {name: restored[name] for name in abstract}
    for tree_name, tree in trees.items():
      for name, total in _sums(tree).items():
        if expected.get(tree_name, {}).get(name) != total:
          raise self._unreadable(step, f"{tree_name}/{name} is not what was written")
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
    """The error for a checkpoint that can't be read: damaged, unless it is gone or going."""
    folder = epath.Path(self._manager.directory) / str(step)
    deadline = time.monotonic() + (REMOVAL_SECONDS if self._read_only else 0.0)
    while folder.exists():
      if time.monotonic() >= deadline:
        return DamagedError(f"{folder}: the checkpoint is damaged ({reason})")
      time.sleep(POLL_SECONDS)
    return RemovedError(f"{folder}: the checkpoint was removed while it was read; name a step that the run keeps")

  def move(self, steps: Iterable[int], target: epath.PathLike) -> None:
    """Moves checkpoints into the folder `target`, which exists."""
    with self._reached("checkpoints to be moved"):
      for step in steps:
        (epath.Path(self._manager.directory) / str(step)).rename(epath.Path(target) / str(step))
      self._manager.reload()

  def reload(self) -> None:
    """Looks at the folder again, after another process changed it."""
    with self._reached("the checkpoints to be listed"):
      self._looking(self._manager.reload)

  def check(self) -> None:
    """Raises what went wrong in the background since the last save, and where the run is no longer this process's."""
    self._check_held()
    with self._named():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until all is written; raises what went wrong in the background, as `save` does."""
    with self._reached("a checkpoint to be written"):
      waiting.until_done(self._manager.wait_until_finished, self._check_held)

  def close(self) -> None:
    """Waits and closes; raises what went wrong in the background."""
    self.wait()
    with self._reached("the checkpoints to be closed"):
      self._manager.close()


def _damaged_description(folder: epath.Path, error: Exception) -> InputError:
  """The error for checkpoints that orbax can't even list, since what one of them says of itself is damaged."""
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
  """While the context is open, orbax does not warn that what is opened to be read can't be written."""
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
  """Hash over all facts but itself."""
  content = {name: value for name, value in facts.items() if name != SEAL}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Checkpoints through orbax: written in the background, atomic, restored onto any mesh.

A checkpoint is one thing: named trees (`params`, and `rest` of the train state, so that parameters can be read alone)
and the facts that say what they are (config, placement table, data fingerprint).
"""

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from mixln_jax.errors import InputError, one_line
from mixln_jax.files import NUMBER, OBJECT, TEXT, Kinds, check_kinds, json_object
from mixln_jax.parallel.bits import bit_sums

T = TypeVar("T")

METRIC = "validation_loss"
SUMS, SEAL = "bit_sums", "sha256"  # facts that say whether the rest is what was written


_DESCRIPTIONS = ("metrics/metrics", "_CHECKPOINT_METADATA")  # files of a checkpoint that orbax reads to list it
_FACTS: Kinds = {"config": OBJECT.optional(), "fingerprint": TEXT.optional(), SUMS: OBJECT}

# What tensorstore says of a bucket, a disk or a network that fails now and may not the next time: no damage.
TRANSIENT = re.compile(
  r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED)\b|"
  r"CURL error|Connection (reset|refused|timed out)|Could not resolve host"
)


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
  ):
    """Keeps the `keep_last` newest, the `keep_best` of lowest validation loss, and those of `keep_steps`."""
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
        self._manager = self._looking(lambda: ocp.CheckpointManager(folder, options=options))
      except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise _damaged_description(epath.Path(folder), error) from error

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
    """
    facts = {**facts, SUMS: {name: _sums(tree) for name, tree in trees.items()}}
    facts[SEAL] = _seal(facts)
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    args = ocp.args.Composite(**items, facts=ocp.args.JsonSave(dict(facts)))
    metrics = None if validation_loss is None else {METRIC: validation_loss}
    if not self._manager.save(step, args=args, metrics=metrics):
      raise RuntimeError(f"orbax did not save the checkpoint of step {step}; the folder has {self.all_steps()}")

  def facts(self, step: int) -> dict[str, Any]:
    """What a checkpoint is: `config`, `placement`, `fingerprint`.

    Raises:
      DamagedError: they can't be read, or are not those that were written.
      RemovedError: the process that trains has removed the checkpoint.
      Exception: of orbax, as it is, where the storage could not be reached or did not let us in.
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
      Exception: of orbax, as it is, where the storage could not be reached or did not let us in.
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
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax raises bare Exceptions, KeyErrors and ValueErrors for damaged files
      if _is_transient(error):
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
    for step in steps:
      (epath.Path(self._manager.directory) / str(step)).rename(epath.Path(target) / str(step))
    self._manager.reload()

  def reload(self) -> None:
    """Looks at the folder again, after another process changed it."""
    self._looking(self._manager.reload)

  def check(self) -> None:
    """Raises what went wrong in the background since the last save."""
    self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until all is written; raises what went wrong in the background."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and closes; raises what went wrong in the background."""
    self._manager.wait_until_finished()
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


def _is_transient(error: BaseException | None) -> bool:
  """Whether an error, or one that it came from, says that the storage could not be reached or did not let us in."""
  while error is not None:
    if isinstance(error, (ConnectionError, TimeoutError, PermissionError)) or TRANSIENT.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def _seal(facts: Mapping[str, Any]) -> str:
  """Hash over all facts but itself."""
  content = {name: value for name, value in facts.items() if name != SEAL}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

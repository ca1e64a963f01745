"""Checkpoints through orbax: written in the background, atomic, restored onto any mesh.

A checkpoint is one thing: named trees (`params`, and `rest` of the train state, so that parameters can be read alone)
and the facts that say what they are (config, placement table, data fingerprint).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mixln_jax.errors import InputError

METRIC = "validation_loss"


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(
    self,
    folder: Path,
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
    options = ocp.CheckpointManagerOptions(
      best_fn=lambda metrics: metrics[METRIC],  # makes orbax store the metrics that BestN reads
      best_mode="min",
      preservation_policy=managers.AnyPreservationPolicy(policies),
      save_decision_policy=managers.FixedIntervalPolicy(1),
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager(folder, options=options)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, trees: Mapping[str, Any], facts: Mapping[str, Any], validation_loss: float | None = None
  ) -> None:
    """Starts to write a checkpoint; returns once the trees are copied."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    args = ocp.args.Composite(**items, facts=ocp.args.JsonSave(dict(facts)))
    metrics = None if validation_loss is None else {METRIC: validation_loss}
    if not self._manager.save(step, args=args, metrics=metrics):
      raise RuntimeError(f"orbax did not save the checkpoint of step {step}; the folder has {self.all_steps()}")

  def facts(self, step: int) -> dict[str, Any]:
    """What a checkpoint is: `config`, `placement`, `fingerprint`."""
    return self._restore(step, facts=ocp.args.JsonRestore())["facts"]

  def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Some or all of the trees, in the shapes, types and shardings of `abstract`."""
    restored = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
    return {name: restored[name] for name in abstract}

  def _restore(self, step: int, **items: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax raises bare Exceptions, KeyErrors and ValueErrors for damaged files
      reason = " ".join(str(error).split())[:300]
      raise InputError(
        f"{self._manager.directory}/{step}: the checkpoint can't be restored ({reason}); "
        "remove it to go on from the one before"
      ) from error

  def move_after(self, step: int, target: Path) -> None:
    """Moves the checkpoints later than `step` into the folder `target`."""
    for later in (s for s in self.all_steps() if s > step):
      (Path(self._manager.directory) / str(later)).rename(target / str(later))
    self._manager.reload()

  def wait(self) -> None:
    """Waits until all is written; raises what went wrong in the background."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and closes; raises what went wrong in the background."""
    self._manager.wait_until_finished()
    self._manager.close()

"""What a checkpoint of a run holds, and its state restored."""

from collections.abc import Mapping
from typing import Any

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.opening import Setup
from mixln_jax.parallel.mesh import attach
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.facts import written_by
from mixln_jax.runs.folder import RunFolder
from mixln_jax.training import step as step_lib
from mixln_jax.version import VERSION


def open_checkpoints(config: Config, folder: RunFolder) -> Checkpoints:
  """The checkpoints of a run, kept as its config says."""
  return Checkpoints(
    folder.place(folder_lib.CHECKPOINTS),
    keep_last=config.checkpoint.keep_last,
    keep_best=config.checkpoint.keep_best,
    keep_steps=decay_start(config),
    check_held=folder.check_held,
  )


def decay_start(config: Config) -> tuple[int, ...]:
  """Where a wsd or trapezoid schedule starts to decay: its checkpoint is kept, because a longer run resumes there."""
  start = config_lib.decay_start(config)
  return () if start is None else (start,)


def facts_of(config: Config, fingerprint: str | None) -> dict[str, Any]:
  """What a checkpoint says of itself. `fingerprint`: of the data that it was trained on; None = of none here."""
  table = config_lib.table(config.model)
  return {
    "version": VERSION,
    "config": config_lib.flatten(config),
    "placement": table.to_json(),
    "fingerprint": fingerprint,
  }


def check_facts(facts: Mapping[str, Any], setup: Setup, folder: RunFolder) -> None:
  """Refuses to resume with other data, or with a placement that means something else than it did."""
  fingerprint = setup.corpus.manifest.fingerprint
  if facts["fingerprint"] not in (fingerprint, None):
    raise InputError(
      f"workdir={folder.address}: the run was trained on data {facts['fingerprint'][:12]}…, but "
      f"{setup.corpus.folder} is {fingerprint[:12]}…; set config.data.directory to the run's, or use another workdir"
    )
  writer = facts.get("version") or written_by(folder)
  if placement.Table.from_json(facts["placement"], writer) != setup.table:
    raise InputError(
      f"workdir={folder.address}: config.model.placement={setup.config.model.placement!r} means another table in this "
      f"version ({VERSION}) than in the checkpoint; use the version that wrote it, {writer}"
    )


def split(state: step_lib.TrainState) -> dict[str, Any]:
  """The trees that a checkpoint stores: parameters can be read alone."""
  rest = {name: getattr(state, name) for name in ("step", "opt_state", "skipped", "skipped_in_a_row")}
  return {"params": state.params, "rest": rest}


def restore_state(
  config: Config, shardings: step_lib.TrainState, checkpoints: Checkpoints, step: int
) -> step_lib.TrainState:
  """The state of a checkpoint, created sharded."""
  abstract = attach(step_lib.abstract_state(config), shardings)
  trees = checkpoints.restore(step, split(abstract))
  return step_lib.TrainState(params=trees["params"], **trees["rest"])

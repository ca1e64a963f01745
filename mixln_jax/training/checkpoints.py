"""What a checkpoint of a run holds, and the state that a run starts or goes on from."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.model import admin
from mixln_jax.model.initial import initial_params
from mixln_jax.model.parameters import abstract_params
from mixln_jax.parallel.mesh import attach, make_mesh
from mixln_jax.parallel.rules import replicated
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.folder import RunFolder
from mixln_jax.training import step as step_lib
from mixln_jax.training.optimizer import init_moments, make_optimizer
from mixln_jax.training.setup import Setup, make_loader
from mixln_jax.training.start import find_start, starting_params


def open_checkpoints(config: Config, folder: RunFolder) -> Checkpoints:
  """The checkpoints of a run, kept as its config says."""
  return Checkpoints(
    folder.place(folder_lib.CHECKPOINTS),
    keep_last=config.checkpoint.keep_last,
    keep_best=config.checkpoint.keep_best,
    keep_steps=decay_start(config),
  )


def decay_start(config: Config) -> tuple[int, ...]:
  """Where a wsd schedule starts to decay: its checkpoint is kept, since a longer run goes on from there."""
  if config.optimizer.schedule != "wsd":
    return ()
  return (config.train.num_steps - config_lib.decay_steps(config),)


def facts_of(config: Config, fingerprint: str | None) -> dict[str, Any]:
  """What a checkpoint says of itself. `fingerprint`: of the data that it was trained on; None = of none here."""
  table = placement.parse(config.model.placement, config.model.num_layers)
  return {"config": config_lib.flatten(config), "placement": table.to_json(), "fingerprint": fingerprint}


def check_facts(facts: Mapping[str, Any], setup: Setup, folder: RunFolder) -> None:
  """Refuses to go on with other data, or with a placement that means something else than it did."""
  fingerprint = setup.corpus.manifest.fingerprint
  if facts["fingerprint"] not in (fingerprint, None):
    raise InputError(
      f"--workdir={folder.address}: the run was trained on data {facts['fingerprint'][:12]}…, but "
      f"{setup.corpus.folder} is {fingerprint[:12]}…; set config.data.directory to the run's, or use another --workdir"
    )
  if placement.Table.from_json(facts["placement"]) != setup.table:
    raise InputError(
      f"--workdir={folder.address}: config.model.placement={setup.config.model.placement!r} means another table in "
      "this version of mixln_jax than in the checkpoint; use the version that wrote it"
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


def initial_state(setup: Setup, shardings: step_lib.TrainState) -> step_lib.TrainState:
  """The state before the first update of a run that draws its weights, created sharded."""
  state = jax.jit(lambda: step_lib.init_state(setup.config), out_shardings=shardings)()
  return state.replace(params=_profiled(setup, state.params, shardings.params))


def initial_weights(setup: Setup, shardings: Any) -> Any:
  """The parameters before the first update, drawn or those that the run starts from; `shardings`: of each of them."""
  if setup.config.train.start_from:
    return starting_params(setup, find_start(setup))
  model, seed = setup.config.model, setup.config.seed
  return _profiled(setup, jax.jit(lambda: initial_params(model, seed), out_shardings=shardings)(), shardings)


def _profiled(setup: Setup, params: Any, shardings: Any) -> Any:
  """The same, where the placement has Admin's scales with those profiled on rows of the first batch."""
  config = setup.config
  if not admin.sublayers_to_profile(config.model):
    return params
  rows = _first_rows(setup, admin.ROWS)
  everywhere = replicated(setup.mesh)
  batch = {
    name: jax.make_array_from_callback(array.shape, everywhere, array.__getitem__) for name, array in rows.items()
  }
  # Without logical rules: every device sees all of these few rows.
  profile = jax.jit(
    lambda params, batch: admin.profile_admin(
      config.model,
      params,
      batch["tokens_BT"],
      batch["weights_BT"],
      segment_ids_BT=batch.get("segment_ids_BT"),
      positions_BT=batch.get("positions_BT"),
    ),
    out_shardings=shardings,
  )
  with jax.set_mesh(setup.mesh):
    return profile(params, batch)


def _first_rows(setup: Setup, count: int) -> dict[str, np.ndarray]:
  """The first rows of step 0's batch, the same on every process."""
  batches = make_loader(setup, setup.config.train.batch_size, all_rows=True).train(0)
  try:
    return {name: rows[:count] for name, rows in next(batches).items()}
  finally:
    batches.close()


def fresh_state(config: Config, params: Any, shardings: step_lib.TrainState) -> step_lib.TrainState:
  """The state of no updates with given parameters, which lie on the mesh and are donated, and a fresh optimizer."""

  def state_of(params: Any) -> step_lib.TrainState:
    moments = init_moments(make_optimizer(config), params, config.optimizer.moment_dtype)
    return step_lib.start_state(params, moments)

  return jax.jit(state_of, out_shardings=shardings, donate_argnums=0)(params)


def begin_from(config: Config, params: Any, workdir: str | Path) -> RunFolder:
  """Makes a run whose first checkpoint, of step 0, holds the given parameters and a fresh optimizer.

  `train` with the same config goes on from there.

  Args:
    config: the run's config.
    params: a tree of arrays of the shapes of config.model, on the host.
    workdir: where to make the run; absent or empty.

  Raises:
    InputError: the folder is in use, or the mesh does not divide a tensor.
  """
  config_lib.validate(config)
  mesh = make_mesh(config.mesh)
  shardings = step_lib.state_shardings(config, mesh)
  expected = nn.unbox(abstract_params(config.model))
  if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
    raise ValueError("params are not of the shapes of config.model")
  folder = check_new(workdir)
  state = fresh_state(config, jax.device_put(params, shardings.params), shardings)
  try:
    if folder.remote is not None:  # its config comes last: it is what makes the folder a run
      _write_first_checkpoint(config, folder, state)
      folder.remote.write(folder_lib.CONFIG, config_lib.to_json(config).encode())
      return folder
    _make_beside(config, folder, state)
  except (OSError, ValueError) as error:
    raise InputError(f"--workdir={folder.address}: can't be written ({error}); nothing was made of it") from error
  return folder


def _make_beside(config: Config, folder: RunFolder, state: step_lib.TrainState) -> None:
  """Makes the run beside its place: one that was cut off before it had its weights would start from random ones."""
  partial = RunFolder(folder.path.with_name(f".{folder.path.name}.partial"))
  shutil.rmtree(partial.path, ignore_errors=True)
  try:
    partial.create(config_lib.to_json(config))
    _write_first_checkpoint(config, partial, state)
    if folder.path.exists():
      folder.path.rmdir()
    partial.path.rename(folder.path)
  except (OSError, ValueError):
    shutil.rmtree(partial.path, ignore_errors=True)
    raise


def _write_first_checkpoint(config: Config, folder: RunFolder, state: step_lib.TrainState) -> None:
  checkpoints = open_checkpoints(config, folder)
  checkpoints.save(0, split(state), facts_of(config, None))
  checkpoints.close()


def check_new(workdir: str | Path) -> RunFolder:
  """A work directory for a new run: absent or empty; raises InputError for any other."""
  folder = RunFolder(workdir)
  if folder.has_run:
    raise InputError(f"--workdir={folder.address} holds a run already; give a folder that does not exist")
  if folder.occupants():
    raise InputError(f"--workdir={folder.address}: not empty; give a folder that does not exist")
  return folder

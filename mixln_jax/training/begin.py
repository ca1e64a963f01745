"""How a run begins: with drawn weights, with another run's or project's weights, or from its own newest checkpoint.

Weights that come from elsewhere become the run's checkpoint of step 0 (`write_first_checkpoint`). After that such a run
is like any other: `load_or_start` is the one place where "load or start?" is answered.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.data.tokenizer_files import write_tokenizer
from mixln_jax.errors import InputError
from mixln_jax.files import is_partial, settle, work_folder
from mixln_jax.model import admin
from mixln_jax.model.initial import initial_params
from mixln_jax.model.parameters import abstract_params
from mixln_jax.opening import Setup, make_loader
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.parallel.processes import agree, is_first, wait_for_all
from mixln_jax.parallel.rules import replicated
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.checkpoint import Checkpoints, DamagedError
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.outcome import STOPPED, read_outcome
from mixln_jax.training import finetune
from mixln_jax.training import step as step_lib
from mixln_jax.training.checkpoints import check_facts, facts_of, open_checkpoints, split
from mixln_jax.training.derived import with_derived
from mixln_jax.training.member import Member, warn
from mixln_jax.training.optimizer import init_moments, make_optimizer
from mixln_jax.training.program import Program, SingleProgram
from mixln_jax.training.resume import ResumePoint, resume_point
from mixln_jax.training.step import TrainState


def load_or_start(program: Program, members: Sequence[Member]) -> tuple[list[ResumePoint], TrainState]:
  """Where the members resume, or start, and the joint state there.

  They resume from the newest step of which every one that still trains has a whole checkpoint. A damaged checkpoint is
  quarantined, and the one before it is taken. A member that ended before the others (`member.outcome`) gets what it
  ended with, and is not updated any more.

  Returns:
    For each member the step and what was changed since, all of one step; and the joint state.

  Raises:
    InputError: a config contradicts what its run was trained with, or there is no step that all of them can resume
      from; nothing was changed.
  """
  for member in members:
    if member.live and member.config.train.start_from and not member.checkpoints.all_steps():
      _start_from_another(member)
  damaged: dict[tuple[int, int], DamagedError] = {}
  while True:
    steps = _common_steps(members, damaged)
    points = []
    for member in members:
      points.append(resume_point(member.old_config, member.config, steps, member.folder.address))
    step = points[0].step
    if any(point.step != step for point in points):
      raise InputError("together: the runs would resume from different steps; train them one by one")
    agree("the checkpoint to resume from", {"step": step, "checkpoints": steps})
    try:
      states = _restored(members, step if step in steps else None, damaged)
    except _MemberDamaged as error:
      damaged[error.index, error.step] = error.cause
      continue
    break
  for (index, bad_step), error in damaged.items():
    member = members[index]
    where = quarantine(member.folder, member.checkpoints, [bad_step], f"damaged_{bad_step}")
    warn(f"{error}; it was moved to {member.folder.shown(where)}, and the run resumes from the one before")
  return points, _joint_state(program, members, states)


class _MemberDamaged(Exception):
  """A member's checkpoint is not what was written."""

  def __init__(self, index: int, step: int, cause: DamagedError):
    super().__init__(str(cause))
    self.index, self.step, self.cause = index, step, cause


def _common_steps(members: Sequence[Member], damaged: dict[tuple[int, int], DamagedError]) -> list[int]:
  """Steps of which every member that still trains has a checkpoint that is not known to be damaged.

  Raises:
    InputError: some have checkpoints, and no step is common to all, so that beginning again would lose updates.
  """
  training = [member for member in members if member.live] or list(members)
  common: set[int] | None = None
  for member in training:
    whole = {step for step in member.checkpoints.all_steps() if (member.index, step) not in damaged}
    common = whole if common is None else common & whole
  if not common and any(member.checkpoints.all_steps() for member in training):
    if len(members) == 1:
      reasons = "; ".join(map(str, damaged.values()))
      raise InputError(f"no checkpoint of the run is whole: {reasons}; nothing was moved, use another workdir")
    if damaged or not _cut_off_in_first_saves(training):
      raise InputError(
        "together: there is no step of which all of the runs have a whole checkpoint; train them one by one, and each "
        "resumes from its own"
      )
    warn("together: a kill left some runs without their first checkpoint, so all of them begin again")
  return sorted(common or ())


def _cut_off_in_first_saves(members: Sequence[Member]) -> bool:
  """Whether some runs have no checkpoint and the others none but their first: the process ended between those saves.

  One that was stopped was trained alone: together all have their checkpoints before the first outcome is written. Its
  updates may be nearly all of the run, where checkpoints are rare.
  """
  outcomes = [read_outcome(member.folder) for member in members]
  if any(outcome is not None and outcome.status == STOPPED for outcome in outcomes):
    return False
  first_step = members[0].config.checkpoint.every_steps  # the runs of one program save at the same steps
  steps = [member.checkpoints.all_steps() for member in members]
  return [] in steps and all(some[-1] <= first_step for some in steps if some)


def _restored(
  members: Sequence[Member], step: int | None, damaged: Mapping[tuple[int, int], DamagedError]
) -> list[TrainState | None]:
  """Each member's own state at a step, of one that has ended the last whole one; None where it has no checkpoint."""
  states: list[TrainState | None] = []
  for member in members:
    chosen = step
    if not member.live:
      whole = [saved for saved in member.checkpoints.all_steps() if (member.index, saved) not in damaged]
      chosen = max(whole, default=None)
    if chosen is None:
      states.append(None)
      continue
    try:
      check_facts(member.checkpoints.facts(chosen), member.setup, member.folder)
      states.append(member.restore(chosen))
    except DamagedError as error:
      raise _MemberDamaged(member.index, chosen, error) from error
  return states


def _joint_state(program: Program, members: Sequence[Member], states: list[TrainState | None]) -> TrainState:
  if isinstance(program, SingleProgram) and states[0] is not None:
    return states[0]  # without drawing weights that would be thrown away
  state = program.initial_state()
  for member, own in zip(members, states, strict=True):
    if own is not None:
      state = program.put(state, member.index, own)
    elif admin.sublayers_to_profile(member.config.model):
      drawn = program.own(state, member.index)
      params = _profiled(member.setup, drawn.params, member.shardings.params)
      state = program.put(state, member.index, drawn.replace(params=params))
    if not member.live:
      state = program.halt(state, member.index)
  return state


def quarantine(folder: RunFolder, checkpoints: Checkpoints, steps: list[int], name: str) -> Path:
  """Moves checkpoints, and a copy of the metrics, into a folder of the run; returns it."""
  target = folder.unused(name)
  wait_for_all(f"{name} is chosen")
  if is_first():
    target.mkdir()
    for file_name in (folder_lib.METRICS, folder_lib.DIAGNOSTICS):  # first: once the checkpoints are gone, nobody asks
      if (folder / file_name).exists():
        shutil.copy(folder / file_name, target)
    folder.copy_out()
    checkpoints.move(steps, folder.place(target.name))
  wait_for_all(f"{name} is made")
  checkpoints.reload()
  return target


# Weights before the first update.


def initial_weights(setup: Setup, shardings: Any) -> Any:
  """The parameters before the first update, drawn or those that the run starts from; `shardings`: of each of them."""
  if setup.config.train.start_from:
    return finetune.starting_params(setup, finetune.find_start(setup))
  model, seed = setup.config.model, setup.config.seed
  return _profiled(setup, jax.jit(lambda: initial_params(model, seed), out_shardings=shardings)(), shardings)


def _profiled(setup: Setup, params: Any, shardings: Any) -> Any:
  """The same parameters; where the placement has Admin's scales, with those profiled on rows of the first batch."""
  config = setup.config
  if not admin.sublayers_to_profile(config.model):
    return params
  everywhere = replicated(setup.mesh)
  batch = {}
  for name, rows in _first_rows(setup, admin.ROWS).items():
    batch[name] = jax.make_array_from_callback(rows.shape, everywhere, rows.__getitem__)

  def profile(params: Any, batch: dict[str, jax.Array]) -> Any:
    return admin.profile_admin(
      config.model,
      params,
      batch["tokens_BT"],
      batch["weights_BT"],
      segment_ids_BT=batch.get("segment_ids_BT"),
      positions_BT=batch.get("positions_BT"),
    )

  # Without logical rules: every device sees all of these few rows.
  with jax.set_mesh(setup.mesh):
    return jax.jit(profile, out_shardings=shardings)(params, batch)


def _first_rows(setup: Setup, count: int) -> dict[str, np.ndarray]:
  """The first rows of step 0's batch, the same on every process."""
  batches = make_loader(setup, setup.config.train.batch_size, all_rows=True).train(0)
  try:
    return {name: rows[:count] for name, rows in next(batches).items()}
  finally:
    batches.close()


# Weights from elsewhere, as the checkpoint of step 0.


def fresh_state(config: Config, params: Any, shardings: TrainState) -> TrainState:
  """The state of no updates with given parameters, which lie on the mesh and are donated, and a fresh optimizer."""

  def state_of(params: Any) -> TrainState:
    moments = init_moments(make_optimizer(config), params, config.optimizer.moment_dtype)
    return step_lib.start_state(params, moments)

  return jax.jit(state_of, out_shardings=shardings, donate_argnums=0)(params)


def write_first_checkpoint(config: Config, checkpoints: Checkpoints, state: TrainState) -> None:
  """Saves weights that the run did not draw as its checkpoint of step 0, and waits until it is whole."""
  checkpoints.save(0, split(state), facts_of(config, None))
  checkpoints.wait()


def _start_from_another(member: Member) -> None:
  """Makes the checkpoint of step 0 of a run that starts from another run's weights, and says which."""
  start = finetune.find_start(member.setup)
  params = finetune.starting_params(member.setup, start)
  member.folder.write_json(folder_lib.START, start.identity())
  write_first_checkpoint(member.config, member.checkpoints, fresh_state(member.config, params, member.shardings))
  if is_first():
    print(f"start      {start.describe()}")


class Origin(NamedTuple):
  """Where imported weights come from, for the run's folder."""

  facts: Mapping[str, Any]  # what imported.json says
  tokenizer: Tokenizer | None = None  # the one that the weights read, where they bring it


def begin_from(config: Config, params: Any, workdir: str | Path, origin: Origin | None = None) -> RunFolder:
  """Makes a run whose checkpoint of step 0 holds the given parameters and a fresh optimizer; `train` resumes it.

  Args:
    config: the run's config.
    params: a tree of arrays of the shapes of config.model, on the host.
    workdir: where to make the run; absent or empty.
    origin: where the parameters come from; by default nothing is said of it.

  Raises:
    InputError: the folder is in use, or the mesh does not divide a tensor.
  """
  config = with_derived(config)
  config_lib.validate(config)
  mesh = make_mesh(config.mesh)
  shardings = step_lib.state_shardings(config, mesh)
  if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, abstract_params(config.model)):
    raise ValueError("params are not of the shapes of config.model")
  folder = check_new(workdir)
  state = fresh_state(config, jax.device_put(params, shardings.params), shardings)
  try:
    if folder.remote is not None:  # its config comes last: it is what makes the folder a run
      _make_first_checkpoint(config, folder, state)
      for name, content in _files_of(origin).items():
        folder.remote.write(name, content)
      folder.remote.write(folder_lib.CONFIG, config_lib.to_json(config).encode())
      return folder
    _make_beside(config, folder, state, origin)
  except (OSError, ValueError) as error:
    raise InputError(f"workdir={folder.address}: can't be written ({error}); nothing was made of it") from error
  return folder


def _files_of(origin: Origin | None) -> dict[str, bytes]:
  """What a run's folder holds of an origin: content by name."""
  if origin is None:
    return {}
  files = {folder_lib.IMPORTED: (json.dumps(origin.facts, indent=1) + "\n").encode()}
  if origin.tokenizer is not None:
    with tempfile.TemporaryDirectory() as temporary:
      written = write_tokenizer(origin.tokenizer, Path(temporary)).parent
      files |= {f"{folder_lib.TOKENIZER}/{path.name}": path.read_bytes() for path in written.iterdir()}
  return files


def _make_beside(config: Config, folder: RunFolder, state: TrainState, origin: Origin | None) -> None:
  """Makes the run aside: one that was cut off before it had its weights would start from random ones."""
  partial = RunFolder(work_folder(folder.path))
  shutil.rmtree(partial.path, ignore_errors=True)
  try:
    partial.create(config_lib.to_json(config))
    _make_first_checkpoint(config, partial, state)
    for name, content in _files_of(origin).items():
      (partial / name).parent.mkdir(exist_ok=True)
      (partial / name).write_bytes(content)
    settle(partial.path, folder.path, last=folder_lib.CONFIG)
  except (OSError, ValueError):
    shutil.rmtree(partial.path, ignore_errors=True)
    raise


def _make_first_checkpoint(config: Config, folder: RunFolder, state: TrainState) -> None:
  checkpoints = open_checkpoints(config, folder)
  write_first_checkpoint(config, checkpoints, state)
  checkpoints.close()


def check_new(workdir: str | Path) -> RunFolder:
  """A work directory for a new run: absent or empty; raises InputError for any other."""
  folder = RunFolder(workdir)
  if folder.has_run:
    raise InputError(f"workdir={folder.address} holds a run already; give a folder that does not exist")
  if [name for name in folder.occupants() if not is_partial(name)]:
    raise InputError(f"workdir={folder.address}: not empty; give a folder that does not exist")
  return folder

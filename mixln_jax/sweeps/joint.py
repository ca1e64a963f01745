"""Runs of a study as one program: which of them, and their folders. The loop is `training/loop.py`'s.

Each run keeps an ordinary folder, and its checkpoints are the ordinary ones, of its own tree. Nothing else is stored:
the joint state is put together from them, and a run that was started here can be trained alone.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.data.loader import Data
from mixln_jax.data.opening import open_data
from mixln_jax.errors import InputError
from mixln_jax.files import TEXTS, read_json, write_whole
from mixln_jax.opening import Setup
from mixln_jax.parallel.processes import agree, is_first, wait_for_all
from mixln_jax.runs.outcome import ENDED_ITSELF, FINISHED, Outcome, read_outcome
from mixln_jax.sweeps.sequence import has_ended
from mixln_jax.sweeps.study import Run, Study
from mixln_jax.training import finetune
from mixln_jax.training.loop import check_batches, start_facts, train_members
from mixln_jax.training.member import Member, old_config_of
from mixln_jax.training.program import JointProgram
from mixln_jax.training.progress import Clock
from mixln_jax.training.references import with_references

TOGETHER = "together.json"


def joint_set(runs: Sequence[Run]) -> list[Run]:
  """The runs to be trained together: those that were when it was last begun, else all that are not done.

  A run that was frozen stays among them: another number of runs would round in another way. One that has finished does
  not: it is never trained again.
  """
  path = _study_folder(runs) / TOGETHER
  names = read_json(path, {"runs": TEXTS})["runs"] if path.exists() else []
  begun = []
  for run in runs:
    outcome = read_outcome(run.folder) if run.name in names else None
    if run.name in names and (outcome is None or outcome.status != FINISHED):
      begun.append(run)
  # By their outcomes alone: the lock of a machine that was killed may lie in the folder of a run that has ended.
  if not all(map(has_ended, begun)):
    return begun
  return [run for run in runs if not has_ended(run)]


def _study_folder(runs: Sequence[Run]) -> Path:
  return runs[0].folder.path.parents[1]


def train_together(study: Study, runs: Sequence[Run]) -> list[Outcome]:
  """Trains runs as one program, from the newest step that all of them have a checkpoint of; returns their outcomes.

  A run whose updates stop being finite, or that diverges where the config ends such runs, is frozen and marked; the
  others continue.

  Raises:
    InputError: they can't be one program, or contradict what their folders hold; nothing was changed.
  """
  clock = Clock()
  check_keeps_two(study.base)
  program = JointProgram({run.name: run.config for run in runs}, study.base.mesh)
  corpus = open_data(program.config)
  with opened_members(program, runs, corpus) as members:
    if is_first():
      write_whole(_study_folder(runs) / TOGETHER, json.dumps({"runs": [run.name for run in runs]}) + "\n")
    return train_members(program, members, clock)


def check_keeps_two(config: Config) -> None:
  """Rejects a config that keeps one checkpoint: a kill between the saves of two runs would leave no step of both."""
  if config.checkpoint.keep_last < 2:
    raise InputError(
      f"config.checkpoint.keep_last={config.checkpoint.keep_last}: runs that are trained together, when cut off, need "
      "the checkpoint before the newest; set it to 2 or more"
    )


@contextlib.contextmanager
def opened_members(program: JointProgram, runs: Sequence[Run], corpus: Data) -> Iterator[list[Member]]:
  """The runs in the slots of a program: their folders are created and locked, and their checkpoints open.

  Raises:
    InputError: a run contradicts what its folder holds, or another process trains it; nothing was changed.
  """
  check_batches(runs[0].config, program.mesh)
  shared = Setup(runs[0].config, program.mesh, corpus)
  agree("the start of the study", {run.name: run.values for run in runs} | start_facts(shared))
  shared = with_references(shared, [run.folder for run in runs])
  setups = [shared._replace(config=run.config) for run in runs]
  old_configs = [old_config_of(run.folder, run.config) for run in runs]
  for run, setup in zip(runs, setups, strict=True):
    if not run.folder.has_run:
      if run.config.train.start_from:
        finetune.find_start(setup)  # for its checks: nothing is written where they fail
      run.folder.create(config_lib.to_json(run.config))
  wait_for_all("the runs' folders")
  with contextlib.ExitStack() as stack:
    members = []
    for index, (run, setup, old_config) in enumerate(zip(runs, setups, old_configs, strict=True)):
      stack.enter_context(run.folder.lock())
      wait_for_all(f"the lock of {run.name}")
      shardings = program.own_shardings(index)
      member = stack.enter_context(Member.opened(index, setup, run.folder, old_config, shardings))
      outcome = read_outcome(run.folder)
      if outcome is not None and outcome.status in ENDED_ITSELF:
        member.outcome = outcome  # frozen before: it stays what it is
      members.append(member)
    yield members

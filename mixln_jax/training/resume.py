"""Whether, and from which checkpoint, a run may resume with a config."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.training.optimizer import learning_rate_schedule


class ResumePoint(NamedTuple):
  step: int  # updates done
  changes: list[str]  # allowed differences of the config, a line each


def resume_point(old: Config, new: Config, steps: Sequence[int], workdir: str) -> ResumePoint:
  """The checkpoint from which the run with config `old` resumes as `new`; step 0 where it has none.

  A field that decides what the run computes can't change. The length of the run can, where every step already done had
  the learning rate that the new schedule gives it; a wsd run that has decayed goes back to where its decay began.

  Args:
    old: the config that the run was started with.
    new: the config that it is to resume with.
    steps: its checkpoints.
    workdir: for the message.

  Raises:
    InputError: the configs contradict each other; every field is listed.
  """
  differences = config_lib.differences(old, new)
  refused = [
    f"config.{name}: {before!r} in the run, {after!r} now"
    for name, before, after in differences
    if config_lib.FIELDS[name].on_resume == config_lib.REFUSED
  ]
  if refused:
    raise InputError(f"workdir={workdir} holds another run: {'; '.join(refused)}; use its values, or another workdir")
  changes = [f"config.{name}: {before!r} -> {after!r}" for name, before, after in differences]
  newest = max(steps, default=0)
  if all(config_lib.FIELDS[name].on_resume == config_lib.FREE for name, _, _ in differences):
    return ResumePoint(newest, changes)
  if new.train.num_steps <= newest and new.train.num_steps != old.train.num_steps:
    raise InputError(
      f"config.train.num_steps={new.train.num_steps}: the run in {workdir} has done {newest} steps "
      "already; raise it, or use another workdir"
    )
  if _rates_agree(old, new, newest):
    return ResumePoint(newest, changes)
  decay_start = config_lib.decay_start(old)
  if decay_start is not None and decay_start in steps and _rates_agree(old, new, decay_start):
    return ResumePoint(decay_start, [*changes, f"resumes from step {decay_start}, where the decay began"])
  raise InputError(_why_not(old, new, newest, workdir))


def _rates(config: Config, num_steps: int) -> np.ndarray:
  schedule = learning_rate_schedule(config)
  return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(num_steps)))


def _rates_agree(old: Config, new: Config, num_steps: int) -> bool:
  return num_steps == 0 or np.array_equal(_rates(old, num_steps), _rates(new, num_steps))


def _why_not(old: Config, new: Config, newest: int, workdir: str) -> str:
  before, after = _rates(old, newest), _rates(new, newest)
  step = int(np.flatnonzero(before != after)[0])
  fields = ", ".join(
    f"config.{name} {b!r} -> {a!r}"
    for name, b, a in config_lib.differences(old, new)
    if config_lib.FIELDS[name].on_resume == config_lib.CHECKED
  )
  return (
    f"the run in {workdir} can't resume with {fields}: step {step + 1} of the {newest} already done had learning rate "
    f"{before[step]:.9g}, with the new {new.optimizer.schedule} schedule it would have been "
    f"{after[step]:.9g}; only the schedules constant, wsd and trapezoid, with config.optimizer.warmup_steps stated, "
    "can be extended; use another workdir"
  )

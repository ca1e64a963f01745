"""Opening a run again: its config and its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.folder import CHECKPOINTS, CONFIG, RunFolder


class OpenedRun(NamedTuple):
  config: Config
  step: int
  params: Any


def read_config(folder: RunFolder) -> Config:
  """The config of a run.

  Raises:
    InputError: the folder holds no run, or its config.json is damaged.
  """
  try:
    return config_lib.from_json(folder.read(CONFIG))
  except (ValueError, TypeError, AttributeError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"{folder.address}/{CONFIG}: damaged ({error}); restore it from a checkpoint's facts") from error


def open_params(folder: RunFolder, abstract_of: Callable[[Config], Any], step: int | None = None) -> OpenedRun:
  """The parameters of a run's newest checkpoint, or of the one at `step`.

  Args:
    folder: the run.
    abstract_of: from its config to the shapes, types and shardings to restore onto.
    step: the checkpoint to open.

  Raises:
    InputError: there is no such run or checkpoint, or it is damaged.
  """
  config = read_config(folder)
  checkpoints = Checkpoints(folder.place(CHECKPOINTS), read_only=True)
  try:
    steps = checkpoints.all_steps()
    if not steps:
      raise InputError(f"--workdir={folder.address}: the run has no checkpoint yet; let it train to one")
    if step is not None and step not in steps:
      raise InputError(f"--step={step}: the run has no checkpoint of that step; it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    params = checkpoints.restore(step, {"params": abstract_of(config)})["params"]
    return OpenedRun(config, step, params)
  finally:
    checkpoints.close()

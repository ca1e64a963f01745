"""The steps of a run on which its layers are looked at, and diagnostics.jsonl."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mixln_jax.diagnostics.parts import GAINS
from mixln_jax.diagnostics.spikes import LossWindow
from mixln_jax.model.parameters import used_by_layer
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import JsonLines, json_number, read_lines
from mixln_jax.training import step as step_lib
from mixln_jax.training.setup import Setup, lower_train_step


class Diagnosis:
  """Which program a step runs, and what diagnostics.jsonl gets of it.

  On the first step and on every `config.diagnostics.every_steps`-th the same step is run by a second program, which
  also gives statistics by layer; on all others, the ordinary one. Without diagnostics there is no second program.

  A line holds `step`, `loss`, `loss_spike_score` (`diagnostics/spikes.py`) and the names of `diagnostics/layers.py` and
  `diagnostics/parts.py`, each a list of L numbers, or a number where it is not of a layer. null: there is none, such as
  the second gain of a layer that has one; "nan", "inf": not finite.
  """

  def __init__(self, setup: Setup, shardings: step_lib.TrainState, folder: RunFolder, start_step: int):
    """Compiles what the run will need, and cuts diagnostics.jsonl back to `start_step`, the step that was restored."""
    self._every = setup.config.diagnostics.every_steps
    self._step = lower_train_step(setup.config, setup.mesh, shardings, diagnose=True).compile() if self._every else None
    path = folder / folder_lib.DIAGNOSTICS
    self._lines = JsonLines(path, start_step) if self._every or path.exists() else None
    lines = read_lines(folder / folder_lib.METRICS) if self._lines is not None and self._lines.writes else []
    self._losses = LossWindow(float(line["loss"]) for line in lines if line["split"] == "train")
    used = used_by_layer(setup.config.model)
    self._used = {statistic: used[name] for statistic, name in GAINS.items()}

  def program(self, step: int, ordinary: jax.stages.Compiled) -> jax.stages.Compiled:
    """What runs update `step` (from 1)."""
    if self._step is None or (step != 1 and step % self._every != 0):
      return ordinary
    return self._step

  def seen(self, step: int, loss: float, statistics: Mapping[str, Any] | None) -> None:
    """Takes note of a step: its loss, and its statistics where it was a diagnostic one."""
    score = self._losses.score(loss)
    self._losses.add(loss)
    if statistics is None or self._lines is None:
      return
    spike = None if score is None else json_number(score)
    line = {"step": step, "loss": json_number(loss), "loss_spike_score": spike}
    self._lines.write(line | {name: self._jsonable(name, np.asarray(value)) for name, value in statistics.items()})

  def _jsonable(self, name: str, value: np.ndarray) -> Any:
    if value.ndim == 0:
      return json_number(float(value))
    used = self._used.get(name, np.ones(value.shape, bool))
    return [json_number(float(x)) if there else None for x, there in zip(value, used, strict=True)]

  def close(self) -> None:
    if self._lines is not None:
      self._lines.close()

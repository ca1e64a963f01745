"""The steps of a run on which its layers are looked at, and diagnostics.jsonl."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixln_jax.config import Config
from mixln_jax.diagnostics.parts import GAINS
from mixln_jax.diagnostics.spikes import LossWindow
from mixln_jax.files import json_number
from mixln_jax.model.parameters import used_by_layer
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import JsonLines, read_metrics


def is_diagnostic(step: int, every: int) -> bool:
  """Whether update `step` (from 1) is one whose layers are looked at: the first one, and every `every`-th."""
  return every > 0 and (step == 1 or step % every == 0)


class Diagnosis:
  """Writes diagnostics.jsonl of one run.

  A line holds `step`, `loss`, `loss_spike_score` (`diagnostics/spikes.py`) and the names of `diagnostics/layers.py` and
  `diagnostics/parts.py`, each a list of L numbers, or a number where it is not of a layer. null: there is none, such as
  the second gain of a layer that has one; "nan", "inf": not finite.
  """

  def __init__(self, config: Config, folder: RunFolder, start_step: int, *, every: int):
    """Cuts diagnostics.jsonl back to `start_step`, the step that was restored; `every`: steps between diagnoses."""
    path = folder / folder_lib.DIAGNOSTICS
    self._lines = JsonLines(path, start_step) if every or path.exists() else None
    losses: list[float] = []
    if self._lines is not None and self._lines.writes:
      lines = read_metrics(folder / folder_lib.METRICS)
      losses = [float(line["loss"]) for line in lines if line["split"] == "train"]
    self._losses = LossWindow(losses)
    used = used_by_layer(config.model)
    none = np.zeros(config.model.num_layers, bool)  # of a gain that only other runs of the program have
    self._used = {statistic: used.get(name, none) for statistic, name in GAINS.items()}

  def seen(self, step: int, loss: float, statistics: Mapping[str, Any] | None) -> None:
    """Takes note of a step: its loss, and its statistics where it was a diagnostic one."""
    score = self._losses.score(loss)
    self._losses.add(loss)
    if statistics is None or self._lines is None:
      return
    line: dict[str, Any] = {"step": step, "loss": json_number(loss)}
    line["loss_spike_score"] = None if score is None else json_number(score)
    for name, value in statistics.items():
      line[name] = self._jsonable(name, np.asarray(value))
    self._lines.write(line)

  def _jsonable(self, name: str, value: np.ndarray) -> Any:
    if value.ndim == 0:
      return json_number(float(value))
    used = self._used.get(name, np.ones(value.shape, bool))
    return [json_number(float(x)) if there else None for x, there in zip(value, used, strict=True)]

  def close(self) -> None:
    if self._lines is not None:
      self._lines.close()

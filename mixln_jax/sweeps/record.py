"""A study's curves as one CSV file: what is kept of it, and what a new one is held against."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mixln_jax.errors import InputError
from mixln_jax.files import local_path
from mixln_jax.runs.folder import METRICS
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.sweeps.study import Run

COLUMNS = ("run", "split", "step", "loss")
TRAIN_LINES = 50  # of each run's training curve, evenly spaced


class Held(NamedTuple):
  """A run's last validation loss, in nats, in the record and now; None where the run has none of that step."""

  run: str
  step: int
  recorded: float
  found: float | None

  def within(self, tolerance: float) -> bool:
    """Whether the two agree; a loss that was not finite agrees with one that is not."""
    if self.found is None or not math.isfinite(self.recorded):
      return self.found is not None and not math.isfinite(self.found)
    return abs(self.found - self.recorded) <= tolerance


def write_curves(runs: Sequence[Run], path: str | Path) -> int:
  """Writes every validation loss and a thinned training curve of each run that has any; returns the number of lines.

  Raises:
    InputError: no run has any, or the file can't be written.
  """
  rows = []
  for run in runs:
    lines = read_metrics(run.folder / METRICS)
    train = [line for line in lines if line["split"] == "train"]
    kept = train[:: max(1, len(train) // TRAIN_LINES)]
    kept += [line for line in lines if line["split"] == "validation"]
    rows += [(run.name, line["split"], line["step"], f"{float(line['loss']):.6f}") for line in kept]
  if not rows:
    raise InputError(f"export={path}: no run of the study has been trained yet")
  try:
    with local_path(path, "export").open("w", newline="") as file:
      csv.writer(file).writerows([COLUMNS, *rows])
  except OSError as error:
    raise InputError(f"export={path}: can't be written ({error.strerror})") from error
  return len(rows)


def hold_against(runs: Sequence[Run], path: str | Path) -> list[Held]:
  """Each run of the record beside what the run of that name gave at the same step.

  Raises:
    InputError: the file can't be read, or is no record.
  """
  try:
    with local_path(path, "compare").open(newline="") as file:
      rows = list(csv.DictReader(file))
    last = {row["run"]: (int(row["step"]), float(row["loss"])) for row in rows if row["split"] == "validation"}
  except (OSError, KeyError, ValueError, TypeError) as error:
    raise InputError(f"compare={path}: no record of a study ({error}); `write_curves` writes one") from error
  if not last:
    raise InputError(f"compare={path}: the record has no validation loss")
  by_name = {run.name: run for run in runs}
  held = []
  for name, (step, recorded) in last.items():
    lines = read_metrics(by_name[name].folder / METRICS) if name in by_name else []
    losses = [float(line["loss"]) for line in lines if line["split"] == "validation" and line["step"] == step]
    held.append(Held(name, step, recorded, losses[0] if losses else None))
  return held

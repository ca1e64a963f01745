"""Curves over steps, from metrics.jsonl: the mean of each group, with a band, and its single seeds on demand."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mixln_jax.reporting.groups import Group
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.panels import Figure, Panel, Series
from mixln_jax.reporting.source import Source, make_figure, mean_label

MAX_POINTS = 250  # of a curve; more would only make the page heavy
THINNED = f"A curve of more than {MAX_POINTS} steps is drawn as means over pieces of equally many steps."
DIVERGED = "A cross ends a run that diverged."
BAND = "Lines are means over seeds, up to the last step that all of them have; bands are one standard deviation."


def loss_curves(source: Source) -> Figure:
  """Training and validation loss."""
  of_pairs = [run.of_pairs for run in source.runs]
  meanings = []
  if not all(of_pairs):
    meanings.append("Cross-entropy in nats a counted token")
  if any(of_pairs):
    meanings.append("loss over pairs of answers (config.preference.loss) in nats a pair")
  meaning = "; ".join(meanings)
  caption = (
    f"{meaning[0].upper()}{meaning[1:]} (metrics.jsonl): of each training batch before its update, and over the fixed "
    f"validation set.{_notes(source)}"
  )
  train = _curves(source, _train, "loss")
  validation = _curves(source, _validation, "loss")
  steps = sorted({x for line in validation for x in line.x})
  panels = [
    Panel("training", "step", "loss (nats)", train, show_markers=False, x_ticks=steps),
    Panel("validation", "step", "loss (nats)", validation, x_ticks=steps),
  ]
  return make_figure("loss", "Loss", caption, panels)


def preference_curves(source: Source) -> Figure:
  """Of runs on pairs of answers: accuracy, margin and rewards on the held-out pairs."""
  caption = (
    "On the fixed validation set (metrics.jsonl). Accuracy: the fraction of the pairs whose preferred answer has the "
    "larger reward. Margin: the mean reward of the preferred answers minus that of the others. A reward is what the "
    f"run’s own loss makes of an answer.{_notes(source)}"
  )
  titles = {"accuracy": "accuracy", "margin": "margin"}
  titles |= {"chosen_reward": "reward of the preferred answers", "rejected_reward": "reward of the others"}
  panels = []
  for name, title in titles.items():
    series = _curves(source, _validation_of_pairs, name)
    steps = sorted({x for line in series for x in line.x})
    unit = "fraction of the pairs" if name == "accuracy" else "reward"
    panels.append(Panel(title, "step", unit, series, x_ticks=steps))
  return make_figure("preferences", "Pairs of answers", caption, panels)


def gradient_norm_curve(source: Source) -> Figure:
  """Global gradient norm by step."""
  caption = (
    "Global norm of the gradient of the mean loss, all parameters, before clipping (metrics.jsonl). The table of runs "
    f"counts the updates that were skipped because their loss or gradient was not finite.{_notes(source)}"
  )
  series = _curves(source, _train, "gradient_norm")
  steps = sorted({float(step) for run in source.runs for step in run.validation["step"]})
  panel = Panel("", "step", "gradient norm", series, log_y=True, show_markers=False, x_ticks=steps)
  return make_figure("gradient_norm", "Gradient norm by step", caption, [panel])


def _notes(source: Source) -> str:
  """How the curves of these runs are to be read."""
  notes = []
  if any(len(group.runs) > 1 for group in source.featured):
    notes.append(BAND)
  if any(len(run.train) > MAX_POINTS for run in source.runs):
    notes.append(THINNED)
  if any(run.diverged for run in source.runs):
    notes.append(DIVERGED)
  return "".join(f" {note}" for note in notes)


def _train(run: ReportedRun) -> pd.DataFrame:
  return run.train


def _validation(run: ReportedRun) -> pd.DataFrame:
  return run.validation


def _validation_of_pairs(run: ReportedRun) -> pd.DataFrame:
  return run.validation if run.of_pairs else pd.DataFrame()


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
  """At most `most` points, each the mean of equally many neighbours; NaN where none of them is finite.

  Pieces of unequal size would change the noise of a curve in the middle. A rest that fills no piece is left out where
  it is less than half of one, since its mean would be noisier than all others.
  """
  size = math.ceil(len(x) / most)
  if size <= 1:
    return x.tolist(), y.tolist()
  pieces = len(x) // size + (1 if len(x) % size > size / 2 else 0)
  thin_x, thin_y = [], []
  for piece in range(pieces):
    some_x, some_y = x[piece * size : (piece + 1) * size], y[piece * size : (piece + 1) * size]
    finite = some_y[np.isfinite(some_y)]
    thin_x.append(float(some_x.mean()))
    thin_y.append(float(finite.mean()) if finite.size else math.nan)
  return thin_x, thin_y


def _curves(source: Source, metrics_of: Callable[[ReportedRun], pd.DataFrame], name: str) -> list[Series]:
  """The curves of the metric `name`: a line for each featured group, and of one of several runs also one for each."""
  means, details = [], []
  for group in source.featured:
    curves: dict[int, pd.Series] = {}
    for index in group.runs:
      metrics = metrics_of(source.runs[index])
      if name in metrics and np.isfinite(metrics[name]).any():
        curves[index] = pd.Series(metrics[name].to_numpy(), metrics["step"].to_numpy())
    if len(curves) == 1:
      means += [_single(source, index, curve) for index, curve in curves.items()]
    elif curves:
      means.append(_mean(group, curves))
      details += [_single(source, index, curve, detail=True) for index, curve in curves.items()]
  return [*means, *details]


def _mean(group: Group, curves: dict[int, pd.Series]) -> Series:
  """Mean and standard deviation over runs, at the steps that all of them have."""
  together = pd.concat(curves, axis="columns", join="inner").sort_index()
  steps = together.index.to_numpy(float)
  x, y = thin(steps, together.mean(axis="columns", skipna=False).to_numpy(float))
  _, std = thin(steps, together.std(axis="columns", skipna=False).to_numpy(float))
  return Series(mean_label(group.label, len(curves)), x, y, group.style, list(curves), std, band=True)


def _single(source: Source, index: int, curve: pd.Series, *, detail: bool = False) -> Series:
  """One run; the last point of one that diverged is marked."""
  x, y = thin(curve.index.to_numpy(float), curve.to_numpy(float))
  finite = [position for position, value in enumerate(y) if math.isfinite(value)]
  marked: Sequence[int] = ()
  notes: Sequence[str] = ()
  if source.runs[index].diverged and finite:
    last = finite[-1]
    marked = [last]
    notes = ["diverged" if position == last else "" for position in range(len(x))]
  style = source.group_of(index).style
  return Series(source.run_label(index), x, y, style, (index,), notes=notes, marked=marked, detail=detail)

"""Curves over steps, from metrics.jsonl."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.panels import Figure, Panel, Series
from mixln_jax.reporting.source import Source, make_figure
from mixln_jax.text import perplexity

MAX_POINTS = 250  # of a curve; more would only make the page heavy
THINNED = f"Each point of a curve of more than {MAX_POINTS} steps is the mean of several neighbouring steps."
DIVERGED = "A cross ends a run that diverged."


def loss_curves(source: Source) -> Figure:
  """Training and validation loss."""
  caption = (
    "Cross-entropy in nats a counted token (metrics.jsonl): of each training batch before its update, and over the "
    f"fixed validation set. {THINNED} {DIVERGED}"
  )
  train = _curves(source, _train, "loss")
  validation = _curves(source, _validation, "loss")
  panels = [
    Panel("training", "step", "loss (nats)", train, show_markers=False),
    Panel("validation", "step", "loss (nats)", validation),
  ]
  return _legend_of_groups(source, make_figure("loss", "Loss", caption, panels))


def perplexity_curves(source: Source) -> Figure:
  """The exponential of the loss."""
  caption = f"exp(loss), on a logarithmic scale: of the training batch, and of the validation set. {THINNED} {DIVERGED}"
  train = _curves(source, _train, "loss", perplexity)
  validation = _curves(source, _validation, "loss", perplexity)
  panels = [
    Panel("training", "step", "perplexity", train, log_y=True, show_markers=False),
    Panel("validation", "step", "perplexity", validation, log_y=True),
  ]
  return _legend_of_groups(source, make_figure("perplexity", "Perplexity", caption, panels))


def gradient_norm_curve(source: Source) -> Figure:
  """Global gradient norm by step."""
  caption = (
    "Global norm of the gradient of the mean loss, all parameters, before clipping (metrics.jsonl). The table of runs "
    f"counts the updates that were skipped because their loss or gradient was not finite. {THINNED}"
  )
  series = _curves(source, _train, "gradient_norm")
  panel = Panel("all parameters", "step", "gradient norm", series, log_y=True, show_markers=False)
  return _legend_of_groups(source, make_figure("gradient_norm", "Gradient norm by step", caption, [panel]))


def _train(run: ReportedRun) -> pd.DataFrame:
  return run.train


def _validation(run: ReportedRun) -> pd.DataFrame:
  return run.validation


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
  """At most `most` points: means of neighbouring ones, without values that are not finite; NaN where none is finite."""
  if len(x) <= most:
    return x.tolist(), y.tolist()
  thin_x, thin_y = [], []
  for some_x, some_y in zip(np.array_split(x, most), np.array_split(y, most), strict=True):
    finite = some_y[np.isfinite(some_y)]
    thin_x.append(float(some_x.mean()))
    thin_y.append(float(finite.mean()) if finite.size else math.nan)
  return thin_x, thin_y


def _curves(
  source: Source,
  metrics_of: Callable[[ReportedRun], pd.DataFrame],
  name: str,
  change: Callable[[float], float] | None = None,
) -> list[Series]:
  """One line a run of the metric `name`; the last point of a run that diverged is marked."""
  curves = []
  for index, run in enumerate(source.runs):
    metrics = metrics_of(run)
    if name not in metrics or metrics.empty:
      continue
    values = metrics[name] if change is None else metrics[name].map(change)
    x, y = thin(metrics["step"].to_numpy(), values.to_numpy())
    finite = [position for position, value in enumerate(y) if math.isfinite(value)]
    if not finite:
      continue
    marked: Sequence[int] = ()
    notes: Sequence[str] = ()
    if run.diverged:
      last = finite[-1]
      marked = [last]
      notes = ["diverged" if position == last else "" for position in range(len(x))]
    style = source.group_of(index).style
    curves.append(Series(source.run_label(index), x, y, style, (index,), notes=notes, marked=marked))
  return curves


def _legend_of_groups(source: Source, figure: Figure) -> Figure:
  """The figure with a legend that names groups, not each of their runs."""
  return dataclasses.replace(figure, group_names={group.style: group.label for group in source.groups})

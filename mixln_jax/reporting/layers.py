"""What is drawn by layer: statistics while training (diagnostics.jsonl), and of the trained model (diagnose.json).

Each line is the mean over a group's runs, with their standard deviation.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mixln_jax.placement import SUBLAYERS
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.model_diagnosis import ModelDiagnosis
from mixln_jax.reporting.panels import Figure, Panel, Series
from mixln_jax.reporting.source import SEEDS_NOTE, Source, make_figure, mean_label

LAYER_AXIS = "layer (1 = first)"
DEPTH_AXIS = "layers that the stream has passed"
# Which positions an angular distance is the mean over, as diagnose.json and as a reader calls them.
POSITIONS = {"last": "last counted token", "all": "all counted tokens"}

ReadLayers = Callable[[ReportedRun], np.ndarray | None]


def by_depth(source: Source, read: ReadLayers, first: int = 1) -> list[Series]:
  """A line for each featured group of what `read` finds in its runs; `first` is the x of the first value."""
  lines = []
  for group in source.featured:
    runs, arrays = [], []
    for index in group.runs:
      values = read(source.runs[index])
      if values is not None:
        runs.append(index)
        arrays.append(values)
    if not runs:
      continue
    stack = np.stack(arrays)
    x = np.arange(first, first + stack.shape[1], dtype=float).tolist()
    std = stack.std(axis=0, ddof=1).tolist() if len(runs) > 1 else ()
    lines.append(Series(mean_label(group.label, len(runs)), x, stack.mean(axis=0).tolist(), group.style, runs, std))
  return lines


# While training.


def training_gradient_norms(source: Source) -> Figure:
  """Gradient norms by layer from diagnostics.jsonl."""
  caption = (
    "Norm of the gradient of the mean loss over all matrices of a sublayer, gains apart, before clipping, on the "
    "training batch of that step (diagnostics.jsonl). Step 1 is the gradient at the initial weights, as in figure 3 of "
    f"arXiv 2412.13795, which does not define its norm. {SEEDS_NOTE}"
  )
  names = {f"{sublayer}/gradient_norm": sublayer for sublayer in SUBLAYERS}
  panels = []
  for at_first in (True, False):
    panels += _training_panels(source, names, "gradient norm", log_y=True, at_first=at_first)
  return make_figure("layer_gradient_norm", "Gradient norm by layer, while training", caption, panels)


def residual_growth(source: Source) -> Figure:
  """Root mean square of the stream by depth; its variance, the square of it where the mean is 0, would add nothing."""
  caption = (
    "Root mean square of the residual stream after each layer, on the training batch of that step "
    f"(diagnostics.jsonl); Pre-LN lets it grow with depth (arXiv 2502.05795). {SEEDS_NOTE}"
  )
  panels = []
  for at_first in (True, False):
    panels += _training_panels(source, {"stream_rms": "RMS"}, "RMS", log_y=True, at_first=at_first)
  return make_figure("residual_growth", "Residual stream by depth", caption, panels)


# What sublayers do: a figure, and so a file, for each group of panels.
AT_LAST_STEP = "At the last step in diagnostics.jsonl."


def update_ratio(source: Source) -> Figure:
  """How much the sublayers' weights are updated."""
  caption = f"Norm of the update over norm of the weights. {AT_LAST_STEP} {SEEDS_NOTE}"
  panels = _sublayer_panels(source, "update_ratio", "update ratio", log_y=True)
  return make_figure("update_ratio", "Update ratio by layer", caption, panels)


def branch_ratio(source: Source) -> Figure:
  """What the sublayers add to the stream."""
  caption = f"RMS of what a sublayer adds over RMS of what it adds to. {AT_LAST_STEP} {SEEDS_NOTE}"
  panels = _sublayer_panels(source, "branch_ratio", "branch ratio", log_y=True)
  return make_figure("branch_ratio", "What sublayers add, by layer", caption, panels)


def norm_gains(source: Source) -> Figure:
  """The norms' gains."""
  caption = f"Root mean square of a norm's gains. {AT_LAST_STEP} {SEEDS_NOTE}"
  panels = _sublayer_panels(source, "norm_gain_rms", "norm gain RMS")
  return make_figure("norm_gain", "Norm gains by layer", caption, panels)


def attention_statistics(source: Source) -> Figure:
  """What attention looks like."""
  panels = _training_panels(source, {"attention/largest_logit": "largest logit"}, "logit")
  panels += _training_panels(source, {"attention/entropy": "entropy"}, "entropy (nats)")
  caption = f"Entropy: of the attention weights, mean over heads and positions. {AT_LAST_STEP} {SEEDS_NOTE}"
  return make_figure("attention", "Attention by layer", caption, panels)


def turning(source: Source) -> Figure:
  """How much a layer turns the stream, while training."""
  panels = _training_panels(source, {"cosine": ""}, "cosine of layer input and output")
  caption = f"Cosine between the residual stream before and after each layer. {AT_LAST_STEP} {SEEDS_NOTE}"
  return make_figure("cosine", "Cosine of a layer's input and output", caption, panels)


def _sublayer_panels(source: Source, name: str, label: str, *, log_y: bool = False) -> list[Panel]:
  names = {f"{sublayer}/{name}": sublayer for sublayer in SUBLAYERS}
  return _training_panels(source, names, label, log_y=log_y)


def _training_panels(
  source: Source, names: Mapping[str, str], y_label: str, *, log_y: bool = False, at_first: bool = False
) -> list[Panel]:
  """A panel for each statistic (name -> title), at step 1 or at the last step."""
  when = "step 1" if at_first else _last_steps(source)
  panels = []
  for name, title in names.items():
    lines = by_depth(source, lambda run, name=name: _statistic(run, name, at_first=at_first))
    panels.append(Panel(", ".join(filter(None, (title, when))), LAYER_AXIS, y_label, lines, log_y=log_y))
  return panels


def _statistic(run: ReportedRun, name: str, *, at_first: bool) -> np.ndarray | None:
  """One statistic by layer [L] of diagnostics.jsonl: of step 1, or of the last line that has it."""
  lines = [line for line in run.diagnostics if line.get(name) is not None]
  if at_first:
    lines = [line for line in lines if line["step"] == 1]
  return _layers(lines[-1][name], run) if lines else None


def _layers(values: Any, run: ReportedRun) -> np.ndarray | None:
  """A list of one number a layer as an array; None for anything else."""
  try:
    array = np.array(values, float)
  except (TypeError, ValueError):
    return None
  return array if array.shape == (run.num_layers,) else None


def _last_steps(source: Source) -> str:
  steps = sorted({int(run.diagnostics[-1]["step"]) for run in source.runs if run.diagnostics})
  if not steps:
    return ""
  return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


# Of the trained model.


def diagnosed_gradient_norms(source: Source) -> Figure:
  """Gradient norms by layer from diagnose.json."""
  panels = []
  for when, title in (("initial", "initial weights"), ("checkpoint", "checkpoint")):
    for sublayer in SUBLAYERS:
      read = diagnosed(lambda found, when=when, sublayer=sublayer: found.gradient_norm.get(when, {}).get(sublayer))
      lines = by_depth(source, read)
      panels.append(Panel(f"{sublayer}, {title}", LAYER_AXIS, "gradient norm", lines, log_y=True))
  meaning = "Norm of the gradient of the mean loss over a sublayer's matrices, on the sample of diagnose"
  caption = f"{_definition(source, 'gradient_norm', meaning)} {SEEDS_NOTE}"
  return make_figure("diagnosed_gradient_norm", "Gradient norm by layer, on one sample", caption, panels)


def angular_distance_last(source: Source) -> Figure:
  """Angular distance at the last counted token of each record."""
  return _angular_distance(source, "last")


def angular_distance_all(source: Source) -> Figure:
  """Angular distance at all counted tokens."""
  return _angular_distance(source, "all")


def _angular_distance(source: Source, which: str) -> Figure:
  """Heat maps of the angular distance between the inputs of layers l and l + n, on one colour scale."""
  # Row n - 1, column l, as the paper draws it.
  panels = maps(source, diagnosed(lambda found: found.angular_distance.get(which)), "layer l (1 = first)", "n")
  meaning = (
    "arccos of the cosine, over π, between the residual stream before layer l and before layer l + n, mean over the "
    "sample; before the final norm (Gromov et al., arXiv 2403.17887; Mix-LN, arXiv 2412.13795, figure 5)"
  )
  caption = (
    "At 0, the n layers from l on leave the direction of the stream as it is; at ½, they turn it by 90°. All maps have "
    f"one colour scale. {_definition(source, 'angular_distance', meaning)}"
  )
  title = f"Angular distance, {POSITIONS[which]}"
  figure = make_figure(f"angular_distance_{which}", title, caption, panels)
  return dataclasses.replace(figure, colour_label="angular distance")


def neighbour_distance(source: Source) -> Figure:
  """Angular distance across single layers."""

  def across_one_layer(found: ModelDiagnosis, which: str) -> np.ndarray | None:
    return found.angular_distance[which][:, 0] if which in found.angular_distance else None

  panels = []
  for which, title in POSITIONS.items():
    lines = by_depth(source, diagnosed(lambda found, which=which: across_one_layer(found, which)))
    panels.append(Panel(title, LAYER_AXIS, "angular distance", lines))
  caption = f"How far each layer turns the residual stream: the case n = 1 of the maps above. {SEEDS_NOTE}"
  return make_figure("angular_distance_by_layer", "Angular distance of neighbouring layers", caption, panels)


def removal_drop(source: Source) -> Figure:
  """How much the loss rises where layers are removed."""

  def rise(found: ModelDiagnosis, size: int) -> np.ndarray | None:
    if size not in found.removal or found.removal_loss is None:
      return None
    return found.removal[size] - found.removal_loss

  sizes: set[int] = set()
  for run in source.runs:
    if run.diagnosis:
      sizes.update(run.diagnosis.removal)
  panels = []
  for size in sorted(sizes):
    title, x_label = f"blocks of {size} layers", f"first of {size} layers removed"
    if size == 1:
      title, x_label = "one layer", "layer removed"
    lines = by_depth(source, diagnosed(lambda found, size=size: rise(found, size)))
    panels.append(Panel(title, x_label, "rise of the loss (nats)", lines, bars=True))
  meaning = "Validation loss without the layers, nothing trained after it"
  caption = (
    "Loss without the layers minus that of the whole model (the drop in performance of arXiv 2412.13795, §2). If it is "
    f"about 0, the layers are not needed. {_definition(source, 'removal', meaning)} {SEEDS_NOTE}"
  )
  return make_figure("removal", "Removal of layers", caption, panels)


def effective_rank(source: Source) -> Figure:
  """Effective rank of the stream by depth."""
  lines = by_depth(source, diagnosed(lambda found: found.effective_rank), first=0)
  meaning = "exp of the entropy of the normalised singular values (Roy and Vetterli, 2007) of the centred stream"
  caption = f"{_definition(source, 'effective_rank', meaning)} {SEEDS_NOTE}"
  panel = Panel("", DEPTH_AXIS, "effective rank", lines)
  return make_figure("effective_rank", "Effective rank by depth", caption, [panel])


def logit_lens(source: Source) -> Figure:
  """Perplexity of the stream read by the final norm and the head."""
  lines = by_depth(source, diagnosed(lambda found: found.logit_lens_perplexity), first=0)
  meaning = "Perplexity of the final norm and the head on the residual stream at each depth"
  definition = _definition(source, "logit_lens_perplexity", meaning)
  caption = f"How early in depth the stream holds the prediction. {definition} {SEEDS_NOTE}"
  panel = Panel("", DEPTH_AXIS, "perplexity", lines, log_y=True)
  return make_figure("logit_lens", "Logit lens by depth", caption, [panel])


def maps(source: Source, read: ReadLayers, x_label: str, y_label: str) -> list[Panel]:
  """A heat map for each featured group: the mean over its runs of a matrix, whose first axis goes to the right."""
  panels = []
  for group in source.featured:
    found = {index: read(source.runs[index]) for index in group.runs}
    matrices = {index: matrix for index, matrix in found.items() if matrix is not None}
    if matrices:
      title = mean_label(group.label, len(matrices))
      matrix = np.mean(list(matrices.values()), axis=0).T
      panels.append(Panel(title, x_label, y_label, matrix=matrix, runs=list(matrices)))
  return panels


def diagnosed(read: Callable[[ModelDiagnosis], np.ndarray | None]) -> ReadLayers:
  """Reads something of a run's diagnosis; None where it has none."""
  return lambda run: read(run.diagnosis) if run.diagnosis else None


def _definition(source: Source, name: str, otherwise: str) -> str:
  """How diagnose says that it measured something, or if no run's diagnosis says so, the usual meaning."""
  text = otherwise
  for run in source.runs:
    if run.diagnosis and run.diagnosis.definitions.get(name):
      text = run.diagnosis.definitions[name]
      break
  return f"{text.rstrip('.')}."

"""From runs to the figures of a report, as data. A figure whose inputs no run has is left out, never faked."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax.reporting.comparison import (
  LEARNING_RATE,
  Group,
  Standing,
  best_by_learning_rate,
  losses_by_pair,
  perplexity,
  post_share,
  show,
  spread,
)
from mixln_jax.reporting.loading import Columns, Diagnosis, Run
from mixln_jax.reporting.panels import Figure, Panel, Series, Style

MAX_POINTS = 250  # of a curve; more would only make the page heavy
LAYER = "layer (1 = first)"
DEPTH = "layers that the stream has passed"
SUBLAYERS = ("attention", "mlp")


@dataclasses.dataclass(frozen=True)
class Absent:
  """A figure that no run has the inputs for, and the command that makes them."""

  title: str
  command: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
  """What figures are made of: runs, their groups, and the groups whose layers are drawn."""

  runs: Sequence[Run]
  groups: Sequence[Group]
  rows: Sequence[Standing]
  featured: Sequence[Group]

  def group_of(self, index: int) -> Group:
    return next(group for group in self.groups if index in group.runs)

  def run_label(self, index: int) -> str:
    """The group's label, with the seeds where the group has several runs."""
    group = self.group_of(index)
    if len(group.runs) == 1:
      return group.label
    config = self.runs[index].config
    order = f", data seed {config['data.seed']}" if config.get("data.seed") else ""
    return f"{group.label}, seed {config['seed']}{order}"


def all_figures(source: Source) -> tuple[list[Figure], list[Absent]]:
  """Every figure that the runs have the inputs for, and those that they have not."""
  train = ("python -m mixln_jax train --config=FILE --workdir=RUN", "")
  diagnostics = (f"{train[0]} --config.diagnostics.every_steps=N", "It writes diagnostics.jsonl.")
  diagnose = ("python -m mixln_jax diagnose --workdir=RUN", "It writes RUN/diagnose/STEP/diagnose.json.")
  alphas = ("python -m mixln_jax sweep", "Or train them one by one: pre, post and at least one mix:α between.")
  rates = ("python -m mixln_jax sweep", "Or train them one by one: optimizer.learning_rate at two values or more.")
  makers: list[tuple[str, tuple[str, str], Callable[[Source], Figure | None]]] = [
    ("Loss", train, loss_curves),
    ("Perplexity", train, perplexity_curves),
    ("Gradient norm by step", train, gradient_norm_curve),
    ("Share of Post-LN layers (α)", alphas, alpha_ablation),
    ("Learning rate", rates, learning_rate_study),
    ("Gradient norm by layer, while training", diagnostics, training_gradient_norms),
    ("Residual stream by depth", diagnostics, residual_growth),
    ("Sublayers by depth", diagnostics, sublayer_statistics),
    ("Gradient norm by layer, on one sample", diagnose, diagnosed_gradient_norms),
    ("Angular distance, last counted token", diagnose, lambda s: angular_distance(s, "last")),
    ("Angular distance, all counted tokens", diagnose, lambda s: angular_distance(s, "all")),
    ("Angular distance of neighbouring layers", diagnose, neighbour_distance),
    ("Removal of layers", diagnose, removal_drop),
    ("Effective rank by depth", diagnose, effective_rank),
    ("Logit lens by depth", diagnose, logit_lens),
  ]
  figures, absent = [], []
  for title, needs, make in makers:
    figure = make(source)
    if figure is None:
      absent.append(Absent(title, *needs))
    else:
      figures.append(figure)
  return figures, absent


# Curves over steps.


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
  """At most `most` points: means of neighbouring points, values that are not finite left out of them."""
  if len(x) <= most:
    return x.tolist(), y.tolist()
  xs, ys = [], []
  for x_bin, y_bin in zip(np.array_split(x, most), np.array_split(y, most), strict=True):
    finite = y_bin[np.isfinite(y_bin)]
    xs.append(float(x_bin.mean()))
    ys.append(float(finite.mean()) if finite.size else math.nan)
  return xs, ys


def _curves(
  source: Source, columns: Callable[[Run], Columns], name: str, change: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> list[Series]:
  """One line a run; the last point of a run that diverged is marked."""
  series = []
  for index, run in enumerate(source.runs):
    found = columns(run)
    if name not in found or not len(found["step"]):
      continue
    x, y = thin(found["step"], change(found[name]))
    finite = [position for position, value in enumerate(y) if math.isfinite(value)]
    if not finite:
      continue
    marked = [finite[-1]] if run.diverged else []
    notes = ["diverged" if position in marked else "" for position in range(len(x))] if marked else ()
    style = source.group_of(index).style
    series.append(Series(source.run_label(index), x, y, style, (index,), notes=notes, marked=marked))
  return series


def _figure(name: str, title: str, caption: str, panels: Sequence[Panel]) -> Figure | None:
  drawn = [panel for panel in panels if panel.series or panel.matrix is not None]
  return Figure(name, title, caption, drawn) if drawn else None


def _of_runs(source: Source, figure: Figure | None) -> Figure | None:
  """The legend names groups, not each of their runs."""
  return figure and dataclasses.replace(figure, group_names={group.style: group.label for group in source.groups})


def _exp(loss: np.ndarray) -> np.ndarray:
  return np.array([perplexity(value) for value in loss])


THINNED = f"A curve of more than {MAX_POINTS} steps is drawn as means of as many stretches of neighbouring steps."
DIVERGED = "A cross ends a run that diverged."


def loss_curves(source: Source) -> Figure | None:
  """Training and validation loss."""
  caption = (
    "Cross-entropy in nats a counted token (metrics.jsonl): of each training batch before its update, and over the "
    f"fixed validation set. {THINNED} {DIVERGED}"
  )
  panels = [
    Panel("training", "step", "loss (nats)", _curves(source, lambda r: r.train, "loss"), show_markers=False),
    Panel("validation", "step", "loss (nats)", _curves(source, lambda r: r.validation, "loss")),
  ]
  return _of_runs(source, _figure("loss", "Loss", caption, panels))


def perplexity_curves(source: Source) -> Figure | None:
  """The exponential of the loss."""
  caption = f"exp(loss), on a logarithmic scale: of the training batch, and of the validation set. {THINNED} {DIVERGED}"
  train = _curves(source, lambda r: r.train, "loss", _exp)
  validation = _curves(source, lambda r: r.validation, "loss", _exp)
  panels = [
    Panel("training", "step", "perplexity", train, log_y=True, show_markers=False),
    Panel("validation", "step", "perplexity", validation, log_y=True),
  ]
  return _of_runs(source, _figure("perplexity", "Perplexity", caption, panels))


def gradient_norm_curve(source: Source) -> Figure | None:
  """Global gradient norm by step, and updates that were skipped."""
  caption = (
    "Global norm of the gradient of the mean loss, all parameters, before clipping (metrics.jsonl). Updates that were "
    f"skipped, since their loss or gradient was not finite, are counted in the table of runs. {THINNED}"
  )
  series = _curves(source, lambda r: r.train, "gradient_norm")
  panel = Panel("all parameters", "step", "gradient norm", series, log_y=True, show_markers=False)
  return _of_runs(source, _figure("gradient_norm", "Gradient norm by step", caption, [panel]))


# Studies.


def _loss_series(
  name: str, points: Sequence[tuple[float, Group]], source: Source, style: Style, mark: Callable[[Group], str]
) -> Series:
  """Mean final loss of each group at its x, with the deviation over seeds; a group with a `mark` stands out."""
  xs, means, deviations, notes, runs, marked = [], [], [], [], [], []
  for x, group in sorted(points, key=lambda point: point[0]):
    losses = list(losses_by_pair(source.runs, group).values())
    if not losses:
      continue
    value = spread(losses)
    diverged = sum(source.runs[index].diverged for index in group.runs)
    words = [f"mean of {value.n} seeds" if value.n > 1 else "one seed"]
    words += [f"{diverged} diverged"] if diverged else []
    if mark(group):
      words.append(mark(group))
      marked.append(len(xs))
    xs.append(x)
    means.append(value.mean)
    deviations.append(value.deviation if value.deviation is not None else math.nan)
    notes.append(f"{group.label}: {', '.join(words)}")
    runs.extend(group.runs)
  return Series(name, xs, means, style, runs, deviations, notes, marked)


def alpha_ablation(source: Source) -> Figure | None:
  """Final loss against the share of Post-LN layers."""
  families: dict[tuple[Any, ...], list[tuple[float, Group]]] = {}
  for group in source.groups:
    share = post_share(source.runs[group.runs[0]])
    if share is not None:
      families.setdefault((share[1], *_words(group)), []).append((share[0], group))
  means = {row.group.label: row.loss.mean for row in source.rows if row.loss}
  series = []
  for kind, (key, points) in enumerate(families.items()):
    known = [group for _, group in points if group.label in means]
    if len({share for share, group in points if group in known}) < 3:
      continue
    lowest = min(known, key=lambda group: means[group.label]).label
    mark = lambda group, lowest=lowest: "lowest" if group.label == lowest else ""  # noqa: E731
    series.append(_loss_series(", ".join(filter(None, key)) or "Mix-LN", points, source, Style(kind), mark))
  caption = (
    "Validation loss after the last step against the share of leading layers that are Post-LN: ⌊αL + ½⌋ / L for mix:α, "
    "0 for pre, 1 for post (arXiv 2412.13795, table 5). Mean over seeds, bars one standard deviation (none: one seed); "
    "the lowest is marked."
  )
  panel = Panel("", "share of Post-LN layers", "validation loss (nats)", series)
  return _figure("alpha", "Share of Post-LN layers (α)", caption, [panel])


def _words(group: Group, but: str = "") -> list[str]:
  """A group's setting in words."""
  return [f"{field.split('.')[-1]} {show(value)}" for field, value in group.setting.items() if field != but]


def learning_rate_study(source: Source) -> Figure | None:
  """Final loss against the learning rate, by placement."""
  families: dict[tuple[Any, ...], list[tuple[float, Group]]] = {}
  for group in source.groups:
    rate = group.setting.get(LEARNING_RATE)
    if isinstance(rate, (int, float)) and rate > 0:
      families.setdefault((group.placement, *_words(group, LEARNING_RATE)), []).append((float(rate), group))
  places = {"inside": "best", "only rate": "best, the only rate so far"}
  words = {
    best.row.group.label: places.get(best.place, f"best, {best.place} of the grid")
    for best in best_by_learning_rate(source.rows)
  }
  mark = lambda group: words.get(group.label, "")  # noqa: E731
  series = [
    _loss_series(", ".join(key), points, source, Style(points[0][1].style.kind, number // 8), mark)
    for number, (key, points) in enumerate(families.items())
  ]
  if not any(len(line.x) > 1 for line in series):
    return None
  caption = (
    "Validation loss after the last step against the peak learning rate. Mean over seeds, bars one standard deviation "
    "(none: one seed). The best rate of each placement is marked, chosen by the mean over the seeds that all its rates "
    "share; one at an edge of its grid may lie beyond it."
  )
  panel = Panel("", "peak learning rate", "validation loss (nats)", series, log_x=True)
  return _figure("learning_rate", "Learning rate", caption, [panel])


# By layer: the mean over a group's runs, with their deviation.


def _by_depth(source: Source, read: Callable[[Run], np.ndarray | None], first: int = 1) -> list[Series]:
  series = []
  for group in source.featured:
    found = [(index, values) for index in group.runs if (values := read(source.runs[index])) is not None]
    if not found:
      continue
    stack = np.stack([values for _, values in found])
    deviations = stack.std(axis=0, ddof=1).tolist() if len(found) > 1 else ()
    x = [float(first + position) for position in range(stack.shape[1])]
    name = f"{group.label} (mean of {len(found)})" if len(found) > 1 else group.label
    runs = [index for index, _ in found]
    series.append(Series(name, x, stack.mean(axis=0).tolist(), group.style, runs, deviations))
  return series


def _statistic(run: Run, name: str, last: bool) -> np.ndarray | None:
  """One statistic by layer of diagnostics.jsonl: of step 1, or of the last row that has it."""
  rows = [row for row in run.diagnostics if row.get(name) is not None]
  if not last:
    rows = [row for row in rows if row["step"] == 1]
  return _layers(rows[-1][name], run) if rows else None


def _layers(values: Any, run: Run) -> np.ndarray | None:
  try:
    array = np.array(values, float)
  except (TypeError, ValueError):
    return None
  return array if array.shape == (run.config["model.num_layers"],) else None


SEEDS_NOTE = "Means over seeds where there are several, bars one standard deviation."


def _last_steps(source: Source) -> str:
  steps = sorted({int(run.diagnostics[-1]["step"]) for run in source.runs if run.diagnostics})
  return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}" if steps else ""


def _training_panels(source: Source, names: Mapping[str, str], y_label: str, *, log_y: bool, both: bool) -> list[Panel]:
  panels = []
  for last in (False, True) if both else (True,):
    for name, title in names.items():
      series = _by_depth(source, lambda run, name=name, last=last: _statistic(run, name, last))
      when = _last_steps(source) if last else "step 1"
      panels.append(Panel(f"{title}, {when}", LAYER, y_label, series, log_y=log_y))
  return panels


def training_gradient_norms(source: Source) -> Figure | None:
  """Gradient norms by layer from diagnostics.jsonl."""
  names = {f"{sublayer}/gradient_norm": sublayer for sublayer in SUBLAYERS}
  caption = (
    "Norm of the gradient of the mean loss over all matrices of a sublayer, gains apart, before clipping, on the "
    "training batch of that step (diagnostics.jsonl). Step 1 is the gradient at the initial weights, as in figure 3 of "
    f"arXiv 2412.13795, which does not define its norm. {SEEDS_NOTE}"
  )
  panels = _training_panels(source, names, "gradient norm", log_y=True, both=True)
  return _figure("layer_gradient_norm", "Gradient norm by layer, while training", caption, panels)


def residual_growth(source: Source) -> Figure | None:
  """Root mean square and variance of the stream by depth."""
  caption = (
    "Root mean square and variance of the residual stream after each layer, on the training batch of that step "
    f"(diagnostics.jsonl); Pre-LN lets it grow with depth (arXiv 2502.05795). {SEEDS_NOTE}"
  )
  panels = [
    *_training_panels(source, {"stream_rms": "RMS"}, "RMS", log_y=True, both=True),
    *_training_panels(source, {"stream_variance": "variance"}, "variance", log_y=True, both=True),
  ]
  return _figure("residual_growth", "Residual stream by depth", caption, panels)


def sublayer_statistics(source: Source) -> Figure | None:
  """What the sublayers add, how much they are updated, and what attention looks like."""
  kinds = (
    ("update_ratio", "update ratio", True, True),
    ("branch_ratio", "branch ratio", True, True),
    ("cosine", "cosine of layer input and output", False, False),
    ("norm_gain_rms", "norm gain RMS", True, False),
  )
  panels = []
  for name, label, by_sublayer, log_y in kinds:
    names = {f"{s}/{name}": f"{label}, {s}" for s in SUBLAYERS} if by_sublayer else {name: label}
    panels += _training_panels(source, names, label, log_y=log_y, both=False)
  panels += _training_panels(
    source, {"attention/largest_logit": "largest attention logit"}, "logit", log_y=False, both=False
  )
  panels += _training_panels(
    source, {"attention/entropy": "attention entropy"}, "entropy (nats)", log_y=False, both=False
  )
  caption = (
    "On the last row of diagnostics.jsonl. Update ratio: norm of the update over norm of the weights. Branch ratio: "
    "RMS of what a sublayer adds over RMS of what it adds to. Entropy: of the attention weights, mean over "
    f"heads and positions. {SEEDS_NOTE}"
  )
  return _figure("sublayers", "Sublayers by depth", caption, panels)


# From diagnose.json.


def _diagnosed(read: Callable[[Diagnosis], np.ndarray | None]) -> Callable[[Run], np.ndarray | None]:
  return lambda run: read(run.diagnosis) if run.diagnosis else None


def _definition(source: Source, name: str, otherwise: str) -> str:
  """How diagnose says that it measured something; where it does not say, what is meant by it."""
  texts = [run.diagnosis.definitions.get(name) for run in source.runs if run.diagnosis]
  return f"{next(filter(None, texts), otherwise).rstrip('.')}."


def diagnosed_gradient_norms(source: Source) -> Figure | None:
  """Gradient norms by layer from diagnose.json."""
  panels = []
  for when, words in (("initial", "initial weights"), ("checkpoint", "checkpoint")):
    for sublayer in SUBLAYERS:
      read = _diagnosed(lambda d, when=when, sublayer=sublayer: d.gradient_norm.get(when, {}).get(sublayer))
      panels.append(Panel(f"{sublayer}, {words}", LAYER, "gradient norm", _by_depth(source, read), log_y=True))
  meaning = "Norm of the gradient of the mean loss over a sublayer's matrices, on the sample of diagnose"
  caption = f"{_definition(source, 'gradient_norm', meaning)} {SEEDS_NOTE}"
  return _figure("diagnosed_gradient_norm", "Gradient norm by layer, on one sample", caption, panels)


def angular_distance(source: Source, which: str) -> Figure | None:
  """Heat maps of the angular distance between the inputs of layers l and l + n, on one colour scale."""
  panels = []
  for group in source.featured:
    found = [
      (index, diagnosis.angular_distance[which])
      for index in group.runs
      if (diagnosis := source.runs[index].diagnosis) and which in diagnosis.angular_distance
    ]
    if found:
      mean = np.mean([matrix for _, matrix in found], axis=0)
      title = f"{group.label} (mean of {len(found)})" if len(found) > 1 else group.label
      # Row n - 1, column l, as the paper draws it.
      panels.append(
        Panel(title, "layer l (1 = first)", "n", matrix=mean.T, runs=tuple(index for index, _ in found))
      )  # fmt: skip
  words = {"last": "last counted token", "all": "all counted tokens"}[which]
  meaning = (
    "arccos of the cosine, over π, between the residual stream before layer l and before layer l + n, mean over the "
    "sample; before the final norm (Gromov et al., arXiv 2403.17887; Mix-LN, arXiv 2412.13795, figure 5)"
  )
  caption = (
    "0: the n layers from l on leave the direction of the stream as it is; ½: they turn it by 90°. One colour scale "
    f"for all. {_definition(source, 'angular_distance', meaning)}"
  )
  figure = _figure(f"angular_distance_{which}", f"Angular distance, {words}", caption, panels)
  return figure and dataclasses.replace(figure, colour_label="angular distance")


def neighbour_distance(source: Source) -> Figure | None:
  """Angular distance across single layers."""

  def read(which: str) -> Callable[[Run], np.ndarray | None]:
    return _diagnosed(lambda d: d.angular_distance[which][:, 0] if which in d.angular_distance else None)

  words = {"last": "last counted token", "all": "all counted tokens"}
  panels = [Panel(words[which], LAYER, "angular distance", _by_depth(source, read(which))) for which in words]
  caption = f"How far each layer turns the residual stream: the case n = 1 of the maps above. {SEEDS_NOTE}"
  return _figure("angular_distance_by_layer", "Angular distance of neighbouring layers", caption, panels)


def removal_drop(source: Source) -> Figure | None:
  """How much the loss rises where layers are removed."""

  def read(n: int) -> Callable[[Run], np.ndarray | None]:
    return _diagnosed(
      lambda d: d.removal[n] - d.removal_loss if n in d.removal and d.removal_loss is not None else None
    )

  blocks = sorted({n for run in source.runs if run.diagnosis for n in run.diagnosis.removal})
  panels = [
    Panel(
      "one layer" if n == 1 else f"blocks of {n} layers",
      "layer removed" if n == 1 else f"first of {n} layers removed",
      "rise of the loss (nats)",
      _by_depth(source, read(n)),
      bars=True,
    )
    for n in blocks
  ]
  meaning = "Validation loss without the layers, nothing trained after it"
  caption = (
    "Loss without the layers less that of the whole model (the drop in performance of arXiv 2412.13795, §2). About 0: "
    f"they are not needed. {_definition(source, 'removal', meaning)} {SEEDS_NOTE}"
  )
  return _figure("removal", "Removal of layers", caption, panels)


def effective_rank(source: Source) -> Figure | None:
  """Effective rank of the stream by depth."""
  series = _by_depth(source, _diagnosed(lambda d: d.effective_rank), first=0)
  meaning = "exp of the entropy of the normalised singular values (Roy and Vetterli, 2007) of the centred stream"
  caption = f"{_definition(source, 'effective_rank', meaning)} {SEEDS_NOTE}"
  return _figure("effective_rank", "Effective rank by depth", caption, [Panel("", DEPTH, "effective rank", series)])


def logit_lens(source: Source) -> Figure | None:
  """Perplexity of the stream read by the final norm and the head."""
  series = _by_depth(source, _diagnosed(lambda d: d.logit_lens_perplexity), first=0)
  meaning = "Perplexity of the final norm and the head on the residual stream at each depth"
  caption = f"How early the prediction is there. {_definition(source, 'logit_lens_perplexity', meaning)} {SEEDS_NOTE}"
  return _figure("logit_lens", "Logit lens by depth", caption, [Panel("", DEPTH, "perplexity", series, log_y=True)])

"""Final loss against what a study varies: the fraction of Post-LN layers, the learning rate."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mixln_jax.reporting.comparison import best_by_learning_rate, final_losses, spread
from mixln_jax.reporting.groups import LEARNING_RATE_FIELD, Group, grouped, post_fraction, words
from mixln_jax.reporting.panels import NUM_COLOURS, Figure, Panel, Series, Style
from mixln_jax.reporting.source import Source, make_figure


class _Point(NamedTuple):
  """A group and where it stands on the x axis."""

  x: float
  group: Group
  family: tuple[str, ...]  # points of one family are one line


def alpha_ablation(source: Source) -> Figure:
  """Final loss against the fraction of Post-LN layers, where a family has three fractions or more."""
  points = []
  for group in source.groups:
    found = post_fraction(source.runs[group.runs[0]])
    if found is not None:
      fraction, modifiers = found
      named = {field: group.setting[field] for field in group.named}
      points.append(_Point(fraction, group, (modifiers, *words(named))))
  mean_loss = {row.group.label: row.loss.mean for row in source.rows if row.loss}

  lines = []
  for kind, (family, members) in enumerate(grouped(points, lambda point: point.family).items()):
    evaluated = [point for point in members if point.group.label in mean_loss]
    if len({point.x for point in evaluated}) < 3:
      continue
    lowest = min(evaluated, key=lambda point: mean_loss[point.group.label])
    name = ", ".join(word for word in family if word) or "Mix-LN"
    lines.append(_line(source, name, members, Style(kind), {lowest.group.label: "lowest"}))
  caption = (
    "Validation loss after the last step against the fraction of leading layers that are Post-LN: ⌊αL + ½⌋ / L for "
    "mix:α, 0 for pre, 1 for post (arXiv 2412.13795, table 5). Mean over seeds, bars one standard deviation (none: one "
    "seed); the lowest is marked."
  )
  fractions = sorted({x for line in lines for x in line.x})
  panel = Panel("", "fraction of Post-LN layers", "validation loss (nats)", lines, x_ticks=fractions)
  return make_figure("alpha", "Fraction of Post-LN layers (α)", caption, [panel])


def learning_rate_study(source: Source) -> Figure:
  """Final loss against the learning rate, by placement."""
  points = []
  for group in source.groups:
    rate = group.setting.get(LEARNING_RATE_FIELD)
    if isinstance(rate, (int, float)) and rate > 0:
      points.append(_Point(float(rate), group, (group.label_but(LEARNING_RATE_FIELD),)))

  marks = {}
  for best in best_by_learning_rate(source.rows):
    mark = f"best, {best.place} of the grid"
    if best.place == "inside":
      mark = "best"
    elif best.place == "only rate":
      mark = "best, the only rate so far"
    marks[best.row.group.label] = mark

  lines = []
  for number, (family, members) in enumerate(grouped(points, lambda point: point.family).items()):
    style = Style(members[0].group.style.kind, number // NUM_COLOURS)
    lines.append(_line(source, ", ".join(family), members, style, marks))
  if all(len(line.x) < 2 for line in lines):
    lines = []
  caption = (
    "Validation loss after the last step against the peak learning rate. Mean over seeds, bars one standard deviation "
    "(none: one seed). The best rate of each placement is marked: that of the lowest mean over the seeds that all its "
    "rates share. If it is at an edge of its grid, the true best may lie beyond."
  )
  rates = sorted({x for line in lines for x in line.x})
  panel = Panel("", "peak learning rate", "validation loss (nats)", lines, log_x=True, x_ticks=rates)
  return make_figure("learning_rate", "Learning rate", caption, [panel])


def _line(source: Source, name: str, points: Sequence[_Point], style: Style, marks: Mapping[str, str]) -> Series:
  """Mean final loss of each group at its x, with the std over seeds; `marks` has words for groups that stand out."""
  xs, means, stds, notes, runs, marked = [], [], [], [], [], []
  for point in sorted(points, key=lambda point: point.x):
    group = point.group
    losses = final_losses(source.runs, group)
    if losses.empty:
      continue
    over_seeds = spread(losses)
    said = [f"mean of {over_seeds.n} seeds" if over_seeds.n > 1 else "one seed"]
    num_diverged = sum(source.runs[index].diverged for index in group.runs)
    if num_diverged:
      said.append(f"{num_diverged} diverged")
    if group.label in marks:
      said.append(marks[group.label])
      marked.append(len(xs))
    xs.append(point.x)
    means.append(over_seeds.mean)
    stds.append(math.nan if over_seeds.std is None else over_seeds.std)
    notes.append(f"{group.label}: {', '.join(said)}")
    runs.extend(group.runs)
  return Series(name, xs, means, style, runs, stds, notes, marked)

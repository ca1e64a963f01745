"""Final loss against depth, each placement at its best learning rate of each shape, with the slope and its interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mixln_jax.reporting.comparison import CONFIDENCE, BestRate, best_by_learning_rate, final_losses, spread
from mixln_jax.reporting.groups import LEARNING_RATE_FIELD, Group, grouped, words
from mixln_jax.reporting.panels import Figure, Panel, Series
from mixln_jax.reporting.source import Source, make_figure
from mixln_jax.reporting.tables import TextTable

DEPTH_FIELD = "model.num_layers"
# What may go along with depth in a ladder: shapes of equal size, and a budget by their parameters.
SHAPE_FIELDS = (DEPTH_FIELD, "model.embed_dim", "model.mlp_dim", "model.num_heads", "model.num_kv_heads")
SHAPE_FIELDS += ("train.num_steps", "train.tokens_per_parameter")


class Rung(NamedTuple):
  """A placement at one depth, at its best rate.

  Attributes:
    depth: layers.
    group: the runs, which differ in seeds alone.
    losses: final loss of each run that counts, in nats.
    rate: the learning rate; None where only one was tried.
    at_edge: whether it is the lowest or the highest that was tried, so that the best may lie beyond.
  """

  depth: int
  group: Group
  losses: Sequence[float]
  rate: float | None
  at_edge: bool


class Slope(NamedTuple):
  """Of the loss over the logarithm (base 2) of depth, by least squares over all runs: nats for each doubling.

  Attributes:
    value: nats.
    interval: Student's, of CONFIDENCE; None where the runs leave no degree of freedom.
    runs: how many.
    depths: how many different ones.
  """

  value: float
  interval: tuple[float, float] | None
  runs: int
  depths: int


class Ladder(NamedTuple):
  """One placement over depths.

  Attributes:
    name: the placement, and what else sets the line apart.
    rungs: by depth.
    slope: None of one depth.
  """

  name: str
  rungs: Sequence[Rung]
  slope: Slope | None

  @property
  def at_edge(self) -> list[int]:
    """Depths whose best rate lies at an edge of its grid."""
    return [rung.depth for rung in self.rungs if rung.at_edge]


def ladders(source: Source) -> list[Ladder]:
  """Every placement with runs at two depths or more, each depth at its best rate."""
  best = best_by_learning_rate(source.rows)
  known = {found.row.group.label: found for found in best}
  has_rates = {_family(found.row.group) for found in best}
  rungs = []
  for group in source.groups:
    depth = group.setting.get(DEPTH_FIELD)
    found = known.get(group.label)
    if not isinstance(depth, int) or (found is None and _family(group) in has_rates):
      continue
    losses = final_losses(source.runs, group)
    counted = [float(loss) for loss in losses if math.isfinite(loss)]
    if counted:
      rungs.append(Rung(depth, group, counted, _rate(group), found is not None and _is_edge(found)))
  lines = []
  for name, members in grouped(rungs, lambda rung: _line_name(rung.group)).items():
    by_depth = sorted(members, key=lambda rung: rung.depth)
    if len({rung.depth for rung in by_depth}) > 1:
      lines.append(Ladder(name, by_depth, slope_of(by_depth)))
  return lines


def _family(group: Group) -> tuple[str, ...]:
  """What the rates that a best one is chosen from have in common."""
  return (group.placement, *words(group.setting_but(LEARNING_RATE_FIELD)))


def _line_name(group: Group) -> str:
  rest = {field: value for field, value in group.setting.items() if field not in (*SHAPE_FIELDS, LEARNING_RATE_FIELD)}
  return ", ".join([group.placement, *words(rest)])


def _rate(group: Group) -> float | None:
  rate = group.setting.get(LEARNING_RATE_FIELD)
  return float(rate) if isinstance(rate, (int, float)) else None


def _is_edge(best: BestRate) -> bool:
  return best.place not in ("inside", "only rate")


def slope_of(rungs: Sequence[Rung]) -> Slope | None:
  """The least-squares slope over all runs of a line; None where all have one depth."""
  points = [(math.log2(rung.depth), loss) for rung in rungs for loss in rung.losses]
  depths, losses = np.array(points).T
  if len(set(depths)) < 2:
    return None
  fit: Any = stats.linregress(depths, losses)
  freedom = len(points) - 2
  interval = None
  if freedom > 0:
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * float(fit.stderr)
    interval = (float(fit.slope) - reach, float(fit.slope) + reach)
  return Slope(float(fit.slope), interval, len(points), len(set(depths)))


def describe(slope: Slope | None) -> str:
  """A slope in words."""
  if slope is None:
    return ""
  text = f"{slope.value:+.4f}"
  if slope.interval is None:
    return f"{text} (too few runs for an interval)"
  return f"{text} [{slope.interval[0]:+.4f}, {slope.interval[1]:+.4f}]"


def loss_by_depth(source: Source) -> Figure:
  """Final loss against the number of layers."""
  lines = []
  for ladder in ladders(source):
    marked = [index for index, rung in enumerate(ladder.rungs) if rung.at_edge]
    over_seeds = [spread(rung.losses) for rung in ladder.rungs]
    lines.append(
      Series(
        f"{ladder.name}: {describe(ladder.slope)}",
        [float(rung.depth) for rung in ladder.rungs],
        [found.mean for found in over_seeds],
        ladder.rungs[0].group.style,
        [index for rung in ladder.rungs for index in rung.group.runs],
        [math.nan if found.std is None else found.std for found in over_seeds],
        [_note(rung) for rung in ladder.rungs],
        marked,
      )
    )
  caption = (
    "Validation loss after the last step against depth, each placement at its best learning rate of each shape. Mean "
    "over seeds, bars one standard deviation (none: one seed). In the legend: nats for each doubling of depth, least "
    f"squares over all runs, with the {CONFIDENCE:.0%} Student interval, which knows the spread over seeds and that "
    "around the line, and not that of other widths, budgets or rates. A marked point's best rate is at an edge of its "
    "grid: the true best may lie beyond."
  )
  panel = Panel("", "layers", "validation loss (nats)", lines, log_x=True)
  return make_figure("depth", "Loss against depth", caption, [panel] if lines else [])


def _note(rung: Rung) -> str:
  seeds = f"mean of {len(rung.losses)} seeds" if len(rung.losses) > 1 else "one seed"
  rate = "" if rung.rate is None else f", learning rate {rung.rate:g}"
  return f"{rung.group.label}: {seeds}{rate}{', at the edge of its grid' if rung.at_edge else ''}"


def depth_table(source: Source) -> TextTable | None:
  """The same as numbers: a row for each placement; None where there is no ladder."""
  found = ladders(source)
  if not found:
    return None
  depths = sorted({rung.depth for ladder in found for rung in ladder.rungs})
  rows, data = [], []
  for ladder in found:
    data += [_numbers(ladder, rung) for rung in ladder.rungs]
    by_depth: Mapping[int, Rung] = {rung.depth: rung for rung in ladder.rungs}
    cells = [_cell(by_depth[depth]) if depth in by_depth else "" for depth in depths]
    rows.append([ladder.name, *cells, describe(ladder.slope)])
  note = (
    "Validation loss in nats at the best learning rate of each shape. Slope: nats for each doubling of depth, least "
    f"squares over all runs, {CONFIDENCE:.0%} Student interval. Where a best rate is at the edge of its "
    "grid, the slope may be that of the grid."
  )
  headers = ("placement", *(f"{depth} layers" for depth in depths), "slope")
  return TextTable("depth", "Loss against depth", headers, rows, data, note)


def _numbers(ladder: Ladder, rung: Rung) -> dict[str, Any]:
  """A rung in full precision, with the slope of its ladder."""
  over_seeds, slope = spread(rung.losses), ladder.slope
  low, high = (None, None) if slope is None or slope.interval is None else slope.interval
  return {
    "placement": ladder.name,
    "layers": rung.depth,
    "loss_mean": over_seeds.mean,
    "loss_sd": over_seeds.std,
    "seeds": len(rung.losses),
    "learning_rate": rung.rate,
    "rate_at_edge": rung.at_edge,
    "slope": None if slope is None else slope.value,
    "slope_low": low,
    "slope_high": high,
  }


def _cell(rung: Rung) -> str:
  over_seeds = spread(rung.losses)
  loss = f"{over_seeds.mean:.4f}" if over_seeds.std is None else f"{over_seeds.mean:.4f} ± {over_seeds.std:.4f}"
  rate = "" if rung.rate is None else f" at {rung.rate:g}{' (edge)' if rung.at_edge else ''}"
  return f"{loss}{rate}"

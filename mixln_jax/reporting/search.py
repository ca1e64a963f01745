"""What a search over placements saw, beside what held with fresh seeds."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from mixln_jax.reporting.comparison import CONFIDENCE, Standing, spread
from mixln_jax.reporting.groups import LEARNING_RATE_FIELD
from mixln_jax.reporting.layers import LAYER_AXIS
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.numbers import NOTHING, fixed, signed
from mixln_jax.reporting.panels import Figure, LayerRow, Panel, Series, Style
from mixln_jax.reporting.search_record import SearchRecord, Tried
from mixln_jax.reporting.source import Source, make_figure
from mixln_jax.reporting.tables import TextTable, difference_cells, mean_and_std

FEWEST = 3  # candidates on each side, below which no interval is drawn


def search_rungs(source: Source) -> Figure:
  """The losses of all candidates at the end of each rung that they were trained in."""
  caption = (
    "Validation loss of each candidate at the end of each rung: those with the lowest loss go on to the next one "
    "(synchronous successive halving, arXiv 1502.07943). One seed, the same batches for all. The lowest losses of many "
    "are too low by some of their luck: what holds is the comparison with fresh seeds. A candidate whose loss was not "
    "finite has no point."
  )
  series = []
  if source.search is not None:
    steps = source.search.rungs
    for one in source.search.ranked():
      rungs = sorted(one.losses)
      last = "trained to the end" if one.last_rung == len(steps) else f"given up after rung {one.last_rung}"
      points = [one.losses[rung] if math.isfinite(one.losses[rung]) else math.nan for rung in rungs]
      style = Style(len(steps) - one.last_rung)
      note = [f"candidate {one.number}: {one.placement}"] * len(rungs)
      series.append(Series(last, [float(steps[rung - 1]) for rung in rungs], points, style, notes=note))
  steps = source.search.rungs if source.search is not None else ()
  panel = Panel("", "step", "validation loss (nats)", series, x_ticks=[float(step) for step in steps])
  return make_figure("search_rungs", "What the search saw, rung by rung", caption, [panel])


def search_layers(source: Source) -> Figure:
  """The layers of all candidates, sorted by loss."""
  caption = (
    "The layers of each candidate, first layer on the left. Candidates that were trained longer stand higher, and of "
    "those the lower loss: it stands beside the number of the candidate, as of the last rung that it was trained in."
  )
  rows = []
  if source.search is not None:
    for one in source.search.ranked():
      loss = f"{one.last_loss:.3f}" if math.isfinite(one.last_loss) else "diverged"
      rate = "" if one.rate is None else f", {one.rate:g}"
      rows.append(LayerRow(f"{one.number}: {loss}{rate}", one.layers))
  panel = Panel("", LAYER_AXIS, "candidate: loss", layer_rows=rows)
  return make_figure("search_layers", "Candidates by loss", caption, [panel])


def search_effects(source: Source) -> Figure:
  """What a name at a layer goes with: the mean loss of the candidates that have it there, minus that of the others."""
  caption = (
    "For each layer and name: mean loss, at the end of the first rung, of the candidates that have the name there, "
    f"minus that of all others; bars are Welch’s {CONFIDENCE:.0%} interval, not corrected for their number. Below 0: "
    f"it goes with a lower loss. A name that fewer than {FEWEST} candidates have, or lack, has no point; candidates "
    "whose loss was not finite are left out. The sampler does not draw layers independently of one another, so this "
    "is no effect of one layer alone."
  )
  panels = []
  effects = {} if source.search is None else layer_effects(source.search)
  for kind, (name, of_layers) in enumerate(effects.items()):
    x = [float(layer) for layer in range(1, len(of_layers) + 1)]
    means = [mean for mean, _ in of_layers]
    halves = [half for _, half in of_layers]
    if np.isfinite(means).any():
      panels.append(Panel(name, LAYER_AXIS, "difference (nats)", [Series(name, x, means, Style(kind), std=halves)]))
  caption += f" {_sure_ones(effects)}"
  return make_figure("search_effects", "Which layers go with a lower loss", caption, panels)


def _sure_ones(effects: Mapping[str, Sequence[tuple[float, float]]]) -> str:
  """The layers whose interval excludes 0, in words, and how many would do so by chance."""
  known, lower, higher = 0, [], []
  for name, of_layers in effects.items():
    for layer, (mean, half) in enumerate(of_layers, start=1):
      known += math.isfinite(mean)
      if mean + half < 0:
        lower.append(f"{name} at layer {layer}")
      elif mean - half > 0:
        higher.append(f"{name} at layer {layer}")
  return (
    f"Intervals that exclude 0: with a lower loss {', '.join(lower) or 'none'}; with a higher one "
    f"{', '.join(higher) or 'none'}. Of {known} intervals about {(1 - CONFIDENCE) * known:.1f} would by chance."
  )


def layer_effects(record: SearchRecord) -> dict[str, list[tuple[float, float]]]:
  """By name, for each layer: mean loss with it minus mean loss without, and half of the interval; NaN where unknown.

  All candidates have been trained to the end of the first rung, so their losses there are of equal tokens.
  """
  seen = [one for one in record.candidates if math.isfinite(one.losses.get(1, math.inf))]
  if not seen:
    return {}
  losses = np.array([one.losses[1] for one in seen])
  names = np.array([list(one.layers) for one in seen])  # [candidates, L]
  effects = {}
  for name in dict.fromkeys(names.flat):
    of_layers = []
    for column in (names == name).T:
      of_layers.append(_difference(losses[column], losses[~column]))
    effects[str(name)] = of_layers
  return effects


def _difference(ours: np.ndarray, others: np.ndarray) -> tuple[float, float]:
  """Difference of the means and half of Welch's interval; NaN where there are too few of either."""
  if min(len(ours), len(others)) < FEWEST or not (np.ptp(ours) or np.ptp(others)):
    return math.nan, math.nan
  interval = stats.ttest_ind(ours, others, equal_var=False).confidence_interval(CONFIDENCE)
  return float(ours.mean() - others.mean()), float(interval.high - interval.low) / 2


def search_table(
  record: SearchRecord, runs: Sequence[ReportedRun], rows: Sequence[Standing], baseline: str
) -> TextTable:
  """What the search saw of each candidate that was tried again, and what held."""
  headers = (
    "placement",
    "the search saw",
    "held, fresh seeds",
    "held − saw",
    f"held − {baseline}’s",
    "95 % interval",
    "pairs",
  )
  body, data = [], []
  ranks = {one.number: place for place, one in enumerate(record.ranked(), start=1)}
  for row in rows:
    found = _seen(record, runs[row.group.runs[0]])
    held = spread(row.losses) if row.counted else None
    difference = None if found is None or held is None else held.mean - found.last_loss
    saw = NOTHING if found is None else f"{fixed(found.last_loss, 4)} (place {ranks[found.number]})"
    versus = row.loss_difference
    body.append(
      (
        row.group.label,
        saw,
        mean_and_std(held),
        signed(difference, 4),
        *difference_cells(versus),
        NOTHING if versus is None else str(versus.n),
      )
    )
    data.append(
      {
        "group": row.group.label,
        "candidate": None if found is None else found.number,
        "search_loss": None if found is None else found.last_loss,
        "held_mean": None if held is None else held.mean,
        "held_std": None if held is None else held.std,
        "pairs": None if versus is None else versus.n,
        "difference": None if versus is None else versus.mean,
      }
    )
  note = (
    f"The search saw one loss of each (seed {record.seed}) at step {record.rungs[-1]}, and took the lowest of "
    f"{len(record.candidates)} candidates; these are the means over seeds that it never saw. Only the paired "
    "differences of those say which is better. The validation text is the same, so what held is shown for this text."
  )
  return TextTable("search_and_finals", "What the search saw, and what held", headers, body, data, note)


def _seen(record: SearchRecord, run: ReportedRun) -> Tried | None:
  """The candidate that a run tries again: of the same layers and rate, trained to the end; None of a baseline's run."""
  for one in record.candidates:
    same_rate = one.rate in (None, run.config[LEARNING_RATE_FIELD])
    if one.last_rung == len(record.rungs) and same_rate and list(one.layers) == list(run.layer_list):
      return one
  return None

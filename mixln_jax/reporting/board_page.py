"""A board as one HTML file that needs nothing else, and as rows for CSV."""

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixln_jax.errors import InputError
from mixln_jax.files import is_partial, local_path, write_whole
from mixln_jax.reporting.board import Board, Entry, StudyClaim, initial_changes, is_baseline, tried_losses
from mixln_jax.reporting.claims import HOLDS, NOT_RUN, OPEN, REFUTED
from mixln_jax.reporting.comparison import (
  CONFIDENCE,
  EQUAL,
  HIGHER,
  LOWER,
  ONE_SEED,
  POWER,
  Comparison,
  spread,
  standings,
)
from mixln_jax.reporting.corpora import Evaluated, corpora_table
from mixln_jax.reporting.depth import loss_by_depth
from mixln_jax.reporting.figures import cell_looks
from mixln_jax.reporting.groups import make_groups, post_fraction
from mixln_jax.reporting.loading import Material
from mixln_jax.reporting.noise import Noise
from mixln_jax.reporting.numbers import NOTHING, fixed
from mixln_jax.reporting.page import figure_view, render
from mixln_jax.reporting.panels import Estimate, Figure, Panel, Series, Style
from mixln_jax.reporting.source import Source, make_figure
from mixln_jax.reporting.speed import Ratio
from mixln_jax.reporting.tables import TextTable, difference_cells, mean_and_std, needed_cell, write_csv
from mixln_jax.track import LOSS, Track

PAGE_FILE, TABLE_FILE, NOISE_FILE = "board.html", "board.csv", "noise.json"
FAR = 4.0  # times the middle difference: what lies farther would leave no room for the others in the picture
LEAST_FAR = 0.1  # nats
COLOURS = {LOWER: 2, HIGHER: 1, EQUAL: 7, ONE_SEED: 7}  # of the page's palette: green, orange, grey
WORDS = {LOWER: "lower", HIGHER: "higher", EQUAL: "all pairs equal", ONE_SEED: "open: one seed"}
CLAIM_ORDER = (REFUTED, HOLDS, OPEN, NOT_RUN)


def write_board(board: Board, output: str | Path) -> Path:
  """Writes board.html, board.csv and, where it can be known, noise.json into a folder; returns the page's path.

  Raises:
    InputError: the folder holds something else, or can't be written.
  """
  folder = local_path(output).absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(entry.name for entry in folder.iterdir() if not is_partial(entry.name))
  except OSError as error:
    raise InputError(f"output={folder}: can't be written ({error.strerror}); choose another folder") from error
  others = [name for name in there if name not in (PAGE_FILE, TABLE_FILE, NOISE_FILE)]
  if others:
    raise InputError(f"output={folder}: holds something else than a board ({others[0]!r}); choose an empty folder")
  write_csv(folder / TABLE_FILE, [_row(board, entry) for entry in board.entries])
  if board.noise is not None:
    write_noise(board.noise, folder / NOISE_FILE)
  write_whole(folder / PAGE_FILE, _page(board))
  return folder / PAGE_FILE


def write_noise(noise: Noise, path: Path) -> None:
  """Writes what a track stores of its noise."""
  write_whole(path, json.dumps(noise.to_json(), indent=1) + "\n")


def _page(board: Board) -> str:
  track = board.track
  looks = cell_looks(list(dict.fromkeys(name for entry in board.entries for name in entry.layer_list)))
  values = {
    "board": board,
    "track": track,
    "headers": headers(track),
    "facts": _facts(track),
    "rules": _rules(track),
    "entries": [_view(board, entry, looks) for entry in board.entries],
    "claims": _claims(board),
    "noise": _noise(board),
    "difference": _shown(_difference(board)),
    "alpha": _shown(_alpha(board)),
    "depth": _shown(_depth(board)),
    "rates": _rates(board),
    "corpora": corpora_table(_evaluated(board)),
    "layer_lists": {"looks": looks},
    "confidence": f"{CONFIDENCE:.0%}".replace("%", " %"),
    "power": f"{POWER:.0%}".replace("%", " %"),
    "time": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
  }
  return render("board.html", values)


def _evaluated(board: Board) -> list[Evaluated]:
  """The entries with the baseline's runs, for what they say of other corpora."""
  theirs = () if board.baseline is None else board.baseline.runs
  return [Evaluated(one.label, one.runs, () if one is board.baseline else theirs) for one in board.entries]


def _shown(figure: Figure | None) -> Mapping[str, Any] | None:
  """A figure for the page; the board is one file, so that no other files of it are named."""
  if figure is None or not figure.panels:
    return None
  return figure_view(figure) | {"files": [], "tables": []}


def _facts(track: Track) -> list[str]:
  """What every run has, in a few words each."""
  has = track.fixed
  tokens = has["train.num_steps"] * has["train.batch_size"] * has["data.sequence_length"]
  shape = f"{has['model.num_layers']} layers × {has['model.embed_dim']}"
  if track.shapes:
    shape = "layers × width: " + ", ".join(
      f"{one.get('model.num_layers')} × {one.get('model.embed_dim')}" for one in track.shapes
    )
  return [
    shape,
    f"{has['train.num_steps']:,} steps, {tokens / 1e6:,.2f} M tokens of {has['data.source']}",
    f"{has['optimizer.name']}, {has['optimizer.schedule']}, clip {has['optimizer.clip_norm']:g}",
    f"peak rate: the best of {', '.join(f'{rate:g}' for rate in track.rates)}",
  ]


def _rules(track: Track) -> list[str]:
  """What an entry must have."""
  rules = [
    f"Tuned on {len(track.first_rates)} learning rates of the grid, and beyond them where the best is at an edge.",
    f"{track.seeds} seeds, the first from 0, at its best rate; the baseline {track.baseline_seeds}.",
    f"What a placement learns besides gains of norms is at most {track.added:.1%} of the model.",
  ]
  if track.close_seeds > track.seeds:
    rules.insert(2, f"{track.close_seeds} seeds where it is within {track.close:g} nats of {track.baseline}.")
  return rules


def _verdict(comparison: Comparison | None) -> str:
  if comparison is None:
    return NOTHING
  if comparison.verdict == ONE_SEED and comparison.difference.n > 1:
    return "open"
  return WORDS.get(comparison.verdict, "open")


def _style(entry: Entry) -> Style:
  """The colour says the verdict, the marker repeats it."""
  if entry.comparison is None:
    return Style(0)
  return Style(COLOURS.get(entry.comparison.verdict, 7))


def _ratio(value: Ratio | None, digits: int = 2) -> str:
  if value is None:
    return NOTHING
  text = f"{value.value:.{digits}f}"
  if value.interval is None:
    return text
  low, high = value.interval
  return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _view(board: Board, entry: Entry, looks: Mapping[str, str]) -> dict[str, Any]:
  """An entry's row of the table."""
  comparison, speed = entry.comparison, entry.speed
  digits = 4
  mean, interval = difference_cells(comparison.difference if comparison else None, digits)
  scores = spread(entry.scores) if len(entry.scores) else None
  steps = NOTHING
  if speed is not None:
    steps = "not reached" if speed.steps_to_baseline is None else f"{speed.steps_to_baseline:,.0f}"
  speed_cells = [steps, _ratio(speed.step_time if speed else None), _ratio(speed.effective if speed else None)]
  cells = [
    mean,
    interval,
    "baseline" if is_baseline(board.track, entry) else _verdict(comparison),
    fixed(comparison.difference.std if comparison else None, digits),
    str(comparison.difference.n if comparison else len(entry.scores)),
    needed_cell(comparison.verdict, comparison.needed) if comparison else NOTHING,
    mean_and_std(scores, digits),
    *(speed_cells if board.track.score == LOSS else []),
    f"{entry.rates}{_edge(entry)}",
    f"{entry.diverged} of {len(entry.runs)}",
    NOTHING if entry.added is None else f"{entry.added:.2%}",
  ]
  return {
    "label": entry.label,
    "cells": cells,
    "layers": [{"name": name, "look": looks[name]} for name in entry.layer_list],
    "verdict": "none" if comparison is None else {LOWER: "lower", HIGHER: "higher"}.get(comparison.verdict, "open"),
    "unranked": bool(entry.faults),
    "faults": entry.faults,
    "remarks": entry.remarks,
  }


def headers(track: Track) -> list[str]:
  """Of the table of entries."""
  score = "loss (nats)" if track.score == LOSS else "slope (nats a doubling of depth)"
  speed = [f"steps to {track.baseline}’s loss", "step time", "effective speed-up"] if track.score == LOSS else []
  first = f"{'loss' if track.score == LOSS else 'slope'} − {track.baseline}’s"
  return [
    *("entry", first, "95 % interval", "verdict", "std of pairs", "seeds", "seeds needed", score),
    *speed,
    *("best rate", "diverged", "learned besides gains"),
  ]


def _edge(entry: Entry) -> str:
  """Whether a best rate lies at an edge of those that were tried."""
  if "lower edge" in entry.places:
    return " ◂ edge"
  return " edge ▸" if "upper edge" in entry.places else ""


def _row(board: Board, entry: Entry) -> dict[str, Any]:
  """An entry in full precision."""
  comparison, speed = entry.comparison, entry.speed
  scores = spread(entry.scores) if len(entry.scores) else None
  low, high = (comparison.difference.interval or (None, None)) if comparison else (None, None)
  effective = speed.effective if speed else None
  return {
    "entry": entry.label,
    "placement": entry.placement,
    "study": entry.study,
    "score": board.track.score,
    "mean": scores.mean if scores else None,
    "std": scores.std if scores else None,
    "seeds": len(entry.scores),
    "difference": comparison.difference.mean if comparison else None,
    "low": low,
    "high": high,
    "pairs": comparison.difference.n if comparison else None,
    "pairs_std": comparison.difference.std if comparison else None,
    "verdict": comparison.verdict if comparison else None,
    "seeds_needed": comparison.needed if comparison else None,
    "steps_ratio": speed.steps.value if speed else None,
    "step_time_ratio": speed.step_time.value if speed and speed.step_time else None,
    "effective_speed_up": effective.value if effective else None,
    "best_rate": entry.rates,
    "place_in_grid": ", ".join(entry.places),
    "diverged": entry.diverged,
    "added": entry.added,
    "faults": "; ".join(entry.faults),
    "remarks": "; ".join(entry.remarks),
  }


def _difference(board: Board) -> Figure | None:
  """The picture of the board: each entry's difference from the baseline, the lowest on top."""
  compared = [(entry, entry.comparison) for entry in board.entries if entry.comparison is not None]
  if not compared:
    return None
  limit = _limit(board)
  near = [(entry, one) for entry, one in compared if abs(one.difference.mean) <= limit]
  far = [entry.label for entry, one in compared if abs(one.difference.mean) > limit]
  estimates = []
  if board.baseline is not None:
    estimates.append(_estimate(board.baseline, None))
  estimates += [_estimate(entry, one) for entry, one in near]
  score = "validation loss after the last step" if board.track.score == LOSS else "slope of the loss with depth"
  caption = (
    f"The {score} minus that of {board.track.baseline}, each entry at its own best learning rate: left of 0 is better. "
    f"Bars: Student’s {CONFIDENCE:.0%} interval over pairs of seeds; dots: single pairs; squares: the layers, the "
    "first one on the left. Green: lower, orange: higher, grey: the seeds leave it open."
  )
  if far:
    caption += f" Farther than {limit:.2g} nats and in the table alone: {', '.join(far)}."
  unit = "nats a token" if board.track.score == LOSS else "nats for each doubling of depth"
  panel = Panel(
    "", f"{board.track.score} minus {board.track.baseline}’s ({unit})", "", estimates=sorted(estimates, key=_value)
  )
  return make_figure("difference", f"Difference to {board.track.baseline}", caption, [panel])


def _value(estimate: Estimate) -> float:
  return estimate.value or 0.0


def _estimate(entry: Entry, comparison: Comparison | None) -> Estimate:
  words = ["baseline" if comparison is None else _verdict(comparison), f"lr {entry.rates}{_edge(entry)}"]
  n = len(entry.scores) if comparison is None else comparison.difference.n
  words.append(f"{n} seed{'s' if n > 1 else ''}")
  if entry.faults:
    words.append("not ranked")
  return Estimate(
    label=entry.label,
    note=", ".join(words),
    layer_list=entry.layer_list,
    value=0.0 if comparison is None else comparison.difference.mean,
    interval=None if comparison is None else comparison.difference.interval,
    points=() if comparison is None else comparison.pairs.tolist(),
    style=_style(entry),
    marked="lower edge" in entry.places or "upper edge" in entry.places,
  )


def _alpha(board: Board) -> Figure | None:
  """The difference from Pre-LN against the number of Post-LN layers, where there are three or more of them."""
  points: dict[int, tuple[float, float, str]] = {}
  far = []
  for entry in board.entries:
    num_post = _post_layers(board, entry)
    difference = entry.comparison.difference if entry.comparison else None
    if num_post is None or (difference is None and entry is not board.baseline):
      continue
    mean = 0.0 if difference is None else difference.mean
    if abs(mean) > _limit(board):
      far.append(f"{entry.label} ({mean:+.2f})")
      continue
    half = math.nan
    if difference is not None and difference.interval is not None:
      half = (difference.interval[1] - difference.interval[0]) / 2
    points.setdefault(num_post, (mean, half, f"{entry.label}, lr {entry.rates}"))
  if len(points) < 3:
    return None
  xs = sorted(points)
  means, halves, notes = zip(*(points[x] for x in xs), strict=True)
  lowest = min(range(len(xs)), key=means.__getitem__)
  line = Series("Mix-LN", xs, list(means), Style(0), (), list(halves), list(notes), [lowest])
  caption = (
    f"The final validation loss minus that of {board.track.baseline} against the number of leading layers that are "
    f"Post-LN, each at its own best learning rate. Bars: {CONFIDENCE:.0%} interval over pairs of seeds; the lowest "
    "mean is marked. The paper’s α = 0.25 is a quarter of the layers."
  )
  if far:
    caption += f" Too far away for the picture: {', '.join(far)}."
  layers = board.track.fixed["model.num_layers"]
  label = f"loss minus {board.track.baseline}’s (nats)"
  panel = Panel("", f"Post-LN layers of {layers}", label, [line], x_ticks=xs)
  return make_figure("alpha", "How many layers are Post-LN", caption, [panel])


def _post_layers(board: Board, entry: Entry) -> int | None:
  """How many leading layers of an entry are Post-LN, the others Pre-LN; None of any other placement."""
  if not entry.runs or entry.contenders.keys() != {()}:
    return None
  found = post_fraction(entry.runs[0])
  changed = any(initial_changes(board.track, run) for run in entry.runs)
  if found is None or found[1] or changed:
    return None
  return round(found[0] * entry.runs[0].num_layers)


def _limit(board: Board) -> float:
  """How far from 0 a difference may lie that a picture shows."""
  if board.track.score != LOSS:
    return math.inf
  sizes = sorted(abs(one.comparison.difference.mean) for one in board.entries if one.comparison is not None)
  return max(LEAST_FAR, FAR * sizes[len(sizes) // 2]) if sizes else math.inf


def _depth(board: Board) -> Figure | None:
  """The ladders, where the track has several shapes."""
  if not board.track.shapes or not board.runs:
    return None
  groups = make_groups(Material(None, board.runs, []))
  rows = standings(board.runs, groups, board.track.baseline)
  return loss_by_depth(Source(board.runs, groups, rows, groups))


def _rates(board: Board) -> TextTable | None:
  """Every entry at every published rate that it was tried at."""
  if board.track.shapes:
    return None
  rates = board.track.rates
  rows = []
  for entry in board.entries:
    cells = tried_losses(board.track, entry)
    best = {run.config["optimizer.learning_rate"] for run in entry.runs}
    rows.append([entry.label, *(f"{cells.get(rate, NOTHING)}{' ★' if rate in best else ''}" for rate in rates)])
  note = (
    "Final validation loss in nats, the mean over the seeds that all rates of an entry share; ★ the best rate. A best "
    "rate with nothing but dashes on one side is at the edge of what was tried."
  )
  return TextTable("rates", "Learning rates", ["entry", *(f"{rate:g}" for rate in rates)], rows, [], note)


def _claims(board: Board) -> list[dict[str, Any]]:
  """The judged claims by verdict, refutations first."""
  found = []
  for verdict in CLAIM_ORDER:
    some = [one for one in board.claims if one.judged.verdict == verdict]
    if some:
      found.append({"verdict": verdict, "claims": [_claim(board, one) for one in some]})
  return found


def _claim(board: Board, one: StudyClaim) -> dict[str, Any]:
  """A claim with what the runs say of it."""
  judged = one.judged
  ours = judged.claim["lower"]
  evidence = []
  for other, comparison in judged.evidence.items():
    mean, interval = difference_cells(comparison.difference)
    pairs = comparison.difference.n
    text = f"{ours} − {other}: {mean} ({interval}; {pairs} pair{'s' if pairs > 1 else ''}"
    if comparison.needed is not None:
      text += f"; about {comparison.needed:,} would be needed"
    evidence.append(f"{text})")
  faults = [entry.faults for entry in board.entries if entry.placement == ours and entry.study == one.study]
  return {
    "text": judged.claim.get("claim", ""),
    "source": judged.claim.get("source", ""),
    "study": one.study,
    "evidence": evidence,
    "faults": [fault for some in faults for fault in some],
  }


def _noise(board: Board) -> list[dict[str, Any]]:
  """The noise that the track has stored, and that of the runs here."""
  views = []
  for where, noise in (("stored with the track", board.stored), ("of the runs here", board.noise)):
    if noise is None:
      continue
    low, high = noise.std_interval
    views.append(
      {
        "where": where,
        "text": f"σ = {noise.std:.4f} nats ({CONFIDENCE:.0%} interval {low:.4f} to {high:.4f}) over {noise.runs} seeds "
        f"of {noise.placement}, mean {noise.mean:.4f}; of a pair at most √2 σ = {noise.pairs_std:.4f}",
        "needed": [
          (f"{difference:g} nats", "more than 1,000" if needed is None else f"{needed:,}")
          for difference, needed in noise.seeds_needed().items()
        ],
      }
    )
  return views

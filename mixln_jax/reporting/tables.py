"""The tables of a report, as text: the same for the page and for CSV."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixln_jax.reporting import comparison
from mixln_jax.reporting.comparison import Difference, Spread, Standing
from mixln_jax.reporting.loading import Run, as_mapping


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of text; `name` is that of its CSV."""

  name: str
  title: str
  headers: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ""

  def records(self) -> list[dict[str, str]]:
    """The rows, each by header."""
    return [dict(zip(self.headers, row, strict=True)) for row in self.rows]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
  """Writes rows by name; returns the path."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
  return path


def number(value: float | None, digits: int = 4) -> str:
  return "" if value is None else f"{value:.{digits}f}"


def mean_and_deviation(value: Spread | None, digits: int = 4) -> str:
  if value is None:
    return "–"
  return number(value.mean, digits) + ("" if value.deviation is None else f" ± {number(value.deviation, digits)}")


def difference_and_interval(value: Difference | None, digits: int = 4) -> str:
  """`-0.51 [-0.69, -0.34]`; where there is no interval, why."""
  if value is None:
    return "–"
  mean = f"{value.mean:+.{digits}f}"
  if value.interval is None:
    return f"{mean} ({'one seed: no interval' if value.n == 1 else 'all pairs equal: no interval'})"
  return f"{mean} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def perplexity_table(rows: Sequence[Standing], baseline: str) -> Table:
  """Final loss and perplexity by group, and the paired differences."""
  headers = (
    "group",
    "perplexity",
    f"perplexity less {baseline}'s",
    "loss (nats)",
    f"loss less {baseline}'s",
    "pairs",
    "runs counted",
    "diverged",
  )
  body = [
    (
      row.group.label,
      mean_and_deviation(row.perplexity, 2),
      difference_and_interval(row.perplexity_difference, 2),
      mean_and_deviation(row.loss),
      difference_and_interval(row.loss_difference),
      str(row.loss_difference.n) if row.loss_difference else "–",
      f"{row.counted} of {row.planned}",
      str(row.diverged),
    )
    for row in rows
  ]
  note = (
    "Validation after the last step of the whole budget; mean ± standard deviation over seeds (n − 1). Differences are "
    "paired: same seed of the initial weights, same order of samples, all other settings equal. In brackets: Student's "
    f"t interval ({comparison.CONFIDENCE:.0%}) of the mean difference, n − 1 degrees of freedom, not corrected for the "
    "number of comparisons. Below 0: lower than the baseline. Runs that have not reached their last step don't count."
  )
  return Table("perplexity_by_group", "Perplexity", headers, body, note)


def best_rates_table(rows: Sequence[Standing]) -> list[Table]:
  best = comparison.best_by_learning_rate(rows)
  if not best:
    return []
  places = {"inside": "inside its grid", "only rate": "the only rate so far"}
  body = [
    (
      one.row.group.label,
      comparison.show(one.row.group.setting[comparison.LEARNING_RATE]),
      places.get(one.place, f"at the {one.place}: it may lie beyond"),
      str(one.seeds),
      mean_and_deviation(one.row.perplexity, 2),
      mean_and_deviation(one.row.loss),
      f"{one.row.counted} of {one.row.planned}",
    )
    for one in best
  ]
  note = (
    "The rate of lowest mean validation loss over the seeds that all rates of its grid share, of the rates that have a "
    "loss; where they share none, none is chosen. Rates that diverged belong to the grid. Perplexity and loss are "
    "those of all its seeds. It is chosen by numbers that are reported, on the same seeds: a little optimistic, and "
    "more so for placements with more rates."
  )
  headers = (
    "group",
    "learning rate",
    "where in its grid",
    "seeds compared",
    "perplexity",
    "loss (nats)",
    "runs counted",
  )
  return [Table("best_learning_rate", "Best learning rate", headers, body, note)]


RUN_HEADERS = (
  "run",
  "placement",
  "seed",
  "data seed",
  "status",
  "step",
  "tokens",
  "validation loss",
  "best (step)",
  "skipped updates",
  "minutes",
  "initial weights",
  "data",
)


def runs_table(runs: Sequence[Run]) -> Table:
  """How each run went."""
  note = (
    "Validation loss: after the last step. Minutes: of the process that ended the run (outcome.json). Initial weights "
    "and data: hash and fingerprint; equal ones mean equal numbers."
  )
  return Table("runs", "Runs", RUN_HEADERS, [_run_row(run) for run in runs], note)


def _run_row(run: Run) -> tuple[str, ...]:
  best = as_mapping(run.outcome.get("best_validation"))
  best_loss, seconds = _number_of(best.get("loss")), _number_of(as_mapping(run.outcome.get("seconds")).get("total"))
  tokens = run.train.get("tokens")
  return (
    run.name,
    run.placement,
    str(run.config["seed"]),
    str(run.config.get("data.seed", "")),
    run.status,
    f"{run.step} / {run.num_steps}",
    "–" if tokens is None else f"{np.nansum(tokens):,.0f}",
    number(run.final_loss) or "–",
    "–" if best_loss is None else f"{best_loss:.4f} ({best.get('step')})",
    str(run.outcome.get("skipped_updates", "–")),
    "–" if seconds is None else f"{seconds / 60:.1f}",
    str(run.initial_weights.get("hash", "–")),
    str(run.fingerprint or "–")[:12],
  )


def _number_of(value: Any) -> float | None:
  """A number, also where it is written as text, as metrics have "nan"; None for anything else."""
  try:
    return float(value)
  except (TypeError, ValueError):
    return None


def differences_table(runs: Sequence[Run]) -> Table:
  """The config fields in which the runs differ."""
  fields = comparison.differing_fields(runs)
  body = [(run.name, *(comparison.show(comparison.values_of([run], field)[0]) for field in fields)) for run in runs]
  note = "All other fields are equal." if fields else "All fields are equal."
  return Table("config_differences", "What differs", ("run", *fields), body, note)


def environment_table(runs: Sequence[Run]) -> Table:
  """Where each run was made; runs of one environment share a row."""
  rows: dict[tuple[str, ...], list[str]] = {}
  for run in runs:
    facts, packages = run.environment, as_mapping(run.environment.get("packages"))
    devices = facts.get("devices")
    names = list(map(str, devices)) if isinstance(devices, list) else []
    key = (
      str(facts.get("git") or "–")[:12] + ("-dirty" if str(facts.get("git")).endswith("-dirty") else ""),
      ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "–",
      str(facts.get("processes", "–")),
      str(facts.get("python", "–")),
      *(str(packages.get(name, "–")) for name in ("jax", "flax", "optax")),
      str(facts.get("platform", "–")),
    )
    rows.setdefault(key, []).append(run.name)
  headers = ("revision", "devices", "processes", "Python", "jax", "flax", "optax", "platform", "runs")
  return Table("environment", "Environment", headers, [(*key, ", ".join(names)) for key, names in rows.items()])

"""The tables of a report, as text: the same for the page and for CSV."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixln_jax.files import write_whole
from mixln_jax.reporting import comparison, groups
from mixln_jax.reporting.comparison import BestRate, Difference, Spread, Standing
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.reading import as_mapping

NOTHING = "–"  # the cell of a value that there is not


@dataclasses.dataclass(frozen=True)
class TextTable:
  """A table of text.

  Attributes:
    name: of its CSV file.
    title: above it.
    headers: of its columns.
    rows: as many cells each as there are headers.
    note: below it.
  """

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
  content = io.StringIO(newline="")
  writer = csv.DictWriter(content, names, restval="")
  writer.writeheader()
  writer.writerows(rows)
  write_whole(path, content.getvalue())
  return path


def mean_and_std(value: Spread | None, digits: int = 4) -> str:
  """`5.0500 ± 0.0707`, or the mean alone where there is no std."""
  if value is None:
    return NOTHING
  mean = f"{value.mean:.{digits}f}"
  return mean if value.std is None else f"{mean} ± {value.std:.{digits}f}"


def difference_and_interval(value: Difference | None, digits: int = 4) -> str:
  """`-0.51 [-0.69, -0.34]`; where there is no interval, why."""
  if value is None:
    return NOTHING
  mean = f"{value.mean:+.{digits}f}"
  if value.interval is not None:
    low, high = value.interval
    return f"{mean} [{low:+.{digits}f}, {high:+.{digits}f}]"
  reason = "one seed" if value.n == 1 else "all pairs equal"
  return f"{mean} ({reason}: no interval)"


def perplexity_table(rows: Sequence[Standing], baseline: str) -> TextTable:
  """Final loss and perplexity by group, and the paired differences."""
  headers = (
    "group",
    "perplexity",
    f"perplexity minus {baseline}'s",
    "loss (nats)",
    f"loss minus {baseline}'s",
    "pairs",
    "runs counted",
    "diverged",
  )
  body = []
  for row in rows:
    cells = (
      row.group.label,
      mean_and_std(row.perplexity, 2),
      difference_and_interval(row.perplexity_difference, 2),
      mean_and_std(row.loss),
      difference_and_interval(row.loss_difference),
      str(row.loss_difference.n) if row.loss_difference else NOTHING,
      f"{row.counted} of {row.planned}",
      str(row.diverged),
    )
    body.append(cells)
  note = (
    "Validation after the last step of the whole budget; mean ± standard deviation over seeds (n − 1). Differences are "
    "paired: same seed of the initial weights, same order of samples, all other settings equal. In brackets: Student's "
    f"t interval ({comparison.CONFIDENCE:.0%}) of the mean difference, n − 1 degrees of freedom, not corrected for the "
    "number of comparisons. Below 0: lower than the baseline. Runs that have not reached their last step do not count."
  )
  return TextTable("perplexity_by_group", "Perplexity", headers, body, note)


def best_rates_table(best_rates: Sequence[BestRate]) -> TextTable:
  """The best learning rate of each placement and setting."""
  places = {"inside": "inside its grid", "only rate": "the only rate so far"}
  body = []
  for best in best_rates:
    row = best.row
    cells = (
      row.group.label,
      groups.show(row.group.setting[groups.LEARNING_RATE_FIELD]),
      places.get(best.place, f"at the {best.place}: the best may lie beyond"),
      str(best.seeds),
      mean_and_std(row.perplexity, 2),
      mean_and_std(row.loss),
      f"{row.counted} of {row.planned}",
    )
    body.append(cells)
  note = (
    "The rate with the lowest mean validation loss over the seeds that all rates of its grid share; only rates that "
    "have a loss can be chosen, and none is where they share no seed. Rates that diverged belong to the grid. "
    "Perplexity and loss are those of all its seeds. The rate is chosen by the losses that are reported, on the same "
    "seeds: they are a little optimistic, and more so for placements with more rates."
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
  return TextTable("best_learning_rate", "Best learning rate", headers, body, note)


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


def runs_table(runs: Sequence[ReportedRun]) -> TextTable:
  """How each run went."""
  note = (
    "Validation loss: after the last step. Minutes: of the process that ended the run (outcome.json). Initial weights "
    "and data: hash and fingerprint; equal ones mean equal numbers."
  )
  return TextTable("runs", "Runs", RUN_HEADERS, [_run_row(run) for run in runs], note)


def _run_row(run: ReportedRun) -> tuple[str, ...]:
  best = as_mapping(run.outcome.get("best_validation"))
  best_loss = _number_or_none(best.get("loss"))
  seconds = _number_or_none(as_mapping(run.outcome.get("seconds")).get("total"))
  tokens = NOTHING
  if "tokens" in run.train:
    tokens = f"{np.nansum(run.train['tokens']):,.0f}"
  return (
    run.name,
    run.placement,
    str(run.config["seed"]),
    str(run.config.get("data.seed", "")),
    run.status,
    f"{run.step} / {run.num_steps}",
    tokens,
    NOTHING if run.final_loss is None else f"{run.final_loss:.4f}",
    NOTHING if best_loss is None else f"{best_loss:.4f} ({best.get('step')})",
    str(run.outcome.get("skipped_updates", NOTHING)),
    NOTHING if seconds is None else f"{seconds / 60:.1f}",
    str(run.initial_weights.get("hash", NOTHING)),
    str(run.fingerprint or NOTHING)[:12],
  )


def _number_or_none(value: Any) -> float | None:
  """A number, also where it is written as text, as metrics have "nan"; None for anything else."""
  try:
    return float(value)
  except (TypeError, ValueError):
    return None


def differences_table(runs: Sequence[ReportedRun]) -> TextTable:
  """The config fields in which the runs differ."""
  fields = groups.differing_fields(runs)
  body = []
  for run in runs:
    values = [groups.show(groups.value_of(run, field)) for field in fields]
    body.append((run.name, *values))
  note = "All other fields are equal." if fields else "All fields are equal."
  return TextTable("config_differences", "What differs", ("run", *fields), body, note)


def environment_table(runs: Sequence[ReportedRun]) -> TextTable:
  """Where each run was trained; runs of one environment share a row."""
  by_environment = groups.grouped(runs, _environment_row)
  body = []
  for cells, members in by_environment.items():
    body.append((*cells, ", ".join(run.name for run in members)))
  headers = ("revision", "code", "devices", "processes", "Python", "jax", "flax", "optax", "platform", "runs")
  note = "Code: a hash of the package's source files; equal ones mean equal code, whatever the revision."
  return TextTable("environment", "Environment", headers, body, note)


def _environment_row(run: ReportedRun) -> tuple[str, ...]:
  environment = run.environment
  revision = str(environment.get("git") or NOTHING)
  short = revision.removesuffix("-dirty")[:12]
  if revision.endswith("-dirty"):
    short += "-dirty"
  kinds = dict.fromkeys(run.devices)
  devices = [f"{run.devices.count(kind)} × {kind}" for kind in kinds]
  return (
    short,
    str(environment.get("code") or NOTHING),
    ", ".join(devices) or NOTHING,
    str(environment.get("processes", NOTHING)),
    str(environment.get("python", NOTHING)),
    *(str(run.packages.get(name, NOTHING)) for name in ("jax", "flax", "optax")),
    str(environment.get("platform", NOTHING)),
  )

"""The tables of a report: as text for the page, and as numbers, each in a column of its own, for CSV and LaTeX."""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixln_jax.files import write_whole
from mixln_jax.reporting import comparison, groups
from mixln_jax.reporting.comparison import Difference, Spread, Standing, spread
from mixln_jax.reporting.headline import Contender, Headline, Matchup
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.numbers import NOTHING, fixed, signed
from mixln_jax.reporting.reading import as_mapping
from mixln_jax.reporting.speed import step_time_of
from mixln_jax.text import perplexity


@dataclasses.dataclass(frozen=True)
class TextTable:
  """A table.

  Attributes:
    name: of its CSV file.
    title: above it.
    headers: of its columns.
    rows: as many cells each as there are headers.
    data: what CSV has, a mapping a row: numbers in full precision, each under its name.
    note: below it.
  """

  name: str
  title: str
  headers: Sequence[str]
  rows: Sequence[Sequence[str]]
  data: Sequence[Mapping[str, Any]]
  note: str = ""


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
  mean = fixed(value.mean, digits)
  return mean if value.std is None else f"{mean} ± {fixed(value.std, digits)}"


def difference_cells(value: Difference | None, digits: int = 4) -> tuple[str, str]:
  """`−0.5123` and `−0.6912 to −0.3370`; where there is no interval, why."""
  if value is None:
    return NOTHING, NOTHING
  mean = signed(value.mean, digits)
  if value.interval is not None:
    low, high = value.interval
    return mean, f"{signed(low, digits)} to {signed(high, digits)}"
  return mean, "one seed" if value.n == 1 else "all pairs equal"


def needed_cell(verdict: str, needed: int | None) -> str:
  """The seeds that an open comparison would need; a dash where it is shown, or no std is known."""
  if needed is not None:
    return f"{needed:,}"
  return f"> {comparison.MOST_SEEDS:,}" if verdict == comparison.NOT_SHOWN else NOTHING


def _spread_data(name: str, value: Spread | None) -> dict[str, Any]:
  """Mean and standard deviation, in columns of their own."""
  if value is None:
    return {f"{name}_mean": None, f"{name}_std": None}
  return {f"{name}_mean": value.mean, f"{name}_std": value.std}


def _difference_data(name: str, value: Difference | None) -> dict[str, Any]:
  """A difference and the ends of its interval, in columns of their own."""
  names = (f"{name}_difference", f"{name}_low", f"{name}_high")
  if value is None:
    return dict.fromkeys(names)
  return dict(zip(names, (value.mean, *(value.interval or (None, None))), strict=True))


# A best learning rate with the place that it has in its grid.
RATE_AT = {"only rate": "{} (one tried)", "inside": "{}", "lower edge": "◂ {}", "upper edge": "{} ▸"}


def summary_table(headline: Headline, runs: Sequence[ReportedRun]) -> TextTable:
  """Each placement at its best learning rate: difference to the baseline, rate, cost of a step, loss, perplexity."""
  with_rates = any(one.rate for one in headline.contenders)
  step_times = {id(match.ours): _step_time(match, runs) for match in headline.matchups}
  with_times = any(time is not None for time in step_times.values())
  headers = (
    "placement",
    "loss − baseline’s",
    "95 % interval",
    "verdict",
    "seeds needed",
    *(("learning rate",) if with_rates else ()),
    *(("step time",) if with_times else ()),
    "loss (nats)",
    "bits a byte",
    "perplexity",
    "seeds",
    "diverged",
  )
  body, data = [], []
  for contender in headline.contenders:
    best, match = contender.best, headline.matchup_of(contender)
    is_baseline = any(one.baseline is contender for one in headline.matchups)
    row = best.row if best else None
    bits = spread(row.bits) if row is not None and len(row.bits) else None
    verdict = match.verdict if match else NOTHING
    if is_baseline:
      verdict = "baseline"
    rate_cell = RATE_AT[best.place].format(contender.rate) if best and contender.rate else NOTHING
    step_time = 1.0 if is_baseline and with_times else step_times.get(id(contender))
    cells = (
      contender.label,
      *difference_cells(match.loss if match else None),
      verdict,
      needed_cell(match.verdict, match.needed) if match else NOTHING,
      *((rate_cell,) if with_rates else ()),
      *((_times(step_time),) if with_times else ()),
      mean_and_std(row.loss if row else None),
      fixed(bits.mean if bits else None, 4),
      fixed(row.perplexity.mean if row and row.perplexity else None, 2),
      str(row.counted if row else 0),
      str(row.diverged if row else contender.diverged),
    )
    body.append(cells)
    data.append(
      {
        "placement": contender.placement,
        **contender.setting,
        groups.LEARNING_RATE_FIELD: row.group.setting.get(groups.LEARNING_RATE_FIELD) if row else None,
        "place_in_grid": best.place if best and contender.rate else None,
        "verdict": verdict,
        "pairs": match.loss.n if match else None,
        "pairs_std": match.loss.std if match else None,
        "seeds_needed": match.needed if match else None,
        "step_time_ratio": step_time,
        **_difference_data("loss", match.loss if match else None),
        **_difference_data("bits_per_byte", match.bits if match else None),
        **_difference_data("perplexity", match.perplexity if match else None),
        **_spread_data("loss", row.loss if row else None),
        **_spread_data("bits_per_byte", bits),
        **_spread_data("perplexity", row.perplexity if row else None),
        "seeds": row.counted if row else 0,
        "planned": row.planned if row else sum(one.planned for one in contender.family),
        "diverged": row.diverged if row else contender.diverged,
      }
    )
  needed = (
    f"Seeds needed: pairs with which such a difference would be shown with a power of {comparison.POWER:.0%}, if "
    "difference and std are what they seem."
  )
  if with_times:
    needed += (
      " Step time: seconds of a step over the baseline’s, by the medians that the runs measured; what else the machine "
      "did is in it."
    )
  note = (
    f"{_MEANING} {needed} Best learning rate: that of the lowest mean loss over the seeds that all rates share; chosen "
    "by the losses that are reported, they are a little optimistic, and more so for placements with more rates. "
    "◂ or ▸: it is at that edge of its grid, and a better one may lie beyond."
  )
  if not with_rates:
    note = f"{_MEANING} {needed}"
  return TextTable("summary", "Each placement at its best", headers, body, data, note)


def _step_time(match: Matchup, runs: Sequence[ReportedRun]) -> float | None:
  """Time of a step, ours over the baseline's; None where it was not measured on equal devices."""
  ratio = step_time_of(_runs_of(match.ours, runs), _runs_of(match.baseline, runs))
  return None if ratio is None else ratio.value


def _runs_of(contender: Contender, runs: Sequence[ReportedRun]) -> list[ReportedRun]:
  """A contender's runs at its best learning rate."""
  return [] if contender.best is None else [runs[index] for index in contender.best.row.group.runs]


def _times(ratio: float | None) -> str:
  return NOTHING if ratio is None else f"{ratio:.2f} ×"


_MEANING = (
  "Validation after the last step of the whole budget, in nats a token; mean ± standard deviation over seeds (n − 1). "
  f"Differences are paired by seed, with Student’s t interval ({comparison.CONFIDENCE:.0%}, n − 1 degrees of freedom, "
  "not corrected for the number of comparisons). Below 0: lower than the baseline."
)


def perplexity_table(rows: Sequence[Standing], baseline: str) -> TextTable:
  """Final loss and perplexity by group, and the paired differences at equal settings."""
  headers = (
    "group",
    f"loss − {baseline}’s",
    "95 % interval",
    "pairs",
    "loss (nats)",
    "perplexity",
    "counted",
    "diverged",
  )
  body, data = [], []
  for row in rows:
    cells = (
      row.group.label,
      *difference_cells(row.loss_difference),
      str(row.loss_difference.n) if row.loss_difference else NOTHING,
      mean_and_std(row.loss),
      mean_and_std(row.perplexity, 2),
      f"{row.counted} of {row.planned}",
      str(row.diverged),
    )
    body.append(cells)
    data.append(
      {
        "group": row.group.label,
        "placement": row.group.placement,
        **row.group.setting,
        "baseline": row.baseline,
        "pairs": row.loss_difference.n if row.loss_difference else None,
        **_difference_data("loss", row.loss_difference),
        **_difference_data("perplexity", row.perplexity_difference),
        **_spread_data("loss", row.loss),
        **_spread_data("perplexity", row.perplexity),
        "counted": row.counted,
        "planned": row.planned,
        "diverged": row.diverged,
      }
    )
  note = f"{_MEANING} Only equal settings are compared. Runs that have not reached their last step do not count."
  return TextTable("perplexity_by_group", "All groups", headers, body, data, note)


def latex(table: TextTable) -> str:
  """A table for LaTeX, with \\usepackage{booktabs}."""
  lines = [
    f"% {table.title}. Needs \\usepackage{{booktabs}}.",
    f"\\begin{{tabular}}{{l{'r' * (len(table.headers) - 1)}}}",
    "\\toprule",
  ]
  lines += [_latex_row(table.headers), "\\midrule"]
  lines += [_latex_row(row) for row in table.rows]
  return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


LATEX_SPECIAL = {
  "\\": r"\textbackslash{}",
  **{character: f"\\{character}" for character in "&%$#_{}"},
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "−": "$-$",
  "±": r"$\pm$",
  "–": "--",
  "’": "'",
  "◂": r"$\triangleleft$",
  "▸": r"$\triangleright$",
}


def _latex_row(cells: Sequence[str]) -> str:
  escaped = ["".join(LATEX_SPECIAL.get(character, character) for character in cell) for cell in cells]
  return f"{' & '.join(escaped)} \\\\"


RUN_HEADERS = (
  "run",
  "status",
  "step",
  "loss",
  "best loss (step)",
  "tokens",
  "minutes",
  "skipped",
  "seeds",
  "initial weights",
  "data",
)


def runs_table(runs: Sequence[ReportedRun]) -> TextTable:
  """How each run went."""
  note = (
    "Loss: of the validation after the last step. Minutes: of the process that ended the run (outcome.json). Skipped: "
    "updates whose loss or gradient was not finite. Seeds: of the initial weights / of the data. Initial weights and "
    "data: hash and fingerprint; equal ones mean equal numbers."
  )
  data = [_run_data(run) for run in runs]
  return TextTable("runs", "Runs", RUN_HEADERS, [_run_row(one) for one in data], data, note)


def _run_data(run: ReportedRun) -> dict[str, Any]:
  best = as_mapping(run.outcome.get("best_validation"))
  seconds = _number_or_none(as_mapping(run.outcome.get("seconds")).get("total"))
  return {
    "run": run.name,
    "placement": run.placement,
    "seed": run.config["seed"],
    "data_seed": run.config.get("data.seed"),
    "status": run.status,
    "step": run.step,
    "num_steps": run.num_steps,
    "loss": run.final_loss,
    "perplexity": None if run.final_loss is None else perplexity(run.final_loss),
    "bits_per_byte": run.at_end("bits_per_byte"),
    "best_loss": _number_or_none(best.get("loss")),
    "best_step": best.get("step"),
    "tokens": int(np.nansum(run.train["tokens"])) if "tokens" in run.train else None,
    "minutes": None if seconds is None else seconds / 60,
    "skipped_updates": run.outcome.get("skipped_updates"),
    "initial_weights": run.initial_weights.get("hash"),
    "data": run.fingerprint,
  }


def _run_row(run: Mapping[str, Any]) -> tuple[str, ...]:
  """A run's data as text."""
  best = NOTHING
  if run["best_loss"] is not None:
    best = f"{fixed(run['best_loss'], 4)} ({run['best_step']})"
  return (
    run["run"],
    run["status"],
    f"{run['step']} / {run['num_steps']}",
    fixed(run["loss"], 4),
    best,
    NOTHING if run["tokens"] is None else f"{run['tokens']:,}",
    fixed(run["minutes"], 1),
    _or_dash(run["skipped_updates"]),
    f"{run['seed']} / {run['data_seed']}",
    _or_dash(run["initial_weights"])[:12],
    _or_dash(run["data"])[:12],
  )


def _or_dash(value: Any) -> str:
  return NOTHING if value is None else str(value)


def _number_or_none(value: Any) -> float | None:
  """A finite number, also where it is written as text; None for anything else, such as the "nan" of metrics."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    return None
  return number if math.isfinite(number) else None


def differences_table(runs: Sequence[ReportedRun]) -> TextTable:
  """The config fields in which the runs differ."""
  fields = groups.differing_fields(runs)
  body = []
  for run in runs:
    values = [groups.show(groups.value_of(run, field)) for field in fields]
    body.append((run.name, *values))
  note = "All other fields are equal." if fields else "All fields are equal."
  headers = ("run", *fields)
  return TextTable("config_differences", "What differs", headers, body, _as_data(headers, body), note)


def environment_table(runs: Sequence[ReportedRun]) -> TextTable:
  """Where each run was trained; runs of one environment share a row."""
  by_environment = groups.grouped(runs, _environment_row)
  body = []
  for cells, members in by_environment.items():
    body.append((*cells, ", ".join(run.name for run in members)))
  headers = ("revision", "code", "devices", "processes", "Python", "jax", "flax", "optax", "platform", "runs")
  note = "Code: a hash of the package's source files; equal ones mean equal code, whatever the revision."
  return TextTable("environment", "Environment", headers, body, _as_data(headers, body), note)


def _as_data(headers: Sequence[str], body: Sequence[Sequence[str]]) -> list[dict[str, str]]:
  """Rows of text, each cell by its header."""
  return [dict(zip(headers, row, strict=True)) for row in body]


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

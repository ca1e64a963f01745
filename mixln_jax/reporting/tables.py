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


def _loss_header(rows: Sequence[Standing]) -> str:
  """Of the column of losses, with their unit where all have one."""
  units = {row.unit for row in rows}
  return f"loss ({units.pop()})" if len(units) == 1 else "loss (nats)"


def _meaning(rows: Sequence[Standing]) -> str:
  """What the numbers of these rows are."""
  units = " or ".join(dict.fromkeys(row.unit for row in rows)) or comparison.NATS_A_TOKEN
  pairs = ""
  if any(row.of_pairs for row in rows):
    pairs = (
      "Nats a pair: the loss over pairs of answers (config.preference.loss), which has no perplexity; accuracy: the "
      "fraction of the pairs whose preferred answer has the larger reward. "
    )
  return (
    f"Validation after the last step of the whole budget, in {units}; mean ± standard deviation over seeds (n − 1). "
    f"{pairs}Differences are paired by seed, with Student’s t interval ({comparison.CONFIDENCE:.0%}, n − 1 degrees of "
    "freedom, not corrected for the number of comparisons). Below 0: lower than the baseline."
  )


# Columns of the summary that are left out where no placement has anything in them.
_WHERE_KNOWN = ("learning rate", "step time", "bits a byte", "perplexity", "accuracy", "margin")


def summary_table(headline: Headline, runs: Sequence[ReportedRun]) -> TextTable:
  """Each placement at its best learning rate: difference to the baseline, rate, cost of a step, loss, perplexity."""
  rows = [row for one in headline.contenders for row in one.family]
  step_times = {id(match.ours): _step_time(match, runs) for match in headline.matchups}
  with_times = any(time is not None for time in step_times.values())
  lines, data = [], []
  for contender in headline.contenders:
    match = headline.matchup_of(contender)
    is_baseline = any(one.baseline is contender for one in headline.matchups)
    verdict = match.verdict if match else NOTHING
    step_time = step_times.get(id(contender))
    if is_baseline:
      verdict = "baseline"
      step_time = 1.0 if with_times else None
    lines.append(_summary_line(contender, match, verdict, step_time, _loss_header(rows)))
    data.append(_summary_data(contender, match, verdict, step_time))
  headers = []
  for name in lines[0] if lines else ():
    if name not in _WHERE_KNOWN or any(line[name] != NOTHING for line in lines):
      headers.append(name)
  body = [tuple(line[name] for name in headers) for line in lines]
  notes = [
    _meaning(rows),
    f"Seeds needed: pairs with which such a difference would be shown with a power of {comparison.POWER:.0%}, if "
    "difference and std are what they seem.",
  ]
  if "step time" in headers:
    notes.append(
      "Step time: seconds of a step over the baseline’s, by the medians that the runs measured; what else the machine "
      "did is in it."
    )
  if "learning rate" in headers:
    notes.append(
      "Best learning rate: that of the lowest mean loss over the seeds that all rates share; chosen by the losses that "
      "are reported, they are a little optimistic, and more so for placements with more rates. ◂ or ▸: it is at that "
      "edge of its grid, and a better one may lie beyond."
    )
  return TextTable("summary", "Each placement at its best", headers, body, data, " ".join(notes))


def _summary_line(
  contender: Contender, match: Matchup | None, verdict: str, step_time: float | None, loss_header: str
) -> dict[str, str]:
  """The cells of one placement, by header."""
  row = contender.best.row if contender.best else None
  difference, interval = difference_cells(match.loss if match else None)
  bits = _spread_or_none(row.bits if row else None)
  accuracy = _spread_or_none(row.accuracies if row else None)
  margin = _spread_or_none(row.margins if row else None)
  rate = NOTHING
  if contender.best and contender.rate:
    rate = RATE_AT[contender.best.place].format(contender.rate)
  return {
    "placement": contender.label,
    "loss − baseline’s": difference,
    "95 % interval": interval,
    "verdict": verdict,
    "std of pairs": fixed(match.loss.std if match else None, 4),
    "seeds needed": needed_cell(match.verdict, match.needed) if match else NOTHING,
    "learning rate": rate,
    "step time": NOTHING if step_time is None else f"{step_time:.2f} ×",
    loss_header: mean_and_std(row.loss if row else None),
    "bits a byte": fixed(bits.mean if bits else None, 4),
    "perplexity": fixed(row.perplexity.mean if row and row.perplexity else None, 2),
    "accuracy": _percent(accuracy),
    "margin": fixed(margin.mean if margin else None, 4),
    "seeds": str(row.counted if row else 0),
    "diverged": str(row.diverged if row else contender.diverged),
  }


def _summary_data(contender: Contender, match: Matchup | None, verdict: str, step_time: float | None) -> dict[str, Any]:
  """The numbers of one placement, for the CSV file."""
  best = contender.best
  row = best.row if best else None
  data = {
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
    **_spread_data("bits_per_byte", _spread_or_none(row.bits if row else None)),
    **_spread_data("perplexity", row.perplexity if row else None),
    "seeds": row.counted if row else 0,
    "planned": row.planned if row else sum(one.planned for one in contender.family),
    "diverged": row.diverged if row else contender.diverged,
  }
  if any(one.of_pairs for one in contender.family):
    data |= _difference_data("accuracy", match.accuracy if match else None)
    data |= _spread_data("accuracy", _spread_or_none(row.accuracies if row else None))
    data |= _spread_data("margin", _spread_or_none(row.margins if row else None))
  return data


def _step_time(match: Matchup, runs: Sequence[ReportedRun]) -> float | None:
  """Time of a step, ours over the baseline's; None where it was not measured on equal devices."""
  ratio = step_time_of(_runs_of(match.ours, runs), _runs_of(match.baseline, runs))
  return None if ratio is None else ratio.value


def _runs_of(contender: Contender, runs: Sequence[ReportedRun]) -> list[ReportedRun]:
  """A contender's runs at its best learning rate."""
  return [] if contender.best is None else [runs[index] for index in contender.best.row.group.runs]


def perplexity_table(rows: Sequence[Standing], baseline: str) -> TextTable:
  """Final loss and perplexity by group, and the paired differences at equal settings."""
  with_tokens = any(not row.of_pairs for row in rows)
  headers = (
    "group",
    f"loss − {baseline}’s",
    "95 % interval",
    "pairs",
    _loss_header(rows),
    *(("perplexity",) if with_tokens else ()),
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
      *((mean_and_std(row.perplexity, 2),) if with_tokens else ()),
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
  note = f"{_meaning(rows)} Only equal settings are compared. Runs that have not reached their last step do not count."
  return TextTable("perplexity_by_group", "All groups", headers, body, data, note)


def preferences_table(rows: Sequence[Standing]) -> TextTable | None:
  """What the groups of runs on pairs of answers make of the held-out pairs; None where there are no such runs."""
  of_pairs = [row for row in rows if row.of_pairs]
  if not of_pairs:
    return None
  body, data = [], []
  for row in of_pairs:
    accuracy, margin = _spread_or_none(row.accuracies), _spread_or_none(row.margins)
    chosen, rejected = _spread_or_none(row.chosen_rewards), _spread_or_none(row.rejected_rewards)
    rewards = (mean_and_std(one) for one in (margin, chosen, rejected, row.loss))
    body.append((row.group.label, _percent(accuracy), *rewards, f"{row.counted} of {row.planned}"))
    data.append(
      {
        "group": row.group.label,
        "placement": row.group.placement,
        **row.group.setting,
        **_spread_data("accuracy", accuracy),
        **_spread_data("margin", margin),
        **_spread_data("chosen_reward", chosen),
        **_spread_data("rejected_reward", rejected),
        **_spread_data("loss", row.loss),
        "counted": row.counted,
        "planned": row.planned,
      }
    )
  note = (
    "Validation after the last step of the whole budget; mean ± standard deviation over seeds (n − 1). Accuracy: the "
    "fraction of the pairs whose preferred answer has the larger reward. Margin: the mean reward of the preferred "
    "answers minus that of the others. Rewards are those of each run’s own config.preference.loss, so that they can be "
    "compared between runs of one loss with equal settings only."
  )
  headers = ("group", "accuracy", "margin", "chosen reward", "rejected reward", "loss (nats a pair)", "counted")
  return TextTable("preferences", "Pairs of answers", headers, body, data, note)


def _spread_or_none(values: Any) -> Spread | None:
  return None if values is None or not len(values) else spread(values)


def _percent(value: Spread | None) -> str:
  """A fraction in percent: its mean, and its std where there is one."""
  if value is None:
    return NOTHING
  mean = f"{100 * value.mean:.1f} %"
  return mean if value.std is None else f"{100 * value.mean:.1f} ± {100 * value.std:.1f} %"


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
  of_pairs = ", nats a pair of a run on pairs of answers" if any(run.of_pairs for run in runs) else ""
  note = (
    f"Loss: of the validation after the last step{of_pairs}. Minutes: of the process that ended the run "
    "(outcome.json). Skipped: updates whose loss or gradient was not finite. Seeds: of the initial weights / of the "
    "data. Initial weights and data: hash and fingerprint; equal ones mean equal numbers."
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
    "perplexity": None if run.final_loss is None or run.of_pairs else perplexity(run.final_loss),
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

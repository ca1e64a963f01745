"""The report: one HTML file that needs no network, the figures alone, and the tables as CSV."""

import base64
import dataclasses
import datetime
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mixln_jax.errors import InputError
from mixln_jax.reporting import charts, comparison, figures, tables
from mixln_jax.reporting.comparison import Group, Standing
from mixln_jax.reporting.evidence import Absent, Source, all_figures
from mixln_jax.reporting.fairness import Finding, find
from mixln_jax.reporting.loading import Material
from mixln_jax.reporting.panels import DARK, LIGHT, Figure, Panel, Series
from mixln_jax.reporting.tables import Table, difference_and_interval, mean_and_deviation, write_csv
from mixln_jax.version import VERSION

PAGE, FIGURES, TABLES = "report.html", "figures", "tables"
TEMPLATES = Path(__file__).parent / "templates"
MOST_COLUMNS, FEW_COLUMNS = 40, 12  # numbers beside a figure: a column an x, or a few of them; all are in its CSV
DIAGNOSED = (
  "diagnosed_gradient_norm",
  "angular_distance_last",
  "angular_distance_all",
  "angular_distance_by_layer",
  "removal",
  "effective_rank",
  "logit_lens",
)
SECTIONS = {
  "Training": ("loss", "perplexity", "gradient_norm"),
  "Studies": ("alpha", "learning_rate"),
  "Layers while training": ("layer_gradient_norm", "residual_growth", "sublayers"),
  "Layers of the trained model": DIAGNOSED,
}


@dataclasses.dataclass(frozen=True)
class Analysis:
  """All that a report says, before it is drawn."""

  material: Material
  baseline: str
  groups: Sequence[Group]
  rows: Sequence[Standing]
  source: Source
  figures: Sequence[Figure]
  absent: Sequence[Absent]
  findings: Sequence[Finding]
  tables: Sequence[Table]
  headline: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What was written, and what it says first."""

  page: Path
  figures: Sequence[Path]
  tables: Sequence[Path]
  findings: Sequence[Finding]
  headline: str


def analyze(material: Material, baseline: str = "pre") -> Analysis:
  """Compares the runs; `baseline` is the placement that the others are compared with."""
  material = _by_group(material)
  runs = material.runs
  groups = comparison.make_groups(material)
  rows = comparison.standings(runs, groups, baseline)
  source = Source(runs, groups, rows, comparison.featured(groups, rows))
  drawn, absent = all_figures(source)
  made = [
    tables.perplexity_table(rows, baseline),
    *tables.best_rates_table(rows),
    tables.runs_table(runs),
    tables.differences_table(runs),
    tables.environment_table(runs),
  ]
  headline = summarize(rows, baseline)
  return Analysis(material, baseline, groups, rows, source, drawn, absent, find(material, groups), made, headline)


def write_report(material: Material, output: str | Path, baseline: str = "pre") -> Report:
  """Writes DIR/report.html, DIR/figures and DIR/tables; what an earlier report left there is replaced.

  Raises:
    InputError: DIR holds something else, or can't be written.
  """
  analysis = analyze(material, baseline)
  folder = _make_folder(Path(output).expanduser().absolute())
  figure_paths = [path for figure in analysis.figures for path in figures.draw(figure, folder / FIGURES)]
  contents = {figure.name: figure.rows() for figure in analysis.figures}
  contents |= {table.name: table.records() for table in analysis.tables}
  table_paths = [write_csv(folder / TABLES / f"{name}.csv", rows) for name, rows in contents.items()]
  page = folder / PAGE
  page.write_text(_render(analysis, folder))
  return Report(page, figure_paths, table_paths, analysis.findings, analysis.headline)


def _by_group(material: Material) -> Material:
  """The runs in the order of their groups."""
  order = [index for group in comparison.make_groups(material) for index in group.runs]
  return dataclasses.replace(material, runs=[material.runs[index] for index in order])


def _make_folder(folder: Path) -> Path:
  try:
    entries = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if entries and PAGE not in entries:
      raise InputError(
        f"--output={folder}: holds something else than a report ({sorted(entries)[0]!r}); choose an empty or new folder"
      )
    for name, endings in ((FIGURES, figures.FORMATS), (TABLES, ("csv",))):
      (folder / name).mkdir(parents=True, exist_ok=True)
      for ending in endings:
        for path in (folder / name).glob(f"*.{ending}"):
          path.unlink()
  except OSError as error:
    raise InputError(f"--output={folder}: can't be written ({error.strerror}); choose another folder") from error
  return folder


# What the page says.


def summarize(rows: Sequence[Standing], baseline: str) -> str:
  """One sentence on the lowest mean perplexity, and whether the seeds tell it from the baseline."""
  counted = [row for row in rows if row.perplexity]
  if not counted:
    return "No run has been evaluated after its last step yet."
  best = min(counted, key=lambda row: row.loss.mean if row.loss else float("inf"))
  assert best.perplexity
  seeds = "one seed" if best.perplexity.n == 1 else f"{best.perplexity.n} seeds"
  text = f"Lowest validation perplexity: {best.group.label}, {mean_and_deviation(best.perplexity, 2)} ({seeds})."
  if best.group.placement == baseline:
    return f"{text} It is the baseline.{_not_counted(best)}"
  base = next((r for r in rows if r.group.placement == baseline and r.group.setting == best.group.setting), None)
  lost = _not_counted(best) + (_not_counted(base) if base else "")
  difference = best.perplexity_difference
  if difference is None:
    return f"{text} There is no {baseline} run of equal settings and seeds to compare it with.{lost}"
  text += f" Against {best.baseline}: {difference_and_interval(difference, 2)}"
  if difference.interval is None:
    return f"{text}.{lost}"
  low, high = difference.interval
  verdict = (
    "the interval holds 0, so these seeds do not tell them apart" if low <= 0 <= high else "the interval excludes 0"
  )
  return f"{text}, {comparison.CONFIDENCE:.0%} interval of {difference.n} paired runs; {verdict}.{lost}"


def _not_counted(row: Standing) -> str:
  """What a mean is silent about: a group's runs that did not count, or diverged."""
  if row.counted == row.planned and not row.diverged:
    return ""
  return f" {row.counted} of {row.planned} runs of {row.group.label} counted; {row.diverged} diverged."


def _strips(source: Source) -> dict[str, Any]:
  """Each run's placement as cells and in words (`post ×3, pre ×9`), and what the cells' looks mean."""
  names = dict.fromkeys(name for run in source.runs for name in run.strip)
  others = [name for name in names if name not in ("pre", "post")]
  looks = {"pre": "pre", "post": "post"} | {name: f"c{2 + number % 6}" for number, name in enumerate(others)}
  strips = []
  for index, run in enumerate(source.runs):
    counts = [(name, len(list(same))) for name, same in itertools.groupby(run.strip)]
    text = ", ".join(f"{name} ×{count}" for name, count in counts) or "placement.txt is not there yet"
    cells = [{"look": looks[name], "name": name} for name in run.strip]
    strips.append({"run": run.name, "label": source.run_label(index), "cells": cells, "text": text})
  return {"runs": strips, "looks": {name: looks[name] for name in names}}


def _filters(analysis: Analysis) -> list[dict[str, Any]]:
  """Buttons that show and hide runs: for each field in which runs differ, its values and the runs that have them."""
  material, groups = analysis.material, analysis.groups
  fields = [comparison.PLACEMENT, *dict.fromkeys(f for group in groups for f in group.setting), *comparison.SEEDS]
  styles = {group.placement: group.style.kind % len(LIGHT) for group in groups}
  filters = []
  for field in fields:
    values = comparison.values_of(material.runs, field)
    ordered = (
      dict.fromkeys(group.placement for group in groups) if field == comparison.PLACEMENT else dict.fromkeys(values)
    )
    if len(ordered) < 2:
      continue
    options = [
      {
        "text": comparison.show(value),
        "colour": styles.get(str(value)) if field == comparison.PLACEMENT else None,
        "runs": [index for index, own in enumerate(values) if own == value],
      }
      for value in ordered
    ]
    filters.append({"field": field, "options": options})
  return filters


def _shown(figure: Figure, folder: Path) -> dict[str, Any]:
  """A figure with what the page needs of it; its SVG, drawn already, is for paper and for a page without scripts."""
  stem = f"{FIGURES}/{figure.name}"
  return {
    "name": figure.name,
    "title": figure.title,
    "caption": figure.caption,
    "svg": base64.b64encode((folder / f"{stem}.svg").read_bytes()).decode(),
    "description": figure.description,
    "files": [f"{stem}.{ending}" for ending in figures.FORMATS] + [f"{TABLES}/{figure.name}.csv"],
    "charts": [
      {"id": f"{figure.name}-{index}", "title": panel.title, "plotly": chart}
      for index, (panel, chart) in enumerate(zip(figure.panels, charts.charts(figure), strict=True))
    ],
    "diagnosed": figure.name in DIAGNOSED,
    "maps": figure.panels[0].matrix is not None,
    "bars": figure.panels[0].bars,
    "legend": [
      {"text": name, "colour": style.kind % len(LIGHT), "dash": style.variant % 4, "marker": style.kind % 8}
      for style, name in figure.looks.items()
    ],
    "tables": [_numbers(panel) for panel in figure.panels],
  }


def _numbers(panel: Panel) -> dict[str, Any]:
  """A panel as a table: a row a series, a column an x; a heat map as it is."""
  if panel.matrix is not None:
    size = range(1, panel.matrix.shape[1] + 1)
    body = [
      (f"n = {row}", *(tables.number(value, 3) if value == value else "" for value in values))
      for row, values in enumerate(panel.matrix.tolist(), start=1)
    ]
    return {"title": panel.title, "headers": ["", *(f"layer {layer}" for layer in size)], "rows": body, "cut": False}
  xs = sorted({x for series in panel.series for x in series.x})
  chosen = xs if len(xs) <= MOST_COLUMNS else _spaced(xs, FEW_COLUMNS)
  body = [(series.name, *_at(series, chosen)) for series in panel.series]
  title = " – ".join(filter(None, (panel.title, f"{panel.y_label} at {panel.x_label}")))
  return {"title": title, "headers": ["", *(f"{x:g}" for x in chosen)], "rows": body, "cut": len(chosen) < len(xs)}


def _spaced(values: Sequence[float], most: int) -> list[float]:
  """At most `most` of the values, evenly spaced, the first and the last among them."""
  if len(values) <= most:
    return list(values)
  return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def _at(series: Series, xs: Iterable[float]) -> list[str]:
  values = dict(zip(series.x, series.y, strict=True))
  return [f"{values[x]:.4g}" if x in values and values[x] == values[x] else "" for x in xs]


def _render(analysis: Analysis, folder: Path) -> str:
  """The page; the figures lie in the folder already."""
  material = analysis.material
  runs, study = material.runs, material.study
  shown = {figure.name: _shown(figure, folder) for figure in analysis.figures}
  sections = {name: [shown[one] for one in names if one in shown] for name, names in SECTIONS.items()}
  filters = _filters(analysis)
  differing = [name for name in comparison.differing_fields(runs) if comparison.changes_the_run(name)]
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template("report.html").render(
    analysis=analysis,
    material=material,
    runs=runs,
    study=study,
    title=study.name if study else "Comparison of placements" if len(runs) > 1 else runs[0].name,
    time=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    version=VERSION,
    fair=not any(finding.level == "unfair" for finding in analysis.findings),
    differing=differing,
    tables={table.name: table for table in analysis.tables},
    sections={name: some for name, some in sections.items() if some},
    some_groups=len(analysis.source.featured) < len(analysis.groups),
    sample=next((text for run in runs if run.diagnosis and (text := run.diagnosis.definitions.get("data"))), ""),
    strips=_strips(analysis.source),
    filters=filters,
    light=LIGHT,
    dark=DARK,
    css=(TEMPLATES / "report.css").read_text(),
    script=(TEMPLATES / "report.js").read_text(),
    library=charts.library(),
    data={
      "charts": {chart["id"]: chart["plotly"] for figure in shown.values() for chart in figure["charts"]},
      "filters": filters,
      "palettes": {"light": LIGHT, "dark": DARK},
    },
  )

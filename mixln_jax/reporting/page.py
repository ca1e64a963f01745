"""The report as files: one HTML page that needs no network, the figures alone, and the tables as CSV."""

import base64
import dataclasses
import datetime
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mixln_jax.errors import InputError
from mixln_jax.files import local_path, write_whole
from mixln_jax.reporting import charts, figures
from mixln_jax.reporting.analysis import Analysis, analyze
from mixln_jax.reporting.fairness import Finding
from mixln_jax.reporting.groups import (
  PLACEMENT_FIELD,
  SEED_FIELDS,
  changes_the_run,
  differing_fields,
  grouped,
  show,
  value_of,
)
from mixln_jax.reporting.loading import Material
from mixln_jax.reporting.panels import DARK, LIGHT, NUM_COLOURS, NUM_DASHES, NUM_MARKERS, Figure, Panel, Series, Style
from mixln_jax.reporting.source import Source
from mixln_jax.reporting.tables import write_csv
from mixln_jax.version import VERSION

PAGE_FILE, FIGURES_FOLDER, TABLES_FOLDER = "report.html", "figures", "tables"
TEMPLATES = Path(__file__).parent / "templates"
MOST_COLUMNS, FEW_COLUMNS = 40, 12  # of numbers beside a figure: one for each x, or a few of them; the CSV has all
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
OTHER_LOOKS = ("c2", "c3", "c4", "c5", "c6", "c7")  # of the cells of layers that are neither pre nor post


@dataclasses.dataclass(frozen=True)
class Report:
  """What was written, and what it says first.

  Attributes:
    page: path of the HTML file.
    figures, tables: paths of the files.
    findings: whether the runs are comparable.
    headline: the result in a sentence or two.
  """

  page: Path
  figures: Sequence[Path]
  tables: Sequence[Path]
  findings: Sequence[Finding]
  headline: str


def write_report(material: Material, output: str | Path, baseline: str = "pre") -> Report:
  """Writes report.html, figures/ and tables/ into the folder `output`; replaces what an earlier report wrote there.

  Raises:
    InputError: the folder holds something else, or can't be written.
  """
  analysis = analyze(material, baseline)
  folder = local_path(output).absolute()
  _make_folder(folder)
  figure_paths = []
  contents = {}
  for figure in analysis.figures:
    figure_paths += figures.draw(figure, folder / FIGURES_FOLDER)
    contents[figure.name] = figure.rows()
  for table in analysis.tables:
    contents[table.name] = table.records()
  table_paths = [write_csv(folder / TABLES_FOLDER / f"{name}.csv", rows) for name, rows in contents.items()]
  page = folder / PAGE_FILE
  write_whole(page, _render(analysis, folder))
  return Report(page, figure_paths, table_paths, analysis.findings, analysis.headline)


def _make_folder(folder: Path) -> None:
  """Makes the folder of a report, or removes the figures and tables of the report that it holds."""
  try:
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if entries and PAGE_FILE not in entries:
      raise InputError(
        f"output={folder}: holds something else than a report ({entries[0]!r}); choose an empty or new folder"
      )
    for name, formats in ((FIGURES_FOLDER, figures.FORMATS), (TABLES_FOLDER, ("csv",))):
      (folder / name).mkdir(parents=True, exist_ok=True)
      for ending in formats:
        for path in (folder / name).glob(f"*.{ending}"):
          path.unlink()
  except OSError as error:
    raise InputError(f"output={folder}: can't be written ({error.strerror}); choose another folder") from error


def _render(analysis: Analysis, folder: Path) -> str:
  """The page; the figures lie in the folder already."""
  material = analysis.material
  runs, study = material.runs, material.study
  title = "Comparison of placements"
  if study:
    title = study.name
  elif len(runs) == 1:
    title = runs[0].name
  figure_views = {figure.name: _figure_view(figure, folder) for figure in analysis.figures}
  sections = {}
  for section, names in SECTIONS.items():
    views = [figure_views[name] for name in names if name in figure_views]
    if views:
      sections[section] = views
  chart_by_id = {chart["id"]: chart["plotly"] for view in figure_views.values() for chart in view["charts"]}
  samples = [run.diagnosis.definitions.get("data", "") for run in runs if run.diagnosis]
  filters = _filters(analysis)
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
    title=title,
    time=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    version=VERSION,
    comparable=not any(finding.level == "unfair" for finding in analysis.findings),
    differing=[field for field in differing_fields(runs) if changes_the_run(field)],
    tables={table.name: table for table in analysis.tables},
    sections=sections,
    some_groups=len(analysis.source.featured) < len(analysis.groups),
    sample=next((sample for sample in samples if sample), ""),
    layer_lists=_layer_lists(analysis.source),
    filters=filters,
    light=LIGHT,
    dark=DARK,
    css=(TEMPLATES / "report.css").read_text(),
    script=(TEMPLATES / "report.js").read_text(),
    library=charts.library(),
    data={"charts": chart_by_id, "filters": filters, "palettes": {"light": LIGHT, "dark": DARK}},
  )


def _layer_lists(source: Source) -> dict[str, Any]:
  """Each run's placement as cells and in words (`post ×3, pre ×9`), and what the looks of the cells mean."""
  names = dict.fromkeys(name for run in source.runs for name in run.layer_list)
  looks = {"pre": "pre", "post": "post"}
  others = [name for name in names if name not in looks]
  for name, look in zip(others, itertools.cycle(OTHER_LOOKS), strict=False):
    looks[name] = look
  lists = []
  for index, run in enumerate(source.runs):
    counts = [f"{name} ×{len(list(same))}" for name, same in itertools.groupby(run.layer_list)]
    lists.append(
      {
        "run": run.name,
        "label": source.run_label(index),
        "cells": [{"look": looks[name], "name": name} for name in run.layer_list],
        "text": ", ".join(counts) or "placement.txt is not there yet",
      }
    )
  return {"runs": lists, "looks": {name: looks[name] for name in names}}


def _filters(analysis: Analysis) -> list[dict[str, Any]]:
  """Buttons that show and hide runs: for each field in which runs differ, its values and the runs that have them."""
  runs = analysis.material.runs
  setting_fields = [field for group in analysis.groups for field in group.setting]
  colours = {group.placement: group.style.kind % NUM_COLOURS for group in analysis.groups}
  filters = []
  for field in dict.fromkeys((PLACEMENT_FIELD, *setting_fields, *SEED_FIELDS)):
    # Runs lie in the order of their groups, so that placements come in the order of the legend.
    runs_by_value = grouped(range(len(runs)), lambda index, field=field: value_of(runs[index], field))
    if len(runs_by_value) < 2:
      continue
    options = []
    for value, members in runs_by_value.items():
      colour = colours[value] if field == PLACEMENT_FIELD else None
      options.append({"text": show(value), "colour": colour, "runs": members})
    filters.append({"field": field, "options": options})
  return filters


def _figure_view(figure: Figure, folder: Path) -> dict[str, Any]:
  """A figure with what the page needs of it. Its SVG, drawn already, is for paper and for a page without scripts."""
  stem = f"{FIGURES_FOLDER}/{figure.name}"
  files = [f"{stem}.{ending}" for ending in figures.FORMATS]
  files.append(f"{TABLES_FOLDER}/{figure.name}.csv")
  panel_charts = []
  for index, (panel, chart) in enumerate(zip(figure.panels, charts.charts(figure), strict=True)):
    panel_charts.append({"id": f"{figure.name}-{index}", "title": panel.title, "plotly": chart})
  return {
    "name": figure.name,
    "title": figure.title,
    "caption": figure.caption,
    "svg": base64.b64encode((folder / f"{stem}.svg").read_bytes()).decode(),
    "description": figure.description,
    "files": files,
    "charts": panel_charts,
    "diagnosed": figure.name in DIAGNOSED,
    "maps": figure.panels[0].matrix is not None,
    "bars": figure.panels[0].bars,
    "legend": [_legend_entry(style, name) for style, name in figure.looks.items()],
    "tables": [
      _matrix_numbers(panel) if panel.matrix is not None else _series_numbers(panel) for panel in figure.panels
    ],
  }


def _legend_entry(style: Style, name: str) -> dict[str, Any]:
  return {
    "text": name,
    "colour": style.kind % NUM_COLOURS,
    "marker": style.kind % NUM_MARKERS,
    "dash": style.variant % NUM_DASHES,
  }


def _matrix_numbers(panel: Panel) -> dict[str, Any]:
  """The numbers of a heat map, a row for each n and a column a layer."""
  assert panel.matrix is not None
  layers = [f"layer {number}" for number in range(1, panel.matrix.shape[1] + 1)]
  body = []
  for n, values in enumerate(panel.matrix, start=1):
    body.append((f"n = {n}", *(_cell(value, ".3f") for value in values)))
  return {"title": panel.title, "headers": ["", *layers], "rows": body, "cut": False}


def _series_numbers(panel: Panel) -> dict[str, Any]:
  """The numbers of a panel's series: a row a series, a column an x."""
  xs = sorted({x for series in panel.series for x in series.x})
  chosen = xs if len(xs) <= MOST_COLUMNS else _spaced(xs, FEW_COLUMNS)
  body = [(series.name, *_at(series, chosen)) for series in panel.series]
  title = f"{panel.y_label} at {panel.x_label}"
  if panel.title:
    title = f"{panel.title} – {title}"
  return {"title": title, "headers": ["", *(f"{x:g}" for x in chosen)], "rows": body, "cut": len(chosen) < len(xs)}


def _cell(value: float, form: str) -> str:
  """The number; nothing for NaN."""
  return "" if value != value else format(value, form)


def _spaced(values: Sequence[float], count: int) -> list[float]:
  """`count` of the values, evenly spaced, with the first and the last among them."""
  return [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]


def _at(series: Series, xs: Sequence[float]) -> list[str]:
  values = dict(zip(series.x, series.y, strict=True))
  return [_cell(values.get(x, float("nan")), ".4g") for x in xs]

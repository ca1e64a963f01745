"""The report as files: one HTML page that needs no network, the figures alone, and the tables as CSV and LaTeX."""

import dataclasses
import datetime
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from mixln_jax.errors import InputError
from mixln_jax.files import is_partial, local_path, partial_of, remove_partials_of_the_dead, write_whole
from mixln_jax.reporting import figures, tables
from mixln_jax.reporting.analysis import Analysis, analyze
from mixln_jax.reporting.evidence import SEARCHED, TRAINED_MODEL
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
from mixln_jax.reporting.numbers import typographic
from mixln_jax.reporting.panels import DARK, LIGHT, NUM_COLOURS, NUM_MARKERS, Figure, Panel, Series, Style
from mixln_jax.reporting.tables import write_csv
from mixln_jax.version import VERSION

PAGE_FILE, FIGURES_FOLDER, TABLES_FOLDER = "report.html", "figures", "tables"
TABLE_FORMATS = ("csv", "tex")
TEMPLATES = Path(__file__).parent / "templates"
MOST_COLUMNS, FEW_COLUMNS = 40, 12  # of numbers beside a figure: one for each x, or a few of them; the CSV has all
MANY_GROUPS = 12  # of more groups the full grid is folded away below the best of each placement


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


def write_report(material: Material, output: str | Path, baseline: str | None = None) -> Report:
  """Writes report.html, figures/ and tables/ into the folder `output`; replaces what an earlier report wrote there.

  All is written aside first, within that folder (which may be a mount, or a link to one): where that fails or is cut
  off, the report of before is as it was, and the folder can be written to again.

  Raises:
    InputError: the folder holds something else, or can't be written.
    OSError: the disk is full; the report of before is as it was.
  """
  analysis = analyze(material, baseline)
  folder = local_path(output).absolute()
  aside = partial_of(folder / "report")
  _make_folders(folder, aside)
  try:
    figure_names = []
    contents = {}
    for figure in analysis.figures:
      figure_names += [path.name for path in figures.draw(figure, aside / FIGURES_FOLDER)]
      contents[figure.name] = figure.rows()
    for table in analysis.tables:
      contents[table.name] = table.data
    table_names = [write_csv(aside / TABLES_FOLDER / f"{name}.csv", rows).name for name, rows in contents.items()]
    summary = analysis.tables[0]
    write_whole(aside / TABLES_FOLDER / f"{summary.name}.tex", tables.latex(summary))
    table_names.append(f"{summary.name}.tex")
    write_whole(aside / PAGE_FILE, _render(analysis))
    _publish(aside, folder)
  finally:
    shutil.rmtree(aside, ignore_errors=True)
  return Report(
    folder / PAGE_FILE,
    [folder / FIGURES_FOLDER / name for name in figure_names],
    [folder / TABLES_FOLDER / name for name in table_names],
    analysis.findings,
    analysis.answer,
  )


def _make_folders(folder: Path, aside: Path) -> None:
  """Makes the folder of a report, unless it holds something else, and in it the one that is written to first."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials_of_the_dead(folder)
    entries = sorted(entry.name for entry in folder.iterdir() if not is_partial(entry.name))
    # An earlier version made these two first, and left them alone where it was cut off.
    others = [name for name in entries if name not in (FIGURES_FOLDER, TABLES_FOLDER)]
    if others and PAGE_FILE not in entries:
      raise InputError(
        f"output={folder}: holds something else than a report ({others[0]!r}); choose an empty or new folder"
      )
    for name in (FIGURES_FOLDER, TABLES_FOLDER):
      (aside / name).mkdir(parents=True)
  except OSError as error:
    raise InputError(f"output={folder}: can't be written ({error.strerror}); choose another folder") from error


def _publish(aside: Path, folder: Path) -> None:
  """Moves a whole report to its place. The page comes first: it is what makes the folder that of a report."""
  (aside / PAGE_FILE).replace(folder / PAGE_FILE)
  for name, formats in ((FIGURES_FOLDER, figures.FORMATS), (TABLES_FOLDER, TABLE_FORMATS)):
    (folder / name).mkdir(exist_ok=True)
    written = {path.name for path in (aside / name).iterdir()}
    for ending in formats:
      for old in (folder / name).glob(f"*.{ending}"):
        if old.name not in written:
          old.unlink()
    for new in written:
      (aside / name / new).replace(folder / name / new)


def _render(analysis: Analysis) -> str:
  """The page."""
  material = analysis.material
  runs = material.runs
  samples = [run.diagnosis.definitions.get("data", "") for run in runs if run.diagnosis]
  filters = _filters(analysis)
  values = {
    "analysis": analysis,
    "material": material,
    "runs": runs,
    "study": material.study,
    "title": _title(material),
    "time": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    "comparable": analysis.comparable,
    "differing": [field for field in differing_fields(runs) if changes_the_run(field)],
    "tables": {table.name: table for table in analysis.tables},
    "difference": figure_view(analysis.difference) if analysis.difference else None,
    "sections": {name: [figure_view(figure) for figure in some] for name, some in analysis.sections.items()},
    "trained_model": TRAINED_MODEL,
    "searched": SEARCHED,
    "some_groups": len(analysis.source.featured) < len(analysis.groups),
    "many_groups": len(analysis.groups) > MANY_GROUPS,
    "has_grid": len(analysis.groups) > len(analysis.headline.contenders),
    "sample": next((sample for sample in samples if sample), ""),
    "layer_lists": _layer_lists(analysis),
    "filters": filters,
    "data": {"filters": filters},
  }
  return render("report.html", values)


def render(template: str, values: Mapping[str, Any]) -> str:
  """A page of the reports' look: one HTML file that needs nothing else.

  Args:
    template: a file of `templates/`.
    values: what it shows, by name; version, palettes, style sheet and script are added.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["typographic"] = typographic
  common = {
    "version": VERSION,
    "light": LIGHT,
    "dark": DARK,
    "css": (TEMPLATES / "report.css").read_text(),
    "script": (TEMPLATES / "report.js").read_text(),
  }
  return environment.get_template(template).render(common | dict(values))


def _title(material: Material) -> str:
  """What the report is of: a study's title, or its axes; else the placements."""
  study = material.study
  if study is not None and study.title:
    return study.title
  if study is not None and study.axes:
    words = [field.split(".")[-1].replace("_", " ") for field in study.axes]
    return " × ".join(words).capitalize()
  placements = list(dict.fromkeys(run.placement for run in material.runs))
  if len(material.runs) == 1:
    return f"One run of {placements[0]}"
  if len(placements) == 1:
    return f"{len(material.runs)} runs of {placements[0]}"
  if len(placements) <= 3:
    return f"{', '.join(placements[:-1])} and {placements[-1]}"
  return f"{len(placements)} placements"


def _layer_lists(analysis: Analysis) -> dict[str, Any]:
  """Each placement's layers as cells and in words (`post ×3, pre ×9`), and what the looks of the cells mean."""
  runs = analysis.material.runs
  looks = figures.cell_looks(list(dict.fromkeys(name for run in runs for name in run.layer_list)))
  lists: dict[tuple[str, ...], dict[str, Any]] = {}
  for index, run in enumerate(runs):
    key = (run.placement, *run.layer_list)
    counts = [f"{name} ×{len(list(same))}" for name, same in itertools.groupby(run.layer_list)]
    entry = lists.setdefault(
      key,
      {
        "label": run.placement,
        "colour": analysis.source.group_of(index).style.colour,
        "cells": [{"look": looks[name], "name": name} for name in run.layer_list],
        "text": ", ".join(counts) or "placement.txt is not there yet",
        "runs": [],
      },
    )
    entry["runs"].append(index)
  used = dict.fromkeys(name for run in runs for name in run.layer_list)
  return {"placements": list(lists.values()), "looks": {name: looks[name] for name in used}}


def _filters(analysis: Analysis) -> list[dict[str, Any]]:
  """Buttons that show and hide runs: for each field in which runs differ, its values and the runs that have them."""
  runs = analysis.material.runs
  setting_fields = [field for group in analysis.groups for field in group.named]
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
    filters.append({"field": field.split(".")[-1].replace("_", " "), "options": options})
  return filters


def figure_view(figure: Figure) -> dict[str, Any]:
  """A figure with what the page needs of it."""
  stem = f"{FIGURES_FOLDER}/{figure.name}"
  files = [f"{stem}.{ending}" for ending in figures.FORMATS]
  files.append(f"{TABLES_FOLDER}/{figure.name}.csv")
  panels = []
  for panel, svg in zip(figure.panels, figures.page_svgs(figure), strict=True):
    panels.append({"title": panel.title, "svg": svg})
  return {
    "name": figure.name,
    "title": figure.title,
    "caption": figure.caption,
    "description": figure.description,
    "files": files,
    "panels": panels,
    "maps": figure.panels[0].matrix is not None,
    "bars": figure.panels[0].bars,
    "has_seeds": any(series.detail for panel in figure.panels for series in panel.series),
    "legend": [_legend_entry(style, name) for style, name in figure.looks.items()],
    "tables": [_numbers(panel) for panel in figure.panels if panel.series or panel.matrix is not None],
  }


def _legend_entry(style: Style, name: str) -> dict[str, Any]:
  return {
    "text": name,
    "colour": style.colour,
    "marker": style.kind % NUM_MARKERS,
    "dash": style.dash,
  }


def _numbers(panel: Panel) -> dict[str, Any]:
  """What a panel draws, as a table."""
  return _series_numbers(panel) if panel.matrix is None else _matrix_numbers(panel)


def _matrix_numbers(panel: Panel) -> dict[str, Any]:
  """The numbers of a heat map, in rows and columns as its axes have them, the first row on top."""
  assert panel.matrix is not None
  headers = ["", *(str(number) for number in range(1, panel.matrix.shape[1] + 1))]
  body = []
  for number, values in enumerate(panel.matrix, start=1):
    body.append((str(number), *(_cell(value, "#.3g") for value in values)))
  title = f"{panel.title} – down: {panel.y_label}; across: {panel.x_label}"
  return {"title": title, "headers": headers, "rows": body, "cut": False}


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

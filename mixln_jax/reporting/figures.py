"""Figures for papers: matplotlib, in vector form, as wide as a column or a page of two columns."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from mixln_jax.files import write_whole
from mixln_jax.reporting.evidence import all_figures
from mixln_jax.reporting.groups import Group
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.model_diagnosis import read_diagnosis
from mixln_jax.reporting.panels import LIGHT, NUM_COLOURS, NUM_DASHES, Figure, Panel, Series, Style
from mixln_jax.reporting.source import Source

COLUMN_WIDTH, TEXT_WIDTH = 3.3, 6.8  # inches: one column, and both, of a page of two columns
FORMATS = ("svg", "pdf", "png")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
HATCHES = ("", "////", "....", "xxxx")
RC_PARAMS: dict[Any, Any] = {
  "font.size": 8,
  "axes.titlesize": 8,
  "axes.labelsize": 8,
  "legend.fontsize": 7,
  "xtick.labelsize": 7,
  "ytick.labelsize": 7,
  "lines.linewidth": 1.1,
  "lines.markersize": 3.2,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.linewidth": 0.4,
  "grid.color": "#d8d8d8",
  "legend.frameon": False,
  "svg.fonttype": "none",  # text stays text
  "svg.hashsalt": "mixln_jax",  # equal runs give equal bytes
  "pdf.fonttype": 42,  # fonts embedded as TrueType
  "savefig.dpi": 200,
}
NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def draw(figure: Figure, folder: Path) -> list[Path]:
  """Writes a figure as SVG, PDF and PNG into a folder; returns their paths."""
  paths = [folder / f"{figure.name}.{form}" for form in FORMATS]
  with _style():
    canvas = _canvas(figure)
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # laid out once, not once a format
    for path in paths:
      form = path.suffix[1:]
      content = io.BytesIO()
      canvas.savefig(content, format=form, metadata=NO_DATE[form])
      write_whole(path, content.getvalue())
  return paths


def draw_diagnose(json_path: str | Path, output_folder: str | Path) -> list[Path]:
  """Draws all figures of one diagnose.json into a folder; returns their paths.

  Raises:
    InputError: the file can't be read, or is damaged.
  """
  diagnosis = read_diagnosis(Path(json_path))
  label = diagnosis.placement or "this run"
  config = {"model.placement": label, "model.num_layers": diagnosis.num_layers, "train.num_steps": 0, "seed": 0}
  run = ReportedRun(name="", path=Path(json_path).parent, config=config, diagnosis=diagnosis)
  group = Group(label, label, {}, (0,), Style())
  folder = Path(output_folder)
  folder.mkdir(parents=True, exist_ok=True)
  figures, _ = all_figures(Source([run], [group], [], [group]))
  return [path for figure in figures for path in draw(figure, folder)]


@contextmanager
def _style() -> Iterator[None]:
  """matplotlib with RC_PARAMS, whatever a matplotlibrc of this machine says."""
  with mpl.rc_context():
    mpl.rcdefaults()
    mpl.rcParams.update(RC_PARAMS)
    yield


def plain(text: str) -> str:
  """Text of a file, escaped: matplotlib would read mathematics between dollar signs."""
  return text.replace("$", r"\$")


def _canvas(figure: Figure) -> Canvas:
  maps = figure.panels[0].matrix is not None
  count = len(figure.panels)
  columns = min(count, 4 if maps else 2)
  rows = math.ceil(count / columns)
  width = COLUMN_WIDTH if count == 1 else TEXT_WIDTH
  handles, legend_columns = _legend(figure, width)
  row_height = 1.75 if maps and columns > 2 else 2.1
  height = rows * row_height + 0.16 * math.ceil(len(handles) / legend_columns)
  canvas = Canvas(figsize=(width, height), layout="constrained")
  axes = canvas.subplots(rows, columns, squeeze=False).flat
  image = None
  for panel, ax in zip(figure.panels, axes, strict=False):  # panels first: the one that ends takes no axes
    ax.set(title=plain(panel.title), xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.matrix is not None:
      image = _draw_matrix(ax, panel, figure.colour_range)
    else:
      _draw_series(ax, panel)
  for ax in axes:  # a flat iterator: these are the axes that no panel was drawn on
    ax.set_visible(False)
  if image is not None:
    canvas.colorbar(image, ax=canvas.axes[:count], label=figure.colour_label, shrink=0.9)
  if handles:
    canvas.legend(handles=handles, loc="outside lower center", ncols=legend_columns)
  return canvas


def _draw_matrix(ax: Any, panel: Panel, colour_range: tuple[float, float]) -> Any:
  matrix = np.ma.masked_invalid(np.asarray(panel.matrix))
  rows, columns = matrix.shape
  extent = (0.5, columns + 0.5, 0.5, rows + 0.5)
  ax.grid(visible=False)
  for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=2))
  low, high = colour_range
  return ax.imshow(matrix, origin="lower", extent=extent, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")


def _draw_series(ax: Any, panel: Panel) -> None:
  if panel.log_x:
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
  if panel.log_y and any(y > 0 for series in panel.series for y in series.y):
    ax.set_yscale("log")
    for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
      set_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
  for number, series in enumerate(panel.series):
    if panel.bars:
      _draw_bars(ax, series, number, len(panel.series))
    else:
      _draw_line(ax, panel, series)
  whole = all(float(x).is_integer() for series in panel.series for x in series.x)
  if whole and not panel.log_x:
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _draw_bars(ax: Any, series: Series, number: int, count: int) -> None:
  width = 0.85 / count
  x = np.asarray(series.x) + (number - (count - 1) / 2) * width
  colour = LIGHT[series.style.kind % NUM_COLOURS]
  hatch = HATCHES[series.style.variant % NUM_DASHES]
  error = {"yerr": series.std, "error_kw": {"elinewidth": 0.6}} if series.std else {}
  ax.bar(x, series.y, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3, **error)


def _draw_line(ax: Any, panel: Panel, series: Series) -> None:
  drawn = _line_style(series.style)
  if not panel.show_markers and len(series.x) > 1:
    drawn |= {"marker": "", "linewidth": 0.8}
  drawn["markevery"] = max(1, len(series.x) // 12)
  if series.std:
    ax.errorbar(series.x, series.y, series.std, elinewidth=0.6, capsize=1.5, **drawn)
  else:
    ax.plot(series.x, series.y, **drawn)
  for point in series.marked:
    x, y = [series.x[point]], [series.y[point]]
    if series.is_end_of_diverged(point):
      ax.scatter(x, y, marker="x", s=26, linewidths=1.2, zorder=3, color=drawn["color"])
    else:
      ax.scatter(x, y, marker="o", s=60, linewidths=1.2, zorder=3, facecolors="none", edgecolors=drawn["color"])


def _line_style(style: Style) -> dict[str, Any]:
  return {
    "color": LIGHT[style.kind % NUM_COLOURS],
    "marker": MARKERS[style.kind % len(MARKERS)],
    "linestyle": DASHES[style.variant % NUM_DASHES],
  }


def _legend(figure: Figure, width: float) -> tuple[list[Line2D], int]:
  """One handle a look (runs of one group share theirs), and how many columns of them fit a width in inches."""
  handles = [Line2D([], [], label=plain(name), **_line_style(style)) for style, name in figure.looks.items()]
  longest = max((len(name) for name in figure.looks.values()), default=0)
  entry_width = 0.5 + 0.055 * longest  # the handle, and so much a character
  columns = max(1, min(len(handles), int(width / entry_width)))
  return (handles if len(handles) > 1 else []), columns

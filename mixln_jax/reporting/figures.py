"""The figures, drawn: vector files for a paper, as wide as a column or a page, and the same as SVG within the page.

One figure as data (`panels.Figure`) is drawn by one renderer; what a new kind of panel needs is a function beside
`_draw_series`, and a line in `_draw`.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from mixln_jax.files import write_whole
from mixln_jax.reporting.evidence import all_figures
from mixln_jax.reporting.groups import Group
from mixln_jax.reporting.inline_svg import Tags, inline
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.model_diagnosis import read_diagnosis
from mixln_jax.reporting.panels import LIGHT, NUM_MARKERS, Estimate, Figure, Panel, Series, Style
from mixln_jax.reporting.source import Source
from mixln_jax.reporting.ticks import chosen, linear_ticks, log_ticks, tick_text

COLUMN_WIDTH, TEXT_WIDTH, TEXT_HEIGHT = 3.3, 6.8, 9.0  # inches: a column, and both, of a page of two columns
# Inches of a panel on the HTML page, where the browser scales it; a heat map is square.
PAGE_WIDTH, WIDE_PAGE_WIDTH, MAP_PAGE_WIDTH = 4.2, 5.4, 2.9
FORMATS = ("svg", "pdf", "png")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
HATCHES = ("", "////", "....", "xxxx")
TEXT, QUIET, GRID, PAPER = "#1b1f24", "#57606a", "#d5d9de", "#ffffff"  # inks that the page replaces in the dark
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
  "axes.axisbelow": True,  # a grid over bars would cut them
  "grid.linewidth": 0.4,
  "grid.color": GRID,
  "text.color": TEXT,
  "axes.labelcolor": TEXT,
  "axes.edgecolor": QUIET,
  "xtick.color": TEXT,
  "ytick.color": TEXT,
  "figure.facecolor": PAPER,
  "axes.facecolor": "none",
  "axes.unicode_minus": True,
  "legend.frameon": False,
  "svg.fonttype": "none",  # text stays text
  "svg.hashsalt": "mixln_jax",  # equal runs give equal bytes
  "pdf.fonttype": 42,  # fonts embedded as TrueType
  "savefig.dpi": 200,
}
PAGE_PARAMS: dict[Any, Any] = {"axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8}  # for a phone
PAGE_MARGINS = {"left": 0.15, "right": 0.98, "bottom": 0.19, "top": 0.97}  # of a panel with a label at each axis
CELL_COLOURS = (2, 3, 4, 6, 7)  # of layers that are neither pre nor post, which is filled with the text's ink
NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def draw(figure: Figure, folder: Path) -> list[Path]:
  """Writes a figure as SVG, PDF and PNG into a folder; returns their paths."""
  paths = [folder / f"{figure.name}.{form}" for form in FORMATS]
  with _style():
    canvas = make_canvas(figure)
    for path in paths:
      write_whole(path, _saved(canvas, path.suffix[1:]))
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
  sections, _ = all_figures(Source([run], [group], [], [group]))
  return [path for figures in sections.values() for figure in figures for path in draw(figure, folder)]


def page_svgs(figure: Figure) -> list[str]:
  """Each panel as an SVG element for the page: of the page's colours, its series tagged with their runs."""
  elements = []
  with _style():
    mpl.rcParams.update(PAGE_PARAMS)
    for number, panel in enumerate(figure.panels):
      tags = Tags()
      canvas = make_canvas(figure.alone(number), tags, width=_page_width(panel))
      title = ", ".join(filter(None, (figure.title, panel.title)))
      elements.append(inline(_saved(canvas, "svg").decode(), f"{figure.name}-{number}", tags, title))
  return elements


def _page_width(panel: Panel) -> float:
  """In inches."""
  if panel.estimates:
    return WIDE_PAGE_WIDTH
  return PAGE_WIDTH if panel.matrix is None else MAP_PAGE_WIDTH


@contextmanager
def _style() -> Iterator[None]:
  """matplotlib with RC_PARAMS, whatever a matplotlibrc of this machine says."""
  with mpl.rc_context():
    mpl.rcdefaults()
    mpl.rcParams.update(RC_PARAMS)
    yield


def _saved(canvas: Canvas, form: str) -> bytes:
  content = io.BytesIO()
  canvas.savefig(content, format=form, metadata=NO_DATE[form])
  return content.getvalue()


def plain(text: str) -> str:
  """Text of a file, escaped: matplotlib would read mathematics between dollar signs."""
  return text.replace("$", r"\$")


def make_canvas(figure: Figure, tags: Tags | None = None, width: float | None = None) -> Canvas:
  """A figure, laid out. With `tags` it is for the page: single seeds are drawn too, and there is no legend."""
  count = len(figure.panels)
  maps = figure.panels[0].matrix is not None
  columns = min(count, 4 if maps else 2)
  rows = math.ceil(count / columns)
  estimates = figure.panels[0].estimates
  if width is None:
    width = TEXT_WIDTH if count > 1 or estimates else COLUMN_WIDTH
  # A layout takes most of the time of a drawing, and the panels of series on the page are all of one kind.
  to_lay_out = tags is None or maps or bool(estimates or figure.panels[0].layer_rows)
  handles, legend_columns = ([], 1) if tags is not None or estimates else _legend(figure, width)
  canvas = Canvas(
    figsize=(width, _height(figure, rows, columns, handles, legend_columns)),
    layout="constrained" if to_lay_out else None,
  )
  if estimates:
    canvas.set_layout_engine("constrained", w_pad=0.12)  # names in the font of a page may be wider
    _draw_estimates(canvas, figure.panels[0], tags)
  else:
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for left_over in axes[count:]:
      left_over.remove()
    images = [_draw(ax, panel, figure, tags) for ax, panel in zip(axes[:count], figure.panels, strict=True)]
    if maps:
      # A pointed end says that some entries are larger.
      extend = "max" if figure.largest_entry > figure.colour_range[1] else "neither"
      canvas.colorbar(images[-1], ax=axes[:count], label=figure.colour_label, shrink=0.9, extend=extend)
  if handles:
    canvas.legend(handles=handles, loc="outside lower center", ncols=legend_columns)
  if not to_lay_out:
    canvas.subplots_adjust(**PAGE_MARGINS)
    return canvas
  canvas.draw_without_rendering()
  canvas.set_layout_engine("none")  # laid out once, not once a format
  return canvas


def _height(figure: Figure, rows: int, columns: int, handles: Sequence[Any], legend_columns: int) -> float:
  """In inches."""
  estimates = figure.panels[0].estimates
  if estimates:
    return 0.75 + 0.4 * len(estimates)
  if figure.panels[0].layer_rows:
    return min(0.9 + 0.11 * len(figure.panels[0].layer_rows), TEXT_HEIGHT)
  row_height = 1.75 if figure.panels[0].matrix is not None and columns > 2 else 2.1
  return rows * row_height + 0.16 * math.ceil(len(handles) / legend_columns)


def _draw(ax: Any, panel: Panel, figure: Figure, tags: Tags | None) -> Any:
  """One panel on its axes; returns the image of a heat map."""
  ax.set(title=plain(panel.title), xlabel=panel.x_label, ylabel=panel.y_label)
  if panel.matrix is not None:
    return _draw_matrix(ax, panel, figure.colour_range)
  if panel.layer_rows:
    return _draw_layer_rows(ax, panel)
  return _draw_series(ax, panel, tags)


def _draw_matrix(ax: Any, panel: Panel, colour_range: tuple[float, float]) -> Any:
  matrix = np.ma.masked_invalid(np.asarray(panel.matrix))
  rows, columns = matrix.shape
  extent = (0.5, columns + 0.5, 0.5, rows + 0.5)
  ax.grid(visible=False)
  for axis, last in ((ax.xaxis, columns), (ax.yaxis, rows)):
    _set_ticks(axis, _layer_ticks(last))
  low, high = colour_range
  return ax.imshow(matrix, origin="lower", extent=extent, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")


def _draw_layer_rows(ax: Any, panel: Panel) -> None:
  """A row of squares a layer list, and below them what the looks of the squares mean."""
  ax.grid(visible=False)
  count, most = len(panel.layer_rows), max(len(row.layers) for row in panel.layer_rows)
  looks = cell_looks(list(dict.fromkeys(name for row in panel.layer_rows for name in row.layers)))
  for place, row in enumerate(panel.layer_rows):
    for layer, name in enumerate(row.layers):
      box = (layer + 0.55, place + 0.12)
      ax.add_patch(Rectangle(box, 0.9, 0.76, facecolor=_fill_of(looks[name]), edgecolor=TEXT, linewidth=0.3))
  ax.set(xlim=(0.4, most + 0.6), ylim=(count, 0))
  ax.set_yticks([place + 0.5 for place in range(count)], [plain(row.label) for row in panel.layer_rows], fontsize=5)
  ax.tick_params(axis="y", length=0)
  _set_ticks(ax.xaxis, _layer_ticks(most))
  handles = [
    Rectangle((0, 0), 1, 1, label=name, facecolor=_fill_of(look), edgecolor=TEXT) for name, look in looks.items()
  ]
  small = {"fontsize": 6, "handlelength": 1.0, "columnspacing": 0.9, "borderaxespad": 0.2}
  ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, **small)


def _layer_ticks(last: int) -> list[float]:
  """Layers from the first to the last, few enough."""
  if last <= 6:
    return [float(layer) for layer in range(1, last + 1)]
  return [1.0, *linear_ticks(2, last, 5)]


def _draw_series(ax: Any, panel: Panel, tags: Tags | None) -> None:
  shown = [series for series in panel.series if tags is not None or not series.detail]
  positive = any(y > 0 for series in shown for y in series.y)
  if panel.log_x:
    ax.set_xscale("log")
  if panel.log_y and positive:
    ax.set_yscale("log")
  with warnings.catch_warnings():
    # Of a single point on a logarithmic axis, before the other series are drawn.
    warnings.filterwarnings("ignore", "Attempting to set identical", UserWarning)
    for number, series in enumerate(shown):
      tag = "" if tags is None else tags.add(series)
      if panel.bars:
        _draw_bars(ax, series, number, len(shown), tag)
      else:
        _draw_line(ax, panel, series, tag)
  _tick_x(ax, panel)
  if ax.get_yscale() == "log":
    low, high = ax.get_ylim()
    if high < 1.01 * low:  # values that differ by rounding alone; ticks between them would have one text
      low, high = ax.set_ylim(low / 1.2, high * 1.2)
    _set_ticks(ax.yaxis, log_ticks(low, high))


def _tick_x(ax: Any, panel: Panel) -> None:
  """What was measured at, else layers from the first one on, else round numbers."""
  values = sorted({x for series in panel.series for x in series.x})
  if panel.x_ticks:
    _set_ticks(ax.xaxis, chosen(panel.x_ticks))
  elif panel.log_x:
    _set_ticks(ax.xaxis, chosen(values))
  elif values and all(float(x).is_integer() for x in values):
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(values) <= 6:
      _set_ticks(ax.xaxis, values)


def _set_ticks(axis: Any, values: Sequence[float]) -> None:
  axis.set_major_locator(FixedLocator(list(values)))
  axis.set_major_formatter(FixedFormatter([tick_text(value) for value in values]))
  axis.set_minor_locator(NullLocator())


def _draw_bars(ax: Any, series: Series, number: int, count: int, tag: str) -> None:
  width = 0.85 / count
  x = np.asarray(series.x) + (number - (count - 1) / 2) * width
  colour, hatch = LIGHT[series.style.colour], HATCHES[series.style.dash]
  bars = ax.bar(x, series.y, width, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0.3)
  if series.std:
    error = ax.errorbar(x, series.y, series.std, fmt="none", ecolor=TEXT, elinewidth=0.6)
    _tag([error], tag)
  _tag(bars, tag)


def _draw_line(ax: Any, panel: Panel, series: Series, tag: str) -> None:
  drawn = _line_style(series.style)
  if not panel.show_markers and len(series.x) > 1:
    drawn |= {"marker": "", "linewidth": 0.9}
  if series.detail:
    drawn |= {"marker": "", "linewidth": 0.5, "alpha": 0.8}
  drawn["markevery"] = max(1, len(series.x) // 12)
  made: list[Any] = []
  if series.std and series.band:
    y, std = np.asarray(series.y), np.nan_to_num(np.asarray(series.std))
    made.append(ax.fill_between(series.x, y - std, y + std, color=drawn["color"], alpha=0.18, linewidth=0))
    made += ax.plot(series.x, series.y, **drawn)
  elif series.std:
    made.append(ax.errorbar(series.x, series.y, series.std, elinewidth=0.6, capsize=1.5, **drawn))
  else:
    made += ax.plot(series.x, series.y, **drawn)
  for point in series.marked:
    x, y = [series.x[point]], [series.y[point]]
    if series.is_end_of_diverged(point):
      made.append(ax.scatter(x, y, marker="x", s=26, linewidths=1.2, zorder=3, color=drawn["color"]))
    else:
      edge = {"facecolors": "none", "edgecolors": drawn["color"]}
      made.append(ax.scatter(x, y, marker="o", s=60, linewidths=1.2, zorder=3, **edge))
  _tag(made, tag)


def _tag(artists: Any, tag: str) -> None:
  """Marks what a series is drawn as; of an error bar its parts."""
  if not tag:
    return
  for artist in artists:
    children = artist.get_children() if hasattr(artist, "get_children") else []
    for part in children or [artist]:
      part.set_gid(tag)


def _line_style(style: Style) -> dict[str, Any]:
  return {
    "color": LIGHT[style.colour],
    "marker": MARKERS[style.kind % NUM_MARKERS],
    "linestyle": DASHES[style.dash],
  }


def _legend(figure: Figure, width: float) -> tuple[list[Any], int]:
  """One handle a look (runs of one group share theirs), and how many columns of them fit a width in inches."""
  bars = figure.panels[0].bars
  handles: list[Any] = []
  for style, name in figure.looks.items():
    if bars:
      colour, hatch = LIGHT[style.colour], HATCHES[style.dash]
      handles.append(Rectangle((0, 0), 1, 1, label=plain(name), facecolor=colour, hatch=hatch, edgecolor=PAPER))
    else:
      handles.append(Line2D([], [], label=plain(name), **_line_style(style)))
  longest = max((len(name) for name in figure.looks.values()), default=0)
  entry_width = 0.5 + 0.055 * longest  # the handle, and so much a character
  columns = max(1, min(len(handles), int(width / entry_width)))
  return (handles if len(handles) > 1 else []), columns


def _draw_estimates(canvas: Canvas, panel: Panel, tags: Tags | None) -> None:
  """Names and layers on the left, the estimates with their intervals beside a line at 0 on the right."""
  left, right = canvas.subplots(1, 2, width_ratios=(1.0, 2.2), sharey=True)
  places = range(len(panel.estimates), 0, -1)  # the first row on top
  left.set_yticks(list(places), [plain(f"{row.label}\n{row.note}") for row in panel.estimates])
  for text in left.get_yticklabels():
    text.set_linespacing(1.35)
  left.tick_params(length=0)
  right.tick_params(axis="y", length=0, labelleft=False)
  left.set_ylim(0.4, len(panel.estimates) + 0.6)
  left.set_xticks([])
  left.grid(visible=False)
  right.grid(visible=False, axis="y")
  for side in ("left", "bottom"):
    left.spines[side].set_visible(False)
  right.spines["left"].set_visible(False)
  right.axvline(0, color=QUIET, linewidth=0.9, zorder=1)
  _draw_layer_lists(left, panel.estimates, list(places))
  for row, place in zip(panel.estimates, places, strict=True):
    _draw_estimate(right, row, place, "" if tags is None else tags.add(row))
  low, high = _symmetric_enough(panel.estimates)
  right.set_xlim(low, high)
  _set_ticks(right.xaxis, linear_ticks(low, high, 5))
  right.set_xlabel(panel.x_label)


def _symmetric_enough(estimates: Sequence[Estimate]) -> tuple[float, float]:
  """The limits of x: all intervals and pairs, 0, and some air."""
  values = [0.0]
  for row in estimates:
    values += [row.value or 0.0, *(row.interval or ()), *row.points]
  low, high = min(values), max(values)
  air = 0.06 * (high - low) or 1.0
  return low - air, high + air


def _draw_layer_lists(ax: Any, estimates: Sequence[Estimate], places: Sequence[int]) -> None:
  """A square a layer: filled for post, empty for pre, in a colour for any other."""
  most = max(len(row.layer_list) for row in estimates)
  ax.set_xlim(0, max(most, 6))
  names = dict.fromkeys(name for row in estimates for name in row.layer_list)
  looks = cell_looks(list(names))
  size = min(0.8, 4.8 / max(most, 6))
  for row, place in zip(estimates, places, strict=True):
    for layer, name in enumerate(row.layer_list):
      fill = _fill_of(looks[name])
      box = (layer + 0.1, place - size * 0.35)
      ax.add_patch(Rectangle(box, 0.8, size * 0.7, facecolor=fill, edgecolor=TEXT, linewidth=0.6))


def cell_looks(names: Sequence[str]) -> dict[str, str]:
  """How a layer of each name looks: `pre`, `post`, or a colour of the palette that is not nearly black, as `c2`."""
  looks = {"pre": "pre", "post": "post"}
  others = [name for name in names if name not in looks]
  for number, name in enumerate(others):
    looks[name] = f"c{CELL_COLOURS[number % len(CELL_COLOURS)]}"
  return looks


def _fill_of(look: str) -> str:
  """The colour of a layer that looks so."""
  fills = {"post": TEXT, "pre": "none"}
  return fills[look] if look in fills else LIGHT[int(look.removeprefix("c"))]


def _draw_estimate(ax: Any, row: Estimate, place: int, tag: str) -> None:
  colour = LIGHT[row.style.colour]
  if row.value is None:
    return
  made: list[Any] = []
  if row.interval is not None:
    made += ax.plot(row.interval, [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
    made += ax.plot(row.interval, [place, place], color=colour, linestyle="none", marker="|", markersize=6)
  filled = colour if row.interval is not None else "none"
  mark = {"marker": MARKERS[row.style.kind % NUM_MARKERS], "markersize": 5.5, "markeredgecolor": colour}
  made += ax.plot([row.value], [place], linestyle="none", markerfacecolor=filled, **mark)
  if row.points and len(row.points) > 1:
    below = [place - 0.25] * len(row.points)
    made += ax.plot(row.points, below, linestyle="none", marker="o", markersize=1.8, color=colour, alpha=0.7)
  _tag(made, tag)

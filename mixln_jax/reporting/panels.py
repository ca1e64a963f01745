"""A figure as data: the paper's drawing, the page's chart and the table are all made from it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

# Two palettes of one order: each colour has a contrast of 3 to 1 (WCAG 2.2, 1.4.11) with the page it is drawn on, and
# neighbours differ in lightness for those who see no hue. Markers repeat what the colours say.
LIGHT = ("#0065a8", "#cc5200", "#00805c", "#a0307a", "#8a6d00", "#5f5f5f", "#7a3b10", "#2a8fb5")
DARK = ("#6cb8f0", "#ff9a5c", "#3fd0a4", "#f09ad0", "#e8c840", "#c2c2c2", "#d8a880", "#8fe3ee")
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#14171c"
NUM_COLOURS, NUM_MARKERS, NUM_DASHES = len(LIGHT), 8, 4  # of looks, before they repeat


@dataclasses.dataclass(frozen=True)
class Style:
  """How a series looks: `kind` (placement) picks colour and marker, `variant` (other settings) the dashes."""

  kind: int = 0
  variant: int = 0


@dataclasses.dataclass(frozen=True)
class Series:
  """One line, or one set of bars, of a panel.

  Attributes:
    name: for the legend and the table.
    x, y: equally many; a y that is not finite is a gap.
    style: how it looks.
    runs: indices of the report's runs that it shows.
    std: standard deviation of each y, or empty.
    notes: a word on each point, shown with its values, or empty.
    marked: indices of the points that stand out.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  style: Style = Style()
  runs: Sequence[int] = ()
  std: Sequence[float] = ()
  notes: Sequence[str] = ()
  marked: Sequence[int] = ()

  def is_end_of_diverged(self, point: int) -> bool:
    """Whether a marked point is where a single run diverged; the points of means, which have an std, never are."""
    return bool(self.notes) and "diverged" in self.notes[point] and not self.std


@dataclasses.dataclass(frozen=True)
class Panel:
  """One pair of axes: either series, or a matrix.

  Attributes:
    title: above the axes.
    x_label, y_label: of the axes.
    series: the lines, or sets of bars.
    matrix: drawn as a heat map, entry [row, column] at y = row + 1 and x = column + 1; NaN is a gap.
    runs: indices of the report's runs that the matrix is of.
    log_x, log_y: whether an axis is logarithmic at first.
    bars: whether the series are sets of bars.
    show_markers: whether each point of a line has a marker.
  """

  title: str
  x_label: str
  y_label: str
  series: Sequence[Series] = ()
  matrix: np.ndarray | None = None
  runs: Sequence[int] = ()
  log_x: bool = False
  log_y: bool = False
  bars: bool = False
  show_markers: bool = True

  @property
  def finite_entries(self) -> np.ndarray:
    """The finite entries of the matrix, in one dimension; empty where there is none."""
    return np.zeros(0) if self.matrix is None else self.matrix[np.isfinite(self.matrix)]


@dataclasses.dataclass(frozen=True)
class Figure:
  """Panels that belong together.

  Attributes:
    name: of its files.
    title: above it.
    caption: definition and source of what is drawn.
    panels: at least one in a figure that is drawn.
    colour_label: of the colour scale of heat maps.
    group_names: what the legend calls the lines of each look, where a line is one run of a group.
  """

  name: str
  title: str
  caption: str
  panels: Sequence[Panel]
  colour_label: str = ""
  group_names: Mapping[Style, str] = dataclasses.field(default_factory=dict)

  @property
  def looks(self) -> dict[Style, str]:
    """The legend: what each look stands for, in the order of the looks."""
    names: dict[Style, str] = {}
    for panel in self.panels:
      for series in panel.series:
        names.setdefault(series.style, self.group_names.get(series.style, series.name))
    return {style: names[style] for style in sorted(names, key=lambda style: (style.kind, style.variant))}

  @property
  def colour_range(self) -> tuple[float, float]:
    """One scale for all heat maps: from 0 to the largest entry, or to 1 where no entry is above 0."""
    largest = 0.0
    for panel in self.panels:
      largest = max(largest, float(panel.finite_entries.max(initial=0.0)))
    return 0.0, largest or 1.0

  def rows(self) -> list[dict[str, object]]:
    """All that is drawn, one value a row."""
    rows: list[dict[str, object]] = []
    for panel in self.panels:
      for series in panel.series:
        for index, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
          row: dict[str, object] = {"panel": panel.title, "series": series.name, "x": x, "y": y}
          row["standard_deviation"] = series.std[index] if series.std else ""
          row["note"] = series.notes[index] if series.notes else ""
          rows.append(row)
      if panel.matrix is not None:
        for (row_index, column), value in np.ndenumerate(panel.matrix):
          if math.isfinite(value):
            rows.append({"panel": panel.title, "x": column + 1, "y": row_index + 1, "value": float(value)})
    return rows

  @property
  def description(self) -> str:
    """For readers who can't see it: what the axes are, and where each series begins and ends."""
    sentences = [self.title]
    for panel in self.panels:
      if panel.matrix is None:
        sentences.append(_describe_series(panel))
      elif panel.finite_entries.size:
        low, high = panel.finite_entries.min(), panel.finite_entries.max()
        sentences.append(f"{panel.title}: heat map, {low:.3g} to {high:.3g}")
    return ". ".join(sentences)


def _describe_series(panel: Panel, most: int = 8) -> str:
  ends = []
  for series in panel.series:
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if points:
      (first_x, first), (last_x, last) = points[0], points[-1]
      ends.append(f"{series.name}: {first:.4g} at {first_x:g}, {last:.4g} at {last_x:g}")
  text = f"{panel.title}: {panel.y_label} against {panel.x_label}. {'; '.join(ends[:most])}"
  return f"{text}; and {len(ends) - most} more" if len(ends) > most else text

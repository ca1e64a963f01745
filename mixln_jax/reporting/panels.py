"""A figure as data: what is drawn for a paper, drawn on the page, and written as a table is one and the same."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

# Two palettes of one order: each colour stands out 3 to 1 (WCAG 2.2, 1.4.11) from the page it is drawn on, and its
# neighbours differ in lightness for those who see no hue. A marker says the same as the colour.
LIGHT = ("#0065a8", "#cc5200", "#00805c", "#a0307a", "#8a6d00", "#5f5f5f", "#7a3b10", "#2a8fb5")
DARK = ("#6cb8f0", "#ff9a5c", "#3fd0a4", "#f09ad0", "#e8c840", "#c2c2c2", "#d8a880", "#8fe3ee")
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#14171c"
NUM_COLOURS, NUM_MARKERS, NUM_DASHES = len(LIGHT), 8, 4


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
    x, y: as many of one as of the other; a y that is not finite is a gap.
    style: how it looks.
    runs: which runs of the report it shows, by index.
    deviation: standard deviation of each y, or empty.
    notes: a word on each point, shown with its values, or empty.
    marked: points that stand out, by index.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  style: Style = Style()
  runs: Sequence[int] = ()
  deviation: Sequence[float] = ()
  notes: Sequence[str] = ()
  marked: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
  """One pair of axes; either series, or a matrix drawn as a heat map with entry [row, column] at y row, x column."""

  title: str
  x_label: str
  y_label: str
  series: Sequence[Series] = ()
  matrix: np.ndarray | None = None
  runs: Sequence[int] = ()  # of the matrix
  log_x: bool = False
  log_y: bool = False
  bars: bool = False
  show_markers: bool = True


@dataclasses.dataclass(frozen=True)
class Figure:
  """Panels that belong together. `name` is that of its files; `caption` states definition and source."""

  name: str
  title: str
  caption: str
  panels: Sequence[Panel]
  colour_label: str = ""  # of a heat map's scale
  group_names: Mapping[Style, str] = dataclasses.field(default_factory=dict)  # where lines of one look are runs of one

  @property
  def looks(self) -> dict[Style, str]:
    """The legend: what each look stands for, in the order of the looks."""
    names: dict[Style, str] = {}
    for series in (series for panel in self.panels for series in panel.series):
      names.setdefault(series.style, self.group_names.get(series.style, series.name))
    return dict(sorted(names.items(), key=lambda item: (item[0].kind, item[0].variant)))

  @property
  def colour_range(self) -> tuple[float, float]:
    """One scale for all heat maps: from 0 to the largest entry."""
    entries = [panel.matrix[np.isfinite(panel.matrix)] for panel in self.panels if panel.matrix is not None]
    return 0.0, max((float(found.max()) for found in entries if found.size), default=1.0) or 1.0

  def rows(self) -> list[dict[str, object]]:
    """All that is drawn, one value a row."""
    rows: list[dict[str, object]] = []
    for panel in self.panels:
      for series in panel.series:
        for index, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
          row: dict[str, object] = {"panel": panel.title, "series": series.name, "x": x, "y": y}
          row["standard_deviation"] = series.deviation[index] if series.deviation else ""
          row["note"] = series.notes[index] if series.notes else ""
          rows.append(row)
      if panel.matrix is not None:
        for (row_index, column), value in np.ndenumerate(panel.matrix):
          if math.isfinite(value):
            rows.append({"panel": panel.title, "x": column + 1, "y": row_index + 1, "value": float(value)})
    return rows

  @property
  def description(self) -> str:
    """For those who can't see it: what the axes are, and where each series begins and ends."""
    parts = []
    for panel in self.panels:
      if panel.matrix is not None:
        finite = panel.matrix[np.isfinite(panel.matrix)]
        if finite.size:
          parts.append(f"{panel.title}: heat map, {finite.min():.3g} to {finite.max():.3g}")
        continue
      ends = [text for text in map(_ends, panel.series) if text]
      more = f"; and {len(ends) - 8} more" if len(ends) > 8 else ""
      parts.append(f"{panel.title}: {panel.y_label} against {panel.x_label}. {'; '.join(ends[:8])}{more}")
    return f"{self.title}. " + ". ".join(parts)


def _ends(series: Series) -> str:
  points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
  if not points:
    return ""
  (first_x, first), (last_x, last) = points[0], points[-1]
  return f"{series.name}: {first:.4g} at {first_x:g}, {last:.4g} at {last_x:g}"

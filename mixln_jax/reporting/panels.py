"""A figure as data: the paper's drawing, the page's chart and the table are all made from it."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Two palettes of one order: each colour has a contrast of 3 to 1 (WCAG 2.2, 1.4.11) with the page it is drawn on. The
# first four of the light one, which a paper prints, differ by 10 in CIE lightness (grey) and by 13 in CIE Lab as people
# without red or green cones see them (Machado et al., 2009). Markers and dashes repeat what the colours say.
LIGHT = ("#12336e", "#e06a00", "#00795c", "#8f1d63", "#947800", "#000000", "#4f8fd6", "#6b6b6b")
DARK = ("#6ea8ff", "#ff9a4d", "#3fd0a4", "#e88fd0", "#e0c23c", "#ffffff", "#a9cdf7", "#b4b4b4")
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#14171c"
NUM_COLOURS, NUM_MARKERS, NUM_DASHES = len(LIGHT), 8, 4  # of looks, before they repeat


@dataclasses.dataclass(frozen=True)
class Style:
  """How a series looks: `kind` (placement) picks colour and marker, both together the dashes.

  Two kinds of one variant have other dashes, so that they are told apart in grey too.
  """

  kind: int = 0
  variant: int = 0

  @property
  def colour(self) -> int:
    """An index of the palettes."""
    return self.kind % NUM_COLOURS

  @property
  def dash(self) -> int:
    return (self.kind + self.variant) % NUM_DASHES


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
    band: whether `std` is drawn as a band around the line, and not as bars.
    detail: whether it is one seed of a mean that is drawn too: the page shows it on demand, a paper does not.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  style: Style = Style()
  runs: Sequence[int] = ()
  std: Sequence[float] = ()
  notes: Sequence[str] = ()
  marked: Sequence[int] = ()
  band: bool = False
  detail: bool = False

  def is_end_of_diverged(self, point: int) -> bool:
    """Whether a marked point is where a single run diverged; the points of means, which have an std, never are."""
    return bool(self.notes) and "diverged" in self.notes[point] and not self.std


@dataclasses.dataclass(frozen=True)
class Estimate:
  """One row of a panel that compares: an estimate with its interval beside 0.

  Attributes:
    label: on the left.
    note: below it, in small.
    layer_list: one word a layer, first layer first.
    value: the estimate; None where there is none, and `note` says why.
    interval: around it, or None.
    points: the single pairs.
    style: how it looks.
    runs: indices of the report's runs that it shows.
    marked: whether it stands out, since its best learning rate is at an edge of its grid.
  """

  label: str
  note: str
  layer_list: Sequence[str] = ()
  value: float | None = None
  interval: tuple[float, float] | None = None
  points: Sequence[float] = ()
  style: Style = Style()
  runs: Sequence[int] = ()
  marked: bool = False


@dataclasses.dataclass(frozen=True)
class LayerRow:
  """One row of a panel that shows layer lists.

  Attributes:
    label: on the left.
    layers: one word a layer, first layer first.
  """

  label: str
  layers: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Panel:
  """One pair of axes: series, or a matrix, or estimates, or layer lists.

  Attributes:
    title: above the axes.
    x_label, y_label: of the axes.
    series: the lines, or sets of bars.
    matrix: drawn as a heat map, entry [row, column] at y = row + 1 and x = column + 1; NaN is a gap.
    runs: indices of the report's runs that the matrix is of.
    log_x, log_y: whether an axis is logarithmic at first.
    bars: whether the series are sets of bars.
    show_markers: whether each point of a line has a marker.
    x_ticks: what was measured at (learning rates, steps of evaluations), sorted: the ticks are some of them.
    estimates: a row each.
    layer_rows: a layer list each, the first one on top.
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
  x_ticks: Sequence[float] = ()
  estimates: Sequence[Estimate] = ()
  layer_rows: Sequence[LayerRow] = ()

  @property
  def is_empty(self) -> bool:
    return not self.series and self.matrix is None and not self.estimates and not self.layer_rows

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
    largest_colour: where the colour scale ends if entries are larger; those have its last colour.
    whole_range: the colour scale, if it is that of a figure with more panels; by default that of these panels.
  """

  name: str
  title: str
  caption: str
  panels: Sequence[Panel]
  colour_label: str = ""
  largest_colour: float = math.inf
  whole_range: tuple[float, float] | None = None

  def alone(self, number: int) -> "Figure":
    """One panel without its title as a figure, its heat map on the colour scale of all panels."""
    panel = dataclasses.replace(self.panels[number], title="")
    return dataclasses.replace(self, panels=[panel], whole_range=self.colour_range)

  @property
  def looks(self) -> dict[Style, str]:
    """The legend: what each look stands for, in the order of the looks."""
    names: dict[Style, str] = {}
    for panel in self.panels:
      for series in panel.series:
        if not series.detail:
          names.setdefault(series.style, series.name)
    return {style: names[style] for style in sorted(names, key=lambda style: (style.kind, style.variant))}

  @property
  def colour_range(self) -> tuple[float, float]:
    """One scale for all heat maps: from 0 to the largest entry, or to 1 where no entry is above 0."""
    if self.whole_range is not None:
      return self.whole_range
    return 0.0, min(self.largest_entry, self.largest_colour) or 1.0

  @property
  def largest_entry(self) -> float:
    """The largest entry of all heat maps, at least 0."""
    return max((float(panel.finite_entries.max(initial=0.0)) for panel in self.panels), default=0.0)

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
      rows += [_estimate_row(panel, estimate) for estimate in panel.estimates]
      for listed in panel.layer_rows:
        rows.append({"panel": panel.title, "row": listed.label, "layers": " ".join(listed.layers)})
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
      if panel.estimates:
        sentences.append(_describe_estimates(panel))
      elif panel.layer_rows:
        first, last = panel.layer_rows[0], panel.layer_rows[-1]
        sentences.append(f"From {first.label} ({' '.join(first.layers)}) to {last.label} ({' '.join(last.layers)})")
      elif panel.matrix is None:
        sentences.append(_describe_series(panel))
      elif panel.finite_entries.size:
        low, high = panel.finite_entries.min(), panel.finite_entries.max()
        sentences.append(f"{panel.title}: heat map, {low:.3g} to {high:.3g}")
    return ". ".join(sentences)


def _estimate_row(panel: Panel, estimate: Estimate) -> dict[str, object]:
  low, high = estimate.interval or ("", "")
  value = "" if estimate.value is None else estimate.value
  return {
    "panel": panel.title,
    "row": estimate.label,
    "value": value,
    "low": low,
    "high": high,
    "note": estimate.note,
    "layers": " ".join(estimate.layer_list),
  }


def _describe_estimates(panel: Panel) -> str:
  words = []
  for estimate in panel.estimates:
    text = "none" if estimate.value is None else f"{estimate.value:+.4g}"
    if estimate.interval is not None:
      low, high = estimate.interval
      text += f" ({low:+.4g} to {high:+.4g})"
    words.append(f"{estimate.label}: {text}")
  return f"{panel.x_label}. {'; '.join(words)}"


def _describe_series(panel: Panel, most: int = 8) -> str:
  ends = []
  for series in panel.series:
    if series.detail:
      continue
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if points:
      (first_x, first), (last_x, last) = points[0], points[-1]
      ends.append(f"{series.name}: {first:.4g} at {first_x:g}, {last:.4g} at {last_x:g}")
  text = f"{panel.title}: {panel.y_label} against {panel.x_label}. {'; '.join(ends[:most])}"
  return f"{text}; and {len(ends) - most} more" if len(ends) > most else text

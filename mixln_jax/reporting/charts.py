"""Charts for the page, one a panel, by plotly. The page colours them, because it knows whether it is light or dark."""

import base64
import gzip
import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mixln_jax.reporting.panels import NUM_COLOURS, Figure, Panel, Series

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
PATTERNS = ("", "/", ".", "x")


def library() -> str:
  """plotly.js (MIT licence), gzipped, in base64. The page unpacks it; so the file has 2 MB instead of 4.8."""
  return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def charts(figure: Figure) -> list[dict[str, Any]]:
  """A plotly figure for each panel. A trace's `meta` has `colour`, an index of the palettes, and `runs`."""
  return [_chart(figure, panel) for panel in figure.panels]


def _chart(figure: Figure, panel: Panel) -> dict[str, Any]:
  traces = [_trace(panel, series) for series in panel.series]
  if panel.matrix is not None:
    traces = [_matrix(figure, panel)]
  x_axis = _axis(panel.x_label, log=panel.log_x)
  if panel.log_x:
    x_axis |= _ticks_at_values(panel)
  layout = go.Layout(
    xaxis=x_axis,
    yaxis=_axis(panel.y_label, log=panel.log_y),
    showlegend=False,
    hovermode="closest",
    dragmode="zoom" if panel.matrix is None else False,
    bargap=0.2,
    margin={"l": 48, "r": 12, "t": 12, "b": 44},
  )
  # Validated by plotly's own schema, then plain lists and dictionaries.
  return _plain(go.Figure(traces, layout, skip_invalid=False).to_plotly_json())


def _axis(label: str, *, log: bool) -> dict[str, Any]:
  return {"title": {"text": label}, "type": "log" if log else "linear", "automargin": True}


def _ticks_at_values(panel: Panel) -> dict[str, Any]:
  """Ticks at the values themselves: a few learning rates are seldom powers of ten."""
  values = sorted({x for series in panel.series for x in series.x})
  return {"tickmode": "array", "tickvals": values, "ticktext": [f"{value:g}" for value in values]}


def _matrix(figure: Figure, panel: Panel) -> go.Heatmap:
  assert panel.matrix is not None
  low, high = figure.colour_range
  rows, columns = panel.matrix.shape
  return go.Heatmap(
    z=panel.matrix,
    x=list(range(1, columns + 1)),
    y=list(range(1, rows + 1)),
    zmin=low,
    zmax=high,
    colorscale="Viridis",
    colorbar={"thickness": 10, "outlinewidth": 0},
    hovertemplate=f"{panel.x_label} %{{x}}, {panel.y_label} %{{y}}<br>%{{z:.4f}}<extra></extra>",
    meta={"colour": None, "runs": list(panel.runs)},
  )


def _trace(panel: Panel, series: Series) -> Any:
  name = html.escape(series.name)  # plotly reads some HTML in names
  name_in_template = name.replace("%", "&#37;")  # and variables in templates
  notes = [html.escape(note) for note in series.notes] or [""] * len(series.x)
  common: dict[str, Any] = {
    "x": series.x,
    "y": series.y,
    "name": name,
    "text": notes,
    "hovertemplate": f"<b>{name_in_template}</b><br>{panel.x_label} %{{x}}<br>%{{y:.5g}} %{{text}}<extra></extra>",
    "meta": {"colour": series.style.kind % NUM_COLOURS, "runs": list(series.runs)},
  }
  if series.std:
    common["error_y"] = {"array": series.std, "thickness": 1, "width": 3}
  if panel.bars:
    return go.Bar(**common, marker={"pattern": {"shape": PATTERNS[series.style.variant % len(PATTERNS)]}})
  has_markers = panel.show_markers or series.marked or len(series.x) == 1
  return go.Scatter(
    **common,
    mode="lines+markers" if has_markers else "lines",
    line={"dash": DASHES[series.style.variant % len(DASHES)], "width": 1.8},
    marker=_markers(panel, series),
  )


def _markers(panel: Panel, series: Series) -> dict[str, Any]:
  symbol = SYMBOLS[series.style.kind % len(SYMBOLS)]
  if not series.marked:
    return {"symbol": symbol, "size": 6, "maxdisplayed": 12}
  usual_size = 6 if panel.show_markers or len(series.x) == 1 else 0
  symbols, sizes = [symbol] * len(series.x), [usual_size] * len(series.x)
  for point in series.marked:
    symbols[point] = "x-thin-open" if series.is_end_of_diverged(point) else f"{symbol}-open"
    sizes[point] = 12
  return {"symbol": symbols, "size": sizes, "opacity": 1, "line": {"width": 2}}


def _plain(value: Any) -> Any:
  """The value as JSON has it: lists, dictionaries, text, numbers of six digits, and null for what is not finite."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, np.ndarray):
    return _plain(value.tolist())
  if isinstance(value, Sequence) and not isinstance(value, str):
    return [_plain(item) for item in value]
  if isinstance(value, float):
    return float(f"{value:.6g}") if math.isfinite(value) else None
  return value

"""The statistics by layer of one step as one image for TensorBoard and wandb: one panel per statistic, layers along x.

Hundreds of scalars (statistics × layers) would be unreadable; in an image per step the viewer's slider is the time.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

COLUMNS = 4
PANEL = (2.4, 1.7)  # inches
LOG_FROM = 30.0  # a panel whose values span more than this factor is logarithmic


def layer_picture(statistics: Mapping[str, Any], title: str) -> np.ndarray | None:
  """Draws all statistics that have a value per layer.

  Args:
    statistics: name -> [L], or a scalar, which is left out; a value that is not finite is a gap.
    title: the text above the picture.

  Returns:
    The picture, uint8 [height, width, 3]; None if no statistic has a value per layer.
  """
  from matplotlib.backends.backend_agg import (
    FigureCanvasAgg,
  )  # the import takes a second, and only TensorBoard and wandb need it
  from matplotlib.figure import Figure

  by_layer = {name: np.asarray(value, float) for name, value in statistics.items() if np.ndim(value) == 1}
  if not by_layer:
    return None
  rows = math.ceil(len(by_layer) / COLUMNS)
  canvas = Figure(figsize=(PANEL[0] * COLUMNS, PANEL[1] * rows + 0.3), layout="constrained", dpi=80)
  canvas.suptitle(title, fontsize=9)
  for number, (name, values_L) in enumerate(by_layer.items(), start=1):
    ax = canvas.add_subplot(rows, COLUMNS, number)
    ax.plot(np.arange(1, len(values_L) + 1), np.where(np.isfinite(values_L), values_L, np.nan), ".-", linewidth=1)
    ax.set_title(name, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(linewidth=0.3)
    positive = values_L[np.isfinite(values_L)]
    if positive.size and positive.min() > 0 and positive.max() > LOG_FROM * positive.min():
      ax.set_yscale("log")
  agg = FigureCanvasAgg(canvas)
  agg.draw()
  return np.asarray(agg.buffer_rgba())[..., :3].copy()

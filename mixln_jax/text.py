"""What people read: aligned columns, and losses in the units that papers use."""

import math
from collections.abc import Sequence

LARGEST_LOSS = 700.0  # nats; exp of more is no float


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
  """Lines of a table whose columns are as wide as their widest cell, two spaces apart.

  Args:
    rows: the cells, the header's first; all rows have the same number.
    right: columns that are aligned to the right, as numbers are.
  """
  widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = []
    for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
      cells.append(cell.rjust(width) if number in right else cell.ljust(width))
    lines.append("  ".join(cells).rstrip())
  return lines


def perplexity(loss: float) -> float:
  """exp of a loss in nats a token; infinity where that is no float."""
  return math.exp(loss) if loss < LARGEST_LOSS else math.inf

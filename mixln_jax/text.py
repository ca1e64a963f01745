"""What people read: aligned columns, losses in the units that papers use, and text that leaves a terminal alone."""

import math
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

# Marks that turn the direction of the text around them, so that it reads as another (CVE-2021-42574).
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
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


def printable(text: str) -> str:
  """A text whose control characters are written as escapes: a terminal would obey them.

  An escape sequence can rewrite what was printed before, retitle the window, or fill in its input line. Newlines and
  tabs stay, as does every printable character of every script.
  """
  return "".join(_escaped(sign) if _is_control(sign) else sign for sign in text)


def _is_control(sign: str) -> bool:
  if sign in "\n\t":
    return False
  return sign in TURNING or unicodedata.category(sign) in ("Cc", "Cs")  # Cs: half of a character, which has no UTF-8


def _escaped(sign: str) -> str:
  return sign.encode("unicode_escape").decode("ascii")


def for_stdout(text: str) -> str:
  """A text as a command prints it: `printable` on a terminal, as it is in a file or a pipe."""
  return printable(text) if sys.stdout.isatty() else text


def whole_number(text: str, maximum: int = 2**31 - 1) -> int | None:
  """The number that a text writes in ASCII digits; None where it is none, or is over `maximum`.

  (Python's int() would also read other scripts' digits, and raise for more than 4,300 of them.)
  """
  if not (text.isascii() and text.isdecimal()) or len(text) > len(str(maximum)):
    return None
  value = int(text)
  return value if value <= maximum else None


def integer_of(text: str) -> int | None:
  """The whole number that a text writes, also as `1e3`, `1_000` or `-1`; None where it is none."""
  try:
    return int(text)
  except ValueError:
    pass
  try:
    value = float(text)
  except ValueError:
    return None
  return int(value) if math.isfinite(value) and value.is_integer() else None


def shown(value: Any, limit: int = 200) -> str:
  """A value of a file as an error shows it: on one line, without control characters, and not all of a large one."""
  try:
    text = repr(value)
  except (RecursionError, ValueError):  # nested without end; a number of too many digits
    return f"a {type(value).__name__} that is too large to show"
  return printable(text if len(text) <= limit else f"{text[:limit]}…")

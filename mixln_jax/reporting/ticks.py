"""Where the ticks of an axis stand, and what they are called.

matplotlib's own formatter of logarithmic axes rounds to one digit (3e−03 twice), so ticks and their texts are chosen
together here: a tick is a round number, or a value that was measured, and its text has all its digits.
"""

import math
from collections.abc import Sequence

MOST_TICKS = 6
FEWEST_LOG_TICKS = 3
MANTISSAS: tuple[tuple[int, ...], ...] = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), tuple(range(1, 10)))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MINUS = "−"


def log_ticks(low: float, high: float) -> list[float]:
  """Round numbers in [low, high], for a logarithmic axis: at least three, and seldom more than six.

  Args:
    low, high: both above 0.
  """
  for mantissas in MANTISSAS:
    found = _decades(low, high, mantissas)
    if len(found) >= FEWEST_LOG_TICKS:
      return chosen(found)
  return linear_ticks(low, high)  # less than a factor of about 1.5: there it looks linear


def _decades(low: float, high: float, mantissas: Sequence[int]) -> list[float]:
  found = []
  for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1):
    for mantissa in mantissas:
      value = float(f"{mantissa}e{power}")
      if low <= value <= high:
        found.append(value)
  return found


def linear_ticks(low: float, high: float, most: int = MOST_TICKS) -> list[float]:
  """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most `most`; `low` alone where the two are equal."""
  if not high > low:
    return [low]
  power = math.floor(math.log10((high - low) / most))
  for factor in (1, 2, 5, 10, 20):
    step = factor * 10.0**power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first < most:
      break
  digits = max(0, -math.floor(math.log10(step)))
  return [round(number * step, digits) for number in range(first, last + 1)]


def chosen(values: Sequence[float], most: int = MOST_TICKS) -> list[float]:
  """At most `most` of measured values (sorted), every k-th of them and always the last."""
  stride = math.ceil(len(values) / most)
  return list(values[::-1][::stride][::-1])


def tick_text(value: float) -> str:
  """A tick's text: all its digits; powers of ten beyond 0.001 and 10,000."""
  if value == 0:
    return "0"
  if 1e-3 <= abs(value) < 1e4:
    return f"{value:g}".replace("-", MINUS)
  if abs(value) >= 1e4 and float(value).is_integer() and abs(value) < 1e6:
    return f"{value:,.0f}".replace("-", MINUS)
  mantissa, power = f"{value:e}".split("e")
  digits = f"{float(mantissa):g}"
  exponent = "10" + str(int(power)).translate(SUPERSCRIPTS)
  text = exponent if digits == "1" else f"{digits}·{exponent}"
  return text.replace("-", MINUS)

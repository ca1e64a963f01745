"""Numbers as a reader sees them: with a typographic minus, and as many digits as they can bear."""

from mixln_jax.reporting.ticks import MINUS

NOTHING = "–"  # the cell of a value that there is not


def fixed(value: float | None, digits: int) -> str:
  """`−0.0336`; a dash where there is no value."""
  return NOTHING if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int) -> str:
  """`+0.0336`, `−0.0336`; a dash where there is no value."""
  return NOTHING if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def typographic(text: str) -> str:
  """A cell's number with a typographic minus; any other text as it is."""
  is_number = text.startswith("-") and text[1:2].isdigit()
  return MINUS + text[1:] if is_number else text

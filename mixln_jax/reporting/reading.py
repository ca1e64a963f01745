"""What files of run folders hold, which may be anything, and errors that name the file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixln_jax.errors import InputError, one_line

# What reading a file can raise when it is damaged, or holds something else than it should.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def reason(error: Exception) -> str:
  """An error in one line. The message of a Python error says little without its type: `KeyError: 'step'`."""
  if isinstance(error, InputError):
    return str(error)
  return f"{type(error).__name__}: {one_line(error)}"


def as_mapping(value: Any) -> Mapping[str, Any]:
  """The value if it is a mapping, else an empty one."""
  return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
  """The value if it is a list, else an empty one."""
  return value if isinstance(value, list) else []


def number_array(values: Any, *shape: int) -> np.ndarray:
  """An array of numbers, null as NaN.

  Raises:
    ValueError: it does not have this shape.
  """
  array = np.array(values, float)
  if array.shape != shape:
    raise ValueError(f"an array has shape {array.shape}, expected {shape}")
  return array

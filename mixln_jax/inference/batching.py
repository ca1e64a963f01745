"""Pads rows of many lengths to few shapes, because each shape is compiled once."""

import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mixln_jax.parallel.mesh import ways_of_rows

SMALLEST = 16  # the shortest padded length


def bucket(length: int, smallest: int = SMALLEST) -> int:
  """The smallest of 16, 24, 32, 48, 64, 96, … (powers of two and the midpoints) that is at least `length`."""
  power = smallest * 2 ** max(0, math.ceil(math.log2(length / smallest)))
  halfway = power * 3 // 4
  return halfway if power > smallest and length <= halfway else power


def bucket_rows(rows: int) -> int:
  """The padded number of rows: at least `rows`, and a power of two on each shard of the mesh in use."""
  ways = ways_of_rows(jax.sharding.get_abstract_mesh())
  return ways * 2 ** math.ceil(math.log2(max(1, rows / ways)))


def pad(rows: Sequence[Sequence[int]], num_rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows as one array [B, T], padded with zeros and with rows of zeros, and their lengths [B]."""
  tokens_BT, lengths_B = np.zeros((num_rows, length), np.int32), np.zeros(num_rows, np.int32)
  for index, row in enumerate(rows):
    tokens_BT[index, : len(row)], lengths_B[index] = row, len(row)
  return tokens_BT, lengths_B


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
  """Indices of rows in batches of similar lengths, longest first, so that running out of memory happens at once."""
  order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
  for start in range(0, len(order), batch_size):
    yield order[start : start + batch_size]

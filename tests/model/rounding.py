"""How far two correct fp32 computations of a sum may be apart, whatever the order of its terms.

A sum of n products computed in fp32 is within n·2⁻²⁴·Σ|a·b| of the exact one for every order of the terms (Higham,
Accuracy and Stability of Numerical Algorithms, §3.1), to first order. XLA's order depends on the instruction set, so a
tolerance that is fitted to one machine fails on another: tests take this bound, from exact magnitudes in fp64.
"""

import numpy as np

UNIT = 2.0**-24  # fp32's unit roundoff


def sum_error(terms, equation, a, b):
  """The bound for each element of `einsum(equation, a, b)`, whose sums have `terms` terms."""
  a, b = np.abs(np.asarray(a, np.float64)), np.abs(np.asarray(b, np.float64))
  return terms * UNIT * np.einsum(equation, a, b)


def assert_within(actual, exact, tolerance, name=""):
  """Every element within its own tolerance, which broadcasts."""
  excess = np.abs(np.asarray(actual, np.float64) - exact) - tolerance
  assert np.max(excess) <= 0, f"{name}: {np.max(excess):.2e} more than its tolerance"


# A network's error has no such useful bound: those of its consecutive sums multiply. The tests' models have about 30
# consecutive sums of up to 61 terms, and roundings that are independent add up like a random walk, to √(30·61)·UNIT =
# 2.6e-6 of the size of what is summed. Measured against float64: at most 2.5e-6, with any instruction set. A formula
# that is wrong is off by more than 1e-2.
NETWORK = 1e-5


def assert_near(actual, expected, tolerance=NETWORK, err_msg=""):
  """Every entry within `tolerance` of the largest one: each is a sum of terms of that size, whatever its own."""
  np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max(), rtol=0, err_msg=err_msg)

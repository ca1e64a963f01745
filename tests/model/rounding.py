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

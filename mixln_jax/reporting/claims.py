"""Claims about placements, judged by paired intervals: what holds, what is refuted, and what the seeds leave open.

A claim is a mapping: `id`, `claim` (in words), `judged_by`, `source`, and for one that is judged here
`lower`: a placement, `than`: one or several, and `by`: nats that it is said to be lower by (0 unless given).

It holds where ours is lower than each of the others with an interval below 0. It is refuted where the interval of some
pair says that the difference is smaller than the claim's: above −`by`. With `by` = 0 that is an interval above 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mixln_jax.reporting.comparison import HIGHER, LOWER, Comparison

HOLDS, REFUTED, OPEN, NOT_RUN = "holds", "refuted", "open", "not run yet"


@dataclasses.dataclass(frozen=True)
class Judged:
  """A claim and what the runs say of it.

  Attributes:
    claim: as it was written down.
    verdict: HOLDS, REFUTED, OPEN or NOT_RUN.
    evidence: placement of the other -> the comparison (ours minus the other's), of those that were run.
    needed: seeds that the most demanding open pair would need; None where none is open, or it is not known.
  """

  claim: Mapping[str, Any]
  verdict: str
  evidence: Mapping[str, Comparison]
  needed: int | None = None


def is_judged(claim: Mapping[str, Any]) -> bool:
  """Whether a claim, checked by `track.check_claims`, is one that is judged here."""
  return "lower" in claim


def others_of(claim: Mapping[str, Any]) -> list[str]:
  """The placements that a claim's is said to be lower than."""
  than = claim["than"]
  return [than] if isinstance(than, str) else list(than)


def judge(claim: Mapping[str, Any], comparisons: Mapping[str, Comparison]) -> Judged:
  """Judges a claim.

  Args:
    claim: one for which `is_judged` is true.
    comparisons: placement of the other -> ours minus the other's, of those that were run.
  """
  others = others_of(claim)
  evidence = {other: comparisons[other] for other in others if other in comparisons}
  by = float(claim.get("by", 0.0))
  if any(_is_refuted(comparison, by) for comparison in evidence.values()):
    return Judged(claim, REFUTED, evidence)
  if not evidence or len(evidence) < len(others):
    return Judged(claim, NOT_RUN, evidence)
  if all(comparison.verdict == LOWER for comparison in evidence.values()):
    return Judged(claim, HOLDS, evidence)
  needed = [comparison.needed for comparison in evidence.values() if comparison.needed is not None]
  return Judged(claim, OPEN, evidence, max(needed, default=None))


def _is_refuted(comparison: Comparison, by: float) -> bool:
  if by == 0:
    return comparison.verdict == HIGHER
  interval = comparison.difference.interval
  return interval is not None and interval[0] > -by


def judge_all(claims: Sequence[Mapping[str, Any]], comparisons: Mapping[tuple[str, str], Comparison]) -> list[Judged]:
  """Judges those claims that can be; `comparisons`: (ours, other) -> ours minus the other's."""
  judged = []
  for claim in claims:
    if is_judged(claim):
      ours = claim["lower"]
      judged.append(judge(claim, {other: found for (one, other), found in comparisons.items() if one == ours}))
  return judged

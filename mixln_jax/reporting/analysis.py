"""All that a report says, before it is drawn."""

import dataclasses
import math
from collections.abc import Sequence

from mixln_jax.reporting import comparison, depth, tables
from mixln_jax.reporting.comparison import Standing, baseline_of
from mixln_jax.reporting.evidence import Absent, all_figures
from mixln_jax.reporting.fairness import Finding, find
from mixln_jax.reporting.groups import Group, make_groups
from mixln_jax.reporting.loading import Material
from mixln_jax.reporting.panels import Figure
from mixln_jax.reporting.source import Source
from mixln_jax.reporting.tables import TextTable, difference_and_interval, mean_and_std


@dataclasses.dataclass(frozen=True)
class Analysis:
  """All that a report says.

  Attributes:
    material: what was read, the runs in the order of their groups.
    baseline: the placement that the others are compared with.
    groups: of the runs.
    rows: a row of the perplexity table for each group.
    source: what the figures are made of.
    figures: those that the runs have the inputs for.
    absent: all others.
    findings: whether the runs are comparable.
    tables: all of them.
    headline: the result in a sentence or two.
  """

  material: Material
  baseline: str
  groups: Sequence[Group]
  rows: Sequence[Standing]
  source: Source
  figures: Sequence[Figure]
  absent: Sequence[Absent]
  findings: Sequence[Finding]
  tables: Sequence[TextTable]
  headline: str


def analyze(material: Material, baseline: str = "pre") -> Analysis:
  """Compares the runs; `baseline` is the placement that the others are compared with."""
  material = _by_group(material)
  runs = material.runs
  groups = make_groups(material)
  rows = comparison.standings(runs, groups, baseline)
  source = Source(runs, groups, rows, comparison.featured(groups, rows))
  figures, absent = all_figures(source)
  made = [tables.perplexity_table(rows, baseline)]
  best_rates = comparison.best_by_learning_rate(rows)
  if best_rates:
    made.append(tables.best_rates_table(best_rates))
  by_depth = depth.depth_table(source)
  if by_depth:
    made.append(by_depth)
  made += [tables.runs_table(runs), tables.differences_table(runs), tables.environment_table(runs)]
  return Analysis(
    material=material,
    baseline=baseline,
    groups=groups,
    rows=rows,
    source=source,
    figures=figures,
    absent=absent,
    findings=find(material, groups),
    tables=made,
    headline=summarize(rows, baseline),
  )


def _by_group(material: Material) -> Material:
  """The runs in the order of their groups."""
  order = [index for group in make_groups(material) for index in group.runs]
  return dataclasses.replace(material, runs=[material.runs[index] for index in order])


def summarize(rows: Sequence[Standing], baseline: str) -> str:
  """The lowest mean perplexity, and whether the seeds tell it from the baseline."""
  evaluated = [row for row in rows if row.counted]
  if not evaluated:
    return "No run has been evaluated after its last step yet."
  best = min(evaluated, key=lambda row: row.loss.mean if row.loss else math.inf)
  seeds = "one seed" if best.counted == 1 else f"{best.counted} seeds"
  text = f"Lowest validation perplexity: {best.group.label}, {mean_and_std(best.perplexity, 2)} ({seeds})."
  if best.group.placement == baseline:
    return f"{text} It is the baseline.{_not_counted(best)}"

  not_counted = _not_counted(best)
  base_group = baseline_of(best.group, [row.group for row in rows], baseline)
  for row in rows:
    if row.group is base_group:
      not_counted += _not_counted(row)
  difference = best.perplexity_difference
  if difference is None:
    return f"{text} There is no {baseline} run of equal settings and seeds to compare it with.{not_counted}"
  text += f" Against {best.baseline}: {difference_and_interval(difference, 2)}"
  if difference.interval is None:
    return f"{text}.{not_counted}"
  low, high = difference.interval
  verdict = "the interval excludes 0"
  if low <= 0 <= high:
    verdict = "the interval contains 0, so these seeds do not tell them apart"
  return f"{text}, {comparison.CONFIDENCE:.0%} interval of {difference.n} paired runs; {verdict}.{not_counted}"


def _not_counted(row: Standing) -> str:
  """What a mean does not show: the runs of a group that did not count, or diverged."""
  if row.counted == row.planned and not row.diverged:
    return ""
  return f" {row.counted} of {row.planned} runs of {row.group.label} counted; {row.diverged} diverged."

"""All that a report says, before it is drawn."""

import dataclasses
from collections.abc import Mapping, Sequence

from mixln_jax.reporting import comparison, depth, tables
from mixln_jax.reporting.comparison import Standing
from mixln_jax.reporting.corpora import Evaluated, corpora_table
from mixln_jax.reporting.evidence import Absent, all_figures
from mixln_jax.reporting.fairness import Finding, find
from mixln_jax.reporting.groups import Group, make_groups
from mixln_jax.reporting.headline import Headline, difference_figure, make_headline
from mixln_jax.reporting.loading import Material, ReportedRun
from mixln_jax.reporting.panels import Figure
from mixln_jax.reporting.search import search_table
from mixln_jax.reporting.source import Source
from mixln_jax.reporting.tables import TextTable

DEFAULT_BASELINE = "pre"


@dataclasses.dataclass(frozen=True)
class Analysis:
  """All that a report says.

  Attributes:
    material: what was read, the runs in the order of their groups.
    baseline: the placement that the others are compared with.
    groups: of the runs.
    rows: a row of the perplexity table for each group.
    source: what the figures are made of.
    difference: the one picture of the answer; None where nothing can be compared.
    sections: the figures that the runs have the inputs for, by section.
    absent: all others.
    findings: whether the runs are comparable.
    tables: all of them.
    headline: the answer.
  """

  material: Material
  baseline: str
  groups: Sequence[Group]
  rows: Sequence[Standing]
  source: Source
  difference: Figure | None
  sections: Mapping[str, Sequence[Figure]]
  absent: Sequence[Absent]
  findings: Sequence[Finding]
  tables: Sequence[TextTable]
  headline: Headline

  @property
  def figures(self) -> list[Figure]:
    """All of them, in the order of the page."""
    first = [] if self.difference is None else [self.difference]
    return first + [figure for figures in self.sections.values() for figure in figures]

  @property
  def comparable(self) -> bool:
    return not any(finding.level == "unfair" for finding in self.findings)

  @property
  def answer(self) -> str:
    """The headline in one line. Of runs that are not comparable it says so first."""
    return self.headline.text if self.comparable else f"NOT COMPARABLE, see why: {self.headline.text}"


def analyze(material: Material, baseline: str | None = None) -> Analysis:
  """Compares the runs.

  Args:
    material: what was read.
    baseline: the placement that the others are compared with; by default `pre`, or the first one where no run has it.
  """
  material = _by_group(material)
  runs = material.runs
  groups = make_groups(material)
  if baseline is None:
    placements = [group.placement for group in groups]
    baseline = DEFAULT_BASELINE if DEFAULT_BASELINE in placements else placements[0]
  rows = comparison.standings(runs, groups, baseline)
  source = Source(runs, groups, rows, comparison.featured(groups, rows), material.search)
  headline = make_headline(rows, baseline)
  sections, absent = all_figures(source)
  difference = difference_figure(source, headline)
  made = [tables.summary_table(headline, runs), tables.perplexity_table(rows, baseline)]
  on_pairs = tables.preferences_table(rows)
  if on_pairs is not None:
    made.append(on_pairs)
  if material.search is not None:
    made.append(search_table(material.search, runs, rows, baseline))
  by_depth = depth.depth_table(source)
  if by_depth is not None:
    made.append(by_depth)
  on_corpora = corpora_table(_evaluated(runs, headline))
  if on_corpora is not None:
    made.append(on_corpora)
  made += [tables.runs_table(runs), tables.differences_table(runs), tables.environment_table(runs)]
  return Analysis(
    material=material,
    baseline=baseline,
    groups=groups,
    rows=rows,
    source=source,
    difference=difference if difference.panels else None,
    sections=sections,
    absent=absent,
    findings=find(material, groups, [one.best.row.group for one in headline.contenders if one.best is not None]),
    tables=made,
    headline=headline,
  )


def _evaluated(runs: Sequence[ReportedRun], headline: Headline) -> list[Evaluated]:
  """The runs of each placement at its best rate beside the baseline's, for what they say of several corpora."""
  rows = []
  for contender in headline.contenders:
    if contender.best is None:
      continue
    match = headline.matchup_of(contender)
    theirs = match.baseline.best if match is not None else None
    baseline = [] if theirs is None else [runs[index] for index in theirs.row.group.runs]
    rows.append(Evaluated(contender.label, [runs[index] for index in contender.best.row.group.runs], baseline))
  return rows


def _by_group(material: Material) -> Material:
  """The runs in the order of their groups."""
  order = [index for group in make_groups(material) for index in group.runs]
  return dataclasses.replace(material, runs=[material.runs[index] for index in order])

"""What all figures are made of: the runs, their groups, and the few words that captions share."""

import dataclasses
from collections.abc import Sequence

from mixln_jax.reporting.comparison import Standing
from mixln_jax.reporting.groups import Group
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.panels import Figure, Panel
from mixln_jax.reporting.search_record import SearchRecord

SEEDS_NOTE = "Means over seeds where there are several, bars one standard deviation."


@dataclasses.dataclass(frozen=True)
class Source:
  """What figures are made of.

  Attributes:
    runs: all runs of the report.
    groups: of these runs.
    rows: a row of the perplexity table for each group.
    featured: the groups whose curves and layers are drawn.
    search: the search that the runs are the finals of; None where they are of none.
  """

  runs: Sequence[ReportedRun]
  groups: Sequence[Group]
  rows: Sequence[Standing]
  featured: Sequence[Group]
  search: SearchRecord | None = None

  def group_of(self, index: int) -> Group:
    """The group of the run of this index."""
    return next(group for group in self.groups if index in group.runs)

  def run_label(self, index: int) -> str:
    """The group's label, with the seeds where the group has several runs."""
    group = self.group_of(index)
    if len(group.runs) == 1:
      return group.label
    config = self.runs[index].config
    label = f"{group.label}, seed {config['seed']}"
    if config.get("data.seed"):
      label += f", data seed {config['data.seed']}"
    return label


def make_figure(name: str, title: str, caption: str, panels: Sequence[Panel]) -> Figure:
  """A figure of those panels that show something, perhaps of none. The arguments are those of Figure."""
  shown = [panel for panel in panels if not panel.is_empty]
  return Figure(name, title, caption, shown)


def mean_label(label: str, num_runs: int) -> str:
  """What a line over the runs of a group is called."""
  return f"{label} (mean of {num_runs})" if num_runs > 1 else label

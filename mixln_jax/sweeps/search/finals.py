"""The best candidates and the baselines once more, with seeds that the search never saw: an ordinary study.

A search takes the lowest of many losses, so its winner's loss is too low by some of its luck. What holds is the paired
comparison of this study.
"""

from collections.abc import Sequence
from pathlib import Path

from mixln_jax import placement
from mixln_jax.errors import InputError
from mixln_jax.runs.outcome import FINISHED, read_outcome
from mixln_jax.sweeps.search.groups import Groups
from mixln_jax.sweeps.search.plan import Search
from mixln_jax.sweeps.search.space import PLACEMENT, RATE
from mixln_jax.sweeps.search.table import Candidate, Table
from mixln_jax.sweeps.sequence import has_ended, open_study
from mixln_jax.sweeps.study import Grid, Run, Study, make_study

FINALS = "finals"
SEEDS = ("seed", "data.seed")  # of the initial weights and of the order of samples: both are fresh


def winners_of(search: Search, table: Table) -> list[Candidate]:
  """The best candidates, each table once, without those that are a baseline."""
  known = {placement.parse(name, search.space.num_layers).layer_list for name in search.baselines}
  winners = []
  for candidate in table.final_ranking(search.ladder()):
    layers = " ".join(candidate.layers)
    if layers not in known:
      known.add(layers)
      winners.append(candidate)
  return winners[: search.winners]


def finals_study(search: Search, table: Table) -> Study:
  """Winners at the rate that they were found with, and baselines at every rate of the grid, all with fresh seeds.

  Raises:
    InputError: no candidate beats anything: all diverged, or all are baselines.
  """
  winners = winners_of(search, table)
  if not winners and not search.baselines:
    raise InputError("search: nothing to run again: no candidate has a finite loss, and there are no baselines")
  seeds = tuple((seed, seed) for seed in search.seeds)
  grids: list[Grid] = []
  for winner in winners:
    rate = winner.values.get(RATE, search.base.optimizer.learning_rate)
    grids.append({SEEDS: seeds, PLACEMENT: (winner.values[PLACEMENT],), RATE: (rate,)})
  if search.baselines:
    grids.append({SEEDS: seeds, PLACEMENT: search.baselines, RATE: search.rates})
  title = search.title or "A search over placements"
  return make_study(search.base, grids, question=search.question, title=f"{title}: what held with fresh seeds")


def run_finals(search: Search, table: Table, groups: Groups, folder: Path) -> list[Run]:
  """Trains what is missing of the finals, in groups of one data seed; returns all of their runs."""
  runs = open_study(finals_study(search, table), folder / FINALS)
  for seed in search.seeds:
    of_seed = [run for run in runs if run.config.data.seed == seed]
    for begin in range(0, len(of_seed), search.group):
      # One that has finished is never trained again: beside runs that were added since it has no step in common.
      group = [run for run in of_seed[begin : begin + search.group] if not _has_finished(run)]
      if not all(map(has_ended, group)):
        groups.train(group, search.base.train.num_steps, f"finals, seed {seed}")
  return runs


def _has_finished(run: Run) -> bool:
  outcome = read_outcome(run.folder)
  return outcome is not None and outcome.status == FINISHED


def table_lines(search: Search, table: Table, most: int) -> Sequence[str]:
  """The best candidates in lines for a person: the loss at the end of the last rung that each was trained in."""
  lines = []
  ladder = search.ladder()
  for place, candidate in enumerate(table.final_ranking(ladder)[:most], start=1):
    rung = [rung for rung in ladder if table.result(rung, candidate.number) is not None][-1]
    result = table.result(rung, candidate.number)
    loss = 0.0 if result is None else result.loss
    rate = f"  rate {candidate.values[RATE]:g}" if RATE in candidate.values else ""
    lines.append(
      f"{place:>4}  candidate {candidate.name}  step {rung.end}  loss {loss:.4f}{rate}  {candidate.values[PLACEMENT]}"
    )
  return lines

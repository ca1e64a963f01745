"""Synchronous successive halving (arXiv 1502.07943): of the candidates of a rung, one of eta goes on to the next.

The order of everything is fixed: a group is asked for, trained, its results written, and told, before the next one is
asked for; a rung ends with its last group. So what is on the disk says where a search stands, and a search that was
killed does the rest as it would have done it.
"""

from collections.abc import Callable, Iterator, Sequence

from mixln_jax.errors import InputError
from mixln_jax.sweeps.search.plan import Rung, Search
from mixln_jax.sweeps.search.proposals import Proposals
from mixln_jax.sweeps.search.table import Candidate, Result, Table

# (candidates of a group, at most R; the rung) -> their results at its end
Evaluate = Callable[[Sequence[Candidate], Rung], Sequence[Result]]


def run_search(
  search: Search,
  proposals: Proposals,
  table: Table,
  evaluate: Evaluate,
  give_up: Callable[[Sequence[Candidate]], None],
) -> None:
  """Does what is missing of a search.

  Args:
    search: what is tried.
    proposals: its candidates so far.
    table: their results so far.
    evaluate: trains a group.
    give_up: hears of the candidates that do not go on, once for each rung that is done; again where it is resumed.

  Raises:
    InputError: no candidate has a finite loss at the end of a rung, or the table has other candidates than the trials.
  """
  first, *later = search.ladder()
  for begin in range(0, search.candidates, search.group):
    end = min(begin + search.group, search.candidates)
    proposals.fill(end)
    group = proposals.candidates[begin:end]
    _check_same(group, table)
    if not _is_done(table, first, group):
      table.put(first, group, evaluate(group, first))
    proposals.tell(table.losses(first), end)  # also those that a killed process had written and not told
  before = first
  for rung in later:
    going_on = survivors(table, before, rung)
    give_up([table.candidates[number] for number in table.losses(before) if number not in _numbers(going_on)])
    for group in _in_groups(going_on, search.group):
      if not _is_done(table, rung, group):
        table.put(rung, group, evaluate(group, rung))
    before = rung


def _check_same(group: Sequence[Candidate], table: Table) -> None:
  """Rejects a table whose candidates are not those that were asked for: their losses would be told to others.

  Raises:
    InputError: the journal was removed or replaced, or another version of Optuna asks otherwise.
  """
  for candidate in group:
    known = table.candidates.get(candidate.number)
    if known is not None and dict(known.values) != dict(candidate.values):
      raise InputError(
        f"candidate {candidate.name} is {dict(known.values)} in the table, and {dict(candidate.values)} by the trials "
        "(optuna.jsonl): restore the file that was removed or changed, or search in another workdir"
      )


def survivors(table: Table, before: Rung, rung: Rung) -> list[Candidate]:
  """Who goes on from one rung to the next, in the order of their numbers.

  Raises:
    InputError: nobody has a finite loss.
  """
  ranked = table.ranked(before)
  if not ranked:
    raise InputError(
      f"all {before.size} candidates diverged before step {before.end}; lower config.optimizer.learning_rate, in "
      "another workdir"
    )
  return sorted(ranked[: rung.size], key=lambda candidate: candidate.number)


def _numbers(candidates: Sequence[Candidate]) -> set[int]:
  return {candidate.number for candidate in candidates}


def _in_groups(candidates: Sequence[Candidate], size: int) -> Iterator[Sequence[Candidate]]:
  for begin in range(0, len(candidates), size):
    yield candidates[begin : begin + size]


def _is_done(table: Table, rung: Rung, group: Sequence[Candidate]) -> bool:
  return all(table.result(rung, candidate.number) is not None for candidate in group)

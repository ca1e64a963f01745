"""What a study runs after its first runs: more rates where the best is at an edge, then more seeds at the best.

A stage begins where every run before it is done, and looks at their final losses. Everything here is a function of
those losses alone, so that the same command finds the same runs again.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mixln_jax.errors import InputError

# An axis is a tuple of fields that move together; its points are tuples of their values.
CheckedGrid = Mapping[tuple[str, ...], Sequence[tuple[Any, ...]]]
Rest = tuple[tuple[str, Any], ...]  # (field, value) of what the runs of one family have in common


class Near(NamedTuple):
  """Only families whose mean loss differs by less than so much from that of the one with another value of a field.

  Attributes:
    field, value: what the family to compare with has, as model.placement and pre.
    within: nats.
  """

  field: str
  value: Any
  within: float


@dataclasses.dataclass(frozen=True)
class Stage:
  """More runs, for each setting of what is neither `best` nor varied by a stage (a family).

  Attributes:
    best: the field whose best value is looked for, as the learning rate.
    grid: what its runs vary at the best value, as seeds; empty in a stage that widens.
    widen: all values of `best` that may be tried, in order. Where the best of those tried so far is the first or the
      last of them, the next one beyond is tried too, until the best lies inside or there is none.
    only: field -> values; families with other values are left out.
    near: families that are not near are left out too.
  """

  best: str
  grid: CheckedGrid = dataclasses.field(default_factory=dict)
  widen: tuple[Any, ...] = ()
  only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  near: Near | None = None


class Tried(NamedTuple):
  """A run that is done: its values on the axes, and its final loss, which is NaN where it diverged."""

  values: Mapping[str, Any]
  loss: float


KEYS = ("best", "grid", "widen", "only", "near")


def fields_of(grid: CheckedGrid) -> list[str]:
  """All fields that a grid varies."""
  return list(itertools.chain.from_iterable(grid))


def check_stages(stages: Sequence[Stage], grids: Sequence[CheckedGrid]) -> None:
  """Rejects stages that could not be run after these grids; raises InputError."""
  tried: dict[str, list[Any]] = {}
  for grid in grids:
    for fields, points in grid.items():
      for field, values in zip(fields, zip(*points, strict=True), strict=True):
        tried.setdefault(field, []).extend(values)
  for stage in stages:
    if bool(stage.grid) == bool(stage.widen):
      raise InputError("STUDY: a stage of 'then' has either grid or widen")
    if stage.best not in tried or stage.best in fields_of(stage.grid):
      raise InputError(f"STUDY: then.best={stage.best!r} must be an axis of the grids, and none of then.grid")
    beyond = [value for value in tried[stage.best] if stage.widen and value not in stage.widen]
    if beyond:
      raise InputError(f"STUDY: then.widen lacks {stage.best}={beyond[0]!r}, which the grids try")
    for field in (*stage.only, *([stage.near.field] if stage.near else [])):
      if field not in tried:
        raise InputError(f"STUDY: then.only and then.near name axes of the grids, and {field!r} is none")


class Families:
  """The runs of a study by what they have in common.

  The best value is chosen among the runs that were made to choose it, which are equally many for each value: seeds that
  a later stage adds to one value don't count.
  """

  def __init__(self, best: str, varied: set[str], chosen_among: Sequence[Tried], done: Sequence[Tried]):
    """`varied`: the fields that some stage varies besides; `done`: all runs so far."""
    self._best, self._varied = best, varied
    self._among = self._by_rest(chosen_among)
    self._done = self._by_rest(done)

  def _by_rest(self, runs: Sequence[Tried]) -> dict[Rest, list[Tried]]:
    families: dict[Rest, list[Tried]] = {}
    for run in runs:
      rest = tuple((field, value) for field, value in run.values.items() if field not in self._varied | {self._best})
      families.setdefault(rest, []).append(run)
    return families

  def best_of(self, rest: Rest) -> Any:
    """The value with the lowest mean loss; None where no value has a finite one."""
    means: dict[Any, list[float]] = {}
    for run in self._among.get(rest, ()):
      means.setdefault(run.values[self._best], []).append(run.loss)
    finite = {value: math.fsum(losses) / len(losses) for value, losses in means.items()}
    finite = {value: mean for value, mean in finite.items() if math.isfinite(mean)}
    return min(finite, key=finite.__getitem__) if finite else None

  def _losses_at_best(self, rest: Rest) -> dict[Any, float]:
    """Final losses at the best value, by what else was varied."""
    best = self.best_of(rest)
    found = [run for run in self._done.get(rest, ()) if run.values[self._best] == best]
    return {tuple(run.values.get(field) for field in sorted(self._varied)): run.loss for run in found}

  def _is_wanted(self, stage: Stage, rest: Rest) -> bool:
    known = dict(rest)
    if any(known.get(field) not in values for field, values in stage.only.items()):
      return False
    if stage.near is None:
      return True
    field, value, within = stage.near
    other = tuple((name, value if name == field else there) for name, there in rest)
    ours, theirs = self._losses_at_best(rest), self._losses_at_best(other)
    differences = [ours[key] - theirs[key] for key in ours if key in theirs]
    finite = [difference for difference in differences if math.isfinite(difference)]
    return bool(finite) and abs(math.fsum(finite) / len(finite)) < within

  def grids(self, stage: Stage) -> Iterator[CheckedGrid]:
    """The runs of a stage, as grids; some of them may be there already."""
    for rest in self._among:
      if not self._is_wanted(stage, rest):
        continue
      fixed = {(field,): ((value,),) for field, value in rest}
      if stage.widen:
        value = self._beyond(stage, rest)
        if value is not None:
          yield from self._runs_at(rest, value)
      elif (best := self.best_of(rest)) is not None:
        yield fixed | {(stage.best,): ((best,),)} | dict(stage.grid)

  def _beyond(self, stage: Stage, rest: Rest) -> Any:
    """The value to try next, where the best lies at an edge of those that were tried; None where it does not.

    Where all of them diverged the next lower one is tried.
    """
    places = sorted({stage.widen.index(run.values[stage.best]) for run in self._among[rest]})
    best = self.best_of(rest)
    place = places[0] if best is None else stage.widen.index(best)
    if place == places[0] and place > 0:
      return stage.widen[place - 1]
    if place == places[-1] and best is not None and place + 1 < len(stage.widen):
      return stage.widen[place + 1]
    return None

  def _runs_at(self, rest: Rest, value: Any) -> Iterator[CheckedGrid]:
    """The runs that a family has at its first value, at another one."""
    first = self._among[rest][0].values[self._best]
    for run in self._among[rest]:
      if run.values[self._best] == first:
        values = dict(run.values) | {self._best: value}
        yield {(field,): ((there,),) for field, there in values.items()}

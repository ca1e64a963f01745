"""What a search left: search.json and table.json, without Optuna and without the candidates' folders."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixln_jax.errors import InputError
from mixln_jax.files import COUNT, NUMBER, OBJECT, OBJECTS, TEXT, TEXTS, check_kinds, read_json

# The names that `sweeps/search/` writes; rooms of one floor don't import one another.
SEARCH_FILE, TABLE_FILE, FINALS_FOLDER = "search.json", "table.json", "finals"
PLACEMENT, RATE = "model.placement", "optimizer.learning_rate"


@dataclasses.dataclass(frozen=True)
class Tried:
  """A candidate of a search.

  Attributes:
    number: from 1, in the order in which they were asked for.
    placement: as it was tried.
    rate: its learning rate; None where none was searched.
    layers: one word a layer, first layer first.
    losses: validation loss at the end of each rung (from 1) that it was trained in; infinite where it diverged.
  """

  number: int
  placement: str
  rate: float | None
  layers: Sequence[str]
  losses: Mapping[int, float]

  @property
  def last_rung(self) -> int:
    return max(self.losses, default=0)

  @property
  def last_loss(self) -> float:
    return self.losses.get(self.last_rung, math.inf)


@dataclasses.dataclass(frozen=True)
class SearchRecord:
  """A search, as far as it has come.

  Attributes:
    rungs: their last steps.
    sampler: that proposed the candidates.
    seed: of all candidates.
    candidates: by their number.
  """

  rungs: Sequence[int]
  sampler: str
  seed: int
  candidates: Sequence[Tried]

  def ranked(self) -> list[Tried]:
    """Those that were trained the furthest first, and of those the lowest loss first."""
    return sorted(self.candidates, key=lambda one: (-one.last_rung, one.last_loss, one.number))


def read_search(folder: Path) -> SearchRecord:
  """Reads the record of a search; raises InputError where a file of it is damaged."""
  plan = read_json(folder / SEARCH_FILE, {"base": OBJECT, "sampler": TEXT})
  rungs = plan.get("rungs")
  if not isinstance(rungs, list) or not all(COUNT.fits(step) for step in rungs):
    raise InputError(f"{folder / SEARCH_FILE}: damaged, rungs are {rungs!r} and not steps; restore it")
  candidates = []
  if (folder / TABLE_FILE).exists():
    path = folder / TABLE_FILE
    for row in read_json(path, {"candidates": OBJECTS})["candidates"]:
      candidates.append(_tried(row, str(path)))
  return SearchRecord(rungs, plan["sampler"], int(plan["base"].get("seed", 0)), candidates)


def _tried(row: Mapping[str, Any], where: str) -> Tried:
  check_kinds(row, where, {"number": COUNT, "values": OBJECT, "layers": TEXTS, "results": OBJECTS})
  check_kinds(row["values"], where, {PLACEMENT: TEXT, RATE: NUMBER.optional()})
  losses = {}
  for result in row["results"]:
    check_kinds(result, where, {"rung": COUNT, "loss": NUMBER})
    losses[result["rung"]] = float(result["loss"])
  rate = row["values"].get(RATE)
  return Tried(row["number"], row["values"][PLACEMENT], rate, row["layers"], losses)

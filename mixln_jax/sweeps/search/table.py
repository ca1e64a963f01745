"""table.json: every candidate of a search, and its validation loss at the end of each rung that it was trained in."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax.errors import InputError
from mixln_jax.files import COUNT, NUMBER, OBJECTS, TEXT, TEXTS, check_kinds, json_number, read_json, write_whole
from mixln_jax.sweeps.search.plan import Rung

TABLE_FILE = "table.json"


class Candidate(NamedTuple):
  """One point of the space.

  Attributes:
    number: from 1, in the order in which they were asked for.
    values: config fields.
    layers: one word a layer, first layer first.
  """

  number: int
  values: Mapping[str, Any]
  layers: Sequence[str]

  @property
  def name(self) -> str:
    """Of its folder."""
    return f"{self.number:04d}"


class Result(NamedTuple):
  """What training a candidate to the end of a rung gave.

  Attributes:
    loss: validation loss in nats a token; infinite where it ended before.
    status: how it stands there: `ok`, `diverged` (at the unigram entropy) or `non_finite`.
  """

  loss: float
  status: str = "ok"


class Table:
  """The results of a search, as far as it has come."""

  def __init__(self, path: Path | None = None):
    """Reads what is there; without a path it lives in memory.

    Raises:
      InputError: the file is damaged.
    """
    self._path = path
    self.candidates: dict[int, Candidate] = {}
    self._results: dict[tuple[int, int], Result] = {}  # (rung, candidate)
    if path is None or not path.exists():
      return
    for number, row in enumerate(read_json(path, {"candidates": OBJECTS})["candidates"], start=1):
      where = f"{path}: candidate {number}"
      check_kinds(row, where, {"number": COUNT, "layers": TEXTS, "results": OBJECTS})
      if not isinstance(row.get("values"), dict):
        raise InputError(f"{where}: damaged, it has no values; restore or remove it")
      self.candidates[row["number"]] = Candidate(row["number"], row["values"], row["layers"])
      for result in row["results"]:
        check_kinds(result, where, {"rung": COUNT, "loss": NUMBER, "status": TEXT})
        self._results[result["rung"], row["number"]] = Result(float(result["loss"]), result["status"])

  def put(self, rung: Rung, candidates: Sequence[Candidate], results: Sequence[Result]) -> None:
    """Takes the results of a group, and writes the whole table."""
    for candidate, result in zip(candidates, results, strict=True):
      self.candidates[candidate.number] = candidate
      self._results[rung.number, candidate.number] = result
    if self._path is not None:
      write_whole(self._path, self.to_json())

  def result(self, rung: Rung, candidate: int) -> Result | None:
    """None where it was not trained to the end of the rung."""
    return self._results.get((rung.number, candidate))

  def losses(self, rung: Rung) -> dict[int, float]:
    """The loss of each candidate that was trained to the end of a rung, by its number."""
    return {number: result.loss for (of_rung, number), result in self._results.items() if of_rung == rung.number}

  def ranked(self, rung: Rung) -> list[Candidate]:
    """The candidates with a finite loss at the end of a rung, the lowest first; of equal ones the earlier."""
    finite = [(loss, number) for number, loss in self.losses(rung).items() if math.isfinite(loss)]
    return [self.candidates[number] for _, number in sorted(finite)]

  def final_ranking(self, ladder: Sequence[Rung]) -> list[Candidate]:
    """All candidates with a finite loss: those of the last rung first, each rung by its loss."""
    ranking: dict[int, Candidate] = {}
    for rung in reversed(ladder):
      for candidate in self.ranked(rung):
        ranking.setdefault(candidate.number, candidate)
    return list(ranking.values())

  def to_json(self) -> str:
    """What table.json holds."""
    rows = []
    for number, candidate in sorted(self.candidates.items()):
      results = []
      for (rung, of), result in sorted(self._results.items()):
        if of == number:
          results.append({"rung": rung, "loss": json_number(result.loss), "status": result.status})
      rows.append(
        {"number": number, "values": dict(candidate.values), "layers": list(candidate.layers), "results": results}
      )
    return json.dumps({"candidates": rows}, indent=1) + "\n"

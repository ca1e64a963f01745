"""study.json: what a sweep set out to compare."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixln_jax.errors import InputError
from mixln_jax.files import OBJECT, OBJECTS, TEXT, check_folder_name, check_kinds, read_json
from mixln_jax.reporting.reading import DAMAGE, reason

# The names that `sweeps/study.py` writes; rooms of one floor don't import one another.
STUDY_FILE, RUNS_FOLDER = "study.json", "runs"


@dataclasses.dataclass(frozen=True)
class StudyPlan:
  """What study.json says.

  Attributes:
    name: of the study.
    title: what it is called; empty where it has none.
    question: what it is to decide.
    base: config field -> value, of the config that every run starts from.
    axes: field -> its values, of the fields in which the runs may differ.
    planned: name of a run -> its values on the axes.
    claims: what is judged, `{"id", "claim", "judged_by"}` each, written down before the runs.
  """

  name: str
  title: str = ""
  question: str = ""
  base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  axes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  planned: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  claims: Sequence[Mapping[str, Any]] = ()


def read_study_plan(path: Path) -> StudyPlan:
  """Reads a study.json.

  Raises:
    InputError: it can't be read, or is damaged.
  """
  value = read_json(path, {"base": OBJECT, "axes": OBJECT, "runs": OBJECTS})
  for number, run in enumerate(value["runs"], start=1):
    check_kinds(run, f"{path}: run {number}", {"name": TEXT, "values": OBJECT})
    check_folder_name(run["name"], f"{path}: run {number}")
  try:
    planned = {run["name"]: dict(run["values"]) for run in value["runs"]}
    return StudyPlan(
      name=str(value.get("name") or path.parent.name),
      title=str(value.get("title") or value.get("name") or ""),
      question=str(value.get("question", "")),
      base=dict(value["base"]),
      axes={str(field): list(values) for field, values in value["axes"].items()},
      planned=planned,
      claims=[dict(claim) for claim in value.get("claims") or ()],
    )
  except DAMAGE as error:
    raise InputError(f"{path}: damaged ({reason(error)}); restore it, or make the study again") from error

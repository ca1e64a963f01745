"""What run folders hold, read with tolerance: a run may still be training, be torn, or be damaged in one file.

A damaged file costs its run what the file would have shown and is named in the report; a run without a readable config
is left out and named. What was asked for and is not there at all is refused.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixln_jax.errors import InputError
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics

STUDY, STUDY_RUNS = "study.json", "runs"
DIAGNOSTICS, DIAGNOSE = "diagnostics.jsonl", "diagnose"
NEEDED_FIELDS = {"model.placement": str, "model.num_layers": int, "train.num_steps": int, "seed": int}

Columns = Mapping[str, np.ndarray]  # of a file of lines: name -> its value in each line, NaN where a line has none


@dataclasses.dataclass(frozen=True)
class Study:
  """study.json: what a sweep set out to compare."""

  name: str
  question: str = ""
  base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  axes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  planned: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # run -> its values on the axes
  claims: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """One diagnose.json of a model with L layers; what it lacks is None or empty.

  Attributes:
    step: the checkpoint's step.
    tokens: counted tokens of the sample.
    placement: as the file says.
    definitions: name -> how it was measured, in words.
    angular_distance: `last`, `all` -> [L, L], entry [l, n-1] between the inputs of layers l and l + n (from 0); NaN
      where l + n > L.
    removal_loss: loss of the whole model.
    removal: number n of layers removed -> loss after removing layers l … l + n - 1.
    gradient_norm: `initial`, `checkpoint` -> sublayer -> [L].
    effective_rank: of the stream, [L + 1].
    logit_lens_perplexity: of the stream read by the head, [L + 1].
  """

  step: int
  tokens: int | None
  placement: str
  num_layers: int
  fingerprint: str | None
  definitions: Mapping[str, str]
  angular_distance: Mapping[str, np.ndarray]
  removal_loss: float | None
  removal: Mapping[int, np.ndarray]
  gradient_norm: Mapping[str, Mapping[str, np.ndarray]]
  effective_rank: np.ndarray | None
  logit_lens_perplexity: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Run:
  """One run, as far as its folder says.

  Attributes:
    name: unique in the report.
    config: flat.
    strip: one word a layer.
    train, validation: columns of metrics.jsonl; `step` is among them.
    outcome, environment, initial_weights: empty where there is no such file yet.
    fingerprint: of the data, where data.json or a diagnosis says so.
    diagnostics: the whole rows of diagnostics.jsonl.
    problems: what could not be read, in words.
  """

  name: str
  path: Path
  config: Mapping[str, Any]
  strip: Sequence[str] = ()
  train: Columns = dataclasses.field(default_factory=dict)
  validation: Columns = dataclasses.field(default_factory=dict)
  outcome: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  initial_weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fingerprint: str | None = None
  diagnostics: Sequence[Mapping[str, Any]] = ()
  diagnosis: Diagnosis | None = None
  changes: Sequence[Mapping[str, Any]] = ()
  problems: Sequence[str] = ()

  @property
  def placement(self) -> str:
    return self.config["model.placement"]

  @property
  def num_steps(self) -> int:
    return self.config["train.num_steps"]

  @property
  def step(self) -> int:
    """The last step that its metrics know of."""
    steps = [columns["step"][-1] for columns in (self.train, self.validation) if len(columns.get("step", ()))]
    return int(max(steps, default=0))

  @property
  def diverged(self) -> bool:
    return bool(self.outcome.get("diverged")) or self.outcome.get("status") in ("diverged", "non_finite")

  @property
  def status(self) -> str:
    """`finished`, `diverged`, …; a run without an outcome is still going, or was killed."""
    status = str(self.outcome.get("status", "running or killed"))
    return f"{status}, diverged" if self.diverged and status == "finished" else status

  @property
  def final_loss(self) -> float | None:
    """Validation loss after the whole budget of steps, in nats a token; None before, or where it is not finite."""
    at_end = self.validation.get("step", np.zeros(0)) == self.num_steps
    losses = self.validation["loss"][at_end] if at_end.any() else np.zeros(0)
    return float(losses[-1]) if len(losses) and math.isfinite(losses[-1]) else None


@dataclasses.dataclass(frozen=True)
class Material:
  """All that a report is made from; `problems` are of runs that are left out."""

  study: Study | None
  runs: Sequence[Run]
  problems: Sequence[str]
  not_started: Sequence[str] = ()


def load(workdirs: Sequence[str]) -> Material:
  """Reads run folders, or one folder of a study.

  Raises:
    InputError: a folder is neither, the study is damaged, or no run can be read.
  """
  paths = list(dict.fromkeys(Path(workdir).expanduser().absolute() for workdir in workdirs))
  studies = [path for path in paths if (path / STUDY).is_file()]
  if studies and len(paths) > 1:
    raise InputError(f"--workdir={studies[0]}: holds a study, which is reported alone; give no other --workdir")
  study = read_study(studies[0] / STUDY) if studies else None
  not_started: list[str] = []
  if study:
    folders = {name: studies[0] / STUDY_RUNS / name for name in study.planned}
    not_started = [name for name, path in folders.items() if not RunFolder(path).has_run]
    paths = [path for name, path in folders.items() if name not in not_started]
  for path in paths:
    if not RunFolder(path).has_run:
      raise InputError(
        f"--workdir={path}: holds neither a run (config.json) nor a study (study.json); give the folder of one"
      )
  runs, problems = [], []
  for name, path in zip(_unique_names(paths), paths, strict=True):
    try:
      runs.append(read_run(name, path))
    except InputError as error:
      problems.append(str(error))
  if not runs:
    raise InputError("; ".join(problems) or f"--workdir={workdirs[0]}: no run of the study has started yet")
  return Material(study, runs, problems, not_started)


def _unique_names(paths: Sequence[Path]) -> list[str]:
  """The shortest ends of the paths that tell them apart."""
  for length in range(1, max((len(path.parts) for path in paths), default=1) + 1):
    names = ["/".join(path.parts[-length:]) for path in paths]
    if len(set(names)) == len(names):
      return names
  return [str(path) for path in paths]


def read_study(path: Path) -> Study:
  """study.json; raises InputError where it is damaged."""
  value = _read_json(path)
  try:
    planned = {str(run["name"]): dict(run["values"]) for run in value["runs"]}
    axes = {str(field): list(values) for field, values in value["axes"].items()}
    claims = [dict(claim) for claim in value.get("claims") or ()]
    outside = [name for name in planned if Path(name).name != name]
    if outside:
      raise ValueError(f"the run name {outside[0]!r} is no name of a folder")
    return Study(
      str(value.get("name") or path.parent.name),
      str(value.get("question", "")),
      dict(value["base"]),
      axes,
      planned,
      claims,
    )
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise InputError(f"{path}: damaged ({_reason(error)}); restore it, or make the study again") from error


def read_run(name: str, path: Path) -> Run:
  """One run's folder.

  Raises:
    InputError: its config can't be read.
  """
  folder = RunFolder(path)
  config = _read_json(folder / folder_lib.CONFIG)
  for field, kind in NEEDED_FIELDS.items():
    if not isinstance(config.get(field), kind):
      raise InputError(f"{folder / folder_lib.CONFIG}: damaged ({field} is {config.get(field)!r}); the run is left out")
  problems: list[str] = []

  def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
    try:
      return read()
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      problems.append(_reason(error))
      return otherwise

  def facts(file: str) -> dict[str, Any]:
    return attempt(lambda: _read_json(folder / file), {}) if (folder / file).is_file() else {}

  lines = attempt(lambda: read_metrics(folder / folder_lib.METRICS), [])
  columns = {
    split: attempt(lambda split=split: _columns([line for line in lines if line["split"] == split]), {})
    for split in ("train", "validation")
  }
  diagnosis = attempt(lambda: _newest_diagnosis(path), None)
  fingerprint = facts(folder_lib.DATA).get("fingerprint") or (diagnosis.fingerprint if diagnosis else None)
  return Run(
    name=name,
    path=path,
    config=config,
    strip=attempt(lambda: (folder / folder_lib.PLACEMENT).read_text(), "").split(),
    train=columns["train"],
    validation=columns["validation"],
    outcome=facts(folder_lib.OUTCOME),
    environment=facts(folder_lib.ENVIRONMENT),
    initial_weights=facts(folder_lib.INITIAL_WEIGHTS),
    fingerprint=fingerprint,
    diagnostics=attempt(lambda: _read_rows(path / DIAGNOSTICS), []),
    diagnosis=diagnosis,
    changes=attempt(lambda: _read_rows(folder / folder_lib.CHANGES), []),
    problems=problems,
  )


def as_mapping(value: Any) -> Mapping[str, Any]:
  """The value where it is a mapping, else an empty one: files of facts may hold anything."""
  return value if isinstance(value, Mapping) else {}


def _reason(error: Exception) -> str:
  text = " ".join(str(error).split())
  return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: can't be read ({_reason(error)}); restore or remove it") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: holds no JSON object; restore or remove it")
  return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
  """Lines of JSON that have a step each; none where there is no file. A torn last line is left out."""
  lines = path.read_text().split("\n") if path.exists() else []
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError as error:
      if number == len(lines):
        break
      raise InputError(f"{path}: line {number} is not JSON; mend or remove the file") from error
    if not isinstance(row, dict) or "step" not in row:
      raise InputError(f"{path}: line {number} has no step; mend or remove the file")
    rows.append(row)
  return rows


def _columns(lines: Sequence[Mapping[str, Any]]) -> Columns:
  if not all("loss" in line for line in lines):
    raise ValueError(f"a line of {folder_lib.METRICS} has no loss")
  names = dict.fromkeys(name for line in lines for name in line if name != "split")
  return {name: np.array([line.get(name) for line in lines], float) for name in names}


def _newest_diagnosis(path: Path) -> Diagnosis | None:
  steps = [folder for folder in (path / DIAGNOSE).glob("*") if (folder / "diagnose.json").is_file()]
  numbered = {int(folder.name): folder for folder in steps if folder.name.isdecimal()}
  return read_diagnosis(numbered[max(numbered)] / "diagnose.json") if numbered else None


def read_diagnosis(path: Path) -> Diagnosis:
  """A diagnose.json; raises InputError where it is damaged."""
  value = _read_json(path)
  try:
    layers = int(value["num_layers"])
    removal = value.get("removal") or {}
    base, tokens = removal.get("loss"), value.get("tokens")
    return Diagnosis(
      step=int(value["step"]),
      tokens=None if tokens is None else int(tokens),
      placement=str(value.get("placement", "")),
      num_layers=layers,
      fingerprint=value.get("data_fingerprint"),
      definitions={str(name): str(text) for name, text in (value.get("definitions") or {}).items()},
      angular_distance={
        str(name): _array(rows, layers, layers) for name, rows in (value.get("angular_distance") or {}).items()
      },
      removal_loss=None if base is None else float(base),
      removal={int(n): _array(losses, layers - int(n) + 1) for n, losses in (removal.get("blocks") or {}).items()},
      gradient_norm={
        str(when): {str(sublayer): _array(norms, layers) for sublayer, norms in by_sublayer.items()}
        for when, by_sublayer in (value.get("gradient_norm") or {}).items()
      },
      effective_rank=_array(value["effective_rank"], layers + 1) if value.get("effective_rank") else None,
      logit_lens_perplexity=(
        _array(value["logit_lens_perplexity"], layers + 1) if value.get("logit_lens_perplexity") else None
      ),
    )
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise InputError(f"{path}: damaged ({_reason(error)}); run `python -m mixln_jax diagnose` again") from error


def _array(values: Any, *shape: int) -> np.ndarray:
  """Numbers of the given shape, null as NaN."""
  array = np.array(values, float)
  if array.shape != shape:
    raise ValueError(f"an array of shape {array.shape} stands where {shape} is meant")
  return array

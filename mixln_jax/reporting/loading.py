"""What run folders hold, read with tolerance: a run may still be training, or be damaged in one file.

If a file is damaged, the report names it and omits what it would have shown. A run without a readable config is left
out and named. A folder that was asked for and does not exist is an error.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from mixln_jax import placement as placement_lib
from mixln_jax.config import FIELDS
from mixln_jax.errors import InputError
from mixln_jax.files import (
  LARGEST_FACTS,
  NUMBER,
  OBJECT,
  TEXT,
  check_kinds,
  local_path,
  read_json,
  read_json_lines,
  read_regular,
)
from mixln_jax.reporting.model_diagnosis import ModelDiagnosis, newest_diagnosis
from mixln_jax.reporting.reading import DAMAGE, as_mapping, reason
from mixln_jax.reporting.search_record import FINALS_FOLDER, SEARCH_FILE, SearchRecord, read_search
from mixln_jax.reporting.study_plan import RUNS_FOLDER, STUDY_FILE, StudyPlan, read_study_plan
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import STEP_LINE, read_metrics
from mixln_jax.version import VERSION

NEEDED_FIELDS = ("model.placement", "model.num_layers", "train.num_steps", "seed")

DEEPEST = 3  # levels of folders that are looked through: `work` finds work/studies/NAME and its runs

T = TypeVar("T")


def _no_metrics() -> pd.DataFrame:
  return pd.DataFrame({"step": [], "loss": []}, dtype=float)


@dataclasses.dataclass(frozen=True)
class ReportedRun:
  """One run, as far as its folder says.

  Attributes:
    name: unique in the report.
    path: of its folder.
    config: flat; fields that an earlier version lacked have their defaults.
    layer_list: one word a layer, first layer first.
    train, validation: the lines of metrics.jsonl of this split, a column a metric; NaN where a line lacks it.
    outcome, environment, initial_weights: empty where there is no such file yet.
    fingerprint: of the data, where data.json or a diagnosis names it.
    diagnostics: the lines of diagnostics.jsonl.
    diagnosis: of its latest diagnosed checkpoint.
    changes: the lines of changes.jsonl.
    parameter_sizes: name -> numbers stored, of the tensors in parameters.txt.
    corpora: corpus -> its metrics, of the newest evaluation on several.
    problems: what could not be read, in words.
  """

  name: str
  path: Path
  config: Mapping[str, Any]
  layer_list: Sequence[str] = ()
  train: pd.DataFrame = dataclasses.field(default_factory=_no_metrics)
  validation: pd.DataFrame = dataclasses.field(default_factory=_no_metrics)
  outcome: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  initial_weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fingerprint: str | None = None
  diagnostics: Sequence[Mapping[str, Any]] = ()
  diagnosis: ModelDiagnosis | None = None
  changes: Sequence[Mapping[str, Any]] = ()
  parameter_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  corpora: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  problems: Sequence[str] = ()

  @property
  def placement(self) -> str:
    return self.config["model.placement"]

  @property
  def placement_table(self) -> placement_lib.Table | None:
    """The parsed placement; None where this version can't parse it."""
    try:
      return placement_lib.parse(self.placement, self.num_layers)
    except InputError:
      return None

  @property
  def of_pairs(self) -> bool:
    """Whether its loss is one over pairs of answers: nats a pair, and neither perplexity nor bits a byte."""
    return self.config.get("preference.loss", "none") != "none"

  @property
  def num_layers(self) -> int:
    return self.config["model.num_layers"]

  @property
  def num_steps(self) -> int:
    return self.config["train.num_steps"]

  @property
  def step(self) -> int:
    """The last step in its metrics; 0 before the first."""
    last_steps = [int(lines["step"].iloc[-1]) for lines in (self.train, self.validation) if len(lines)]
    return max(last_steps, default=0)

  @property
  def diverged(self) -> bool:
    return bool(self.outcome.get("diverged")) or self.outcome.get("status") in ("diverged", "non_finite")

  @property
  def status(self) -> str:
    """`finished`, `diverged`, …; a run without an outcome is still training, or was killed."""
    status = str(self.outcome.get("status", "running or killed"))
    if status == "finished" and self.diverged:
      return "finished, diverged"
    return status

  @property
  def packages(self) -> Mapping[str, Any]:
    """Package -> its version, of the process that trained it last."""
    return as_mapping(self.environment.get("packages"))

  @property
  def devices(self) -> list[str]:
    """The kind of each device, `gpu:NVIDIA H100`, one entry a device."""
    devices = self.environment.get("devices")
    return [str(device) for device in devices] if isinstance(devices, list) else []

  @property
  def final_loss(self) -> float | None:
    """Validation loss after the last step of its budget, in nats a token, or a pair where it is `of_pairs`; None before
    it, or where it is not finite."""
    return self.at_end("loss")

  def at_end(self, name: str) -> float | None:
    """A metric of the validation after the last step of its budget; None before it, or where it is not finite."""
    if name not in self.validation:
      return None
    found = self.validation.loc[self.validation["step"] == self.num_steps, name]
    if found.empty:
      return None
    value = float(found.iloc[-1])
    return value if math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Material:
  """All that a report is made from.

  Attributes:
    study: the plan of the study that the runs belong to, if they do.
    runs: those that could be read.
    problems: of runs that are left out, in words.
    not_started: names of planned runs that do not exist yet.
    search: the search that the study tries the best candidates of again, if it does.
  """

  study: StudyPlan | None
  runs: Sequence[ReportedRun]
  problems: Sequence[str]
  not_started: Sequence[str] = ()
  search: SearchRecord | None = None


def load(workdirs: Sequence[str], *, begun: bool = True) -> Material:
  """Reads what the folders hold: each is a run, a study, a search, or a folder with some of them inside.

  Args:
    workdirs: the folders.
    begun: reject studies of which no run has begun.

  Raises:
    InputError: a folder holds none of them, a study is damaged, no run can be read, or (`begun`) there is none yet.
  """
  found = [_find(local_path(workdir).absolute()) for workdir in workdirs]
  paths = list(dict.fromkeys(path for one in found for path in one.paths))
  studies = {path: plan for one in found for path, plan in one.studies.items()}
  runs, problems = [], []
  for name, path in zip(unique_names(paths), paths, strict=True):
    try:
      runs.append(read_run(name, path))
    except InputError as error:
      problems.append(str(error))
  not_started = {path: name for one in found for path, name in one.not_started.items()}
  if not runs and (problems or begun):
    raise InputError("; ".join(problems) or f"workdir={workdirs[0]}: no run of the study has started yet")
  # Several studies, or runs beside one, are no study: their axes are not those of all runs.
  in_studies = sum(len(one.paths) for one in found if one.studies)
  is_one_study = len(studies) == 1 and in_studies == len(paths)
  study = next(iter(studies.values())) if is_one_study else None
  searches = [one.search for one in found if one.search is not None]
  search = searches[0] if is_one_study and searches else None
  return Material(study, runs, problems, list(not_started.values()), search)


class _Found(NamedTuple):
  """What a folder holds.

  Attributes:
    paths: of the runs.
    studies: path -> plan of the studies.
    not_started: path -> name of planned runs that do not exist yet. Runs of two studies may have one name.
    search: what the search saw whose finals these runs are.
  """

  paths: Sequence[Path]
  studies: Mapping[Path, StudyPlan]
  not_started: Mapping[Path, str]
  search: SearchRecord | None = None


def _find(path: Path) -> _Found:
  """The runs in a folder: itself, those of a study or a search, or those of all such folders inside it."""
  if RunFolder(path).has_run:
    return _Found([path], {}, {})
  if (path / SEARCH_FILE).is_file():
    if not (path / FINALS_FOLDER / STUDY_FILE).is_file():
      raise InputError(
        f"workdir={path}: holds a search whose best candidates were not tried again yet; run its command to the end, "
        "or report on its candidates/"
      )
    return _find(path / FINALS_FOLDER)._replace(search=read_search(path))
  if (path / STUDY_FILE).is_file():
    plan = read_study_plan(path / STUDY_FILE)
    planned = {name: path / RUNS_FOLDER / name for name in plan.planned}
    begun = {name: folder for name, folder in planned.items() if RunFolder(folder).has_run}
    not_started = {folder: name for name, folder in planned.items() if name not in begun}
    return _Found(list(begun.values()), {path: plan}, not_started)
  inside = [_find(place) for place in _places_inside(path, DEEPEST)]
  if not inside:
    raise InputError(
      f"workdir={path}: holds neither a run ({folder_lib.CONFIG}) nor a study ({STUDY_FILE}) nor folders of them; give "
      "the folder of one"
    )
  studies: dict[Path, StudyPlan] = {}
  not_started: dict[Path, str] = {}
  for one in inside:
    studies.update(one.studies)
    not_started.update(one.not_started)
  paths = [run for one in inside for run in one.paths]
  search = inside[0].search if len(inside) == 1 else None
  return _Found(paths, studies, not_started, search)


def _places_inside(path: Path, levels: int) -> list[Path]:
  """The folders of runs, studies and searches in a folder and, down to so many levels, in its other folders."""
  places = []
  for child in _children(path):
    if _holds_runs(child):
      places.append(child)
    elif levels > 1 and not (child / SEARCH_FILE).is_file():  # an unfinished search's candidates are no runs to compare
      places += _places_inside(child, levels - 1)
  return places


def _holds_runs(path: Path) -> bool:
  """Whether a folder is that of a run, a study, or a search that has tried its best candidates again."""
  of_study = (path / STUDY_FILE).is_file()
  of_search = (path / SEARCH_FILE).is_file() and (path / FINALS_FOLDER / STUDY_FILE).is_file()
  return RunFolder(path).has_run or of_study or of_search


def _children(path: Path) -> list[Path]:
  """The folders in a folder, sorted; none where it can't be read."""
  try:
    return sorted(child for child in path.iterdir() if child.is_dir())
  except OSError:
    return []


def unique_names(paths: Sequence[Path]) -> list[str]:
  """The shortest ends of the paths that tell them apart."""
  longest = max((len(path.parts) for path in paths), default=0)
  for length in range(1, longest + 1):
    names = ["/".join(path.parts[-length:]) for path in paths]
    if len(set(names)) == len(names):
      return names
  return [str(path) for path in paths]


def read_run(name: str, path: Path) -> ReportedRun:
  """Reads one run's folder.

  Args:
    name: what the report calls it.
    path: of the folder.

  Raises:
    InputError: its config can't be read.
  """
  stored_config = read_json(path / folder_lib.CONFIG)
  config = {field: known.default for field, known in FIELDS.items()} | stored_config
  for field in NEEDED_FIELDS:
    if not FIELDS[field].admits(config[field]):
      raise InputError(f"{path / folder_lib.CONFIG}: damaged ({field} is {config[field]!r}); the run is left out")

  files = _TolerantReader(path)
  environment = files.facts(folder_lib.ENVIRONMENT)
  unknown = [f"{field}={value!r}" for field, value in stored_config.items() if field not in FIELDS]
  if unknown:
    files.problems.append(
      f"{path / folder_lib.CONFIG}: written by {_written_by(environment)}; this version ({VERSION}) does not know "
      f"{', '.join(unknown)}, and can't tell whether the run is comparable with runs that lack it"
    )
  metrics = files.read(folder_lib.METRICS, read_metrics, [])
  diagnosis = files.read("", newest_diagnosis, None)
  fingerprint = files.facts(folder_lib.DATA).get("fingerprint")
  if not fingerprint and diagnosis:
    fingerprint = diagnosis.fingerprint
  return ReportedRun(
    name=name,
    path=path,
    config=config,
    layer_list=files.read(folder_lib.PLACEMENT, Path.read_text, "").split(),
    train=files.read("", lambda _: _split(metrics, "train"), _no_metrics()),
    validation=files.read("", lambda _: _split(metrics, "validation"), _no_metrics()),
    outcome=files.facts(folder_lib.OUTCOME),
    environment=environment,
    initial_weights=files.facts(folder_lib.INITIAL_WEIGHTS),
    fingerprint=fingerprint,
    diagnostics=files.read(folder_lib.DIAGNOSTICS, _read_steps, []),
    diagnosis=diagnosis,
    changes=files.read(folder_lib.CHANGES, _read_steps, []),
    corpora=files.read(folder_lib.CORPORA, _read_corpora, {}),
    parameter_sizes=files.read(folder_lib.PARAMETERS, _read_parameter_sizes, {}),
    problems=files.problems,
  )


class _TolerantReader:
  """Reads the files of one folder and collects what could not be read.

  Attributes:
    problems: one for each file that could not be read, in words.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    self.problems: list[str] = []

  def read(self, name: str, read: Callable[[Path], T], otherwise: T) -> T:
    """`read(path)` of the file of this name, or `otherwise` if it is damaged."""
    try:
      return read(self.folder / name)
    except DAMAGE as error:
      self.problems.append(reason(error))
      return otherwise

  def facts(self, name: str) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not (self.folder / name).is_file():
      return {}
    return self.read(name, read_json, {})


def _written_by(environment: Mapping[str, Any]) -> str:
  if environment.get("version"):
    return f"version {environment['version']}"
  if environment.get("git"):
    return f"revision {environment['git']}"
  return "another version"


def _read_steps(path: Path) -> list[dict[str, Any]]:
  return read_json_lines(path, STEP_LINE)


def _read_corpora(path: Path) -> dict[str, dict[str, Any]]:
  """The metrics of each corpus of the newest evaluation in a run's corpora/; empty where there is none."""
  steps = [int(file.parent.name) for file in path.glob(f"*/{folder_lib.CORPORA_FILE}") if file.parent.name.isdecimal()]
  if not steps:
    return {}
  content = read_json(path / str(max(steps)) / folder_lib.CORPORA_FILE, {"corpora": OBJECT})
  kinds = {"loss": NUMBER, "bits_per_byte": NUMBER, "fingerprint": TEXT.optional(), "tokens": NUMBER.optional()}
  for source, metrics in content["corpora"].items():
    check_kinds(metrics, f"{path}: {source}", kinds)
  return content["corpora"]


def _read_parameter_sizes(path: Path) -> dict[str, int]:
  """The tensors of parameters.txt and how many numbers each has; empty where there is no file."""
  if not path.is_file():
    return {}
  sizes = {}
  for line in read_regular(path, LARGEST_FACTS).decode().splitlines()[1:]:
    columns = re.split(r"\s{2,}", line.strip())
    if len(columns) > 2:  # the last two lines are sums
      sizes[columns[0]] = int(columns[-1].replace(",", ""))
  return sizes


def _split(lines: Sequence[Mapping[str, Any]], split: str) -> pd.DataFrame:
  """The lines of one split as numbers. Metrics that are not finite stand in the file by name, as "nan"."""
  own = pd.DataFrame([line for line in lines if line["split"] == split], dtype=object)
  return _no_metrics() if own.empty else own.drop(columns="split").astype(float)

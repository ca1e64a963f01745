"""Tasks of the lm-evaluation-harness: loading them, running a model on them, and reporting the results.

Importing this module imports the harness, which takes seconds.
"""

import difflib
import importlib.metadata
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mixln_jax.errors import InputError, one_line
from mixln_jax.files import local_path
from mixln_jax.inference.harness import HarnessModel, TaskManager, evaluate
from mixln_jax.text import aligned

# The paper's table 2 (arXiv 2412.13795). It states neither the metric nor the number of shots. Its values for
# OpenBookQA (11.6 to 18.8, below the 25 of guessing) are accuracy without length normalisation; the harness's default
# is no shots.
PAPER = "mixln"
PAPER_TASKS = ("mmlu", "boolq", "arc_easy", "piqa", "hellaswag", "openbookqa", "winogrande")
PAPER_METRIC, PAPER_SHOTS = "acc", 0
FEWSHOT_SEED, RANDOM_SEED, NUMPY_SEED = 1234, 0, 1234  # the harness's own


class Tasks:
  """Loaded tasks with their documents."""

  def __init__(self, names: str):
    """
    Args:
      names: names of the harness's tasks (fetched over the network), paths of task files (.yaml) or of folders of
        them, separated by commas; or `mixln` for the paper's seven tasks.

    Raises:
      InputError: a task is unknown or can't be loaded.
    """
    self.names = names
    self.paper = names.strip() == PAPER
    words = PAPER_TASKS if self.paper else [word.strip() for word in names.split(",") if word.strip()]
    if not words:
      raise InputError(f"tasks={names!r}: names no task")
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)  # noqa: NPY002 (the tasks' own code uses this generator)
    self._loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    by_name = None
    for word in words:
      if _is_path(word):
        manager, specs = _local(word)
      else:
        by_name = by_name or TaskManager()  # it reads all the harness's task files, which takes seconds
        manager, specs = by_name, [_known(word, by_name)]
      for part, content in _load(manager, specs, word).items():
        self._loaded[part] |= content

  def __len__(self) -> int:
    return len(self._loaded["tasks"])

  def __iter__(self) -> Iterator[str]:
    return iter(self._loaded["tasks"])

  def run(
    self, model: HarnessModel, *, limit: int | None = None, num_fewshot: int | None = None, only: str | None = None
  ) -> dict[str, dict[str, Any]]:
    """Runs the model on the tasks.

    Args:
      model: the model.
      limit: use only this many of the first documents of each task.
      num_fewshot: solved examples before each question; by default the task's own number.
      only: run only this task.

    Returns:
      Name of a task or group -> `num_documents`, `num_fewshot`, `version`, and `metrics`: name -> `value` and `stderr`.
    """
    loaded: Any = self._loaded
    if only is not None:
      loaded = {"tasks": {only: loaded["tasks"][only]}, "groups": {}, "group_map": {}}
    shots = PAPER_SHOTS if self.paper and num_fewshot is None else num_fewshot
    for task in loaded["tasks"].values():
      task.set_config("num_fewshot", (task.get_config("num_fewshot") or 0) if shots is None else shots)
      task.set_fewshot_seed(FEWSHOT_SEED)
    results: Any = evaluate(model, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
    return {name: _described(name, values, results) for name, values in results["results"].items()}


def _described(name: str, values: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
  """The harness's results for one task or group. The keys of `values` are like `acc,none` and `acc_stderr,none`."""
  metrics: dict[str, Any] = {}
  for key, value in values.items():
    metric, _, filtered = key.partition(",")
    if not filtered or not isinstance(value, int | float) or metric.endswith("_stderr"):
      continue
    error = values.get(f"{metric}_stderr,{filtered}")
    shown = metric if filtered == "none" else f"{metric} ({filtered})"
    stderr = float(error) if isinstance(error, int | float) else None  # it may be "N/A"
    metrics[shown] = {"value": float(value), "stderr": stderr}
  counts = results["n-samples"]
  members = [name]
  if name not in counts:
    members = [one for one in results["group_subtasks"].get(name, ()) if one in counts]
  return {
    "num_documents": sum(counts[one]["effective"] for one in members),
    "num_fewshot": results["n-shot"].get(name),
    "version": results["versions"].get(name),
    "metrics": metrics,
  }


def main_metric(described: Mapping[str, Any]) -> float:
  """A task's main result: its accuracy if it has one, else its first metric."""
  metrics = described["metrics"]
  return metrics.get(PAPER_METRIC, next(iter(metrics.values())))["value"]


def report(tasks: Tasks, results: Mapping[str, Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
  """The results and how they were measured, for JSON; for the paper's tasks also their `mean`. No path is included."""
  content = {**facts, "harness": f"lm_eval {importlib.metadata.version('lm_eval')}"}
  if tasks.paper:
    content["mean"] = float(np.mean([main_metric(results[name]) for name in PAPER_TASKS]))
  return {**content, "tasks": dict(results)}


def table(result: Mapping[str, Any]) -> str:
  """The report as a table, one metric per line."""
  rows = [("task", "documents", "shots", "metric", "value", "")]
  for name, one in result["tasks"].items():
    shots = "" if one["num_fewshot"] is None else str(one["num_fewshot"])
    for metric, number in one["metrics"].items():
      error = "" if number["stderr"] is None else f"± {number['stderr']:.4f}"
      rows.append((name, f"{one['num_documents']:,}", shots, metric, f"{number['value']:.4f}", error))
  if "mean" in result:
    rows.append((f"mean of the {len(PAPER_TASKS)}", "", "", PAPER_METRIC, f"{result['mean']:.4f}", ""))
  return "\n".join(aligned(rows, right=(1, 2, 4)))


def _is_path(word: str) -> bool:
  return word.endswith((".yaml", ".yml")) or "/" in word or local_path(word).is_dir()


def _local(word: str) -> tuple[TaskManager, list[str]]:
  """The harness's manager and task specifications for a task file, or for all tasks of a folder."""
  path = local_path(word)
  if path.is_dir():
    manager = TaskManager(include_path=str(path), include_defaults=False)
    if not manager.all_subtasks:
      raise InputError(f"tasks={word}: the folder has no task file (.yaml with `task:`)")
    return manager, manager.all_subtasks
  if not path.is_file():
    raise InputError(f"tasks={word}: no such file or folder; give a task's name, its .yaml, or a folder of them")
  return TaskManager(include_path=str(path.parent), include_defaults=False), [str(path)]


def _known(word: str, manager: TaskManager) -> str:
  if word not in manager.all_tasks:
    close = difflib.get_close_matches(word, manager.all_tasks, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(
      f"tasks={word}: the harness has no such task; {hint}`lm_eval ls tasks` lists all; a file ends in .yaml"
    )
  return word


def _load(manager: TaskManager, specs: list[str], word: str) -> Mapping[str, Any]:
  try:
    return manager.load(specs)
  except Exception as error:  # task files may contain anything, and their documents come over the network
    reason = one_line(f"{type(error).__name__}: {error}")
    raise InputError(
      f"tasks={word}: can't be loaded ({reason}); a task by name fetches its documents from the Hugging Face hub, a "
      "task file names them under dataset_path and data_files"
    ) from error

"""The runs in a folder at a glance: how each stands, and which can be compared."""

import dataclasses
import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixln_jax.reporting.groups import (
  LEARNING_RATE_FIELD,
  PLACEMENT_FIELD,
  SEED_FIELDS,
  changes_the_run,
  differing_fields,
  grouped,
  show,
  value_of,
  words,
)
from mixln_jax.reporting.loading import Material, ReportedRun
from mixln_jax.runs.folder import LOCK
from mixln_jax.runs.lock import Liveness, is_held
from mixln_jax.text import aligned

FREE_FIELDS = (PLACEMENT_FIELD, LEARNING_RATE_FIELD, *SEED_FIELDS)  # runs that differ in these alone are comparable
HEADERS = ("run", "placement", "status", "step", "best loss", "age", "size", "set")


@dataclasses.dataclass(frozen=True)
class Listing:
  """What is shown.

  Attributes:
    lines: a table.
    sets: what the letters of comparable runs stand for.
  """

  lines: Sequence[str]
  sets: Sequence[str]


def listing(material: Material) -> Listing:
  """A line for each run, and which are comparable: a letter for runs that differ in placement, rate and seeds alone."""
  runs = material.runs
  fields = [field for field in differing_fields(runs) if changes_the_run(field) and field not in FREE_FIELDS]

  def settings(run: ReportedRun) -> tuple[Any, ...]:
    return (*(value_of(run, field) for field in fields), run.fingerprint or "unknown data")

  by_settings = grouped(runs, settings)
  letters = {values: _letter(number) for number, values in enumerate(by_settings)}
  liveness = Liveness()
  rows = [_row(run, letters[settings(run)], liveness) for run in runs]
  sets = []
  for values, members in by_settings.items():
    told = words(dict(zip(fields, values, strict=False)))
    told.append(f"data {str(values[-1])[:12]}")
    count = "1 run" if len(members) == 1 else f"{len(members)} runs"
    sets.append(f"{letters[values]}: {count}, {', '.join(told)}")
  return Listing(aligned([HEADERS, *rows], right=(3, 4, 5, 6)), sets)


def _letter(number: int) -> str:
  """A, B, …, Z, A1, B1, …"""
  return chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else "")


def _row(run: ReportedRun, letter: str, liveness: Liveness) -> tuple[str, ...]:
  losses = run.validation["loss"].dropna()
  best = f"{losses.min():.4f}" if len(losses) else "–"
  status = run.status
  if not run.outcome:
    status = "training" if is_held(run.path / LOCK, liveness) else "killed or waiting"
  size, newest = _size_and_time(run.path)
  return (
    run.name,
    show(run.placement),
    status,
    f"{run.step}/{run.num_steps}",
    best,
    _age(time.time() - newest),
    _size(size),
    letter,
  )


def _size_and_time(folder: Path) -> tuple[int, float]:
  """Bytes of the files in a folder, and when the newest of them was written."""
  size, newest = 0, 0.0
  for path in folder.rglob("*"):
    try:
      status = path.stat()
    except OSError:  # it was removed in between
      continue
    if path.is_file():
      size, newest = size + status.st_size, max(newest, status.st_mtime)
  return size, newest


def _size(size: int) -> str:
  value, unit = float(size), "B"
  for larger in ("kB", "MB", "GB", "TB"):
    if value < 1000:
      break
    value, unit = value / 1000, larger
  return f"{value:.0f} {unit}"


def _age(seconds: float) -> str:
  if seconds < 120:
    return f"{max(0, round(seconds))} s"
  if seconds < 2 * 3600:
    return f"{round(seconds / 60)} min"
  if seconds < 2 * 86400:
    return f"{round(seconds / 3600)} h"
  return f"{datetime.timedelta(seconds=seconds).days} d"

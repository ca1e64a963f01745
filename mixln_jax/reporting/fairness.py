"""Whether a comparison is fair: what differs besides what was meant to, said loudly."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from mixln_jax import placement as placement_lib
from mixln_jax.errors import InputError
from mixln_jax.reporting.comparison import (
  LEARNING_RATE,
  PLACEMENT,
  SEEDS,
  Group,
  changes_the_run,
  differing_fields,
  pair_key,
  show,
  sort_key,
  values_of,
)
from mixln_jax.reporting.loading import Material, Run, as_mapping

DEFAULT_AXES = (PLACEMENT, *SEEDS, LEARNING_RATE)
Level = Literal["unfair", "caution", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that a reader of the comparison must know. `unfair`: the runs are not what a fair comparison needs."""

  level: Level
  text: str


def axes_of(material: Material) -> tuple[str, ...]:
  """The fields in which the runs may differ."""
  return tuple(material.study.axes) if material.study else DEFAULT_AXES


def find(material: Material, groups: Sequence[Group]) -> list[Finding]:
  """All findings, the gravest first."""
  runs, axes = material.runs, axes_of(material)
  found = [
    *_undeclared(runs, axes),
    *_not_as_planned(material),
    *_data(runs),
    *_initial_weights(runs),
    *_twice(runs, groups),
    *_diagnosed_otherwise(runs),
    *_not_crossed(runs, groups),
    *_unequal_seeds(runs, groups),
    *_unfinished(material),
    *_changed(runs),
    *_harmless(runs),
    *_environments(runs),
  ]
  order = ("unfair", "caution", "note")
  return sorted(found, key=lambda finding: order.index(finding.level))


def _names(runs: Sequence[Run], most: int = 4) -> str:
  shown = ", ".join(run.name for run in runs[:most])
  return f"{shown} and {len(runs) - most} more" if len(runs) > most else shown


def _groups(labels: Sequence[str], most: int = 4) -> str:
  """Labels hold commas."""
  shown = " and in ".join(labels[:most])
  return f"{shown} and in {len(labels) - most} more" if len(labels) > most else shown


def _by_value(runs: Sequence[Run], field: str) -> str:
  """`0.1 in a, b; 0 in c`."""
  values = values_of(runs, field)
  return "; ".join(
    f"{show(value)} in {_names([run for run, own in zip(runs, values, strict=True) if own == value])}"
    for value in dict.fromkeys(values)
  )


def _undeclared(runs: Sequence[Run], axes: Sequence[str]) -> Iterator[Finding]:
  for field in differing_fields(runs):
    if changes_the_run(field) and field not in axes:
      text = f"{field} differs and is no axis of the comparison: {_by_value(runs, field)}"
      yield Finding("unfair", f"{text}. Runs that differ in it are not compared with each other below")


def _not_as_planned(material: Material) -> Iterator[Finding]:
  if not material.study:
    return
  for run in material.runs:
    planned = {**material.study.base, **material.study.planned.get(run.name, {})}
    wrong = [
      field
      for field, value in planned.items()
      if changes_the_run(field) and field in run.config and run.config[field] != value
    ]
    if wrong:
      differences = ", ".join(f"{f}={show(run.config[f])}, planned {show(planned[f])}" for f in wrong)
      yield Finding("unfair", f"{run.name} is not the run that the study planned: {differences}")


def _data(runs: Sequence[Run]) -> Iterator[Finding]:
  prints = dict.fromkeys(run.fingerprint for run in runs if run.fingerprint is not None)
  if len(prints) > 1:
    split = [f"{value[:12]} in {_names([run for run in runs if run.fingerprint == value])}" for value in prints]
    yield Finding("unfair", f"the runs were trained on different data (fingerprints): {'; '.join(split)}")
  unknown = [run for run in runs if run.fingerprint is None]
  if unknown:
    names = _names(unknown)
    yield Finding("caution", f"which data they were trained on is not known yet of {names}: no checkpoint says so")


def _drawn_alike(run: Run, other: Run) -> bool:
  """Whether two placements draw the matrices of their layers with the same deviations."""

  def deviations(one: Run) -> list[Any]:
    table = placement_lib.parse(one.placement, one.config["model.num_layers"])
    rows = [row for name in placement_lib.SUBLAYERS for row in table.rows(name)]
    return [(row.xavier, row.branch_gain, row.output_deviation) for row in rows]

  try:
    return deviations(run) == deviations(other)
  except InputError:  # a placement of another version
    return True


def _matrices(run: Run) -> dict[str, int]:
  sums = as_mapping(run.initial_weights.get("bit_sums"))
  names = {"embedding", "head", "query", "key", "value", "output", "gate", "up", "down"}
  return {name: total for name, total in sums.items() if name.split("/")[-1] in names}


def _starts(runs: Sequence[Run]) -> list[list[Run]]:
  """Runs of one shape and one seed, which must start from the same numbers; those of another run, where it is one."""
  starts: dict[tuple[Any, ...], list[Run]] = {}
  for run in runs:
    shape = [(name, str(value)) for name, value in sorted(run.config.items()) if name.startswith("model.")]
    start = [str(run.config.get(field)) for field in ("train.start_from", "train.start_checkpoint")]
    key = (run.config["seed"], *start, *(field for field in shape if field[0] != PLACEMENT))
    starts.setdefault(key, []).append(run)
  return list(starts.values())


def _initial_weights(runs: Sequence[Run]) -> Iterator[Finding]:
  """What placements share must start from the same numbers, but for what a placement draws otherwise by design."""
  if without := [run for run in runs if not _matrices(run)]:
    yield Finding("caution", f"the initial weights are not known of {_names(without)} (no initial_weights.json)")
  by_design: set[str] = set()
  for first, *others in _starts([run for run in runs if _matrices(run)]):
    mine = _matrices(first)
    for other in others:
      unequal = [name for name, total in _matrices(other).items() if name in mine and mine[name] != total]
      if not _drawn_alike(first, other):
        by_design |= {other.placement} if any(name.startswith("layers/") for name in unequal) else set()
        unequal = [name for name in unequal if not name.startswith("layers/")]
      if unequal:
        text = f"{first.name} and {other.name} have the same seed but start from other numbers in {', '.join(unequal)}"
        yield Finding("unfair", text)
  if by_design:
    names = ", ".join(sorted(by_design))
    yield Finding("note", f"the layers' matrices start from other deviations than the first run's by design: {names}")


def _twice(runs: Sequence[Run], groups: Sequence[Group]) -> Iterator[Finding]:
  for group in groups:
    by_seeds: dict[tuple[Any, ...], list[Run]] = {}
    for run in (runs[index] for index in group.runs):
      by_seeds.setdefault(pair_key(run), []).append(run)
    for same in by_seeds.values():
      if len(same) > 1:
        yield Finding("caution", f"{_names(same)} are one run made again; only the first counts in means and pairs")


def _diagnosed_otherwise(runs: Sequence[Run]) -> Iterator[Finding]:
  """Figures of layers compare each run's newest diagnosis: of one step, or each run's last, and of one sample."""
  diagnosed = [(run, run.diagnosis) for run in runs if run.diagnosis]
  kinds: dict[tuple[Any, ...], list[Run]] = {}
  for run, diagnosis in diagnosed:
    step = "last step" if diagnosis.step == run.num_steps else f"step {diagnosis.step}"
    kinds.setdefault((step, diagnosis.tokens), []).append(run)
  if len(kinds) > 1:
    listed = [
      f"{step}, {'an unknown number of' if tokens is None else f'{tokens:,}'} tokens in {_names(some)}"
      for (step, tokens), some in kinds.items()
    ]
    text = f"the layers of the trained models were not diagnosed at one step on one sample ({'; '.join(listed)})"
    yield Finding("unfair", f"{text}; diagnose all at the same --step and --tokens")
  old = [f"{run.name} (step {one.step}, trained to {run.step})" for run, one in diagnosed if one.step < run.step]
  if old:
    yield Finding("caution", f"diagnosed before their last step: {', '.join(old)}")


def _not_crossed(runs: Sequence[Run], groups: Sequence[Group]) -> Iterator[Finding]:
  """Placements that were not run at the same settings."""
  for field in dict.fromkeys(field for group in groups for field in group.setting):
    values: dict[str, set[Any]] = {}
    for group in groups:
      own = values_of((runs[index] for index in group.runs), field)
      values.setdefault(group.placement, set()).update(own)
    if len({frozenset(own) for own in values.values()}) > 1:
      listed = [f"{name}: {', '.join(map(show, sorted(own, key=sort_key)))}" for name, own in values.items()]
      text = f"{field} was not the same set for each placement ({'; '.join(listed)}); only equal values are compared"
      yield Finding("caution", text)


def _unequal_seeds(runs: Sequence[Run], groups: Sequence[Group]) -> Iterator[Finding]:
  """Groups that were not run with the same seeds: their means are over different seeds."""
  by_seeds: dict[frozenset[tuple[Any, ...]], list[str]] = {}
  for group in groups:
    by_seeds.setdefault(frozenset(pair_key(runs[index]) for index in group.runs), []).append(group.label)
  if len(by_seeds) > 1:
    several = len({key[1:] for keys in by_seeds for key in keys}) > 1
    word = lambda key: "/".join(map(show, key if several else key[:1]))  # noqa: E731
    listed = [
      f"{', '.join(map(word, sorted(keys, key=lambda key: tuple(map(sort_key, key)))))} in {_groups(labels)}"
      for keys, labels in by_seeds.items()
    ]
    name = " / ".join(SEEDS) if several else SEEDS[0]
    text = f"{name} was not the same set for each group ({'; '.join(listed)})"
    yield Finding("caution", f"{text}; means are over different seeds, differences only over equal ones")


def _unfinished(material: Material) -> Iterator[Finding]:
  waiting = [run for run in material.runs if run.final_loss is None]
  if waiting:
    listed = ", ".join(f"{run.name} ({run.status}, step {run.step} of {run.num_steps})" for run in waiting)
    yield Finding("caution", f"not counted, since they have no evaluation at their last step: {listed}")
  if material.not_started:
    yield Finding("caution", f"planned but not started: {', '.join(material.not_started)}")
  diverged = [run for run in material.runs if run.diverged]
  if diverged:
    yield Finding("caution", f"diverged, and counted where they reached the last step: {_names(diverged, most=12)}")


def _changed(runs: Sequence[Run]) -> Iterator[Finding]:
  changed = [run for run in runs if run.changes]
  if changed:
    yield Finding("note", f"went on with a changed config (changes.jsonl): {_names(changed)}")


def _harmless(runs: Sequence[Run]) -> Iterator[Finding]:
  fields = [field for field in differing_fields(runs) if not changes_the_run(field)]
  if fields:
    yield Finding("note", f"fields that don't change what is computed differ: {', '.join(fields)}")


def _environments(runs: Sequence[Run]) -> Iterator[Finding]:
  facts = {
    "code revision": lambda e: e.get("git"),
    "jax version": lambda e: as_mapping(e.get("packages")).get("jax"),
    "devices": lambda e: ", ".join(sorted(set(map(str, e.get("devices") or ())))),
  }
  for name, get in facts.items():
    values = {str(get(run.environment)) for run in runs if run.environment}
    if len(values) > 1:
      yield Finding("caution", f"the {name} was not the same for all runs: {'; '.join(sorted(values))}")

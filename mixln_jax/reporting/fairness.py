"""Whether the runs are comparable: what differs besides what was meant to differ."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from mixln_jax.config import DERIVED, FIELDS
from mixln_jax.placement import SUBLAYERS
from mixln_jax.reporting.groups import (
  LEARNING_RATE_FIELD,
  PLACEMENT_FIELD,
  SEED_FIELDS,
  START_FIELDS,
  Group,
  changes_the_run,
  differing_fields,
  grouped,
  seeds_of,
  show,
  sort_key,
  sort_keys,
  starts_follow_placements,
  value_of,
)
from mixln_jax.reporting.loading import Material, ReportedRun
from mixln_jax.reporting.reading import as_mapping

DEFAULT_AXES = (PLACEMENT_FIELD, *SEED_FIELDS, LEARNING_RATE_FIELD)
Level = Literal["unfair", "caution", "note"]
LEVELS: tuple[Level, ...] = ("unfair", "caution", "note")  # the gravest first

# Parameters that are drawn from the seed, by the last part of their names. All others (gains, biases, learned scalars)
# start from constants that a placement chooses, and hyper-connections draw matrices of a size that it chooses, so that
# a difference there says nothing. The names are stated again, because a report reads folders and builds no model; a
# test compares them with the model's own table.
DRAWN = (
  *("embedding", "head", "query", "key", "value", "output", "gate", "up", "down"),
  *("position_embedding", "token_type_embedding", "head_dense"),  # of encoders
)
IN_LAYERS = "layers/"  # what the names of parameters in layers begin with


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that a reader of the comparison must know. `unfair`: the runs are not comparable, because `text`."""

  level: Level
  text: str


def axes_of(material: Material) -> tuple[str, ...]:
  """The fields in which the runs may differ."""
  return tuple(material.study.axes) if material.study else DEFAULT_AXES


def find(material: Material, groups: Sequence[Group], compared: Sequence[Group] | None = None) -> list[Finding]:
  """All findings, the gravest first.

  Args:
    material: what was read.
    groups: of its runs.
    compared: the groups of which the headline is made, each placement at its best learning rate; by default all. The
      other rates were tried to find it, mostly with fewer seeds.
  """
  runs = material.runs
  compared = groups if compared is None else compared
  found = [
    *_undeclared(runs, axes_of(material)),
    *_other_starts(runs),
    *_not_as_planned(material),
    *_data(runs, axes_of(material)),
    *_initial_weights(runs),
    *_repeated(runs, groups),
    *_diagnosed_differently(runs),
    *_not_crossed(runs, groups),
    *_unequal_seeds(runs, compared),
    *_unfinished(material),
    *_changed(runs),
    *_harmless(runs),
    *_code(runs),
    *_programs(runs, groups),
    *_environments(runs),
  ]
  return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def find_of_entries(runs: Sequence[ReportedRun]) -> list[Finding]:
  """What is to be known of runs whose configs were held against a track: their initial numbers, code and machines."""
  found = [*_initial_weights(runs), *_code(runs), *_environments(runs)]
  return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _names(runs: Sequence[ReportedRun], most: int = 4) -> str:
  return _some([run.name for run in runs], most)


def _some(names: Sequence[str], most: int = 4) -> str:
  shown = ", ".join(names[:most])
  return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _label_list(labels: Sequence[str], most: int = 4) -> str:
  """Labels contain commas, so `and` separates them."""
  shown = " and in ".join(labels[:most])
  return f"{shown} and in {len(labels) - most} more" if len(labels) > most else shown


def _listed(runs_by_value: Mapping[Any, Sequence[ReportedRun]], words: Callable[[Any], str] = show) -> str:
  """`0.1 in a, b; 0 in c`."""
  return "; ".join(f"{words(value)} in {_names(runs)}" for value, runs in runs_by_value.items())


def _undeclared(runs: Sequence[ReportedRun], axes: Sequence[str]) -> Iterator[Finding]:
  declared = set(axes)
  if starts_follow_placements(runs):
    declared.update(START_FIELDS)
  for field in differing_fields(runs):
    if changes_the_run(field) and field not in declared and not _all_follow(runs, field):
      by_value = grouped(runs, lambda run, field=field: value_of(run, field))
      text = f"{field} differs and is not an axis of the comparison: {_listed(by_value)}"
      yield Finding("unfair", f"{text}. Runs that differ in it are not compared with each other below")


def _all_follow(runs: Sequence[ReportedRun], field: str) -> bool:
  """Whether other fields decided this one in all runs: where those are equal it has one value."""
  if not all(_follows(run, field) for run in runs):
    return False
  free = {*DERIVED, PLACEMENT_FIELD, LEARNING_RATE_FIELD, *SEED_FIELDS}
  others = [name for name in differing_fields(runs) if changes_the_run(name) and name not in free]
  alike = grouped(runs, lambda run: tuple(value_of(run, name) for name in others))
  return all(len({value_of(run, field) for run in some}) == 1 for some in alike.values())


def _follows(run: ReportedRun, field: str) -> bool:
  """Whether other fields decided this one before the run began, or it is as if left out."""
  if field not in DERIVED:
    return False
  left_out, decided_by = DERIVED[field]
  is_decided = any(value_of(run, decider) != FIELDS[decider].default for decider in decided_by)
  return is_decided or value_of(run, field) == left_out


def _other_starts(runs: Sequence[ReportedRun]) -> Iterator[Finding]:
  """Runs that are tuned from weights of their placement's own."""
  differing = [field for field in START_FIELDS if field in differing_fields(runs)]
  if differing and starts_follow_placements(runs):
    listed = []
    for field in differing:
      by_value = grouped(runs, lambda run, field=field: value_of(run, field))
      listed.append(f"{field}: {_listed(by_value)}")
    text = f"tuned from different weights, each placement and seed from its own ({'; '.join(listed)})"
    yield Finding("caution", f"{text}; how those were trained is part of the difference, and not checked here")


def _not_as_planned(material: Material) -> Iterator[Finding]:
  if not material.study:
    return
  for run in material.runs:
    planned = {**material.study.base, **material.study.planned.get(run.name, {})}
    wrong = []
    for field, value in planned.items():
      is_filled_in = field in DERIVED and value == DERIVED[field].left_out and _follows(run, field)
      if changes_the_run(field) and field in run.config and run.config[field] != value and not is_filled_in:
        wrong.append(f"{field}={show(run.config[field])}, planned {show(value)}")
    if wrong:
      yield Finding("unfair", f"{run.name} is not the run that the study planned: {', '.join(wrong)}")


def _data(runs: Sequence[ReportedRun], axes: Sequence[str]) -> Iterator[Finding]:
  """Runs must have equal data; in a study that varies the data itself, those that are compared with each other."""
  known = [run for run in runs if run.fingerprint is not None]
  varied = [
    field for field in axes if field.startswith("data.") and field not in SEED_FIELDS and changes_the_run(field)
  ]
  for compared in grouped(known, lambda run: tuple(value_of(run, field) for field in varied)).values():
    by_fingerprint = grouped(compared, lambda run: str(run.fingerprint))
    if len(by_fingerprint) > 1:
      listed = _listed(by_fingerprint, lambda fingerprint: fingerprint[:12])
      yield Finding("unfair", f"the runs were trained on different data (fingerprints): {listed}")
  unknown = [run for run in runs if run.fingerprint is None]
  if unknown:
    text = f"the training data of {_names(unknown)} is not known yet"
    yield Finding("caution", f"{text}: neither data.json nor a diagnosis names its fingerprint")


def _start_of(run: ReportedRun) -> tuple[str, ...]:
  """What decides the initial weights, except for the placement: runs where it is equal must start from equal numbers.

  A fine-tuned run starts from the weights of another run, a checkpoint of which is named.
  """
  deciding = ["seed", *START_FIELDS]
  deciding += sorted(field for field in run.config if field.startswith("model.") and field != PLACEMENT_FIELD)
  return tuple(f"{field}={run.config.get(field)}" for field in deciding)


def _drawn_sums(run: ReportedRun) -> dict[str, int]:
  """The sum of bits of each drawn parameter of a run's initial weights."""
  sums = as_mapping(run.initial_weights.get("bit_sums"))
  return {name: total for name, total in sums.items() if name.split("/")[-1] in DRAWN}


def _equally_drawn(run: ReportedRun, other: ReportedRun) -> bool:
  """Whether two placements draw the matrices of their layers with the same standard deviations."""
  ours, theirs = run.placement_table, other.placement_table
  if ours is None or theirs is None:  # of another version: nothing excuses a difference
    return True
  for sublayer in SUBLAYERS:
    for column in ("xavier", "branch_gain", "output_deviation"):
      if (ours.column(sublayer, column) != theirs.column(sublayer, column)).any():
        return False
  return True


def _initial_weights(runs: Sequence[ReportedRun]) -> Iterator[Finding]:
  """Runs must start from equal numbers, except in what their placements draw differently by design."""
  unknown = [run for run in runs if not _drawn_sums(run)]
  if unknown:
    yield Finding("caution", f"the initial weights of {_names(unknown)} are not known (no initial_weights.json)")
  known = [run for run in runs if _drawn_sums(run)]
  by_design: set[str] = set()
  for first, *others in grouped(known, _start_of).values():
    expected = _drawn_sums(first)
    for other in others:
      sums = _drawn_sums(other)
      unequal = [name for name in sums if name in expected and sums[name] != expected[name]]
      in_layers = [name for name in unequal if name.startswith(IN_LAYERS)]
      if in_layers and not _equally_drawn(first, other):
        by_design.add(other.placement)
        unequal = [name for name in unequal if name not in in_layers]
      if unequal:
        names = ", ".join(unequal)
        text = f"{first.name} and {other.name} have the same seed but start from different numbers in {names}"
        yield Finding("unfair", text)
  if by_design:
    names = ", ".join(sorted(by_design))
    text = "by design, these placements draw the layers' matrices with other standard deviations than the first run's"
    yield Finding("note", f"{text}: {names}")


def _repeated(runs: Sequence[ReportedRun], groups: Sequence[Group]) -> Iterator[Finding]:
  repeated = []
  for group in groups:
    members = [runs[index] for index in group.runs]
    repeated += [_names(same) for same in grouped(members, seeds_of).values() if len(same) > 1]
  if repeated:
    each = " each" if len(repeated) > 1 else ""
    listed = "; ".join(repeated[:4]) + (f"; and {len(repeated) - 4} more" if len(repeated) > 4 else "")
    yield Finding("caution", f"{listed} repeat one run{each}; only the first counts in means and pairs")


def _diagnosed_differently(runs: Sequence[ReportedRun]) -> Iterator[Finding]:
  """Figures of layers compare each run's newest diagnosis: all of one step, or each of the last one, on one sample."""
  diagnosed = [(run, run.diagnosis) for run in runs if run.diagnosis]
  by_kind: dict[str, list[ReportedRun]] = {}
  for run, diagnosis in diagnosed:
    step = "last step" if diagnosis.step == run.num_steps else f"step {diagnosis.step}"
    tokens = "an unknown number of" if diagnosis.tokens is None else f"{diagnosis.tokens:,}"
    by_kind.setdefault(f"{step}, {tokens} tokens", []).append(run)
  if len(by_kind) > 1:
    text = f"the trained models were not diagnosed at one step on one sample ({_listed(by_kind)})"
    yield Finding("unfair", f"{text}; diagnose all at the same step, on the same number of tokens")
  early = []
  for run, diagnosis in diagnosed:
    if diagnosis.step < run.step:
      early.append(f"{run.name} (step {diagnosis.step}, trained to {run.step})")
  if early:
    yield Finding("caution", f"diagnosed before their last step: {', '.join(early)}")


def _not_crossed(runs: Sequence[ReportedRun], groups: Sequence[Group]) -> Iterator[Finding]:
  """Placements that were not run at the same settings."""
  fields = dict.fromkeys(field for group in groups for field in group.setting)
  for field in fields:
    values_by_placement: dict[str, set[Any]] = {}
    for group in groups:
      values = values_by_placement.setdefault(group.placement, set())
      values.update(value_of(runs[index], field) for index in group.runs)
    if all(values == values_by_placement[groups[0].placement] for values in values_by_placement.values()):
      continue
    listed = []
    for placement, values in values_by_placement.items():
      listed.append(f"{placement}: {', '.join(show(value) for value in sorted(values, key=sort_key))}")
    text = f"{field} does not have the same values for each placement ({'; '.join(listed)})"
    is_tuned = field == LEARNING_RATE_FIELD
    what_follows = "each stands at its best of them" if is_tuned else "only equal values are compared"
    yield Finding("caution", f"{text}; {what_follows}")


def _unequal_seeds(runs: Sequence[ReportedRun], groups: Sequence[Group]) -> Iterator[Finding]:
  """Groups that were not run with the same seeds: their means are over different seeds."""
  by_seeds = grouped(groups, lambda group: frozenset(seeds_of(runs[index]) for index in group.runs))
  if len(by_seeds) < 2:
    return
  data_seeds = {data_seed for pairs in by_seeds for _, data_seed in pairs}
  fields = SEED_FIELDS if len(data_seeds) > 1 else SEED_FIELDS[:1]
  listed = []
  for pairs, some in by_seeds.items():
    words = []
    for seeds in sorted(pairs, key=sort_keys):
      words.append("/".join(show(seed) for seed in seeds[: len(fields)]))
    listed.append(f"{', '.join(words)} in {_label_list([group.label for group in some])}")
  text = f"{' / '.join(fields)} does not have the same values in each group ({'; '.join(listed)})"
  yield Finding("caution", f"{text}; means are over different seeds, differences only over equal ones")


def _unfinished(material: Material) -> Iterator[Finding]:
  waiting = [run for run in material.runs if run.final_loss is None]
  if waiting:
    listed = _some([f"{run.name} ({run.status}, step {run.step} of {run.num_steps})" for run in waiting], most=12)
    yield Finding("caution", f"not counted, because they have no finite loss at their last step: {listed}")
  if material.not_started:
    yield Finding("caution", f"planned but not started: {_some(material.not_started)}")
  diverged = [run for run in material.runs if run.diverged]
  if diverged:
    yield Finding("caution", f"diverged, and counted where they reached the last step: {_names(diverged, most=12)}")


def _changed(runs: Sequence[ReportedRun]) -> Iterator[Finding]:
  changed = [run for run in runs if run.changes]
  if changed:
    yield Finding("note", f"resumed with a changed config (changes.jsonl): {_names(changed)}")


def _harmless(runs: Sequence[ReportedRun]) -> Iterator[Finding]:
  fields = [field for field in differing_fields(runs) if not changes_the_run(field)]
  if fields:
    yield Finding("note", f"fields that do not change what is computed differ: {', '.join(fields)}")


def _code_of(run: ReportedRun) -> str:
  """What tells the code of one run from another's: a hash of the package's files, or without one its revision."""
  code, revision = run.environment.get("code"), run.environment.get("git")
  return f"code {code}" if code else f"revision {revision}"


def _code(runs: Sequence[ReportedRun]) -> Iterator[Finding]:
  by_code = grouped([run for run in runs if run.environment], _code_of)
  if len(by_code) > 1:
    text = f"the runs were trained by different code (environment.json): {_listed(by_code)}"
    yield Finding("caution", f"{text}. They are comparable only if what changed in between does not change the numbers")


def _programs(runs: Sequence[ReportedRun], groups: Sequence[Group]) -> Iterator[Finding]:
  """Within a group only: other placements and settings are other programs by design."""
  for group in groups:
    known = [runs[index] for index in group.runs if runs[index].environment.get("train_step")]
    by_program = grouped(known, lambda run: str(run.environment["train_step"]))
    if len(by_program) > 1:
      text = f"the training steps of {group.label} are different programs (environment.json): {_listed(by_program)}"
      yield Finding("note", f"{text}. A part of their spread over seeds may come from that")


def _environments(runs: Sequence[ReportedRun]) -> Iterator[Finding]:
  known = [run for run in runs if run.environment]
  by_version = grouped(known, lambda run: str(run.packages.get("jax")))
  if len(by_version) > 1:
    yield Finding("caution", f"not all runs had the same JAX version: {_listed(by_version)}")
  by_devices = grouped(known, lambda run: ", ".join(sorted(set(run.devices))))
  if len(by_devices) > 1:
    yield Finding("caution", f"not all runs had the same kind of device: {_listed(by_devices)}")

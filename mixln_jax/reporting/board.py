"""A track's board: what each entry says of its placement, held against the baseline seed by seed.

An entry is a placement in one study's folder: two studies of one placement are two entries, and neither hides the
other. Runs that break the track's rules are named and not counted.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mixln_jax.reporting import fairness
from mixln_jax.reporting.claims import Judged, is_judged, judge_all, others_of
from mixln_jax.reporting.comparison import EQUAL, HIGHER, LOWER, Comparison, compare, standings
from mixln_jax.reporting.fairness import Finding
from mixln_jax.reporting.groups import SEED_FIELDS, grouped, make_groups, show, value_of
from mixln_jax.reporting.headline import Contender, make_contenders
from mixln_jax.reporting.loading import Material, ReportedRun, unique_names
from mixln_jax.reporting.noise import Noise, noise_of, stored_noise
from mixln_jax.reporting.speed import Speed, speed_of
from mixln_jax.reporting.study_plan import STUDY_FILE, StudyPlan, read_study_plan
from mixln_jax.reporting.track_check import added_fraction, reference_runs, shape_of, violations
from mixln_jax.track import INITIAL_FIELDS, LOSS, PLACEMENT_FIELD, RATE_FIELD, SEED_FIELD, Track, check_claims

IDENTITY = (PLACEMENT_FIELD, *INITIAL_FIELDS)  # what tells the entries of a study apart
FEWEST_RATES = 3  # that an entry is tuned on
LEAST = 1e-12  # of a budget: rounding


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A run that is not counted, and why."""

  run: ReportedRun
  violations: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Entry:
  """A placement in a study, at its best learning rate.

  Attributes:
    label: unique on the board.
    placement: of all its runs.
    study: the shortest end of the path of the study's folder that no other study has.
    contenders: shape -> the placement at its best rate of that shape; a track of one shape has the shape ().
    all_runs: that are counted; what the contenders' groups number.
    runs: those at the best rate of each shape.
    scores: what is compared, for each seed: the final loss, or the slope of the loss with depth.
    added: what it learns besides gains of norms, as a fraction of the model; None where it is not known.
    missing: names of runs at the best rate that were planned or begun, and have no final loss that counts.
    faults: why it has no rank.
    remarks: what else is to be known of it.
    comparison: its scores minus those of the baseline's entry; None for that one, or where no seed is shared.
    speed: of its runs beside the baseline's; None where there are several shapes.
  """

  label: str
  placement: str
  study: str
  contenders: Mapping[tuple[object, ...], Contender]
  all_runs: Sequence[ReportedRun]
  runs: Sequence[ReportedRun]
  scores: pd.Series
  added: float | None = None
  missing: Sequence[str] = ()
  faults: Sequence[str] = ()
  remarks: Sequence[str] = ()
  comparison: Comparison | None = None
  speed: Speed | None = None

  @property
  def rates(self) -> str:
    """The best rate of each shape, in words."""
    return ", ".join(dict.fromkeys(show(run.config[RATE_FIELD]) for run in self.runs))

  @property
  def places(self) -> list[str]:
    """Where each best rate lies in the grid that was tried."""
    return [one.best.place for one in self.contenders.values() if one.best is not None]

  @property
  def diverged(self) -> int:
    """Runs at the best rates that diverged."""
    return sum(run.diverged for run in self.runs)

  @property
  def layer_list(self) -> Sequence[str]:
    return self.runs[0].layer_list if self.runs else ()


@dataclasses.dataclass(frozen=True)
class StudyClaim:
  """A claim as the runs of one study judge it: an entry of its own."""

  study: str
  judged: Judged


@dataclasses.dataclass(frozen=True)
class Board:
  """All that a board shows.

  Attributes:
    track: its rules.
    entries: the baseline's first, then from the lowest score to the highest, then those without a comparison.
    rejected: runs that are not counted.
    problems: of folders that could not be read.
    findings: of the runs that are counted.
    noise: of the baseline's runs here; None of fewer than two.
    stored: the noise that the track has stored.
    claims: of the track and of the studies, as each study judges them.
    runs: those that are counted.
  """

  track: Track
  entries: Sequence[Entry]
  rejected: Sequence[Rejected]
  problems: Sequence[str]
  findings: Sequence[Finding]
  noise: Noise | None
  stored: Noise | None
  claims: Sequence[StudyClaim]
  runs: Sequence[ReportedRun]

  @property
  def baseline(self) -> Entry | None:
    return next((entry for entry in self.entries if is_baseline(self.track, entry)), None)

  def with_verdict(self, *verdicts: str) -> list[Entry]:
    """The ranked entries whose comparison has one of these verdicts."""
    compared = [entry for entry in self.entries if entry.comparison is not None and not entry.faults]
    return [entry for entry in compared if entry.comparison and entry.comparison.verdict in verdicts]

  @property
  def answer(self) -> str:
    """The board in a sentence."""
    compared = [entry for entry in self.entries if entry.comparison is not None and not entry.faults]
    if not compared:
      return f"No entry can be compared with {self.track.baseline} yet."
    lower, higher = len(self.with_verdict(LOWER)), len(self.with_verdict(HIGHER))
    still_open = len(compared) - lower - higher - len(self.with_verdict(EQUAL))
    return (
      f"Ranked entries: {len(compared)}. By intervals that exclude 0, {lower} {_is(lower)} lower than "
      f"{self.track.baseline} and {higher} {_is(higher)} higher; {still_open} {_is(still_open)} open."
    )


def _is(number: int) -> str:
  return "is" if number == 1 else "are"


def make_board(track: Track, material: Material) -> Board:
  """Checks the runs and compares the entries.

  Raises:
    InputError: what the track has stored of its noise is damaged, or a study is.
  """
  rejected, counted = _checked(track, material.runs)
  plans = _plans(material.runs)
  folders = list(dict.fromkeys(_study_folder(run) for run in material.runs))
  studies = dict(zip(folders, unique_names(folders), strict=True))
  by_entry = grouped(counted, lambda run: (_study_folder(run), run.placement, *initial_changes(track, run)))
  labels = _labels(list(by_entry), studies)
  entries = []
  for key, runs in by_entry.items():
    entries.append(_entry(track, labels[key], studies[key[0]], runs, plans.get(key[0])))
  stored = stored_noise(track.noise, str(track.noise_file))
  baselines = [entry for entry in entries if is_baseline(track, entry)]
  most = max(baselines, key=lambda entry: len(entry.scores), default=None)
  noise = None if most is None else noise_of(most.placement, most.scores.tolist())
  known = stored or noise
  compared = [_compared(track, entry, baselines, None if known is None else known.pairs_std) for entry in entries]
  judged = _judged(track, compared, plans)
  return Board(
    track=track,
    entries=sorted(compared, key=lambda entry: _order(track, entry)),
    rejected=rejected,
    problems=[*material.problems, *(text for run in counted for text in run.problems)],
    findings=fairness.find_of_entries(counted),
    noise=noise,
    stored=stored,
    claims=judged,
    runs=counted,
  )


def _checked(track: Track, runs: Sequence[ReportedRun]) -> tuple[list[Rejected], list[ReportedRun]]:
  """The runs that break the track's rules, and the others."""
  reference = reference_runs(track, runs)
  rejected, counted = [], []
  for run in runs:
    found = violations(track, run, reference.get(shape_of(track, run)))
    if found:
      rejected.append(Rejected(run, found))
    else:
      counted.append(run)
  return rejected, counted


def _study_folder(run: ReportedRun) -> Path:
  """The folder of the study that a run lies in; of a run alone, the folder around it."""
  around = run.path.parent
  return around.parent if (around.parent / STUDY_FILE).is_file() else around


def _plans(runs: Sequence[ReportedRun]) -> dict[Path, StudyPlan]:
  folders = dict.fromkeys(_study_folder(run) for run in runs)
  return {folder: read_study_plan(folder / STUDY_FILE) for folder in folders if (folder / STUDY_FILE).is_file()}


def initial_changes(track: Track, run: ReportedRun) -> tuple[tuple[str, object], ...]:
  """The initial values in which a run differs from the track's."""
  changed = [field for field in INITIAL_FIELDS if run.config.get(field) != track.fixed.get(field)]
  return tuple((field, value_of(run, field)) for field in changed)


EntryKey = tuple[Any, ...]  # the folder of the study, the placement, and each initial value that differs


def _labels(keys: Sequence[EntryKey], studies: Mapping[Path, str]) -> dict[EntryKey, str]:
  """The placement, its initial values, and the study's name where several have the same."""
  short = {}
  for key in keys:
    _, placement, *changes = key
    short[key] = ", ".join([placement, *map(_in_words, changes)])
  times = collections.Counter(short.values())
  return {key: label if times[label] == 1 else f"{label} ({studies[key[0]]})" for key, label in short.items()}


def _in_words(change: tuple[str, object]) -> str:
  """An initial value as `init deviation 0.01`."""
  field, value = change
  return f"{field.split('.')[-1].replace('_', ' ')} {show(value)}"


def is_baseline(track: Track, entry: Entry) -> bool:
  """Whether an entry is the track's baseline, with the track's initial values."""
  return entry.placement == track.baseline and not _has_changes(track, entry)


def _entry(track: Track, label: str, study: str, runs: Sequence[ReportedRun], plan: StudyPlan | None) -> Entry:
  """An entry by itself, before it is compared."""
  groups = make_groups(Material(None, runs, []))
  found = make_contenders(standings(runs, groups, track.baseline))
  contenders = {shape_of(track, runs[one.family[0].group.runs[0]]): one for one in found}
  at_best = []
  for contender in contenders.values():
    if contender.best is not None:
      at_best += [runs[index] for index in contender.best.row.group.runs]
  scores = _losses(contenders) if track.score == LOSS else _slopes(contenders, runs)
  added = max((one for one in map(added_fraction, runs) if one is not None), default=None)
  unfinished = [run.path.name for run in at_best if run.final_loss is None and not run.diverged]
  missing = list(dict.fromkeys([*_missing(track, runs, contenders, plan), *unfinished]))
  entry = Entry(label, runs[0].placement, study, contenders, runs, at_best, scores, added, missing)
  return dataclasses.replace(entry, faults=_faults(track, entry))


def _losses(contenders: Mapping[tuple[object, ...], Contender]) -> pd.Series:
  """The final losses of an entry of one shape, by seeds."""
  best = next((one.best for one in contenders.values() if one.best is not None), None)
  return pd.Series(dtype=float) if best is None else best.row.losses


def _slopes(contenders: Mapping[tuple[object, ...], Contender], runs: Sequence[ReportedRun]) -> pd.Series:
  """For each seed the slope of the loss with depth, nats for each doubling, where the seed has all of two depths or
  more."""
  by_depth: dict[float, pd.Series] = {}
  for contender in contenders.values():
    if contender.best is None:
      return pd.Series(dtype=float)
    row = contender.best.row
    by_depth[math.log2(runs[row.group.runs[0]].num_layers)] = row.losses
  if len(by_depth) < 2:
    return pd.Series(dtype=float)
  table = pd.concat(by_depth, axis="columns", join="inner")
  depths = np.array(table.columns, float)
  slopes = [float(stats.linregress(depths, row).slope) for row in table.to_numpy(float)]  # pyright: ignore
  return pd.Series(slopes, table.index, dtype=float)


def _missing(
  track: Track,
  runs: Sequence[ReportedRun],
  contenders: Mapping[tuple[object, ...], Contender],
  plan: StudyPlan | None,
) -> list[str]:
  """Runs at a best rate that the study planned and that are not among those that could be read and counted."""
  if plan is None:
    return []
  there = {run.path.name for run in runs}
  missing = []
  for name, values in plan.planned.items():
    config = {**plan.base, **values}
    shape = tuple(config.get(field) for field in track.shape_fields)
    at_best = shape in contenders and config.get(RATE_FIELD) == _best_rate(contenders[shape], runs)
    ours = all(config.get(field, track.fixed[field]) == runs[0].config[field] for field in IDENTITY)
    if ours and at_best and name not in there:
      missing.append(name)
  return missing


def _best_rate(contender: Contender, runs: Sequence[ReportedRun]) -> object:
  """The best learning rate as the config has it; None where there is none."""
  return None if contender.best is None else runs[contender.best.row.group.runs[0]].config[RATE_FIELD]


def _faults(track: Track, entry: Entry) -> list[str]:
  """What keeps an entry from having a rank."""
  faults = []
  if entry.added is not None and entry.added > track.added * (1 + LEAST):
    faults.append(
      f"over the budget: what it learns besides gains of norms is {entry.added:.2%} of the model, and the track allows "
      f"{track.added:.2%}"
    )
  lost = sorted({run.config[SEED_FIELD] for run in entry.runs if run.diverged and run.final_loss is None})
  if lost:
    faults.append(f"seeds {', '.join(map(str, lost))} diverged and have no final loss: its mean is that of the others")
  gaps = [seed for seed in _gaps(entry.scores) if seed not in lost]
  if gaps:
    faults.append(f"seeds {', '.join(map(str, gaps))} are not there, and later ones are: dropped, or not done yet")
  if entry.missing:
    faults.append(f"planned or begun, and not done or not counted: {', '.join(entry.missing)}")
  if entry.scores.empty:
    all_diverged = all(run.diverged for run in entry.all_runs)
    faults.append("all its runs diverged" if all_diverged else "has no final loss at a best rate yet")
  return faults


def _gaps(scores: pd.Series) -> list[int]:
  """The seeds below the highest one that have no score: an entry's seeds are the first ones, from 0."""
  if scores.empty:
    return []
  seeds = {int(seed) for seed in scores.index.get_level_values(SEED_FIELDS[0])}
  return [seed for seed in range(max(seeds)) if seed not in seeds]


def _compared(track: Track, entry: Entry, baselines: Sequence[Entry], std: float | None) -> Entry:
  """The entry beside the baseline of its own study, or of the first study that has one."""
  own = [one for one in baselines if one.study == entry.study]
  baseline = (own or [*baselines, None])[0]
  remarks = _remarks(track, entry)
  if baseline is None or baseline is entry or is_baseline(track, entry):
    return dataclasses.replace(entry, remarks=remarks)
  if not own:
    remarks.append(f"its study has no {track.baseline}: compared with that of {baseline.study}")
  comparison = compare(entry.scores, baseline.scores, std)
  speed = speed_of(entry.runs, baseline.runs) if track.score == LOSS else None
  if comparison is not None and abs(comparison.difference.mean) < track.close and track.score == LOSS:
    pairs = comparison.difference.n
    if pairs < track.close_seeds:
      remarks.append(
        f"{pairs} pair{'s' if pairs > 1 else ''} of seeds; within {track.close} nats of {track.baseline} the track "
        f"asks for {track.close_seeds}"
      )
  return dataclasses.replace(entry, comparison=comparison, speed=speed, remarks=remarks)


def _remarks(track: Track, entry: Entry) -> list[str]:
  """What an entry lacks, or is to be known of it."""
  remarks = []
  wanted = track.baseline_seeds if is_baseline(track, entry) else track.seeds
  if 0 < len(entry.scores) < wanted:
    remarks.append(f"{len(entry.scores)} of the {wanted} seeds that the track asks for")
  for contender in entry.contenders.values():
    tried = len(contender.rates) or 1
    if tried < FEWEST_RATES:
      remarks.append(f"tuned on {tried} of the {FEWEST_RATES} learning rates that the track asks for")
    if contender.at_edge and contender.best is not None:
      remarks.append(f"its best rate {contender.rate} is the {contender.best.place} of those that it was tried at")
  if entry.diverged:
    remarks.append(f"{entry.diverged} of {len(entry.runs)} runs at its best rate diverged")
  return list(dict.fromkeys(remarks))


def _order(track: Track, entry: Entry) -> tuple[int, float]:
  """The baseline first, then by the difference to it, then what has none."""
  if is_baseline(track, entry):
    return 0, 0.0
  if entry.comparison is None:
    return 2, 0.0
  return 1, entry.comparison.difference.mean


def _judged(track: Track, entries: Sequence[Entry], plans: Mapping[Path, StudyPlan]) -> list[StudyClaim]:
  """Every claim that can be judged, by the runs of each study that has the placement that it is about."""
  claims = [_as_stored(claim) for claim in track.claims]
  for folder, plan in plans.items():
    check_claims(plan.claims, str(folder / STUDY_FILE))
    claims += [_as_stored(claim) for claim in plan.claims if is_judged(claim) and _as_stored(claim) not in claims]
  found = []
  for study in dict.fromkeys(entry.study for entry in entries):
    own = {entry.placement: entry for entry in entries if entry.study == study and not _has_changes(track, entry)}
    others = {entry.placement: entry for entry in reversed(entries) if not _has_changes(track, entry)} | own
    comparisons = {}
    for claim in filter(is_judged, claims):
      for other in others_of(claim):
        if claim["lower"] in own and other in others:
          pair = (claim["lower"], other)
          compared = compare(own[claim["lower"]].scores, others[other].scores)
          if compared is not None:
            comparisons[pair] = compared
    about = [claim for claim in claims if is_judged(claim) and claim["lower"] in own]
    found += [StudyClaim(study, judged) for judged in judge_all(about, comparisons)]
  return found


def _as_stored(claim: Mapping[str, Any]) -> dict[str, Any]:
  """A claim as a study.json has it, with lists for tuples: that of a recipe and that of a study are then one."""
  return json.loads(json.dumps(dict(claim)))


def _has_changes(track: Track, entry: Entry) -> bool:
  return any(initial_changes(track, run) for run in entry.all_runs)


def tried_losses(track: Track, entry: Entry) -> dict[float, str]:
  """The mean final loss of an entry of one shape at each published rate that it was tried at, or why it has none.

  The mean is over the seeds that all rates share, as where the best is chosen.
  """
  rows = {}
  for contender in entry.contenders.values():
    for row in contender.family:
      rows[entry.all_runs[row.group.runs[0]].config[RATE_FIELD]] = row
  losses = {rate: row.losses for rate, row in rows.items() if row.counted}
  shared = pd.concat(losses, axis="columns", join="inner") if losses else pd.DataFrame()
  cells = {rate: "diverged" for rate, row in rows.items() if row.diverged}
  cells |= {rate: f"{shared[rate].mean():.4f}" for rate in losses if len(shared)}
  return {rate: cells[rate] for rate in track.rates if rate in cells}

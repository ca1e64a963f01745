"""Whether a run may stand on a track's board: its folder's facts held against the track's fixed fields.

The config says what was meant; the other files say what was done. Both are held against the track, since a config can
be written anew.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mixln_jax.config import FIELDS
from mixln_jax.reporting.fairness import DRAWN
from mixln_jax.reporting.groups import changes_the_run, grouped, value_of
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.reading import as_list
from mixln_jax.track import RATE_FIELD, Track

ROUNDING = 1e-4  # relative; a rate that is computed in fp32 differs by less from the one that the config has
# As a fraction of the rate: the peak may fall between two steps, and rates of a grid are farther apart than that.
LOWEST_PEAK = 0.75
# Gains of norms come with a placement; everything else that is not a matrix of LLaMA is what a placement learns. The
# names are stated again, because a report builds no model; a test compares them with the model's own table.
CHANGED_FIELD = re.compile(r"config\.([\w.]+): ")  # how a line of changes.jsonl names a field
GAIN = re.compile(r"(attention|mlp|final|query|key|value|stream)_norm(_\d+)?$")


def violations(track: Track, run: ReportedRun, baseline: ReportedRun | None) -> list[str]:
  """Everything that keeps a run off the board, in words; empty where nothing does.

  Args:
    track: that the run claims to be of.
    run: as its folder says.
    baseline: a run of the baseline of the same shape that keeps the track's rules, or None.
  """
  found = [*track.departures_in_words(run.config)]
  invalid = _invalid(run)
  if invalid:
    return [*found, *invalid]  # nothing can be computed of it
  found += _resumed_otherwise(run)
  found += _data(track, run, baseline)
  found += _length(run)
  found += _rate(run)
  found += _shapes(run, baseline)
  return found


def _invalid(run: ReportedRun) -> list[str]:
  """The fields whose value no run can have: the config was written anew, or is damaged."""
  values = {field: (run.config[field], known) for field, known in FIELDS.items()}
  return [
    f"config.{field}={value!r}, which must be {known.allowed()}"
    for field, (value, known) in values.items()
    if not known.admits(value)
  ]


def _resumed_otherwise(run: ReportedRun) -> Iterator[str]:
  """A change that was made when a run was resumed shows in the config of its second part alone."""
  for change in run.changes:
    texts = [str(text) for text in as_list(change.get("changes"))]
    named = {text: CHANGED_FIELD.match(text) for text in texts}
    wrong = [text for text, match in named.items() if match is None or changes_the_run(match.group(1))]
    if wrong:
      yield f"it was resumed at step {change.get('step')} as another run ({'; '.join(wrong)})"


def _data(track: Track, run: ReportedRun, baseline: ReportedRun | None) -> Iterator[str]:
  fingerprint = track.fingerprint or (baseline.fingerprint if baseline else None)
  if fingerprint and run.fingerprint is not None and run.fingerprint != fingerprint:
    yield (
      f"the records' fingerprint is {run.fingerprint[:12]}…, the track has {fingerprint[:12]}…: another text, "
      "tokenizer, or validation set"
    )
  tokens = run.at_end("tokens")
  expected = track.validation_tokens or (baseline.at_end("tokens") if baseline else None)
  if expected and tokens is not None and tokens != expected:
    yield f"its last validation counts {tokens:,.0f} tokens, the track {expected:,.0f}: another validation set"


def _length(run: ReportedRun) -> Iterator[str]:
  if run.step > run.num_steps:
    yield f"its metrics go to step {run.step}, its config to {run.num_steps}: more steps than it says"
  if "tokens" in run.train and "data.sequence_length" in run.config:
    most = run.config["train.batch_size"] * run.config["data.sequence_length"]
    largest = run.train["tokens"].max()
    if largest > most:
      yield f"a step of its metrics has {largest:,.0f} tokens, its config {most:,}: a larger batch than it says"


def _rate(run: ReportedRun) -> Iterator[str]:
  if "learning_rate" not in run.train or not len(run.train):
    return
  peak, said = float(np.nanmax(run.train["learning_rate"].to_numpy(float))), run.config[RATE_FIELD]
  is_lower = run.final_loss is not None and peak < said * LOWEST_PEAK
  if peak > said * (1 + ROUNDING) or is_lower:
    yield f"its metrics reach a learning rate of {peak:g}, its config says {said:g}: another rate than it says"


def _shapes(run: ReportedRun, baseline: ReportedRun | None) -> Iterator[str]:
  """The matrices of LLaMA, in numbers as they are stored, which a config that was written anew does not change."""
  if baseline is None:
    return
  ours, theirs = _matrices(run.parameter_sizes), _matrices(baseline.parameter_sizes)
  wrong = [name for name in theirs if ours and ours.get(name) != theirs[name]]
  if wrong:
    name = wrong[0]
    yield (
      f"{', '.join(wrong)} (parameters.txt): {ours.get(name, 0):,} numbers in {name}, the baseline has "
      f"{theirs[name]:,}: another shape than it says"
    )


def _matrices(sizes: Mapping[str, int]) -> dict[str, int]:
  return {name: size for name, size in sizes.items() if name.split("/")[-1] in DRAWN}


def added_parameters(run: ReportedRun) -> int | None:
  """Numbers that the placement learns besides gains of norms; None where the folder does not say."""
  if not run.parameter_sizes:
    return None
  matrices = _matrices(run.parameter_sizes)
  others = {name: size for name, size in run.parameter_sizes.items() if name not in matrices}
  return sum(size for name, size in others.items() if not GAIN.search(name))


def added_fraction(run: ReportedRun) -> float | None:
  """The same as a fraction of the matrices, embedding and head."""
  added, matrices = added_parameters(run), sum(_matrices(run.parameter_sizes).values())
  return None if added is None or not matrices else added / matrices


def reference_runs(track: Track, runs: Sequence[ReportedRun]) -> dict[tuple[object, ...], ReportedRun]:
  """A run of the baseline for each shape, of those that keep the track's rules by themselves.

  It is one with the facts that most of them have: a single one that is not what it says must not reject all others.
  """
  keeping = [run for run in runs if run.placement == track.baseline and not violations(track, run, None)]
  found: dict[tuple[object, ...], ReportedRun] = {}
  for shape, of_shape in grouped(keeping, lambda run: shape_of(track, run)).items():
    by_facts = grouped(of_shape, _facts)
    found[shape] = max(by_facts.values(), key=len)[0]
  return found


def _facts(run: ReportedRun) -> tuple[object, ...]:
  """What all runs of one shape have in common."""
  return run.fingerprint, run.at_end("tokens"), *sorted(_matrices(run.parameter_sizes).items())


def shape_of(track: Track, run: ReportedRun) -> tuple[object, ...]:
  """The values of the fields of a track's shapes."""
  return tuple(value_of(run, field) for field in track.shape_fields)

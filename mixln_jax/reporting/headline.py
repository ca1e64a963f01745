"""The answer of a report: which placement is lower, by how much, and whether the seeds show it.

Each placement stands at its own best learning rate. It is compared with the baseline at the baseline's best, pair by
pair over the seeds that both have. The loss comes first, in nats a token: it is what is trained, and differences of it
can be held against those of other studies; then bits a byte, then perplexity. Runs on pairs of answers have neither:
their loss is in nats a pair, and accuracy comes second.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mixln_jax.reporting.comparison import (
  CONFIDENCE,
  EQUAL,
  HIGHER,
  LOWER,
  MOST_SEEDS,
  NOT_SHOWN,
  POWER,
  BestRate,
  Difference,
  Standing,
  best_rate,
  compare,
  families,
  paired,
  paired_difference,
  spread,
  tried_rates,
)
from mixln_jax.reporting.groups import LEARNING_RATE_FIELD, SEED_FIELDS, grouped, show
from mixln_jax.reporting.numbers import fixed, signed
from mixln_jax.reporting.panels import Estimate, Figure, Panel
from mixln_jax.reporting.source import Source, make_figure
from mixln_jax.text import perplexity

EDGES = ("lower edge", "upper edge")
MOST_NAMED = 4  # placements that a sentence lists by name


@dataclasses.dataclass(frozen=True)
class Contender:
  """A placement, in one setting, at its best learning rate.

  Attributes:
    label: the placement, and the setting where several are compared.
    family: its rows, one a learning rate.
    best: the best of them; None where no run has a loss, or its rates share no seed.
    rates: all that were tried, sorted.
  """

  label: str
  family: Sequence[Standing]
  best: BestRate | None
  rates: Sequence[Any]

  @property
  def placement(self) -> str:
    return self.family[0].group.placement

  @property
  def setting(self) -> dict[str, Any]:
    """All but the placement and the rate: only contenders of equal ones are compared."""
    return self.family[0].group.setting_but(LEARNING_RATE_FIELD)

  @property
  def rate(self) -> str:
    """The best rate, for a person; empty where the report has one rate alone."""
    if self.best is None or LEARNING_RATE_FIELD not in self.best.row.group.setting:
      return ""
    return show(self.best.row.group.setting[LEARNING_RATE_FIELD])

  @property
  def at_edge(self) -> bool:
    return self.best is not None and self.best.place in EDGES

  @property
  def diverged(self) -> int:
    """How many of its runs diverged, at any rate."""
    return sum(row.diverged for row in self.family)


@dataclasses.dataclass(frozen=True)
class Matchup:
  """A contender beside the baseline of its setting.

  Attributes:
    ours, baseline: the two; both have a best rate.
    loss: ours − baseline, paired by seeds, in the unit of the rows.
    bits, perplexity, accuracy: the same of bits a byte, of perplexity, and of the accuracy on pairs of answers, a
      fraction; None where runs have none.
    pairs: the single differences in nats.
    verdict: LOWER, HIGHER, NOT_SHOWN, EQUAL or ONE_SEED.
    needed: seeds with which such a difference would be shown with a power of 80 %; None where it is shown, can't be
      known, or more than a thousand are needed.
  """

  ours: Contender
  baseline: Contender
  loss: Difference
  bits: Difference | None
  perplexity: Difference | None
  accuracy: Difference | None
  pairs: Sequence[float]
  verdict: str
  needed: int | None

  @property
  def unit(self) -> str:
    """Of the loss."""
    assert self.baseline.best is not None
    return self.baseline.best.row.unit


@dataclasses.dataclass(frozen=True)
class Headline:
  """The answer.

  Attributes:
    lines: one sentence for each setting that is compared.
    cautions: what a reader must know with it.
    contenders: setting by setting, in the order of the groups.
    matchups: those of them that can be compared.
  """

  lines: Sequence[str]
  cautions: Sequence[str]
  contenders: Sequence[Contender]
  matchups: Sequence[Matchup]

  @property
  def text(self) -> str:
    """All of it, in one line."""
    return " ".join([*self.lines, *self.cautions])

  def matchup_of(self, contender: Contender) -> Matchup | None:
    """How a contender stands beside the baseline; None where it is one, or can't be compared."""
    return next((one for one in self.matchups if one.ours is contender), None)


def make_headline(rows: Sequence[Standing], baseline: str) -> Headline:
  """The answer that rows of the table give; `baseline` is the placement that the others are compared with."""
  contenders = make_contenders(rows)
  by_setting = grouped(contenders, lambda one: tuple(one.setting.items()))
  lines: list[str] = []
  cautions: list[str] = []
  matchups: list[Matchup] = []
  for some in by_setting.values():
    base = next((one for one in some if one.placement == baseline), None)
    found = [_match(one, base) for one in some if base is not None and one is not base]
    compared = [one for one in found if one is not None]
    matchups += compared
    told = _setting_words(some[0])
    if not told and any(map(_setting_words, contenders)):
      told = "as the base"
    prefix = f"{told}: " if len(by_setting) > 1 and told else ""
    lines.append(prefix + _sentence(some, compared, baseline))
    cautions += _cautions(some, compared)
  in_order = [one for some in by_setting.values() for one in some]
  return Headline(lines, list(dict.fromkeys(cautions)), in_order, matchups)


def make_contenders(rows: Sequence[Standing]) -> list[Contender]:
  """Each placement and setting of the table at its best learning rate."""
  return [_contender(family, families(rows)) for family in families(rows)]


def _contender(family: Sequence[Standing], others: Sequence[Sequence[Standing]]) -> Contender:
  group = family[0].group
  same_placement = [other for other in others if other[0].group.placement == group.placement]
  label = group.label_but(LEARNING_RATE_FIELD) if len(same_placement) > 1 else group.placement
  return Contender(label, family, best_rate(family), tried_rates(family))


def _setting_words(contender: Contender) -> str:
  """A contender's setting in words, without its placement."""
  label = contender.family[0].group.label_but(LEARNING_RATE_FIELD)
  return label.removeprefix(contender.placement).removeprefix(", ")


def _match(ours: Contender, baseline: Contender | None) -> Matchup | None:
  """Compares two contenders over the seeds that both have; None where there are none.

  Two that were tried at no common learning rate are not compared: their difference may be that of the rates.
  """
  if baseline is None or ours.best is None or baseline.best is None:
    return None
  if ours.rates and baseline.rates and not set(ours.rates) & set(baseline.rates):
    return None
  compared = compare(ours.best.row.losses, baseline.best.row.losses)
  if compared is None:
    return None
  row, base = ours.best.row, baseline.best.row
  losses = paired(row.losses, base.losses)

  def difference(values: pd.DataFrame) -> Difference | None:
    return paired_difference(values["ours"], values["baseline"]) if len(values) == len(losses) else None

  return Matchup(
    ours=ours,
    baseline=baseline,
    loss=compared.difference,
    bits=difference(paired(row.bits, base.bits)),
    perplexity=None if row.of_pairs else difference(losses.map(perplexity)),
    accuracy=difference(paired(row.accuracies, base.accuracies)),
    pairs=compared.pairs.tolist(),
    verdict=compared.verdict,
    needed=compared.needed,
  )


def _sentence(contenders: Sequence[Contender], matchups: Sequence[Matchup], baseline: str) -> str:
  """The answer of one setting."""
  evaluated = [one for one in contenders if one.best is not None]
  if not evaluated:
    return "No run has been evaluated after its last step yet."
  if not matchups:
    return _without_comparison(evaluated, baseline)
  by_difference = sorted(matchups, key=lambda one: one.loss.mean)
  by_verdict = grouped(by_difference, lambda one: one.verdict)
  if LOWER in by_verdict:
    return _clear_win(by_verdict[LOWER][0])
  for verdict in (NOT_SHOWN, EQUAL):
    if verdict in by_verdict:
      return _no_difference(by_verdict[verdict][0]) + _beaten(by_verdict.get(HIGHER, []), also=True)
  if HIGHER in by_verdict:
    return _beaten(by_verdict[HIGHER], also=False)
  return _one_seed(by_difference)


def _without_comparison(evaluated: Sequence[Contender], baseline: str) -> str:
  """Where nothing can be compared: the lowest loss, and why there is no comparison."""
  rows = {one.label: one.best.row for one in evaluated if one.best is not None}
  label = min(rows, key=lambda name: rows[name].losses.mean())
  lowest = _loss_in_words(label, rows[label])
  if len(evaluated) == 1:
    return f"{lowest}; there is nothing to compare it with."
  have = [one for one in evaluated if one.placement == baseline]
  if not have:
    return f"{lowest}, the lowest; no run of {baseline} with equal settings has a loss to compare it with."
  return f"{lowest}, the lowest; {baseline} shares no seed or no learning rate with it, so they are not compared."


def _loss_in_words(label: str, row: Standing) -> str:
  """The loss of a row that has one, and what it means; means over seeds, as in the tables."""
  loss = f"{label} has a validation loss of {fixed(spread(row.losses).mean, 4)} {row.unit}"
  if not row.of_pairs:
    return f"{loss} (perplexity {fixed(spread(row.losses.map(perplexity)).mean, 2)})"
  if row.accuracies.empty:
    return loss
  return f"{loss} (accuracy {spread(row.accuracies).mean:.1%})"


def _clear_win(match: Matchup) -> str:
  ours, base = match.ours, match.baseline
  return (
    f"{ours.placement} is lower than {base.placement} by {fixed(-match.loss.mean, 4)} {match.unit} "
    f"({_interval(match.loss, sign=-1)}, {_seeds(match.loss.n)}){_at_rates(match)}{_other_units(match)}."
  )


def _beaten(matchups: Sequence[Matchup], *, also: bool) -> str:
  """What a baseline that wins is lower than."""
  if not matchups:
    return ""
  words = []
  for match in matchups[:MOST_NAMED]:
    evidence = "" if also else f" ({_interval(match.loss)}, {_seeds(match.loss.n)})"
    words.append(f"{match.ours.placement} by {fixed(match.loss.mean, 4)}{evidence}")
  if len(matchups) > MOST_NAMED:
    words[-1] += f" and {len(matchups) - MOST_NAMED} more"
  base = matchups[0].baseline.placement
  if also:
    return f" {base} is lower than {', '.join(words)}."
  rates = _at_rates(matchups[0])
  if rates and len(matchups) > 1:  # others have other rates; the table has all
    rates = ", each at its best learning rate"
  text = f"{base}, the baseline, is lower in {matchups[0].unit}{rates}{',' if rates else ''} than {', '.join(words)}"
  if len(matchups) == 1:
    text += _other_units(matchups[0])
  return text + "."


def _no_difference(match: Matchup) -> str:
  ours, base = match.ours.placement, match.baseline.placement
  if match.verdict == EQUAL:
    what = "are equal" if match.loss.mean == 0 else f"differ by {signed(match.loss.mean, 4)} {match.unit}"
    return f"{ours} and {base} {what} in all {match.loss.n} pairs of seeds: they show no spread, so no interval."
  needed = f"more than {MOST_SEEDS:,}" if match.needed is None else f"about {match.needed:,}"
  return (
    f"No difference shown between {ours} and {base}{_at_rates(match)}: {signed(match.loss.mean, 4)} {match.unit} "
    f"({_interval(match.loss)}, {_seeds(match.loss.n)}; {needed} would be needed to show such a difference)."
  )


def _one_seed(by_difference: Sequence[Matchup]) -> str:
  """One pair shows no spread: the difference is told, and how to get another."""
  match = by_difference[0]
  seeds = [row.losses.index.get_level_values(SEED_FIELDS[0]) for one in by_difference for row in one.ours.family]
  numbers = [int(seed) for some in seeds for seed in some if isinstance(seed, int)]
  following = max(numbers, default=0) + 1
  return (
    f"One seed: nothing can be said yet. {match.ours.placement} − {match.baseline.placement} is "
    f"{signed(match.loss.mean, 4)} {match.unit}{_at_rates(match)}; train each again with --config.seed={following}."
  )


def _at_rates(match: Matchup) -> str:
  """The rates of the two, where rates were tried."""
  if not match.ours.rate:
    return ""
  if match.ours.rate == match.baseline.rate:
    return f", each at its best learning rate ({match.ours.rate})"
  return f", each at its best learning rate ({match.ours.rate}; {match.baseline.rate} for {match.baseline.placement})"


def _interval(value: Difference, sign: int = 1) -> str:
  if value.interval is None:
    return "no interval"
  low, high = sorted((sign * value.interval[0], sign * value.interval[1]))
  return f"{CONFIDENCE:.0%} interval {fixed(low, 4)} to {fixed(high, 4)}"


def _seeds(n: int) -> str:
  return "one seed" if n == 1 else f"{n} seeds"


def _other_units(match: Matchup) -> str:
  """The difference in what else is known of both, after a semicolon; empty where nothing is."""
  units = []
  if match.bits is not None:
    units.append(f"{signed(match.bits.mean, 4)} bits a byte")
  if match.perplexity is not None:
    units.append(f"{signed(match.perplexity.mean, 2)} of perplexity")
  if match.accuracy is not None:
    units.append(f"{signed(100 * match.accuracy.mean, 1)} points of accuracy")
  return f"; {', '.join(units)}" if units else ""


def _cautions(contenders: Sequence[Contender], matchups: Sequence[Matchup]) -> list[str]:
  """What weakens the answer: rates at an edge, runs that diverged or are missing, unequal seeds, many comparisons."""
  said = []
  compared = {id(one) for match in matchups for one in (match.ours, match.baseline)}
  said += _at_edges([one for one in contenders if id(one) in compared and one.at_edge])
  for one in contenders:
    said += _losses_of_runs(one)
  without = [one.label for one in contenders if not one.diverged and not any(row.counted for row in one.family)]
  if without and len(without) < len(contenders):
    more = f" and {len(without) - MOST_NAMED} more" if len(without) > MOST_NAMED else ""
    said.append(f"Not compared, since no run of theirs has a final loss: {', '.join(without[:MOST_NAMED])}{more}.")
  for match in matchups:
    ours, base = match.ours.best, match.baseline.best
    assert ours is not None
    assert base is not None
    if {ours.row.counted, base.row.counted} != {match.loss.n}:
      said.append(
        f"{match.ours.label} has {_seeds(ours.row.counted)} and {match.baseline.placement} {base.row.counted}; "
        f"they are compared on the {match.loss.n} that both have."
      )
  with_interval = sum(match.loss.interval is not None for match in matchups)
  if with_interval > 1:
    said.append(f"{with_interval} placements are compared; their intervals are not corrected for that.")
  return said


def _at_edges(contenders: Sequence[Contender]) -> list[str]:
  """That the best rates of these are at the edges of their grids, in one sentence."""
  places = [(one.label, one.rate, one.best.place) for one in contenders if one.best is not None]
  if not places:
    return []
  if len(places) == 1:
    label, rate, place = places[0]
    return [f"The best rate of {label}, {rate}, is the {place} of its grid: a better one may lie beyond."]
  listed = ", ".join(f"{label} ({rate}, {place})" for label, rate, place in places)
  return [f"The best rates of these are at the edge of their grids, and better ones may lie beyond: {listed}."]


def _losses_of_runs(contender: Contender) -> list[str]:
  """Runs at the best rate that did not reach a loss, or did though they diverged; a placement without any."""
  if contender.best is None:
    if any(row.counted for row in contender.family):
      return [f"{contender.label}: its learning rates share no seed, so none is the best and it is not compared."]
    if contender.diverged:
      return [f"{contender.label}: {contender.diverged} runs diverged, and none can be compared."]
    return []  # `_cautions` names all of these at once
  row = contender.best.row
  at_rate = f" at {contender.rate}" if contender.rate else ""
  said = []
  if row.diverged:
    said.append(f"{row.diverged} of {row.planned} runs of {contender.label}{at_rate} diverged; {row.counted} counted.")
  elif row.counted < row.planned:
    counted = f"{row.counted} of {row.planned} runs of {contender.label}{at_rate} counted"
    said.append(f"{counted}: the others have no final loss.")
  return said


def difference_figure(source: Source, headline: Headline) -> Figure:
  """The one picture: the difference of each placement to the baseline, with its interval. Empty without a pair."""
  baselines = list(dict.fromkeys(match.baseline.placement for match in headline.matchups))
  base = ", ".join(baselines)
  estimates = []
  for contender in headline.contenders if headline.matchups else ():
    estimate = _estimate(source, headline, contender)
    if estimate is not None:
      estimates.append(estimate)
  caption = (
    f"Validation loss after the last step minus that of {base}, each placement at its own best learning rate: left of "
    f"0 is better. Bars: Student’s {CONFIDENCE:.0%} interval over pairs of seeds; dots: single pairs; squares: the "
    "layers, the first one on the left."
  )
  if any(contender.at_edge for contender in headline.contenders):
    caption += " ◂ or ▸: the best rate is at that edge of its grid, and a better one may lie beyond."
  if any(match.needed for match in headline.matchups):
    caption += f" Seeds that would be needed: for a power of {POWER:.0%}, if the difference is what it seems."
  units = ", ".join(dict.fromkeys(match.unit for match in headline.matchups))
  panel = Panel("", f"loss minus {base}’s ({units})", "", estimates=estimates)
  return make_figure("difference", f"Difference to {base}", caption, [panel])


def _estimate(source: Source, headline: Headline, contender: Contender) -> Estimate | None:
  """A contender's row of the picture; None where it has nothing to show."""
  match = headline.matchup_of(contender)
  is_baseline = any(one.baseline is contender for one in headline.matchups)
  if match is None and not is_baseline and not contender.diverged:
    return None
  group = (contender.best.row if contender.best else contender.family[0]).group
  value = 0.0 if is_baseline else None
  return Estimate(
    label=contender.label,
    note=_note(contender, match, is_baseline=is_baseline),
    layer_list=source.runs[group.runs[0]].layer_list,
    value=value if match is None else match.loss.mean,
    interval=None if match is None else match.loss.interval,
    points=() if match is None else match.pairs,
    style=group.style,
    runs=group.runs,
    marked=contender.at_edge,
  )


def _note(contender: Contender, match: Matchup | None, *, is_baseline: bool) -> str:
  """What stands below a row's name."""
  if contender.best is None:
    return f"{contender.diverged} runs diverged"
  words = []
  if is_baseline:
    words.append("baseline")
  if contender.rate:
    mark = {"lower edge": "◂ ", "upper edge": "▸ "}.get(contender.best.place, "")
    words.append(f"{mark}lr {contender.rate}")
  n = match.loss.n if match else contender.best.row.counted
  words.append(_seeds(n))
  if contender.best.row.diverged:
    words.append(f"{contender.best.row.diverged} diverged")
  return ", ".join(words)

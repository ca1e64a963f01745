"""Losses on several corpora: that of the training, and others that the model was not trained on."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from mixln_jax.reporting.comparison import compare, spread
from mixln_jax.reporting.groups import SEED_FIELDS, seeds_of
from mixln_jax.reporting.loading import ReportedRun
from mixln_jax.reporting.numbers import fixed
from mixln_jax.reporting.tables import TextTable, difference_cells, mean_and_std


class Evaluated(NamedTuple):
  """A placement whose runs were evaluated, and those of the baseline that it is compared with (none: it is one)."""

  label: str
  runs: Sequence[ReportedRun]
  baseline: Sequence[ReportedRun] = ()


class Corpus(NamedTuple):
  """What was evaluated: losses of other records, or of another part of them, can't be compared.

  Attributes:
    source: as config.data.source names it.
    fingerprint: of its records; None where an earlier version did not write it.
    tokens: of the validation.
  """

  source: str
  fingerprint: str | None
  tokens: float | None

  @property
  def in_words(self) -> str:
    """What tells it from others of the same source."""
    tokens = "unknown" if self.tokens is None else f"{self.tokens:,.0f}"
    return f"fingerprint {str(self.fingerprint)[:12]}, {tokens} tokens"


def _corpora(run: ReportedRun) -> list[Corpus]:
  """Those that a run was evaluated on."""
  return [Corpus(source, found.get("fingerprint"), found.get("tokens")) for source, found in run.corpora.items()]


def corpora_table(rows: Iterable[Evaluated]) -> TextTable | None:
  """A row for each placement and corpus; None where no run was evaluated on several corpora."""
  rows = list(rows)
  corpora = list(dict.fromkeys(corpus for row in rows for run in row.runs for corpus in _corpora(run)))
  if not corpora:
    return None
  times = collections.Counter(corpus.source for corpus in corpora)
  body, data = [], []
  for corpus in corpora:
    source = corpus.source
    name = source if times[source] == 1 else f"{source}, {corpus.in_words}"
    for row in rows:
      losses, bits = _values(row.runs, corpus, "loss"), _values(row.runs, corpus, "bits_per_byte")
      if losses.empty:
        continue
      compared = compare(losses, _values(row.baseline, corpus, "loss"))
      where = _where(row.runs, source)
      loss, bits_mean = spread(losses), spread(bits).mean if len(bits) else None
      cells = (*difference_cells(compared.difference if compared else None), mean_and_std(loss), fixed(bits_mean, 4))
      body.append((row.label, f"{name} ({where})", *cells, str(loss.n)))
      low, high = (compared.difference.interval or (None, None)) if compared else (None, None)
      data.append(
        {
          "placement": row.label,
          "corpus": source,
          "fingerprint": corpus.fingerprint,
          "tokens": corpus.tokens,
          "trained_on": where == TRAINED,
          "loss_mean": loss.mean,
          "loss_std": loss.std,
          "bits_per_byte_mean": bits_mean,
          "loss_difference": compared.difference.mean if compared else None,
          "loss_low": low,
          "loss_high": high,
          "seeds": loss.n,
        }
      )
  note = (
    "Loss in nats a token on the validation set of each corpus, cut by the tokenizer of the run; across corpora only "
    "bits a byte can be compared. Differences from the baseline are paired by seed, with Student’s 95 % interval. Of "
    "runs that `evaluate` was given several corpora for, at the step of their newest such evaluation."
  )
  headers = ("placement", "corpus", "loss − baseline’s", "95 % interval", "loss (nats)", "bits a byte", "seeds")
  return TextTable("corpora", "On several corpora", headers, body, data, note)


TRAINED, OTHER = "trained on it", "not trained on it"


def _where(runs: Sequence[ReportedRun], source: str) -> str:
  return TRAINED if all(run.config.get("data.source") == source for run in runs) else OTHER


def _values(runs: Sequence[ReportedRun], corpus: Corpus, name: str) -> pd.Series:
  """A metric of each run on a corpus, by seeds; of runs with equal seeds the first counts."""
  values: dict[tuple[Any, ...], float] = {}
  for run in runs:
    value = run.corpora[corpus.source].get(name) if corpus in _corpora(run) else None
    if isinstance(value, (int, float)):
      values.setdefault(seeds_of(run), float(value))
  if not values:
    return pd.Series(dtype=float)
  return pd.Series(list(values.values()), pd.MultiIndex.from_tuples(list(values), names=SEED_FIELDS), dtype=float)

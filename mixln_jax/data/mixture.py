"""A weighted mixture of several folders of records."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mixln_jax.data.records import Corpus, Manifest, Record, Split, open_corpus
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.errors import InputError
from mixln_jax.files import local_path

SMALLEST_FRACTION = 1e-4  # of the records; grain draws fractions down to this one correctly (measured)


class Mixture:
  """Training records drawn from each corpus in proportion to its weight, which grain rounds to about 0.01."""

  def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float]):
    """Raises InputError if the corpora differ in tokenizer, length or mode."""
    self._corpora, self._weights = list(corpora), _fractions(weights)
    first = corpora[0].manifest
    for corpus in corpora[1:]:
      for name in ("tokenizer_sha256", "sequence_length", "mode"):
        theirs, ours = getattr(corpus.manifest, name), getattr(first, name)
        if theirs != ours:
          raise InputError(
            f"config.data.mixture: {corpus.folder} has {name} {theirs!r}, {corpora[0].folder} has {ours!r}; prepare "
            f"both with the same {name}"
          )

  @property
  def folder(self) -> Path:
    """The parent of the first corpus's folder."""
    return self._corpora[0].folder.parent

  @property
  def tokenizer(self) -> Tokenizer:
    return self._corpora[0].tokenizer

  @property
  def manifest(self) -> Manifest:
    """The manifest of the mixture; its fingerprint depends on the corpora's fingerprints and on the weights."""
    manifests = [corpus.manifest for corpus in self._corpora]
    parts = []
    for manifest, weight in zip(manifests, self._weights, strict=True):
      parts.append(f"{manifest.fingerprint} {weight!r}")
    splits = {}
    for name in manifests[0].splits:
      splits[name] = Split.merged([manifest.splits[name] for manifest in manifests])
    return dataclasses.replace(
      manifests[0],
      source=",".join(str(corpus.folder) for corpus in self._corpora),
      source_sha256=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
      splits=splits,
    )

  def rows(self, split: str) -> grain.MapDataset[Record]:
    """The records of all corpora. Validation sets are interleaved, so that a token limit takes all in proportion."""
    if split == "validation":
      source: Any = _Interleaved([corpus.rows(split) for corpus in self._corpora])
      return grain.MapDataset.source(source)
    return grain.MapDataset.concatenate([corpus.rows(split) for corpus in self._corpora])

  def training(self, seed: int) -> grain.MapDataset[Record]:
    """Endless training records; the n-th is a function of the seed and n."""
    # Each corpus repeats in its own epochs, so that none runs out, and has its own seed, so that two copies of a corpus
    # are drawn in different orders.
    endless = [corpus.training((seed + index) % 2**32) for index, corpus in enumerate(self._corpora)]
    return grain.MapDataset.mix(endless, weights=self._weights)


def _fractions(weights: Sequence[float]) -> list[float]:
  """Weights as fractions of their sum.

  Raises:
    InputError: one is so small beside the others that no record would ever be drawn from its corpus.
  """
  total = sum(weights)
  if math.isinf(total):
    return _fractions([weight / max(weights) for weight in weights])
  fractions = [weight / total for weight in weights]
  for weight, fraction in zip(weights, fractions, strict=True):
    if fraction < SMALLEST_FRACTION:
      raise InputError(
        f"config.data.mixture: weight {weight:g} is {fraction:.1e} of all, and at least {SMALLEST_FRACTION:g} is "
        "needed for its corpus to be drawn from; raise it, or leave the corpus out"
      )
  return fractions


class _Interleaved:
  """Several datasets as one, each spread evenly over the whole."""

  def __init__(self, datasets: Sequence[grain.MapDataset[Record]]):
    self._datasets = list(datasets)
    sizes = [len(dataset) for dataset in datasets]
    which = np.repeat(np.arange(len(datasets)), sizes)
    row = np.concatenate([np.arange(size) for size in sizes])
    fraction = (row + 0.5) / np.repeat(sizes, sizes)  # how far into its own dataset each row is
    order = np.argsort(fraction, kind="stable")
    self._which, self._row = which[order], row[order]

  def __len__(self) -> int:
    return len(self._which)

  def __getitem__(self, index: int) -> Any:
    return self._datasets[self._which[index]][int(self._row[index])]


def open_mixture(mixture: str, *, verify: bool) -> Mixture:
  """The mixture that `config.data.mixture` describes: `FOLDER:WEIGHT,FOLDER:WEIGHT`.

  Raises:
    InputError: the mixture is malformed, or a folder can't be used.
  """
  folders, weights = [], []
  for entry in mixture.split(","):
    folder, _, weight = entry.strip().rpartition(":")
    malformed = InputError(
      f"config.data.mixture: {entry.strip()!r} must be FOLDER:WEIGHT with a weight above 0, as in work/data/a:0.7"
    )
    try:
      number = float(weight)
    except ValueError as error:
      raise malformed from error
    if not folder or not 0 < number < float("inf"):
      raise malformed
    folders.append(local_path(folder))
    weights.append(number)
  return Mixture([open_corpus(folder, verify=verify) for folder in folders], weights)

"""Several folders of records as one, mixed by weight."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mixln_jax.data.records import Corpus, Manifest, Record, Split, open_corpus
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.errors import InputError


class Mixture:
  """Training records drawn from each corpus in proportion to its weight (which grain rounds to about a hundredth)."""

  def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float]):
    """Raises InputError where the corpora differ in tokenizer, length or mode."""
    self._corpora, self._weights = list(corpora), [weight / sum(weights) for weight in weights]
    first = corpora[0].manifest
    for corpus in corpora[1:]:
      for name in ("tokenizer_sha256", "sequence_length", "mode"):
        theirs, ours = getattr(corpus.manifest, name), getattr(first, name)
        if theirs != ours:
          raise InputError(
            f"config.data.mixture: {corpus.folder} has {name} {theirs!r}, {corpora[0].folder} has {ours!r}; prepare "
            "them alike"
          )

  @property
  def folder(self) -> Path:
    return self._corpora[0].folder.parent

  @property
  def tokenizer(self) -> Tokenizer:
    return self._corpora[0].tokenizer

  @property
  def manifest(self) -> Manifest:
    """The facts of the whole; its fingerprint depends on each corpus's and on the weights."""
    parts = [
      f"{corpus.manifest.fingerprint} {weight!r}" for corpus, weight in zip(self._corpora, self._weights, strict=True)
    ]
    return dataclasses.replace(
      self._corpora[0].manifest,
      source=",".join(str(corpus.folder) for corpus in self._corpora),
      source_sha256=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
      splits={name: self._split(name) for name in self._corpora[0].manifest.splits},
    )

  def _split(self, name: str) -> Split:
    splits = [corpus.manifest.splits[name] for corpus in self._corpora]
    return Split(
      documents=sum(split.documents for split in splits),
      tokens=sum(split.tokens for split in splits),
      counted=sum(split.counted for split in splits),
      largest_id=max(split.largest_id for split in splits),
      shards=tuple(shard for split in splits for shard in split.shards),
    )

  def rows(self, split: str) -> grain.MapDataset[Record]:
    """The records of all corpora; validation sets are interleaved, so that a token limit sees all in proportion."""
    if split == "validation":
      source: Any = _Interleaved([corpus.rows(split) for corpus in self._corpora])
      return grain.MapDataset.source(source)
    return grain.MapDataset.concatenate([corpus.rows(split) for corpus in self._corpora])

  def training(self, seed: int) -> grain.MapDataset[Record]:
    # Each repeats by its own epochs, so none runs out; a seed of its own keeps two equal corpora apart.
    endless = [corpus.training((seed + index) % 2**32) for index, corpus in enumerate(self._corpora)]
    return grain.MapDataset.mix(endless, weights=self._weights)


class _Interleaved:
  """Several datasets as one, each spread evenly over the whole."""

  def __init__(self, datasets: Sequence[grain.MapDataset[Record]]):
    self._datasets = list(datasets)
    at = [(np.arange(len(dataset)) + 0.5) / len(dataset) for dataset in datasets]
    which = np.concatenate([np.full(len(dataset), index) for index, dataset in enumerate(datasets)])
    row = np.concatenate([np.arange(len(dataset)) for dataset in datasets])
    order = np.argsort(np.concatenate(at), kind="stable")
    self._which, self._row = which[order], row[order]

  def __len__(self) -> int:
    return len(self._which)

  def __getitem__(self, index: int) -> Any:
    return self._datasets[self._which[index]][int(self._row[index])]


def open_mixture(mixture: str, *, verify: bool) -> Mixture:
  """The mixture that `config.data.mixture` describes: `FOLDER:WEIGHT,FOLDER:WEIGHT`.

  Raises:
    InputError: it is malformed, or a folder can't be used.
  """
  folders, weights = [], []
  for entry in mixture.split(","):
    folder, _, weight = entry.strip().rpartition(":")
    try:
      weights.append(float(weight))
    except ValueError:
      weights.append(-1.0)
    if not folder or not 0 < weights[-1] < float("inf"):
      raise InputError(
        f"config.data.mixture: {entry.strip()!r} must be FOLDER:WEIGHT with a weight above 0, as in work/data/a:0.7"
      )
    folders.append(Path(folder).expanduser())
  return Mixture([open_corpus(folder, verify=verify) for folder in folders], weights)

"""Documents that are tokenized while training: no prepared records."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import tokenizer as tokenizer_lib
from mixln_jax.data.corpus import Document
from mixln_jax.data.records import Manifest, Padder, Record, Split, named_tokenizer
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.errors import InputError

_opening = threading.Lock()  # a worker's threads all come at once, and neither library bears that
SAMPLED = 64  # documents that the fingerprint looks at: hashing all would be preparing


class Texts:
  """The documents of a tfds or hf source by number; opened in each worker for itself."""

  def __init__(self, source: str, text_field: str):
    self.source, self._text_field = source, text_field
    self._examples: Any = None
    kind, _, rest = source.partition(":")
    name, _, split = rest.rpartition(":")
    if kind not in ("tfds", "hf") or not name:
      raise InputError(
        f"config.data.on_the_fly: {source!r} is not addressed by number; give tfds:NAME:SPLIT or hf:NAME:SPLIT, or "
        "prepare its records"
      )
    self._place = kind, name, split

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_examples": None}

  def _open(self) -> Any:
    with _opening:
      if self._examples is None:
        self._examples = corpus_lib.examples(*self._place)
    return self._examples

  def __len__(self) -> int:
    return len(self._open())

  def __getitem__(self, index: int) -> str:
    """A document's text; empty where it can't be used."""
    example = self._open()[index]
    if self._text_field not in example:
      raise InputError(f"config.data.text_field={self._text_field!r}: {self.source} has {', '.join(example)}")
    document = corpus_lib.document_of(example[self._text_field], self.source)
    return document.text if isinstance(document, Document) else ""


class _Tokenize:
  """Text to a padded record; the tokenizer is made in each worker for itself."""

  def __init__(self, name: str, content: bytes, sequence_length: int):
    self._name, self._content, self._length = name, content, sequence_length
    self._tokenizer: Tokenizer | None = None

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_tokenizer": None}

  def __call__(self, text: str) -> Record:
    if self._tokenizer is None:
      self._tokenizer = tokenizer_lib.load_tokenizer(self._name, self._content, "of the run")
    ids = [*self._tokenizer.encode(text), self._tokenizer.eos_id] if text else []
    (record,) = Padder(self._length, tokenizer_lib.PAD).add(ids)
    return record._replace(tokens=record.tokens.astype(np.int32))


class OnTheFly:
  """The documents of config.data as padded records, one each; a document that can't be used counts for nothing."""

  def __init__(self, config: Any):
    """Raises InputError where a source or the tokenizer can't be used."""
    data = config.data
    if not data.validation_source:
      raise InputError(
        "config.data.validation_source is needed with config.data.on_the_fly, as in tfds:c4/en:validation"
      )
    if data.validation_source == data.source:
      raise InputError(f"config.data.validation_source={data.source!r} is the training data; give another split")
    if data.tokenizer == tokenizer_lib.SENTENCEPIECE:
      raise InputError(
        "config.data.tokenizer=sentencepiece is trained by `prepare`; with config.data.on_the_fly give a path or bytes"
      )
    self.tokenizer = named_tokenizer(data.tokenizer)
    self._texts = {
      "train": Texts(data.source, data.text_field),
      "validation": Texts(data.validation_source, data.text_field),
    }
    self._length, self._max_bad_share = data.sequence_length, data.max_bad_share
    self.folder = Path(data.source)
    self.manifest = self._manifest(data)

  def _manifest(self, data: Any) -> Manifest:
    splits = {name: Split(len(texts), 0, 0, 0, ()) for name, texts in self._texts.items()}
    return Manifest(
      source=data.source,
      validation_source=data.validation_source,
      validation_share=data.validation_share,
      text_field=data.text_field,
      tokenizer_source=data.tokenizer,
      source_sha256=hashlib.sha256(
        json.dumps([self._sample(texts) for texts in self._texts.values()]).encode()
      ).hexdigest(),
      skipped={},
      tokenizer=self.tokenizer.name,
      tokenizer_sha256=tokenizer_lib.content_hash(self.tokenizer),
      vocab_size=self.tokenizer.vocab_size,
      sequence_length=self._length,
      mode="pad",
      bytes_per_token=tuple(self.tokenizer.bytes_per_token()),
      splits=splits,
    )

  def _sample(self, texts: Texts) -> list[Any]:
    """How many documents there are, and some of them, evenly spread."""
    if not len(texts):
      raise InputError(f"{texts.source}: the corpus is empty")
    chosen = np.unique(np.linspace(0, len(texts) - 1, SAMPLED).astype(int))
    sample = [texts[int(index)] for index in chosen]
    bad = sample.count("")
    if bad > max(1, self._max_bad_share * len(sample)):
      raise InputError(
        f"{texts.source}: {bad} of {len(sample)} sampled documents can't be used, more than config.data.max_bad_share="
        f"{self._max_bad_share:g} allows; mend the data set, name another config.data.text_field, or raise it"
      )
    return [len(texts), *sample]

  def rows(self, split: str) -> grain.MapDataset[Record]:
    source: Any = self._texts[split]
    tokenize = _Tokenize(self.tokenizer.name, self.tokenizer.content, self._length)
    return grain.MapDataset.source(source).map(tokenize)

  def training(self, seed: int) -> grain.MapDataset[Record]:
    return self.rows("train").seed(seed).shuffle().repeat()

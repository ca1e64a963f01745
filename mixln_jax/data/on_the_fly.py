"""Documents that are tokenized during training: no prepared records."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mixln_jax.config import DataConfig
from mixln_jax.data import addressed
from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import tokenizer as tokenizer_lib
from mixln_jax.data.corpus import Document
from mixln_jax.data.records import Manifest, Padder, Record, Split, named_tokenizer
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.data.tokenizer_files import load_tokenizer
from mixln_jax.errors import InputError

_opening = threading.Lock()  # the threads of a worker all start at once; neither library can open a data set twice then
SAMPLED = 64  # documents that the fingerprint depends on: hashing all of them would take as long as `prepare`


class Texts:
  """The documents of a tfds or hf source by number; each worker opens the source for itself."""

  def __init__(self, source: str, text_field: str):
    self.source, self._text_field = source, text_field
    self._examples: Any = None
    address = addressed.address_of(source)
    if address is None:
      raise InputError(
        f"config.data.on_the_fly: {source!r} is not addressed by number; give tfds:NAME:SPLIT or hf:NAME:SPLIT, or "
        "prepare its records"
      )
    self.address = address

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_examples": None}

  def _open(self) -> Any:
    with _opening:
      if self._examples is None:
        self._examples = addressed.open_examples(self.address, self._text_field)
    return self._examples

  def __len__(self) -> int:
    return len(self._open())

  def __getitem__(self, index: int) -> str:
    """The text of a document; empty if it can't be used."""
    example = self._open()[index]
    text = corpus_lib.field_of(example, self._text_field)
    if text is corpus_lib.ABSENT:
      raise InputError(
        f"config.data.text_field={self._text_field!r}: {self.source} has no such field; "
        f"{corpus_lib.named_texts(example)}"
      )
    document = corpus_lib.document_of(text, self.source)
    return document.text if isinstance(document, Document) else ""


class _Tokenize:
  """Converts a text to a padded record; each worker process loads the tokenizer by itself."""

  def __init__(self, tokenizer: Tokenizer, sequence_length: int):
    self._arguments = (tokenizer.name, tokenizer.content, "of the run", tokenizer.end_token)
    self._length = sequence_length
    self._tokenizer: Tokenizer | None = None

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_tokenizer": None}

  def __call__(self, text: str) -> Record:
    if self._tokenizer is None:
      self._tokenizer = load_tokenizer(*self._arguments)
    ids = [*self._tokenizer.encode(text), self._tokenizer.eos_id] if text else []
    (record,) = Padder(self._length, tokenizer_lib.PAD).add(ids)
    return record._replace(tokens=record.tokens.astype(np.int32))


class OnTheFly:
  """The documents of config.data as padded records, one per document; an unusable document becomes an empty record."""

  def __init__(self, data: DataConfig):
    """Raises InputError if a source or the tokenizer can't be used."""
    if not data.validation_source:
      raise InputError(
        "config.data.validation_source is required with config.data.on_the_fly, as in tfds:c4/en:validation"
      )
    if data.tokenizer == tokenizer_lib.SENTENCEPIECE:
      raise InputError(
        "config.data.tokenizer=sentencepiece is trained by `prepare`; with config.data.on_the_fly give a path or bytes"
      )
    self.tokenizer = named_tokenizer(data.tokenizer)
    self._texts = {
      "train": Texts(data.source, data.text_field),
      "validation": Texts(data.validation_source, data.text_field),
    }
    shared = addressed.overlap(self._texts["train"].address, self._texts["validation"].address)
    if shared is not None:
      raise InputError(
        f"config.data.validation_source={data.validation_source!r} has {shared}, which is training data; give another "
        "split"
      )
    self._length, self._max_bad_share = data.sequence_length, data.max_bad_share
    self.folder = Path(data.source)  # not a folder, but the name in messages
    self.manifest = self._manifest(data)

  def _manifest(self, data: DataConfig) -> Manifest:
    # Only the documents are known; their tokens are never counted.
    splits = {
      name: Split(documents=len(texts), tokens=0, counted=0, largest_id=0, shards=())
      for name, texts in self._texts.items()
    }
    samples = [self._sample(texts) for texts in self._texts.values()]
    return Manifest(
      source=data.source,
      validation_source=data.validation_source,
      validation_share=data.validation_share,
      text_field=data.text_field,
      tokenizer_source=data.tokenizer,
      source_sha256=hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
      skipped={},
      tokenizer=self.tokenizer.name,
      tokenizer_sha256=tokenizer_lib.content_hash(self.tokenizer),
      vocab_size=self.tokenizer.vocab_size,
      sequence_length=self._length,
      mode="pad",
      bytes_per_token=tuple(self.tokenizer.bytes_per_token()),
      splits=splits,
      end_token=self.tokenizer.end_token,
    )

  def _sample(self, texts: Texts) -> list[Any]:
    """The number of documents, and SAMPLED of them, evenly spaced.

    Raises:
      InputError: there are none, or too many of them can't be used.
    """
    if not len(texts):
      raise InputError(f"{texts.source}: the corpus is empty")
    chosen = np.unique(np.linspace(0, len(texts) - 1, SAMPLED).astype(int))
    sample = [texts[int(index)] for index in chosen]
    bad = sample.count("")
    if bad > max(1, self._max_bad_share * len(sample)):
      raise InputError(
        f"{texts.source}: {bad} of {len(sample)} sampled documents can't be used, more than config.data.max_bad_share="
        f"{self._max_bad_share:g} allows; repair the data set, choose another config.data.text_field, or raise the "
        "limit"
      )
    return [len(texts), *sample]

  def rows(self, split: str) -> grain.MapDataset[Record]:
    """The documents of a split as records, in their order."""
    source: Any = self._texts[split]
    tokenize = _Tokenize(self.tokenizer, self._length)
    return grain.MapDataset.source(source).map(tokenize)

  def training(self, seed: int) -> grain.MapDataset[Record]:
    """Endless training records, in a new order each epoch; the n-th is a function of the seed and n."""
    return self.rows("train").seed(seed).shuffle().repeat()

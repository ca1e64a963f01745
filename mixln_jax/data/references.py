"""What a reference model makes of records of pairs: a number for each document, stored beside the records.

A loss such as DPO compares a model with the one that it starts from. The log-probabilities of that one never change, so
they are computed once and written to `references-WEIGHTS-MODEL.safetensors` in the folder of the records. WEIGHTS is
the hash of the start checkpoint's weights, and MODEL that of what the model makes of them: runs of two placements can
start from equal bits. The file says itself which weights, model and records it is of.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from mixln_jax.config import FIELDS, FREE, ModelConfig
from mixln_jax.data.records import SPLITS, Corpus
from mixln_jax.errors import InputError, one_line
from mixln_jax.files import write_whole

MEANING = "log probability of each document's answer under the reference, nats"


class Reference(NamedTuple):
  """Which model log-probabilities are of.

  Attributes:
    weights: hash of the start checkpoint's weights.
    model: hash of the config's model (`model_hash`); empty in a file that was written before this was stored.
  """

  weights: str
  model: str = ""


def model_hash(model: ModelConfig) -> str:
  """Of the fields of config.model that decide what it computes from given weights.

  Fields with their default are left out, so that a field that a later version adds changes no hash.
  """
  fields = {}
  for name, value in model.items():
    field = FIELDS[f"model.{name}"]
    if field.on_resume != FREE and value != field.default:
      fields[name] = value
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def file_of(folder: Path, reference: Reference) -> Path:
  """Where the log-probabilities of a reference lie."""
  words = [re.sub(r"[^0-9a-zA-Z]", "_", word) for word in reference if word]
  return folder / f"references-{'-'.join(words)}.safetensors"


def with_stored(corpus: Corpus, reference: Reference) -> Corpus | None:
  """The corpus with the references that are stored for it; None where there are none.

  Args:
    corpus: records of pairs.
    reference: which model they are of.

  Raises:
    InputError: the file is damaged, or is of other weights, another model or other records than its place says.
  """
  path = file_of(corpus.folder, reference)
  if not path.exists():
    return None
  expected = _facts(corpus, reference)
  try:
    with safetensors.safe_open(path, "numpy") as file:
      facts = file.metadata() or {}
      references = {split: file.get_tensor(split) for split in SPLITS}
  except (OSError, safetensors.SafetensorError) as error:
    raise _unusable(path, f"can't be read ({one_line(error)})") from error
  for name, value in expected.items():
    if facts.get(name) != value:
      raise _unusable(path, f"its {name.replace('_', ' ')} is {facts.get(name)!r} and not {value!r}")
  for split, numbers in references.items():
    records = corpus.manifest.splits[split].records
    if numbers.ndim != 2 or len(numbers) != records or numbers.dtype != np.float32 or not np.isfinite(numbers).all():
      raise _unusable(path, f"holds no finite numbers for the {records} {split} records")
  return corpus._replace(references=references)


def store(corpus: Corpus, reference: Reference, references: Mapping[str, np.ndarray]) -> Corpus:
  """Writes references, whole or not at all; returns the corpus with them.

  Args:
    corpus: records of pairs.
    reference: which model computed them.
    references: of each split [records, documents of a record], fp32; zeros behind a record's last document.

  Raises:
    InputError: they can't be written.
  """
  path = file_of(corpus.folder, reference)
  content = safetensors.numpy.save(dict(references), _facts(corpus, reference))
  try:
    write_whole(path, content)
  except OSError as error:
    raise InputError(
      f"{path}: can't be written ({error.strerror}); make room, or copy the records to where files can be written"
    ) from error
  return corpus._replace(references=dict(references))


def _facts(corpus: Corpus, reference: Reference) -> dict[str, str]:
  facts = {"meaning": MEANING, "start_checkpoint": reference.weights, "records": corpus.manifest.fingerprint}
  return facts | {"model": reference.model} if reference.model else facts


def _unusable(path: Path, problem: str) -> InputError:
  return InputError(f"{path}: {problem}; remove it, and it is computed again from the start checkpoint")

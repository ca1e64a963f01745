"""What a reference model makes of records of pairs: a number for each document, stored beside the records.

A loss such as DPO compares a model with the one that it starts from. The log-probabilities of that one never change, so
they are computed once and written to `references-HASH.safetensors` in the folder of the records, where HASH is that of
the start checkpoint's weights. The file says itself which weights and which records it is of.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from mixln_jax.data.records import SPLITS, Corpus
from mixln_jax.errors import InputError, one_line
from mixln_jax.files import write_whole

MEANING = "log probability of each document's answer under the reference, nats"


def file_of(folder: Path, start_hash: str) -> Path:
  """Where the references of a start checkpoint lie."""
  return folder / f"references-{re.sub(r'[^0-9a-zA-Z]', '_', start_hash)}.safetensors"


def with_stored(corpus: Corpus, start_hash: str) -> Corpus | None:
  """The corpus with the references that are stored for it; None where there are none.

  Args:
    corpus: records of pairs.
    start_hash: of the weights of the start checkpoint.

  Raises:
    InputError: the file is damaged, or is of other weights or records than its place says.
  """
  path = file_of(corpus.folder, start_hash)
  if not path.exists():
    return None
  expected = _facts(corpus, start_hash)
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


def store(corpus: Corpus, start_hash: str, references: Mapping[str, np.ndarray]) -> Corpus:
  """Writes references, whole or not at all; returns the corpus with them.

  Args:
    corpus: records of pairs.
    start_hash: of the weights that computed them.
    references: of each split [records, documents of a record], fp32; zeros behind a record's last document.

  Raises:
    InputError: they can't be written.
  """
  path = file_of(corpus.folder, start_hash)
  content = safetensors.numpy.save(dict(references), _facts(corpus, start_hash))
  try:
    write_whole(path, content)
  except OSError as error:
    raise InputError(
      f"{path}: can't be written ({error.strerror}); make room, or copy the records to where files can be written"
    ) from error
  return corpus._replace(references=dict(references))


def _facts(corpus: Corpus, start_hash: str) -> dict[str, str]:
  return {"meaning": MEANING, "start_checkpoint": start_hash, "records": corpus.manifest.fingerprint}


def _unusable(path: Path, problem: str) -> InputError:
  return InputError(f"{path}: {problem}; remove it, and it is computed again from the start checkpoint")

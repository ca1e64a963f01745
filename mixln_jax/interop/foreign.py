"""Opens another project's weights in any supported form.

The result has the tensors by the names that `hf.import_weights` expects, the matching fields of config.model, and the
facts that a run records about them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixln_jax.data.gguf_file import GgufFile
from mixln_jax.data.gguf_tokenizer import gguf_tokenizer
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.data.tokenizer_files import GGUF
from mixln_jax.errors import InputError
from mixln_jax.interop import bert, hf
from mixln_jax.interop.gguf_weights import GgufWeights
from mixln_jax.interop.safetensors_folder import SafetensorsFolder


class Foreign(NamedTuple):
  """Another project's weights.

  Attributes:
    tensors: by name; each is read when it is accessed.
    fields: the matching fields of config.model.
    facts: where the weights come from and how they were stored, for the run's folder.
    tokenizer: the tokenizer inside the weights' file; None if there is none (it may be a file beside them).
    notes: lines to show to the user.
  """

  tensors: Mapping[str, np.ndarray]
  fields: dict[str, Any]
  facts: dict[str, Any]
  tokenizer: Tokenizer | None = None
  notes: tuple[str, ...] = ()


def open_foreign(source: Path, placement: str | None = None) -> Foreign:
  """Opens a GGUF file, or a folder of safetensors.

  Args:
    source: the file or folder.
    placement: the norm placement, if the weights' own config does not state it.

  Raises:
    InputError: the weights can't be read, or are of an unsupported model.
  """
  if source.suffix == GGUF:
    weights = GgufWeights(GgufFile(source))
    fields = hf.model_fields(weights.config(), placement)
    return Foreign(weights, fields, weights.facts(), gguf_tokenizer(weights.file), (weights.storage(),))
  folder = SafetensorsFolder(source)
  config = folder.config()
  facts = {"folder": folder.path.name, "model_type": config.get("model_type"), "quantized": False}
  if config.get("model_type") != bert.TYPE:
    return Foreign(folder, hf.model_fields(config, placement), facts)
  tensors = bert.BertWeights(folder)
  fields = bert.model_fields(config, masked_head=tensors.has_masked_head)
  if placement not in (None, fields["placement"]):
    raise InputError(f"placement={placement!r}: a BERT has {fields['placement']!r}; leave placement out")
  facts |= {"masked_head": tensors.has_masked_head}
  return Foreign(tensors, fields, facts, notes=() if tensors.has_masked_head else (bert.NO_HEAD,))

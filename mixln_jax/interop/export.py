"""The files that go with exported weights: the modelling file of the official layout, and the tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mixln_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from mixln_jax.interop import hf


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
  """What config.json says of special tokens: no token begins a document, and this one ends it."""
  return {"bos_token_id": None, "eos_token_id": tokenizer.eos_id}


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
  """The files that `AutoTokenizer` reads, by name; none for bytes, which it can't describe.

  Of a SentencePiece model that is not like ours (byte-pair encoding of the text as it stands) only the model is
  written, for `sentencepiece` to read: transformers would build another tokenizer of it.

  Args:
    tokenizer: of the run.
    max_length: tokens that the model was trained on at a time.
  """
  described = {"model_max_length": max_length, "clean_up_tokenization_spaces": False}
  if isinstance(tokenizer, HuggingFaceTokenizer):
    files = {"tokenizer.json": tokenizer.content}
    described |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos_token}
  elif isinstance(tokenizer, SentencePieceTokenizer):
    files = {"tokenizer.model": tokenizer.content}
    if not _takes_text_as_it_stands(tokenizer.content):
      return files
    described |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False}
    described |= {"add_bos_token": False, "bos_token": None, "eos_token": "</s>", "unk_token": "<unk>"}
  else:
    return {}
  return files | {"tokenizer_config.json": (json.dumps(described, indent=1) + "\n").encode()}


def _takes_text_as_it_stands(content: bytes) -> bool:
  model = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
  normalizer, pieces = model.normalizer_spec, model.pieces
  names = {pieces[index].piece for index in (model.trainer_spec.eos_id, model.trainer_spec.unk_id)}
  plain = normalizer.name == "identity" and not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
  return plain and model.trainer_spec.model_type == model.trainer_spec.BPE and names == {"</s>", "<unk>"}


def modeling_files(config: Mapping[str, Any]) -> dict[str, bytes]:
  """The modelling file that a config.json names, by name; empty where transformers has the model itself."""
  return {hf.MODELING.name: hf.MODELING.read_bytes()} if config["model_type"] == hf.OFFICIAL_TYPE else {}

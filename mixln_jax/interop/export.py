"""The files beside exported weights: the modelling file of the official layout, and the tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mixln_jax.data.tokenizer import CONFIG as TOKENIZER_CONFIG
from mixln_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from mixln_jax.interop import hf


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
  """The special tokens for config.json: no token begins a document, and `eos_token_id` ends it."""
  return {"bos_token_id": None, "eos_token_id": tokenizer.eos_id}


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
  """The files that `AutoTokenizer` reads, by name; none for the byte tokenizer, which it can't describe.

  A SentencePiece model other than byte-pair encoding without normalisation is written alone, for the `sentencepiece`
  library: transformers would build a different tokenizer from it.

  Args:
    tokenizer: the run's tokenizer.
    max_length: the sequence length that the model was trained on.
  """
  described = {"model_max_length": max_length, "clean_up_tokenization_spaces": False}
  if isinstance(tokenizer, HuggingFaceTokenizer):
    files = {"tokenizer.json": tokenizer.content}
    described |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos_token}
  elif isinstance(tokenizer, SentencePieceTokenizer):
    files = {"tokenizer.model": tokenizer.content}
    if not _is_unnormalized_bpe(tokenizer.content):
      return files
    described |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False}
    described |= {"add_bos_token": False, "bos_token": None, "eos_token": "</s>", "unk_token": "<unk>"}
  else:
    return {}
  return files | {TOKENIZER_CONFIG: (json.dumps(described, indent=1) + "\n").encode()}


def _is_unnormalized_bpe(content: bytes) -> bool:
  """Whether a SentencePiece model is byte-pair encoding that leaves the text as it is, with LLaMA's special tokens."""
  model = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
  normalizer, trainer, pieces = model.normalizer_spec, model.trainer_spec, model.pieces
  plain = normalizer.name == "identity" and not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
  special = {pieces[trainer.eos_id].piece, pieces[trainer.unk_id].piece}
  return plain and trainer.model_type == trainer.BPE and special == {"</s>", "<unk>"}


def modeling_files(config: Mapping[str, Any]) -> dict[str, bytes]:
  """The modelling file that a config.json refers to, by name; empty if transformers itself has the model."""
  if config["model_type"] != hf.OFFICIAL_TYPE:
    return {}
  return {hf.MODELING.name: hf.MODELING.read_bytes()}


def loading_hint(config: Mapping[str, Any], files: Mapping[str, bytes]) -> list[str]:
  """Lines of text that say how to load an exported folder with transformers, and how prompts must begin.

  Generation in this project starts after an end-of-document token, as every document of the training data does. The
  exported tokenizer does not add that token, so that it encodes a text to the same ids as in training.

  Args:
    config: the folder's config.json.
    files: the files beside the weights, by name.
  """
  remote = ", trust_remote_code=True" if hf.MODELING.name in files else ""
  lines = [f"model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER{remote})"]
  if TOKENIZER_CONFIG in files:
    lines.append("tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)")
    lines.append("ids = [tokenizer.eos_token_id, *tokenizer(PROMPT, add_special_tokens=False).input_ids]")
    return [*lines, "(a prompt starts with the end-of-document token, as in training and in `generate`)"]
  eos_id = config.get("eos_token_id")
  number = "" if eos_id is None else f", id {eos_id}"
  return [*lines, f"(a prompt starts with the end-of-document token{number}, as in training and in `generate`)"]

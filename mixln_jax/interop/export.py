"""The files that go with exported weights: the modelling file of the official layout, and the tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mixln_jax.data.tokenizer import CONFIG as TOKENIZER_CONFIG
from mixln_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from mixln_jax.interop import hf


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
  """The special tokens of config.json: no token begins a document, and this one ends it."""
  return {"bos_token_id": None, "eos_token_id": tokenizer.eos_id}


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
  """The files that `AutoTokenizer` reads, by name; none for bytes, which it can't describe.

  A SentencePiece model that is not like ours (byte-pair encoding of the text as it stands) is written alone, for
  `sentencepiece` to read: transformers would build another tokenizer from it.

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
  return files | {TOKENIZER_CONFIG: (json.dumps(described, indent=1) + "\n").encode()}


def _takes_text_as_it_stands(content: bytes) -> bool:
  model = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
  normalizer, trainer, pieces = model.normalizer_spec, model.trainer_spec, model.pieces
  plain = normalizer.name == "identity" and not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
  special = {pieces[trainer.eos_id].piece, pieces[trainer.unk_id].piece}
  return plain and trainer.model_type == trainer.BPE and special == {"</s>", "<unk>"}


def modeling_files(config: Mapping[str, Any]) -> dict[str, bytes]:
  """The modelling file that a config.json names, by name; empty where transformers has the model itself."""
  return {hf.MODELING.name: hf.MODELING.read_bytes()} if config["model_type"] == hf.OFFICIAL_TYPE else {}


def loading_hint(config: Mapping[str, Any], files: Mapping[str, bytes]) -> list[str]:
  """How to load an exported folder with transformers, and how its prompts must begin, as lines for a person.

  Generation here starts after an end-of-document token, as every document of the training data does. The exported
  tokenizer adds none, so that it encodes a text to the ids that the model was trained on.

  Args:
    config: the folder's config.json.
    files: the files that go with the weights, by name.
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

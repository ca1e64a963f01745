"""Converts BERT's weights and config to the layout that `hf.py` imports (arXiv 1810.04805).

The input is a folder of transformers' BertModel or BertForMaskedLM in safetensors: an encoder of any size, with or
without a masked-token head. The pooler and the next-sentence head read only one position and take no part in the
masked-token loss, so they are left out.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mixln_jax.errors import InputError

TYPE = "bert"
LEFT_OUT = ("pooler.", "cls.seq_relationship.", "embeddings.position_ids")
# BERT's name -> the name in LLaMA's layout, as in `model/parameters.py`; for a module, without `.weight` or `.bias`.
OUTSIDE = {
  "embeddings.word_embeddings.weight": "model.embed_tokens.weight",
  "embeddings.position_embeddings.weight": "model.embed_positions.weight",
  "embeddings.token_type_embeddings.weight": "model.embed_token_types.weight",
  "embeddings.LayerNorm": "model.embed_norm",
  "cls.predictions.transform.dense": "head_transform",
  "cls.predictions.transform.LayerNorm": "head_norm",
  "cls.predictions.bias": "lm_head.bias",
  "cls.predictions.decoder.weight": "lm_head.weight",
}
IN_LAYER = {
  "attention.self.query": "self_attn.q_proj",
  "attention.self.key": "self_attn.k_proj",
  "attention.self.value": "self_attn.v_proj",
  "attention.output.dense": "self_attn.o_proj",
  "attention.output.LayerNorm": "post_attention_layernorm",
  "intermediate.dense": "mlp.up_proj",
  "output.dense": "mlp.down_proj",
  "output.LayerNorm": "post_feedforward_layernorm",
}
OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # in LayerNorms of checkpoints converted from TensorFlow
BIAS, BIAS_COPY = "cls.predictions.bias", "cls.predictions.decoder.bias"
# Options of its config.json that this model lacks, and the values with which they have no effect.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  "hidden_act": ("gelu", None),
  "position_embedding_type": ("absolute", None),
  "is_decoder": (False, None),
  "add_cross_attention": (False, None),
  "embedding_size": (None,),
}


NO_HEAD = (
  "the checkpoint has no masked-token head: the embedding is used as the head, so losses mean little until it is "
  "trained"
)


class BertWeights(Mapping[str, np.ndarray]):
  """The tensors of a BERT checkpoint by the names that `hf.import_weights` asks for."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    """
    Args:
      tensors: by BERT's names, with or without the prefix `bert.`; each is read when it is accessed.

    Raises:
      InputError: a tensor has no counterpart in this project's BERT, or the two copies of the logit bias differ.
    """
    self._tensors = tensors
    self._bert_name: dict[str, str] = {}
    for name in tensors:
      plain = name.removeprefix("bert.")
      if plain.startswith(LEFT_OUT) or plain == BIAS_COPY:
        continue
      self._bert_name[_our_name(plain, name)] = name
    if BIAS_COPY in tensors and not np.array_equal(np.asarray(tensors[BIAS_COPY]), np.asarray(tensors.get(BIAS))):
      raise InputError(f"{BIAS_COPY} differs from {BIAS}; a BERT has one bias for each logit")

  @property
  def has_masked_head(self) -> bool:
    """Whether the checkpoint has a masked-token head."""
    return "lm_head.bias" in self

  def __getitem__(self, name: str) -> np.ndarray:
    return self._tensors[self._bert_name[name]]

  def __contains__(self, name: object) -> bool:
    return name in self._bert_name

  def __iter__(self) -> Iterator[str]:
    return iter(self._bert_name)

  def __len__(self) -> int:
    return len(self._bert_name)


def _our_name(plain: str, name: str) -> str:
  if plain in OUTSIDE:
    return OUTSIDE[plain]
  place, _, kind = plain.rpartition(".")
  kind = OLD_NAMES.get(kind, kind)
  if kind in ("weight", "bias"):
    if place in OUTSIDE:
      return f"{OUTSIDE[place]}.{kind}"
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", place)
    if match is not None and match[2] in IN_LAYER:
      return f"model.layers.{match[1]}.{IN_LAYER[match[2]]}.{kind}"
  raise InputError(
    f"{name}: this project's BERT has no such tensor; the checkpoint is of another model, or has another head"
  )


def model_fields(hf: Mapping[str, Any], *, masked_head: bool) -> dict[str, Any]:
  """The fields of config.model that correspond to a BERT's config.json.

  Args:
    hf: the JSON object.
    masked_head: whether the checkpoint has a masked-token head (`BertWeights.has_masked_head`).

  Raises:
    InputError: the config has an unsupported option, or a number is missing or invalid.
  """
  for name, harmless in UNSUPPORTED.items():
    if hf.get(name) not in harmless:
      raise InputError(f"config.json: {name}={hf[name]!r} is not supported; this model has {harmless[0]!r}")
  if hf.get("tie_word_embeddings") is False and masked_head:
    raise InputError("config.json: tie_word_embeddings=False is not supported for a BERT; its head is its embedding")

  def number(name: str) -> int:
    value = hf.get(name)
    if type(value) is not int:
      raise InputError(f"config.json: {name}={value!r} is not a whole number")
    return value

  epsilon = hf.get("layer_norm_eps", 1e-12)
  if type(epsilon) is not float:
    raise InputError(f"config.json: layer_norm_eps={epsilon!r} is not a number")
  return {
    "vocab_size": number("vocab_size"),
    "embed_dim": number("hidden_size"),
    "mlp_dim": number("intermediate_size"),
    "num_layers": number("num_hidden_layers"),
    "num_heads": number("num_attention_heads"),
    "num_kv_heads": 0,
    "head_dim": 0,
    "placement": "post",
    "norm": "layernorm",
    "norm_epsilon": epsilon,
    "rope_scaling": "none",
    "tied_embeddings": True,
    "qkv_bias": True,
    "bidirectional": True,
    "learned_positions": number("max_position_embeddings"),
    "token_types": number("type_vocab_size"),
    "embedding_norm": True,
    "final_norm": False,
    "activation": "gelu",
    "biases": True,
    "head_transform": masked_head,
  }

"""BERT's weights and config in the layout that `hf.py` imports: encoders of any size, with a head for masked tokens or
without one (arXiv 1810.04805).

A folder of transformers' BertModel or BertForMaskedLM in safetensors. The pooler and the head for next sentences, which
read one position alone, have no part in the loss of masked tokens and are left out.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mixln_jax.errors import InputError

TYPE = "bert"
LEFT_OUT = ("pooler.", "cls.seq_relationship.", "embeddings.position_ids")
# Their name -> ours, as `model/parameters.py` has it, of weights and biases.
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
OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of a LayerNorm, in checkpoints that came from TensorFlow
BIAS, BIAS_AGAIN = "cls.predictions.bias", "cls.predictions.decoder.bias"
# Options of its config.json that this model lacks, and the values with which they do nothing here.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  "hidden_act": ("gelu", None),
  "position_embedding_type": ("absolute", None),
  "is_decoder": (False, None),
  "add_cross_attention": (False, None),
  "embedding_size": (None,),
}


NO_HEAD = (
  "the checkpoint has no head for masked tokens: its embedding stands in for one, which says little until it is trained"
)


class BertWeights(Mapping[str, np.ndarray]):
  """The tensors of a BERT checkpoint by the names that `hf.import_weights` asks for."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    """
    Args:
      tensors: by BERT's names, with `bert.` in front or without it; each is read when it is asked for.

    Raises:
      InputError: a tensor has no place here, or the bias of the logits is there twice with two values.
    """
    self._tensors = tensors
    self._name_there: dict[str, str] = {}
    for name in tensors:
      plain = name.removeprefix("bert.")
      if plain.startswith(LEFT_OUT) or plain == BIAS_AGAIN:
        continue
      self._name_there[_our_name(plain, name)] = name
    if BIAS_AGAIN in tensors and not np.array_equal(np.asarray(tensors[BIAS_AGAIN]), np.asarray(tensors.get(BIAS))):
      raise InputError(f"{BIAS_AGAIN} differs from {BIAS}; a BERT has one bias for each logit")

  @property
  def has_masked_head(self) -> bool:
    """Whether there is a head for masked tokens."""
    return "lm_head.bias" in self

  def __getitem__(self, name: str) -> np.ndarray:
    return self._tensors[self._name_there[name]]

  def __contains__(self, name: object) -> bool:
    return name in self._name_there

  def __iter__(self) -> Iterator[str]:
    return iter(self._name_there)

  def __len__(self) -> int:
    return len(self._name_there)


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
  raise InputError(f"{name}: a BERT of this project has no place for it; it is another model, or has another head")


def model_fields(hf: Mapping[str, Any], *, masked_head: bool) -> dict[str, Any]:
  """The fields of config.model that a BERT's config.json stands for.

  Args:
    hf: the JSON object.
    masked_head: whether the checkpoint has a head for masked tokens (`BertWeights.has_masked_head`).

  Raises:
    InputError: it has an option that this model lacks, or lacks a number.
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

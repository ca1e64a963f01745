"""The weights of a GGUF file in Hugging Face's layout, from which `hf.py` imports them.

llama.cpp stores the query and key rows of each head with the two halves that RoPE rotates interleaved: its row 2i is
Hugging Face's row i, and its row 2i + 1 is row i + K/2. This module restores the order.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mixln_jax.data.gguf_file import GgufFile
from mixln_jax.errors import InputError
from mixln_jax.interop.hf import EMBEDDING, HEAD

ARCHITECTURE = "llama"
OUTSIDE = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
IN_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
# Options of this architecture that this model lacks, and the value with which each has no effect.
HARMLESS: Mapping[str, Any] = {
  "expert_count": 0,
  "rope.scaling.type": "none",
  "attention.sliding_window": 0,
  "logit_scale": 1.0,
  "residual_scale": 1.0,
  "embedding_scale": 1.0,
}


class GgufWeights(Mapping[str, np.ndarray]):
  """The tensors of a GGUF file by their names in Hugging Face's layout, in fp32; each is read when it is accessed."""

  def __init__(self, file: GgufFile):
    """Raises InputError if the file does not hold a LLaMA, or one with unsupported options."""
    self.file, self.path = file, file.path
    if file.architecture != ARCHITECTURE:
      raise InputError(
        f"path={file.path}: general.architecture={file.architecture!r} is not supported; supported: {ARCHITECTURE} "
        "(LLaMA and models like it, such as SmolLM and Mistral)"
      )
    for name, harmless in HARMLESS.items():
      full = f"{ARCHITECTURE}.{name}"
      if file.has(full) and file.fact(full, type(harmless)) != harmless:
        raise InputError(
          f"path={file.path}: {full}={file.fact(full, type(harmless))!r} is not supported; this model has {harmless!r}"
        )
    self._name_in_file = {_their_name(file, name): name for name in file}
    self._heads = self._number("attention.head_count")
    self._kv_heads = self._number("attention.head_count_kv", self._heads)

  def _number(self, name: str, default: int | None = None) -> int:
    value = self.file.fact(f"{ARCHITECTURE}.{name}", int, default)
    if value < 1:
      raise InputError(f"path={self.path}: {ARCHITECTURE}.{name}={value} is not positive; download it again")
    return value

  def config(self) -> dict[str, Any]:
    """The file's description of its model, in the form of a config.json."""
    width = self._number("embedding_length")
    head_dim = self._number("attention.key_length", self._number("rope.dimension_count", width // self._heads))
    rotated = self._number("rope.dimension_count", head_dim)
    if rotated != head_dim:
      raise InputError(
        f"path={self.path}: RoPE rotates {rotated} of a head's {head_dim} numbers; that is not supported"
      )
    if EMBEDDING not in self:
      raise InputError(f"path={self.path}: lacks {OUTSIDE_NAME[EMBEDDING]}, its embedding; download it again")
    layers = {name.split(".")[1] for name in self.file if name.startswith("blk.")}
    if len(layers) != self._number("block_count"):
      raise InputError(
        f"path={self.path}: states {self._number('block_count')} layers and has tensors of {len(layers)}; download it "
        "again"
      )
    return {
      "model_type": "llama",
      "vocab_size": self.file.shape(OUTSIDE_NAME[EMBEDDING])[0],
      "hidden_size": width,
      "intermediate_size": self._number("feed_forward_length"),
      "num_hidden_layers": self._number("block_count"),
      "num_attention_heads": self._heads,
      "num_key_value_heads": self._kv_heads,
      "head_dim": head_dim,
      "rms_norm_eps": _as_written(self.file.fact(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", float)),
      "rope_theta": _as_written(self.file.fact(f"{ARCHITECTURE}.rope.freq_base", float, 10_000.0)),
      "tie_word_embeddings": HEAD not in self,
    }

  def facts(self) -> dict[str, Any]:
    """Where the weights come from, for the folder of a run that starts from them."""
    types = self.file.quantization()
    return {
      "file": self.path.name,
      "bytes": self.path.stat().st_size,
      "name": self.file.fact("general.name", str, self.path.stem),
      "license": self.file.fact("general.license", str, "not stated"),
      "quantized": self.file.is_quantized,
      "tensors_by_type": types,
    }

  def storage(self) -> str:
    """A sentence about how the weights are stored."""
    counts = ", ".join(f"{count} {kind}" for kind, count in self.file.quantization().items())
    if self.file.is_quantized:
      return f"stored as {counts}: quantized, so that the run starts from rounded weights"
    return f"stored as {counts}"

  def __getitem__(self, name: str) -> np.ndarray:
    array = self.file[self._name_in_file[name]]
    if name.endswith("q_proj.weight"):
      return _halves_apart(array, self._heads, name)
    if name.endswith("k_proj.weight"):
      return _halves_apart(array, self._kv_heads, name)
    return array

  def __contains__(self, name: object) -> bool:
    return name in self._name_in_file

  def __iter__(self) -> Iterator[str]:
    return iter(self._name_in_file)

  def __len__(self) -> int:
    return len(self._name_in_file)


OUTSIDE_NAME = {theirs: name for name, theirs in OUTSIDE.items()}


def _their_name(file: GgufFile, name: str) -> str:
  """Hugging Face's name of a tensor."""
  if name in OUTSIDE:
    return OUTSIDE[name]
  match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
  if match is None or match[2] not in IN_LAYER:
    raise InputError(f"path={file.path}: has the tensor {name}, which this project's LLaMA does not have")
  return f"model.layers.{match[1]}.{IN_LAYER[match[2]]}.weight"


def _halves_apart(array: np.ndarray, heads: int, name: str) -> np.ndarray:
  """Reorders the rows of each head from (0, K/2, 1, K/2 + 1, …) to (0, 1, …)."""
  if array.ndim != 2 or array.shape[0] % (2 * heads):
    raise InputError(f"{name}: has shape {array.shape}, which can't be divided into {heads} heads of even width")
  return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _as_written(value: float) -> float:
  """A number stored in fp32 as the shortest decimal: 1e-05 instead of 9.999999747378752e-06."""
  return float(str(np.float32(value)))

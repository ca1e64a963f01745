"""The forward pass of an exported folder, in NumPy, from its config.json and its tensors alone.

It follows the layouts and uses nothing of `mixln_jax.model`, so that an export can be compared with the model that it
came from (`check.py`). Tensors are read one at a time and not kept, so that it works for models that fill most of the
memory.

Dimensions: T tokens, D width of the residual stream, F of the MLP, H query heads, G key-value heads, K width of a head,
V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mixln_jax.errors import InputError

Rows = Mapping[str, Mapping[str, Any]]  # a layer's `attention` and `mlp`, each column -> value

# The rows of transformers' own decoders, which their config.json does not spell out.
_PRE = {"norm_in": True}
STOCK: Mapping[str, Rows] = {
  "llama": {"attention": _PRE, "mlp": _PRE},
  "qwen2": {"attention": _PRE, "mlp": _PRE},
  "qwen3": {"attention": {"norm_in": True, "qk_norm": True}, "mlp": _PRE},
  "olmo2": {"attention": {"norm_mid": True, "qk_norm_full": True}, "mlp": {"norm_mid": True}},
}
EMBEDDING = "model.embed_tokens.weight"
# The columns of a `placement_table` that a reader of the official layout understands; `modeling_mixln.py` reads the
# same ones.
COLUMNS = (
  *("norm_in", "norm_mid", "norm_out", "residual_from_normed", "c_in", "c_out", "c_res"),
  *("vector_c_res", "vector_c_out", "scalar_c_out", "gpas", "qk_norm", "qk_norm_full", "v_norm"),
)


class ExportedModel:
  """The model that an exported folder describes, one layer at a time.

  `logits(layer(L - 1, … layer(0, embed(tokens_T))))` is its forward pass, in fp32. Every method raises InputError if a
  tensor is missing or its shape does not match config.json.
  """

  def __init__(self, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], positions_T: np.ndarray):
    """
    Args:
      tensors: the folder's tensors by name, of any floating type.
      config: the folder's config.json.
      positions_T: the position of each token, for RoPE. A token attends to itself and to the earlier tokens.
    """
    self._reader, self._config = _Reader(tensors), config
    self._vocabulary, self._width = config["vocab_size"], config["hidden_size"]
    self._rope = _rope(config, positions_T)

  def embed(self, tokens_T: np.ndarray) -> np.ndarray:
    """The residual stream [T, D] before the first layer."""
    return self._reader.raw(EMBEDDING, self._vocabulary, self._width)[tokens_T].astype(np.float32)

  def layer(self, index: int, x_TD: np.ndarray) -> np.ndarray:
    """The residual stream [T, D] after a layer."""
    if "placement_table" in self._config:
      rows = self._config["placement_table"][index]
    else:
      rows = STOCK[self._config["model_type"]]
    return _Layer(self._reader, self._config, f"model.layers.{index}", rows).apply(x_TD, self._rope)

  def logits(self, x_TD: np.ndarray) -> np.ndarray:
    """Logits [T, V] of the residual stream after the last layer."""
    hidden_TD = _rms_norm(x_TD, self._reader("model.norm.weight", self._width), self._config["rms_norm_eps"])
    head = EMBEDDING if self._config["tie_word_embeddings"] else "lm_head.weight"
    return hidden_TD @ self._reader(head, self._vocabulary, self._width).T

  def unread(self) -> list[str]:
    """Names of the tensors that have not been read so far."""
    return self._reader.unread()


class _Reader:
  """Reads tensors by name and records which ones."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    self._tensors = tensors
    self._read: set[str] = set()

  def raw(self, name: str, *shape: int) -> np.ndarray:
    """A tensor in its own type. Raises InputError if it is missing or has another shape."""
    if name not in self._tensors:
      raise InputError(f"export: {name} is missing, but the model of config.json needs it")
    tensor = np.asarray(self._tensors[name])
    if tensor.shape != shape:
      raise InputError(f"export: {name} has shape {tensor.shape}, but config.json makes it {shape}")
    self._read.add(name)
    return tensor

  def __call__(self, name: str, *shape: int) -> np.ndarray:
    """A tensor in fp32."""
    return self.raw(name, *shape).astype(np.float32)

  def unread(self) -> list[str]:
    return sorted(set(self._tensors) - self._read)


class _Layer:
  """One decoder layer: two sublayers under the rule that `modeling_mixln.py` states."""

  def __init__(self, reader: _Reader, config: Mapping[str, Any], prefix: str, rows: Rows):
    self.reader, self.config, self.prefix, self.rows = reader, config, prefix, rows
    self.width, self.epsilon = config["hidden_size"], config["rms_norm_eps"]

  def read(self, name: str, *shape: int) -> np.ndarray:
    return self.reader(f"{self.prefix}.{name}", *shape)

  def apply(self, x_TD: np.ndarray, rope: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    x_TD = self.sublayer("attention", x_TD, lambda h_TD: self.attention(h_TD, rope))
    return self.sublayer("mlp", x_TD, self.mlp)

  def sublayer(self, name: str, x_TD: np.ndarray, branch: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """s = c_res · r + c_out · N_mid(f(c_in · N_in(x))), and N_out(s)."""
    row = self.rows[name]
    normed_TD = self.norm(name, "norm_in", x_TD)
    residual_TD = normed_TD if row.get("residual_from_normed", False) else x_TD
    out_TD = self.norm(name, "norm_mid", branch(row.get("c_in", 1.0) * normed_TD))
    gated = row.get("gpas", False)
    if gated and row.get("norm_out", False):
      residual_TD = self.gate(residual_TD)
    sum_TD = self.factor(name, "c_res") * residual_TD + self.factor(name, "c_out") * out_TD
    if gated and not row.get("norm_out", False):
      sum_TD = self.gate(sum_TD)
    return self.norm(name, "norm_out", sum_TD)

  def norm(self, sublayer: str, which: str, x_TD: np.ndarray) -> np.ndarray:
    """One of a sublayer's norms applied to x, or x itself if its row does not have that norm."""
    if not self.rows[sublayer].get(which, False):
      return x_TD
    gain_D = self.read(f"{self.norm_name(sublayer, which)}.weight", self.width)
    return _rms_norm(x_TD, gain_D, self.epsilon)

  def norm_name(self, sublayer: str, which: str) -> str:
    """The name of a norm in the official code, Gemma 2 and OLMo 2; LLaMA's if no norm follows attention."""
    attention = self.rows["attention"]
    follows_attention = attention.get("norm_mid", False) or attention.get("norm_out", False)
    if sublayer == "attention":
      return "input_layernorm" if which == "norm_in" else "post_attention_layernorm"
    if which != "norm_in":
      return "post_feedforward_layernorm"
    return "pre_feedforward_layernorm" if follows_attention else "post_attention_layernorm"

  def factor(self, sublayer: str, which: str) -> np.ndarray:
    """c_res or c_out: its constant times its learned factors, a scalar or [D]."""
    row, module = self.rows[sublayer], {"attention": "self_attn", "mlp": "mlp"}[sublayer]
    factor = np.float32(row.get(which, 1.0))
    if row.get(f"vector_{which}", False):
      factor = factor * self.read(f"{module}.vector_{which}", self.width)
    if row.get(f"scalar_{which}", False):
      factor = factor * self.read(f"{module}.scalar_{which}")
    return np.asarray(factor)

  def gate(self, h_TD: np.ndarray) -> np.ndarray:
    """GPAS in the forward direction: h - silu(a) · h."""
    return h_TD - _silu(self.read("gpas_block.gate")) * h_TD

  def mlp(self, x_TD: np.ndarray) -> np.ndarray:
    hidden = self.config["intermediate_size"]
    gate_TF = x_TD @ self.read("mlp.gate_proj.weight", hidden, self.width).T
    up_TF = x_TD @ self.read("mlp.up_proj.weight", hidden, self.width).T
    return (_silu(gate_TF) * up_TF) @ self.read("mlp.down_proj.weight", self.width, hidden).T

  def attention(self, x_TD: np.ndarray, rope: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    heads, groups, head_dim = (self.config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q_THK = _rotate(self.project("q", x_TD, heads), rope)
    # Each key-value head serves heads / groups consecutive query heads.
    k_THK = np.repeat(_rotate(self.project("k", x_TD, groups), rope), heads // groups, axis=1)
    v_THK = np.repeat(self.project("v", x_TD, groups), heads // groups, axis=1)
    scores_HTS = np.einsum("thk,shk->hts", q_THK, k_THK) / np.float32(math.sqrt(head_dim))
    length = len(x_TD)
    scores_HTS = np.where(np.tril(np.ones((length, length), bool)), scores_HTS, -np.inf)
    powers_HTS = np.exp(scores_HTS - scores_HTS.max(axis=-1, keepdims=True))
    weights_HTS = powers_HTS / powers_HTS.sum(axis=-1, keepdims=True)
    out_THK = np.einsum("hts,shk->thk", weights_HTS, v_THK)
    return out_THK.reshape(length, -1) @ self.read("self_attn.o_proj.weight", self.width, heads * head_dim).T

  def project(self, name: str, x_TD: np.ndarray, heads: int) -> np.ndarray:
    """Queries, keys or values [T, heads, K], normalised if the row says so."""
    row, head_dim = self.rows["attention"], self.config["head_dim"]
    out_TE = x_TD @ self.read(f"self_attn.{name}_proj.weight", heads * head_dim, self.width).T
    if self.config.get("qkv_bias", self.config["model_type"] == "qwen2"):
      out_TE = out_TE + self.read(f"self_attn.{name}_proj.bias", heads * head_dim)
    if name != "v" and row.get("qk_norm_full", False):
      out_TE = _rms_norm(out_TE, self.read(f"self_attn.{name}_norm.weight", heads * head_dim), self.epsilon)
    out_THK = out_TE.reshape(len(x_TD), heads, head_dim)
    if row.get("v_norm" if name == "v" else "qk_norm", False):
      out_THK = _rms_norm(out_THK, self.read(f"self_attn.{name}_norm.weight", head_dim), self.epsilon)
    return out_THK


def _rms_norm(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
  return gain * x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(epsilon))


def _silu(x: np.ndarray) -> np.ndarray:
  return x * np.exp(-np.logaddexp(np.float32(0), -x))  # no overflow, unlike 1 / (1 + exp(-x))


def _rope(config: Mapping[str, Any], positions_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of RoPE's angles, [T, 1, K / 2]; the angles are computed in fp64 to avoid rounding."""
  frequencies = float(config["rope_theta"]) ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
  scaling = config["rope_scaling"]
  if scaling is not None:
    frequencies = _llama3(frequencies, scaling)
  angles = positions_T[:, None, None] * frequencies
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
  """Llama 3.1's frequencies, as transformers computes them from their wavelengths."""
  original = scaling["original_max_position_embeddings"]
  low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
  wavelengths = 2 * math.pi / frequencies
  smooth = (original / wavelengths - low) / (high - low)
  blended = (1 - smooth) * frequencies / factor + smooth * frequencies
  short, long = wavelengths < original / high, wavelengths > original / low
  return np.select([short, long], [frequencies, frequencies / factor], blended)


def _rotate(x_THK: np.ndarray, rope: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
  """Rotates the pairs (x[i], x[i + K/2]): LLaMA's pairing of the two halves."""
  cosine, sine = rope
  first, second = np.split(x_THK, 2, axis=-1)
  return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)

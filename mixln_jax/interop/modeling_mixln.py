"""The model of the weights beside this file: `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`.

A LLaMA whose norms are placed as config.json says. Every sublayer f (attention or MLP) of every layer is

    r = N_in(x) if residual_from_normed else x
    s = c_res * g(r) + c_out * N_mid(f(c_in * N_in(x)))
    y = N_out(s) where there is an N_out, else g(s)

and `placement_table` has its row, which lists what differs from a row without norms and with constants of 1. Each N is
an RMSNorm or the identity. If the row has `gpas`, g(h) = h - silu(a) * h without a gradient through the second term,
else g(h) = h. Norms, constants and the sum are fp32. Everything else, including the cache, is transformers' LLaMA.

This file needs torch and transformers (tried with 5.24); mixln_jax copies it and never imports it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

LEARNED = ("vector_c_res", "vector_c_out", "scalar_c_out")


class MixLNConfig(LlamaConfig):
  """LLaMA's config with `placement_table`: for each layer, the rows of `attention` and `mlp`."""

  model_type = "mixln_llama"

  def validate_architecture(self) -> None:
    """Skips LLaMA's check: the width of a head need not divide the model's width."""


class MixLNNorm(nn.Module):
  """RMSNorm whose arithmetic and result are fp32."""

  def __init__(self, width: int, epsilon: float):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(width))
    self.epsilon = epsilon

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return self.weight.float() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


class MixLNGate(nn.Module):
  """GPAS (arXiv 2506.22049): scales activations, not their gradient."""

  def __init__(self) -> None:
    super().__init__()
    self.gate = nn.Parameter(torch.zeros(()))

  def forward(self, h: torch.Tensor) -> torch.Tensor:
    return h - nn.functional.silu(self.gate.float()) * h.detach()


def add_learned(module: nn.Module, row: Mapping[str, Any], width: int) -> None:
  """The learned constants of a sublayer's row, as parameters of its module."""
  for name in LEARNED:
    if row.get(name, False):
      module.register_parameter(name, nn.Parameter(torch.ones(width if name.startswith("vector") else ())))


class MixLNAttention(llama.LlamaAttention):
  """LLaMA's attention, with optional norms of queries, keys and values and optional biases of their projections."""

  def __init__(self, config: MixLNConfig, index: int):
    super().__init__(config, index)
    row, widths = config.placement_table[index]["attention"], self.widths(config)
    if config.qkv_bias:
      for name, width in widths.items():
        setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, width, bias=True))
    self.full = row.get("qk_norm_full", False)
    normed = ("q", "k") * (self.full or row.get("qk_norm", False)) + ("v",) * row.get("v_norm", False)
    for name in normed:
      width = widths[name] if self.full and name != "v" else self.head_dim
      setattr(self, f"{name}_norm", MixLNNorm(width, config.rms_norm_eps))
    add_learned(self, row, config.hidden_size)

  def widths(self, config: MixLNConfig) -> dict[str, int]:
    keys = config.num_key_value_heads * self.head_dim
    return {"q": config.num_attention_heads * self.head_dim, "k": keys, "v": keys}

  def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values by head, [B, H, T, K]."""
    out = getattr(self, f"{name}_proj")(x)
    norm = getattr(self, f"{name}_norm", None)
    over_all_heads = self.full and name != "v"
    if norm is not None and over_all_heads:
      out = norm(out).to(x.dtype)
    out = out.view(*x.shape[:-1], -1, self.head_dim)
    if norm is not None and not over_all_heads:
      out = norm(out).to(x.dtype)
    return out.transpose(1, 2)

  def forward(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
  ) -> tuple[torch.Tensor, torch.Tensor | None]:
    query, key, value = (self.project(name, hidden_states) for name in ("q", "k", "v"))
    query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    caches = [options.pop(name, None) for name in ("cache", "past_key_values")]  # which of them depends on transformers
    for cache in caches:
      if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    kind = self.config._attn_implementation
    attend = llama.ALL_ATTENTION_FUNCTIONS.get(kind, llama.eager_attention_forward)
    dropout = self.attention_dropout if self.training else 0.0
    out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **options)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class MixLNDecoderLayer(llama.LlamaDecoderLayer):
  """Two sublayers under the rule above."""

  def __init__(self, config: MixLNConfig, index: int):
    super().__init__(config, index)
    del self.input_layernorm, self.post_attention_layernorm
    self.rows = config.placement_table[index]
    self.self_attn = MixLNAttention(config, index)
    add_learned(self.mlp, self.rows["mlp"], config.hidden_size)
    self.norm_names = {name: self.names_of(name) for name in self.rows}
    for names in self.norm_names.values():
      for name in names.values():
        setattr(self, name, MixLNNorm(config.hidden_size, config.rms_norm_eps))
    if any(row.get("gpas", False) for row in self.rows.values()):
      self.gpas_block = MixLNGate()

  def names_of(self, sublayer: str) -> dict[str, str]:
    """The names of a sublayer's norms in the official code, Gemma 2 and OLMo 2."""
    attention = self.rows["attention"]
    after_attention = attention.get("norm_mid", False) or attention.get("norm_out", False)
    if sublayer == "attention":
      before, after = "input_layernorm", "post_attention_layernorm"
    else:
      before = "pre_feedforward_layernorm" if after_attention else "post_attention_layernorm"
      after = "post_feedforward_layernorm"
    names = {"norm_in": before, "norm_mid": after, "norm_out": after}
    return {norm: name for norm, name in names.items() if self.rows[sublayer].get(norm, False)}

  def sublayer(
    self, name: str, module: nn.Module, x: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor]
  ) -> torch.Tensor:
    row = self.rows[name]

    def norm(which: str, h: torch.Tensor) -> torch.Tensor:
      return getattr(self, self.norm_names[name][which])(h) if row.get(which, False) else h.float()

    def constant(which: str) -> Any:
      learned = [getattr(module, f"{kind}_{which}", None) for kind in ("vector", "scalar")]
      factor = row.get(which, 1.0)
      for parameter in learned:
        factor = factor if parameter is None else factor * parameter.float()
      return factor

    gate = self.gpas_block if row.get("gpas", False) else lambda h: h
    has_out = row.get("norm_out", False)
    normed = norm("norm_in", x)
    residual = normed if row.get("residual_from_normed", False) else x.float()
    out = norm("norm_mid", branch((row.get("c_in", 1.0) * normed).to(x.dtype)))
    total = constant("c_res") * (gate(residual) if has_out else residual) + constant("c_out") * out
    total = (total if has_out else gate(total)).to(x.dtype)
    return norm("norm_out", total).to(x.dtype)

  def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
    def attend(h: torch.Tensor) -> torch.Tensor:
      return self.self_attn(hidden_states=h, **options)[0]

    hidden_states = self.sublayer("attention", self.self_attn, hidden_states, attend)
    return self.sublayer("mlp", self.mlp, hidden_states, self.mlp)


class MixLNModel(llama.LlamaModel):
  config_class = MixLNConfig
  _no_split_modules = ("MixLNDecoderLayer",)

  def __init__(self, config: MixLNConfig):
    super().__init__(config)
    self.layers = nn.ModuleList(MixLNDecoderLayer(config, index) for index in range(config.num_hidden_layers))
    self.post_init()


class MixLNForCausalLM(llama.LlamaForCausalLM):
  config_class = MixLNConfig
  _no_split_modules = ("MixLNDecoderLayer",)

  def __init__(self, config: MixLNConfig):
    super().__init__(config)
    self.model = MixLNModel(config)
    self.post_init()

"""Counted cost of the model. XLA's own count sees a scan's body once, so it is not used."""

from mixln_jax.config import ModelConfig, head_dim, num_kv_heads


def matmul_params(model: ModelConfig) -> int:
  """Parameters that take part in a matrix product for every token: all but the embedding's rows and the gains."""
  width, kv_width = model.num_heads * head_dim(model), num_kv_heads(model) * head_dim(model)
  layer = model.embed_dim * (2 * width + 2 * kv_width) + 3 * model.embed_dim * model.mlp_dim
  return model.num_layers * layer + model.embed_dim * model.vocab_size


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
  """Model FLOPs of one token, forward and backward, without recomputation.

  6 × matmul parameters, and for attention 6 × 2 × L × H × K × (T + 1) / 2: a token of a causal row reads (T + 1) / 2
  positions on average (the PaLM definition, arXiv 2204.02311 appendix B, counts all T).
  """
  attention = model.num_layers * model.num_heads * head_dim(model) * (sequence_length + 1)
  return 6.0 * matmul_params(model) + 6.0 * attention


def executed_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
  """FLOPs of the matrix products that the training step really does for a token: with recomputation, masked positions.

  Attention is taken to multiply all T positions, masked or not, as `xla` does. The backward pass does the layers'
  forward products again with remat full (but `down`, whose result it does not need), and those of attention with
  dots_no_batch.
  """
  attention = 4.0 * model.num_layers * model.num_heads * head_dim(model) * sequence_length
  forward = 2.0 * matmul_params(model) + attention
  layers = forward - 2.0 * model.embed_dim * model.vocab_size - 2.0 * model.num_layers * model.embed_dim * model.mlp_dim
  recomputed = {"none": 0.0, "dots": 0.0, "dots_no_batch": attention, "full": layers}
  return 3.0 * forward + recomputed[model.remat]

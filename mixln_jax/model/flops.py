"""FLOPs of the model, counted from its table of parameters. (XLA's own count takes the body of a scan only once.)"""

import math

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig, head_dim
from mixln_jax.model.columns import Columns
from mixln_jax.model.parameters import parameters

LOOKED_UP = ("position_embedding", "token_type_embedding")


def matmul_params(model: ModelConfig) -> int:
  """Parameters that every token is multiplied with in a matrix product: all but embeddings, gains, biases and scalars.

  A tied embedding counts, as the head's matrix.
  """
  count = 0
  for path, param in parameters(model).items():
    looked_up = path in LOOKED_UP or (path == "embedding" and not model.tied_embeddings)
    if param.drawn and not looked_up:
      count += param.size
  return count


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
  """Model FLOPs of one token, forward and backward, without recomputation.

  6 × matmul parameters, and for attention 6 × 2 × L × H × K × (T + 1) / 2: a token of a causal row reads (T + 1) / 2
  positions on average (the PaLM definition, arXiv 2204.02311 appendix B, counts all T); one of an encoder reads all T.
  """
  read = 2 * sequence_length if model.bidirectional else sequence_length + 1  # twice the positions that a token reads
  attention = model.num_layers * model.num_heads * head_dim(model) * read
  return 6.0 * matmul_params(model) + 6.0 * attention


def executed_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
  """FLOPs of the matrix products that a training step executes per token, with recomputation and masked positions.

  Attention is counted over all T positions, masked or not, as `xla` computes it. With remat=full the backward pass
  repeats the layers' forward products (except `down`, whose result it does not need); with remat=dots_no_batch it
  repeats those of attention. Attention residuals are always recomputed as with remat=full (`model/append_only.py`).
  """
  attention = 4.0 * model.num_layers * model.num_heads * head_dim(model) * sequence_length
  forward = 2.0 * matmul_params(model) + attention
  head = model.embed_dim * model.vocab_size
  down = math.prod(parameters(model)["layers/down"].logical_shape)
  layers = forward - 2.0 * head - 2.0 * down
  recomputed = {"none": 0.0, "dots": 0.0, "dots_no_batch": attention, "full": layers}
  always_full = Columns.of(config_lib.table(model)).only_sources and model.unroll > 0
  return 3.0 * forward + recomputed["full" if always_full else model.remat]

"""The Flax model: norms, attention, the sublayer rule, the scanned stack, initial weights and the loss."""

from mixln_jax.model.columns import Columns
from mixln_jax.model.loss import next_token_loss
from mixln_jax.model.transformer import Transformer

__all__ = ["Columns", "Transformer", "next_token_loss"]

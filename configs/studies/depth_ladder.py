"""What depth is worth at one small size: three aspect ratios of 0.55 M parameters, each placement at its best rate."""

from mixln_jax.config import base

# layers, width, MLP, heads: 551,000, 548,000 and 547,000 parameters without gains.
SHAPES = ((5, 80, 216, 4), (11, 56, 160, 4), (24, 40, 108, 4))

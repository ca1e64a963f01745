"""mixln_jax: norm placement in transformers, built around Mix-LN (arXiv 2412.13795)."""

__version__ = "0.2.0"

"""The training loop, its step, the optimizer, evaluation, and stopping."""

"""Fine-tune a model on instructions: `train` from the weights of the run that config.train.start_from names.

The model and the tokenizer are those of that run; `prepare` with the same --config makes the records. The result is an
ordinary run: the same command resumes it, and so does `train`.
"""

from mixln_jax.training.session import train_command


def main(argv: list[str]) -> int:
  return train_command(__doc__ or "", argv, needs_start=True)

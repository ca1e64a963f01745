"""Fine-tune a model on instructions or on pairs of answers: `train` from the weights of config.train.start_from's run.

The model and the tokenizer are those of that run; `prepare` with the same --config makes the records. The result is an
ordinary run: the same command resumes it, and so does `train`.
"""

from mixln_jax.commands._training import train_command


def main(argv: list[str]) -> int:
  return train_command(__doc__ or "", argv, needs_start=True)

"""Train a model: starts a run in --workdir, or resumes the one that is there."""

from mixln_jax.training.session import train_command


def main(argv: list[str]) -> int:
  return train_command(__doc__ or "", argv)

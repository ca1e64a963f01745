"""Train a model: starts a run in --workdir, or goes on with the one that is there."""

from mixln_jax.command_line import CommandLine
from mixln_jax.errors import InputError
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.opening import read_config
from mixln_jax.training.session import train_here


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.config(required=False)
  line.string(
    "workdir", "the run's folder; a run that is there goes on, without --config as it was configured", required=True
  )
  values = line.parse(argv)
  folder = RunFolder(values.workdir)
  if values.config is None and not folder.has_run:
    raise InputError("--config is required for a new run, and --workdir holds none; see --help")
  if values.config is None:
    return train_here(read_config(folder), {}, folder)
  return train_here(line.config_value(), line.overrides(), folder)

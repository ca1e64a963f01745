"""Fine-tune a model on instructions: `train` from the weights of the run that config.train.start_from names.

The model, and the tokenizer, are those of that run; `prepare` with the same --config makes the records. What is made is
an ordinary run: the same command goes on with it, and so does `train`.
"""

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
  config = read_config(folder) if values.config is None else line.config_value()
  if not config.train.start_from:
    raise InputError(
      "config.train.start_from is required: the folder of the run whose weights are fine-tuned (of `train`, or of "
      "`convert --input`)"
    )
  return train_here(config, {} if values.config is None else line.overrides(), folder)

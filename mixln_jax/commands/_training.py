"""The command that trains, `train` and `finetune` alike: it joins the other processes, trains, says how it ended."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from mixln_jax.command_line import CommandLine
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.inference.generate import generate_text
from mixln_jax.opening import open_run
from mixln_jax.parallel import processes
from mixln_jax.parallel.compile_cache import use_compile_cache
from mixln_jax.runs.facts import read_config
from mixln_jax.runs.folder import PROFILE, RunFolder
from mixln_jax.runs.outcome import DIVERGED, FINISHED, NON_FINITE, STOPPED, Outcome
from mixln_jax.signals import STOPPED_STATUS
from mixln_jax.text import printable
from mixln_jax.training import finetune, loop
from mixln_jax.training.divergence import MEANING, NOT_YET, is_below

PROFILE_HINT = (
  "pip install tensorboard-plugin-profile; tensorboard --logdir={folder}/profile; or open its .trace.json.gz in "
  "ui.perfetto.dev"
)
STATUSES = {FINISHED: 0, DIVERGED: 0, STOPPED: STOPPED_STATUS, NON_FINITE: 1}


def train_command(doc: str, argv: list[str], *, needs_start: bool = False) -> int:
  """Parses the arguments of a command that trains, and trains; returns the exit status.

  Args:
    doc: the command's docstring, for --help.
    argv: its arguments.
    needs_start: refuse a run that does not start from another run's weights.

  Raises:
    InputError: as `finetune.resolve` and `loop.train`, or an argument is missing.
  """
  line = CommandLine(doc)
  line.config(required=False, of_run=config_of_run)
  line.string(
    "workdir",
    "the run's folder; a run that is there is resumed, without --config as it was but for the fields that are given",
    required=True,
  )
  values = line.parse(argv)
  folder = RunFolder(values.workdir)
  if values.config is None:
    raise InputError("--config is required for a new run, and --workdir holds none; see --help")
  config, overrides = line.config_value(), line.overrides()
  if needs_start and not config.train.start_from:
    raise InputError(
      "config.train.start_from is required: the folder of the run whose weights are fine-tuned (of `train`, or of "
      "`convert --input`)"
    )
  return train_here(config, overrides, folder)


def config_of_run(workdir: str) -> Config | None:
  """The config of the run in a folder; None where it holds none."""
  folder = RunFolder(workdir)
  return read_config(folder) if folder.has_run else None


def train_here(config: Config, overrides: Mapping[str, Any], folder: RunFolder) -> int:
  """Trains config in a run's folder; returns the exit status.

  Args:
    config: of a recipe and the command line, or of the run itself.
    overrides: the fields that stand on the command line.
    folder: the run's.

  Raises:
    InputError: as `finetune.resolve` and `loop.train`.
  """
  processes.join(config.parallel)
  use_compile_cache()
  with processes.failing_together():
    config = finetune.resolve(config, overrides, folder)
    outcome = loop.train(config, folder.address)
    processes.wait_for_all("the end of the run")  # process 0 may still copy: the others must not time out meanwhile
  if processes.is_first():
    _show(outcome)
  if outcome.status == FINISHED and config.train.sample_tokens:
    with open_run(folder.address) as run:
      text = generate_text(run.config.model, run.params, run.tokenizer, "", config.train.sample_tokens)
    if processes.is_first():
      print(f"sample     {text!r}")
  if processes.is_first():
    print(printable(f"files      {folder.address}"))
    if config.profile.num_steps and (folder / PROFILE).is_dir():
      print(printable(f"profile    {PROFILE_HINT.format(folder=folder.address)}"))
  return STATUSES[outcome.status]


def _show(outcome: Outcome) -> None:
  """Prints how a run ended."""
  validation = outcome.validation or {}
  loss, entropy = (float(validation.get(name, "nan")) for name in ("loss", "unigram_entropy"))
  if outcome.diverged:
    print("diverged   the validation loss is back, or stuck, at the unigram entropy of its data: a model without input")
  elif math.isfinite(entropy) and not is_below(loss, entropy):
    print(f"not yet    {MEANING[NOT_YET]}")
  if outcome.skipped_updates:
    print(f"skipped    {outcome.skipped_updates} updates, whose loss or gradient was not finite")
  stream = sys.stderr if outcome.status == NON_FINITE else sys.stdout
  print(printable(f"{outcome.status:<10} {outcome.message}"), file=stream)
  if outcome.validation and "accuracy" in outcome.validation:
    print(
      f"validation loss {loss:.4f}, accuracy {float(validation['accuracy']):.1%}, margin "
      f"{float(validation['margin']):.4f} (step {validation['step']})"
    )
  elif outcome.validation:
    loss, perplexity = (float(outcome.validation[name]) for name in ("loss", "perplexity"))
    print(f"validation loss {loss:.4f}, perplexity {perplexity:.3f} (step {outcome.validation['step']})")

"""A run in this process: it joins the others, trains, and says how it ended."""

import sys
from collections.abc import Mapping
from typing import Any

from mixln_jax.config import Config
from mixln_jax.inference.generate import generate_text
from mixln_jax.parallel import processes
from mixln_jax.parallel.compile_cache import use_compile_cache
from mixln_jax.runs.folder import RunFolder
from mixln_jax.training import loop
from mixln_jax.training.setup import on_mesh, open_run, set_up
from mixln_jax.training.start import resolve
from mixln_jax.training.stopping import STOPPED_STATUS

STATUSES = {loop.FINISHED: 0, loop.DIVERGED: 0, loop.STOPPED: STOPPED_STATUS, loop.NON_FINITE: 1}


def train_here(config: Config, overrides: Mapping[str, Any], folder: RunFolder) -> int:
  """Trains config in a run's folder; returns the exit status.

  Args:
    config: of a recipe and the command line, or of the run itself.
    overrides: the fields that stand on the command line.
    folder: the run's.

  Raises:
    InputError: as `start.resolve` and `loop.train`.
  """
  processes.join(config.parallel)
  use_compile_cache()
  with processes.failing_together():
    config = resolve(config, overrides, folder)
    outcome = loop.train(config, folder.address)
    processes.wait_for_all("the end of the run")  # process 0 may still copy: the others must not time out meanwhile
  show = print if processes.is_first() else _nothing
  if outcome.diverged:
    show("diverged   the last validation loss is at the unigram entropy of its data: that of a model without input")
  if outcome.skipped_updates:
    show(f"skipped    {outcome.skipped_updates} updates, whose loss or gradient was not finite")
  show(f"{outcome.status:<10} {outcome.message}", file=sys.stderr if outcome.status == loop.NON_FINITE else sys.stdout)
  if outcome.validation:
    loss, perplexity = (float(outcome.validation[name]) for name in ("loss", "perplexity"))
    show(f"validation loss {loss:.4f}, perplexity {perplexity:.3f} (step {outcome.validation['step']})")
  if outcome.status == loop.FINISHED and config.train.sample_tokens:
    setup = set_up(config)
    run = open_run(folder, setup.mesh)
    with on_mesh(setup.mesh):
      text = generate_text(run.config.model, run.params, setup.corpus.tokenizer, "", config.train.sample_tokens)
    show(f"sample     {text!r}")
  show(f"files      {folder.address}")
  return STATUSES[outcome.status]


def _nothing(*_: Any, **__: Any) -> None:
  """What the processes print that are not the first."""

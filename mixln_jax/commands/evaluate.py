"""Evaluate a run's checkpoint on its validation set: loss, perplexity, bits per byte, and the unigram entropy."""

import json

from mixln_jax.command_line import CommandLine
from mixln_jax.data.loader import unigram_entropy
from mixln_jax.parallel import processes
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.opening import read_config
from mixln_jax.training.setup import Evaluator, check_batch, make_loader, open_run, set_up, spread_over_all_devices


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.string("workdir", "the run's folder", required=True)
  line.integer("step", "which checkpoint; by default the newest", minimum=0)
  line.integer("batch_size", "sequences a batch; by default the run's", minimum=1)
  values = line.parse(argv)
  folder = RunFolder(values.workdir)
  config = read_config(folder)
  processes.join(config.parallel)
  with processes.failing_together():
    config = spread_over_all_devices(config)
    if values.batch_size is not None:
      config.evaluate.batch_size = values.batch_size
    setup = set_up(config)
    check_batch(setup, "--batch_size", config.evaluate.batch_size)
    run = open_run(folder, setup.mesh, values.step)
    evaluation = Evaluator(setup)(run.params)
    rows = make_loader(setup, config.evaluate.batch_size, all_rows=True).validation(config.evaluate.max_tokens)
    entropy = unigram_entropy(rows)
    processes.wait_for_all("the end of the evaluation")
  if not processes.is_first():
    return 0
  print(f"validation step {run.step}  {evaluation.describe(official_compat=True)}")
  print(f"unigram entropy of the same labels {entropy:.4f}; the model is {entropy - evaluation.loss:.4f} nats below it")
  print(json.dumps({"step": run.step, "unigram_entropy": entropy, **evaluation.metrics(official_compat=True)}))
  return 0

"""Evaluate a run's checkpoint: loss and perplexity on its validation set, or accuracy on tasks (--tasks).

A run on pairs of answers has accuracy, margin and rewards instead of perplexity.
With --corpus the run is also evaluated on the validation sets of other corpora, tokenized by its own tokenizer. Missing
records are prepared; the results are written into the run's folder, and `report` shows them.
"""

import json
from typing import Any

from mixln_jax.command_line import CommandLine
from mixln_jax.config import NEWEST
from mixln_jax.data.loader import unigram_entropy
from mixln_jax.errors import InputError
from mixln_jax.opening import OpenRun, check_batch, make_loader, open_run
from mixln_jax.parallel import processes
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.text import for_stdout
from mixln_jax.training.corpora import other_corpus
from mixln_jax.training.divergence import MEANING, NOT_YET, Divergence
from mixln_jax.training.evaluation import Evaluator, PairEvaluation
from mixln_jax.training.program import SingleProgram
from mixln_jax.training.references import with_references

FILE = "tasks.json"


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.string("workdir", "the run's folder", required=True)
  line.integer("step", "which checkpoint; by default the newest", minimum=0)
  line.integer("batch_size", "sequences a batch; by default the run's", minimum=1)
  line.strings(
    "corpus",
    "another corpus to evaluate on, as config.data.source names it (sotu, text:google-api, a path); the flag may be "
    "given several times",
  )
  line.string(
    "tasks",
    "evaluate on tasks of the lm-evaluation-harness instead: names, .yaml files or folders of them, separated by "
    "commas; `mixln` = the paper's seven",
  )
  line.integer("limit", "with --tasks: only the first documents of each", minimum=1)
  line.integer("num_fewshot", "with --tasks: solved examples before each question; by default the task's", minimum=0)
  line.string("output", "with --tasks: folder to write tasks.json to; by default RUN/tasks/STEP")
  values = line.parse(argv)
  for name in ("limit", "num_fewshot", "output"):
    if line.was_given(name) and values.tasks is None:
      raise InputError(f"--{name} has no meaning without --tasks; leave it out")
  if values.corpus and values.tasks is not None:
    raise InputError("--corpus and --tasks are two evaluations; give one of them")
  changes = {} if values.batch_size is None else {"evaluate.batch_size": values.batch_size}
  step = NEWEST if values.step is None else values.step
  with open_run(values.workdir, step, changes=changes) as run:
    if values.tasks is not None:
      lines = _on_tasks(run, values)
    elif values.corpus:
      lines = _on_corpora(run, list(dict.fromkeys(values.corpus)))
    else:
      lines = _on_validation(run)
  if processes.is_first():
    print(for_stdout("\n".join(lines)))
  return 0


def _on_validation(run: OpenRun) -> list[str]:
  setup, config = run.setup, run.config
  check_batch(setup, "--batch_size", config.evaluate.batch_size)
  setup = with_references(setup, [run.folder])
  evaluation = Evaluator(SingleProgram(config, setup.mesh), setup)(run.params, run.step)[0]
  if isinstance(evaluation, PairEvaluation):
    metrics = evaluation.metrics(official_compat=False)
    line = f"validation step {run.step}  {evaluation.describe(official_compat=False)}"
    return [line, json.dumps({"step": run.step, **metrics})]
  rows = make_loader(setup, config.evaluate.batch_size, all_rows=True).validation(config.evaluate.max_tokens)
  entropy = unigram_entropy(rows)
  distance = evaluation.loss - entropy
  side = "above" if distance > 0 else "below"
  compat = config.evaluate.official_compat  # two perplexities that nobody asked for would be taken for one another
  metrics = evaluation.metrics(official_compat=compat)
  divergence = Divergence(config, run.metrics(), run.step - 1)
  divergence.evaluated(run.step, evaluation.loss, entropy)
  word = "diverged" if divergence.diverged else "learning"
  return [
    f"validation step {run.step}  {evaluation.describe(official_compat=compat)}",
    f"{word:<10} {MEANING[divergence.state or NOT_YET]}",
    f"unigram entropy of the same labels {entropy:.4f}; the model is {abs(distance):.4f} nats {side} it",
    json.dumps({"step": run.step, "unigram_entropy": entropy, "diverged": divergence.diverged, **metrics}),
  ]


def _on_corpora(run: OpenRun, sources: list[str]) -> list[str]:
  """On its own validation set and those of other corpora; writes what it found into the run's folder."""
  own = run.setup
  check_batch(own, "--batch_size", run.config.evaluate.batch_size)
  target = RunFolder(f"{run.folder.address}/{folder_lib.CORPORA}/{run.step}")
  target.make_writable(folder_lib.CORPORA_FILE)
  setups = {run.config.data.source: own}
  for source in sources:
    if source not in setups:
      setups[source] = other_corpus(run, source)
  program = SingleProgram(run.config, own.mesh)
  found, lines = {}, []
  width = max(map(len, setups))
  for source, setup in setups.items():
    evaluation = Evaluator(program, setup)(run.params, run.step)[0]
    lines.append(f"{source:<{width}}  {evaluation.describe(official_compat=False)}")
    found[source] = evaluation.metrics(official_compat=False) | {"fingerprint": setup.corpus.manifest.fingerprint}
  target.write_json(folder_lib.CORPORA_FILE, {"step": run.step, "corpora": found})
  target.copy_out()
  lines.append("bits/byte can be compared across corpora, loss and perplexity only within one")
  return [*lines, f"wrote      {target.address}: {folder_lib.CORPORA_FILE}"]


def _on_tasks(run: OpenRun, values: Any) -> list[str]:
  from mixln_jax.inference.generate import check_decoder
  from mixln_jax.inference.harness import HarnessModel
  from mixln_jax.inference.tasks import Tasks, report, table  # it loads the harness, which takes seconds

  config = run.config
  check_decoder(config.model)  # before tasks are fetched over the network
  tasks = Tasks(values.tasks)
  target = RunFolder(values.output or f"{run.folder.address}/{folder_lib.TASKS}/{run.step}")
  target.make_writable(FILE)
  length, rows = config.data.sequence_length, config.evaluate.batch_size
  model = HarnessModel(config.model, run.params, run.tokenizer, length, rows)
  results = tasks.run(model, limit=values.limit, num_fewshot=values.num_fewshot)
  result = report(tasks, results, step=run.step, placement=config.model.placement, limit=values.limit)
  target.write_json(FILE, result)
  target.copy_out()
  return [table(result), f"wrote      {target.address}: {FILE}"]

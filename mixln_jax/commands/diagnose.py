"""Diagnose a run's checkpoint by layer: angular distance, removal, gradient norms, effective rank, logit lens.

And the depth suite of DepthBench (arXiv 2609.32534): causal and permutation scores, layers replaced by linear maps,
Jacobians, and how far the prediction of each depth is from the model's.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mixln_jax.command_line import CommandLine
from mixln_jax.config import NEWEST, ModelConfig
from mixln_jax.diagnostics.depth_suite import MEASUREMENTS
from mixln_jax.diagnostics.diagnose import SWAPS, diagnose, table
from mixln_jax.diagnostics.removal import Score
from mixln_jax.diagnostics.swaps import READINGS
from mixln_jax.errors import InputError
from mixln_jax.opening import OpenRun, Setup, check_batch, make_loader, open_run
from mixln_jax.parallel import processes
from mixln_jax.parallel.compile_cache import use_compile_cache
from mixln_jax.parallel.mesh import global_batch
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.text import for_stdout, whole_number
from mixln_jax.training.begin import initial_weights
from mixln_jax.training.step import state_shardings

TOKENS = 262_144  # the paper's 256K
BLOCKS = (1, 2, 4)
SWAP_TOKENS = 32_768  # L (L - 1) / 2 forward passes over them
FILE = "diagnose.json"
EVERY = 30.0  # seconds between lines in a log


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.string("workdir", "the run's folder, of training or of `convert --input`", required=True)
  line.integer("step", "which checkpoint; by default the newest", minimum=0)
  line.string("output", "folder to write diagnose.json to; by default RUN/diagnose/STEP")
  line.integer(
    "tokens",
    f"validation tokens to measure on; by default {TOKENS:,}, or config.evaluate.max_tokens where that is less",
    minimum=1,
    maximum=2**24,  # up to where fp32 counts
  )
  line.string("blocks", "how many neighbouring layers to remove together, as in 1,2,4; by default those that there are")
  line.integer("batch_size", "sequences a batch; by default the run's. Lower it where memory is short", minimum=1)
  line.string("tasks", "also the accuracy on tasks without each layer or block; tasks as `evaluate --tasks` has them")
  line.integer("limit", "with --tasks: only the first documents of each", minimum=1)
  line.string(
    "suite",
    f"which measurements of the depth suite: some of {','.join(MEASUREMENTS)}, or none; by default all of them",
  )
  line.string(
    "swaps",
    f"what moves where two layers are exchanged: some of {','.join(READINGS)}; by default {','.join(SWAPS)}",
  )
  line.integer(
    "swap_tokens",
    "tokens to exchange layers on, as whole records: each pair of layers is a pass over them",
    default=SWAP_TOKENS,
    minimum=1,
  )
  line.integer("jacobian_vectors", "random vectors to estimate the Jacobian of each layer from", default=32, minimum=2)
  line.boolean("json", "print the JSON instead of a table")
  values = line.parse(argv)
  if values.limit is not None and values.tasks is None:
    raise InputError("--limit has no meaning without --tasks; leave it out")
  changes = {} if values.batch_size is None else {"evaluate.batch_size": values.batch_size}
  step = NEWEST if values.step is None else values.step
  use_compile_cache()
  with open_run(values.workdir, step, changes=changes) as run:
    result, target, drawn = _diagnose(run, values)
  if processes.is_first():
    print(json.dumps(result) if values.json else for_stdout(table(result, run.setup.table.layer_list)))
    if not values.json:
      if run.step == 0 or run.config.train.start_from:  # a run of drawn weights has no checkpoint of step 0
        print("initial    this run started from imported weights, or another run's; “initial” above is a fresh draw")
      print(f"wrote      {target.address}: {FILE} and {len(drawn)} figures")
  return 0


def _diagnose(run: OpenRun, values: Any) -> tuple[dict[str, Any], RunFolder, list[Path]]:
  """Measures, writes and draws; returns what was measured, where it was written, and the figures."""
  config, setup = run.config, run.setup
  sizes = _sizes(values.blocks, config.model.num_layers)
  suite = _suite(values, config.data.sequence_length)
  tasks = _tasks(values.tasks, config.model)
  check_batch(setup, "--batch_size", config.evaluate.batch_size)
  target = RunFolder(values.output or f"{run.folder.address}/{folder_lib.DIAGNOSE}/{run.step}")
  target.make_writable(FILE)
  tokens = values.tokens or min(TOKENS, config.evaluate.max_tokens or TOKENS)
  rows = make_loader(setup, config.evaluate.batch_size).validation(tokens)
  batches = [global_batch(batch, setup.mesh) for batch in rows]
  shardings = state_shardings(config, setup.mesh).params
  measured = diagnose(
    config,
    run.params,
    lambda: initial_weights(setup, shardings),
    batches,
    setup.mesh,
    sizes=sizes,
    scores=_scores(tasks, setup, values.limit),
    suite=suite,
    watch=_bar,
  )
  result = {
    "step": run.step,
    "placement": config.model.placement,
    "num_layers": config.model.num_layers,
    "data_fingerprint": setup.corpus.manifest.fingerprint,
    **measured,
  }
  target.write_json(FILE, result)
  drawn = _draw(target)
  target.copy_out()
  return result, target, drawn


def _tasks(names: str | None, model: ModelConfig) -> Any:
  """The tasks of --tasks, loaded; None where there are none."""
  if names is None:
    return None
  from mixln_jax.inference.generate import check_decoder
  from mixln_jax.inference.tasks import Tasks  # it loads the harness, which takes seconds

  check_decoder(model)  # before tasks are fetched over the network
  return Tasks(names)


def _scores(tasks: Any, setup: Setup, limit: int | None) -> dict[str, Score]:
  """Each task as `removal` scores it."""
  if tasks is None:
    return {}
  from mixln_jax.inference.harness import HarnessModel
  from mixln_jax.inference.tasks import main_metric

  config, tokenizer = setup.config, setup.corpus.tokenizer
  rows = config.evaluate.batch_size

  def score_of(task: str) -> Score:
    def score(params: Any, keep_L: jax.Array) -> float:
      model = HarnessModel(config.model, params, tokenizer, config.data.sequence_length, rows)
      model.keep_L = keep_L
      return main_metric(tasks.run(model, limit=limit, only=task)[task])

    return score

  return {task: score_of(task) for task in tasks}


def _draw(target: RunFolder) -> list[Path]:
  """Draws the figures; of several processes the first one does."""
  if not processes.is_first():
    return []
  from mixln_jax.reporting.figures import draw_diagnose  # it loads matplotlib, which takes seconds

  return draw_diagnose(target / FILE, target.path)


def _sizes(blocks: str | None, num_layers: int) -> list[int]:
  """The sizes of --blocks, in order."""
  if blocks is None:
    return [size for size in BLOCKS if size <= num_layers]
  words = [word.strip() for word in blocks.split(",")]
  sizes: set[int] = set()
  for word in words:
    size = whole_number(word, num_layers)
    if not size:
      raise InputError(f"--blocks={blocks}: must be whole numbers from 1 to the run's {num_layers} layers, as in 1,2,4")
    sizes.add(size)
  return sorted(sizes)


def _suite(values: Any, length: int) -> dict[str, Any] | None:
  """What the flags say of the depth suite; None where nothing of it is to be measured."""
  if values.suite == "none":
    return None
  return {
    "measurements": _words("--suite", values.suite, MEASUREMENTS, MEASUREMENTS),
    "readings": _words("--swaps", values.swaps, READINGS, SWAPS),
    "permutation_sequences": -(-values.swap_tokens // length),
    "jacobian_vectors": values.jacobian_vectors,
  }


def _words(flag: str, text: str | None, known: Sequence[str], usual: Sequence[str]) -> list[str]:
  """Words of a flag, in the order of those that are known."""
  if text is None:
    return list(usual)
  words = [word.strip() for word in text.split(",")]
  if unknown := [word for word in words if word not in known]:
    raise InputError(f"{flag}={text}: {unknown[0]!r} is none of {', '.join(known)}")
  return [name for name in known if name in words]


def _bar(batches: Iterable[Any], stage: str) -> Iterable[Any]:
  """Shows how far a stage is, and the time left of it: a bar in a terminal, now and then a line in a log."""
  if not processes.is_first():
    return batches
  if sys.stderr.isatty():
    return tqdm(batches, desc=f"{stage:20}", unit="batch", leave=False)
  return _logged(list(batches), stage)


def _logged(batches: list[Any], stage: str) -> Iterator[Any]:
  """The batches; prints a line at the first, the last, and every half a minute between."""
  started = said = time.monotonic()
  for number, batch in enumerate(batches):
    now = time.monotonic()
    if number == 0 or now - said >= EVERY:
      left = "?" if number == 0 else str(timedelta(seconds=round((now - started) / number * (len(batches) - number))))
      print(f"{stage:20} {number}/{len(batches)} batches  left {left}", file=sys.stderr, flush=True)
      said = now
    yield batch
  print(f"{stage:20} done in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

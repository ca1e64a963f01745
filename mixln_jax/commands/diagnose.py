"""Diagnose a run's checkpoint by layer: angular distance, removal, gradient norms, effective rank, logit lens."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixln_jax.command_line import CommandLine
from mixln_jax.diagnostics.diagnose import diagnose, table
from mixln_jax.errors import InputError
from mixln_jax.parallel import processes
from mixln_jax.parallel.compile_cache import use_compile_cache
from mixln_jax.parallel.mesh import global_batch
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.opening import read_config
from mixln_jax.training.checkpoints import initial_weights
from mixln_jax.training.setup import check_batch, make_loader, on_mesh, open_run, set_up, spread_over_all_devices
from mixln_jax.training.step import state_shardings

TOKENS = 262_144  # the paper's 256K
BLOCKS = (1, 2, 4)
FILE = "diagnose.json"


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
  line.boolean("json", "print the JSON instead of a table")
  values = line.parse(argv)
  folder = RunFolder(values.workdir)
  config = read_config(folder)
  processes.join(config.parallel)
  use_compile_cache()
  sizes = _sizes(values.blocks, config.model.num_layers)
  if values.batch_size is not None:
    config.evaluate.batch_size = values.batch_size
  with processes.failing_together():
    config = spread_over_all_devices(config)
    setup = set_up(config)
    check_batch(setup, "--batch_size", config.evaluate.batch_size)
    run = open_run(folder, setup.mesh, values.step)
    target = RunFolder(values.output or f"{folder.address}/{folder_lib.DIAGNOSE}/{run.step}")
    _make(target)
    tokens = values.tokens or min(TOKENS, config.evaluate.max_tokens or TOKENS)
    rows = make_loader(setup, config.evaluate.batch_size).validation(tokens)
    batches = [global_batch(batch, setup.mesh) for batch in rows]
    shardings = state_shardings(config, setup.mesh).params
    with on_mesh(setup.mesh):
      measured = diagnose(
        config, run.params, lambda: initial_weights(setup, shardings), batches, setup.mesh, sizes=sizes, watch=_bar
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
    processes.wait_for_all("the end of the diagnosis")
  if processes.is_first():
    print(json.dumps(result) if values.json else table(result, setup.table.strip))
    if not values.json:
      print(f"wrote      {target.address}: {FILE} and {len(drawn)} figures")
  return 0


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
  if not all(word.isdecimal() and 1 <= int(word) <= num_layers for word in words):
    raise InputError(f"--blocks={blocks}: must be whole numbers from 1 to the run's {num_layers} layers, as in 1,2,4")
  return sorted(set(map(int, words)))


def _make(target: RunFolder) -> None:
  """Makes the folder before anything is measured."""
  try:
    if processes.is_first():
      if target.remote is not None:
        target.remote.write(f".{FILE}.partial", b"")
        target.remote.remove(f".{FILE}.partial")
      target.path.mkdir(parents=True, exist_ok=True)
      probe = target / f".{FILE}.partial"
      probe.write_text("")
      probe.unlink()
  except OSError as error:
    raise InputError(f"--output={target.path}: can't be written ({error.strerror}); choose another folder") from error


def _bar(batches: Iterable[Any], stage: str) -> Iterable[Any]:
  """Shows in a terminal how far a stage is."""
  return tqdm(batches, desc=f"{stage:18}", unit="batch", disable=None if processes.is_first() else True, leave=False)

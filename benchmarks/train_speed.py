"""Training speed of this repository and of Hugging Face's LlamaForCausalLM, on one machine in one run.

    python -m benchmarks.train_speed --recipes 9m 71m --torch=PYTHON --flax=PYTHON2 [--out=FILE]

PYTHON is an interpreter with torch and transformers; PYTHON2 has JAX, flax and transformers 4, the last version with
FlaxLlamaForCausalLM. Without them only this repository is timed. Each trainer runs in a process of its own. They run
alternately, so that other work on the machine affects all of them alike: a round is some steps of each, and one large
matrix product to measure the machine's speed at that time. The table has medians over all steps, the spread between
quartiles, and utilisation: model FLOPs (mixln_jax/model/flops.py) relative to the fastest product that any trainer
measured. Peak memory during training is that of the process on a CPU, else that of the device.

All train in --dtype (bfloat16: over fp32 weights) with the same shape, batch, AdamW and clipping. --cases replaces a
recipe's placement, remat, unroll and micro-batches: PLACEMENT[/FIELD=VALUE…], where FIELD is a field of config.model or
has its section (train.micro_batches=2).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from benchmarks.output import output_file
from benchmarks.recipes import RECIPES, case_fields, load
from mixln_jax import config as config_lib
from mixln_jax.errors import InputError

WORKERS = Path(__file__).parent
ROOT = WORKERS.parent
PEERS = ("torch eager", "torch compile", "flax")
PLACEMENTS = ("pre", "post", "mix:0.25")
CASES = (*PLACEMENTS, *(f"{name}/remat=dots_no_batch" for name in PLACEMENTS))


class Worker:
  """A trainer in its own process, which works on request and is idle otherwise."""

  def __init__(
    self,
    command: list[str],
    request: dict[str, Any],
    environment: dict[str, str] | None = None,
    *,
    stderr: IO[str] | None = None,
    seconds: float | None = None,
  ):
    """Starts the process and waits until it is ready.

    Args:
      command: the command that starts the process.
      request: its last argument, as JSON.
      environment: variables to add to those of this process.
      stderr: the file for its error output; None = that of this process.
      seconds: kill it after this time; None = never.
    """
    self.process = subprocess.Popen(
      [*command, json.dumps(request)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=stderr,
      text=True,
      env=os.environ | (environment or {}),
      cwd=ROOT,
    )
    self._limit = threading.Timer(seconds or 0.0, self.process.kill)
    if seconds is not None:
      self._limit.daemon = True
      self._limit.start()
    self.facts = self.read()
    self.seconds: list[float] = []
    self.peak_gb = 0.0

  def read(self) -> dict[str, Any]:
    assert self.process.stdout
    if not (line := self.process.stdout.readline()):
      self._limit.cancel()
      raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
    return json.loads(line)

  def ask(self, **request: Any) -> dict[str, Any]:
    assert self.process.stdin
    self.process.stdin.write(json.dumps(request) + "\n")
    self.process.stdin.flush()
    return self.read()

  def train(self, steps: int) -> None:
    result = self.ask(steps=steps)
    self.seconds += result["seconds"]
    self.peak_gb = result["peak_gb"]

  def close(self) -> None:
    assert self.process.stdin
    self.process.stdin.close()
    self.process.wait()
    self._limit.cancel()


def fields_of(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
  """Flat config fields of `mix:0.25/unroll=0`."""
  fields: dict[str, Any] = {
    "model.dtype": arguments.dtype,
    "model.remat": "none",
    "train.batch_size": arguments.batch,
    "train.micro_batches": 1,
    "data.sequence_length": arguments.length,
  }
  return fields | case_fields(case)


def llama_shape(recipe: str, length: int, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
  """The recipe's shape as fields of `transformers.LlamaConfig`, with `sizes` changed if given."""
  model = load(recipe).model
  model.update(sizes or {})
  return {
    "vocab_size": model.vocab_size,
    "hidden_size": model.embed_dim,
    "intermediate_size": model.mlp_dim,
    "num_hidden_layers": model.num_layers,
    "num_attention_heads": model.num_heads,
    "max_position_embeddings": length,
    "rms_norm_eps": model.norm_epsilon,
    "tie_word_embeddings": model.tied_embeddings,
  }


def check(arguments: argparse.Namespace) -> None:
  """Rejects a case that is not a valid config, before anything is measured."""
  for recipe in arguments.recipes:
    for case in arguments.cases:
      config = load(recipe)
      config.update_from_flattened_dict(fields_of(case, arguments))
      try:
        config_lib.validate(config)
      except InputError as error:
        raise SystemExit(f"error: --cases: {case!r}: {error}") from error


def start(recipe: str, arguments: argparse.Namespace) -> dict[str, Worker]:
  ours = [sys.executable, "-m", "benchmarks.speed_worker"]
  workers = {
    case: Worker(ours, {"recipe": recipe, "fields": fields_of(case, arguments)}, {"JAX_ENABLE_COMPILATION_CACHE": "0"})
    for case in arguments.cases
  }
  request = {
    "shape": llama_shape(recipe, arguments.length),
    "batch": [arguments.batch, arguments.length],
    "dtype": arguments.dtype,
  }
  for name, compiled in (("torch eager", False), ("torch compile", True)) if arguments.torch else ():
    workers[name] = Worker([arguments.torch, str(WORKERS / "torch_worker.py")], request | {"compiled": compiled})
  if arguments.flax:
    workers["flax"] = Worker([arguments.flax, str(WORKERS / "flax_worker.py")], request)
  return workers


def measure(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
  """Rows of the table for one recipe."""
  workers = start(recipe, arguments)
  facts = next(iter(workers.values())).facts
  ceilings = []
  for _ in range(arguments.rounds):
    for name, worker in workers.items():
      if name in (arguments.cases[0], "torch eager"):
        ceilings.append(worker.ask(matmul=arguments.matmul)["flops_per_second"])
      worker.train(arguments.steps)
  for worker in workers.values():
    worker.close()
  ceiling = statistics.median(sorted(ceilings)[len(ceilings) // 2 :])  # of the upper half: the rest met other work
  rows = []
  for name, worker in workers.items():
    median = statistics.median(worker.seconds)
    quartiles = statistics.quantiles(worker.seconds, n=4)
    rows.append(
      {
        "case": name,
        "seconds": median,
        "spread": (quartiles[2] - quartiles[0]) / median,
        "tokens_per_second": facts["tokens"] / median,
        "utilisation": facts["tokens"] * facts["flops_per_token"] / median / ceiling,
        "compile_seconds": worker.facts["compile_seconds"],
        "peak_gb": worker.peak_gb,
        "parameters": worker.facts["parameters"],
        "versions": worker.facts["versions"],
        "all_seconds": worker.seconds,
      }
    )
  return {"recipe": recipe, "device": facts["device"], "ceiling_gflops": ceiling / 1e9, "rows": rows}


def show(result: dict[str, Any]) -> None:
  """One line per case; ratios are to the best peer, or to the first case if there is no peer."""
  rows = result["rows"]
  peers = [row for row in rows if row["case"] in PEERS] or rows[:1]
  fastest = min(peers, key=lambda row: row["seconds"])
  leanest = min(peers, key=lambda row: row["peak_gb"])
  print(f"\n{result['recipe']} on {result['device']}; matrix product {result['ceiling_gflops']:,.0f} GFLOP/s")
  line = "{:<26}{:>9}{:>9}{:>11}{:>8}{:>13}{:>11}{:>9}{:>10}"
  print(line.format("case", "s/step", "spread", "tokens/s", "ratio", "utilisation", "compile s", "peak GB", "ratio"))
  for row in rows:
    print(
      line.format(
        row["case"],
        f"{row['seconds']:.3f}",
        f"{row['spread']:.0%}",
        f"{row['tokens_per_second']:,.0f}",
        f"{fastest['seconds'] / row['seconds']:.2f}",
        f"{row['utilisation']:.0%}",
        f"{row['compile_seconds']:.1f}",
        f"{row['peak_gb']:.2f}",
        f"{row['peak_gb'] / leanest['peak_gb']:.2f}",
      )
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=["9m", "71m"])
  parser.add_argument("--cases", nargs="+", default=list(CASES))
  parser.add_argument("--torch", help="a Python with torch and transformers")
  parser.add_argument("--flax", help="a Python with JAX, flax and transformers 4")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--dtype", choices=config_lib.DTYPES, default="float32")
  parser.add_argument("--matmul", type=int, default=2048, help="size of the matrix product that is the ceiling")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=2, help="steps of each trainer a round")
  parser.add_argument("--out", type=output_file, help="results of recipes that it has already are not measured again")
  arguments = parser.parse_args()
  check(arguments)
  stored = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {"results": []}
  results = {result["recipe"]: result for result in stored["results"]}
  for recipe in arguments.recipes:
    if recipe not in results:
      results[recipe] = measure(recipe, arguments)
    if arguments.out:
      machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
      setting = {name: getattr(arguments, name) for name in ("batch", "length", "dtype", "rounds", "steps")}
      document = {"machine": machine, "setting": setting, "results": list(results.values())}
      arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    show(results[recipe])


if __name__ == "__main__":
  main()

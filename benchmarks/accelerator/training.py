"""Steps a second of one trainer at a time: batch and remat tuned, then each placement, and torch's LLaMA.

Each trainer has the device to itself while it is timed: two of them would share its memory.
"""

import dataclasses
import statistics
import sys
from functools import partial
from typing import Any

from benchmarks.accelerator.kit import Kit, Piece, PieceError, Result
from benchmarks.train_speed import WORKERS, llama_shape

OURS = [sys.executable, "-m", "benchmarks.speed_worker"]
PLACEMENTS = ("post", "lns", "hc:4", "mhc:4", "siamese", "attnres:4")
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Shape:
  """A recipe at a length, with the settings that are tried.

  Attributes:
    recipe: as benchmarks/recipes.py names it.
    length: tokens a row.
    tried: remat policy and rows of each setting of ours.
    torch_rows: rows that torch's LLaMA is tried with.
    fields: further config fields, flat.
  """

  recipe: str
  length: int
  tried: tuple[tuple[str, int], ...]
  torch_rows: tuple[int, ...]
  fields: tuple[tuple[str, Any], ...] = ()


LARGE = (
  Shape(
    "71m", 1024, (("none", 32), ("none", 64), ("dots_no_batch", 64), ("dots_no_batch", 128), ("full", 128)), (32, 64)
  ),
  Shape(
    "250m", 1024, (("none", 16), ("dots_no_batch", 32), ("dots_no_batch", 64), ("full", 64), ("full", 128)), (16, 32)
  ),
  Shape("1b", 1024, (("none", 8), ("dots_no_batch", 16), ("dots_no_batch", 32), ("full", 32), ("full", 64)), (8, 16)),
)
# For a CPU and for tests: the same pieces, no sizes worth a number.
LITTLE = (
  Shape(
    "9m",
    64,
    (("none", 2), ("full", 2)),
    (2,),
    (("model.num_layers", 2), ("model.embed_dim", 32), ("model.mlp_dim", 64), ("model.vocab_size", 128)),
  ),
)


def pieces(small: bool, torch: bool) -> list[Piece]:
  """Tuning first: what comes after takes the best setting that was found."""
  found = []
  for shape in LITTLE if small else LARGE:
    for remat, rows in shape.tried:
      found.append(Piece(f"tune/{shape.recipe}/{remat}/{rows}", 200, partial(_tuning, shape, remat, rows)))
    if torch:
      for compiled in (True, False):
        for rows in shape.torch_rows:
          name = "torch compile" if compiled else "torch eager"
          found.append(Piece(f"{name}/{shape.recipe}/{rows}", 240, partial(_peer, shape, rows, compiled)))
    for placement in ("pre", "mix:0.25"):
      found.append(Piece(f"placement/{shape.recipe}/{placement}", 200, partial(_placement, shape, placement)))
  middle = LITTLE[0] if small else LARGE[1]
  for placement in PLACEMENTS[:1] if small else PLACEMENTS:
    found.append(Piece(f"placement/{middle.recipe}/{placement}", 200, partial(_placement, middle, placement)))
  # The same once more: what changed since the first was the machine.
  found.append(Piece(f"placement/{middle.recipe}/pre again", 200, partial(_placement, middle, "pre")))
  return found


def fields_of(shape: Shape, placement: str, remat: str, rows: int) -> dict[str, Any]:
  return {
    "model.placement": placement,
    "model.dtype": DTYPE,
    "model.remat": remat,
    "train.batch_size": rows,
    "train.micro_batches": 1,
    "data.sequence_length": shape.length,
    **dict(shape.fields),
  }


def _tuning(shape: Shape, remat: str, rows: int, kit: Kit) -> Result:
  return _ours(kit, shape, fields_of(shape, "pre", remat, rows))


def _placement(shape: Shape, placement: str, kit: Kit) -> Result:
  return _ours(kit, shape, fields_of(shape, placement, *best_setting(kit, shape.recipe)))


def best_setting(kit: Kit, recipe: str) -> tuple[str, int]:
  """Remat policy and rows of the fastest setting that was tried.

  Raises:
    PieceError: none of them ran.
  """
  best = kit.best(f"tune/{recipe}/")
  if best is None:
    raise PieceError(f"no setting of {recipe} ran")
  _, _, remat, rows = best[0].split("/")
  return remat, int(rows)


def _ours(kit: Kit, shape: Shape, fields: dict[str, Any]) -> Result:
  with kit.worker(OURS, {"recipe": shape.recipe, "fields": fields}) as worker:
    facts = worker.facts
    timed = _timed(kit, worker, facts["tokens"])
    flops = facts["flops_per_token"] * timed["tokens_per_second"]
    peak = facts["peak_flops"]
    return timed | {
      "model_flops_per_second": flops,
      "utilisation": None if peak is None else flops / peak,
      "attention": facts["attention"],
      "parameters": facts["parameters"],
      "remat": fields["model.remat"],
      "rows": fields["train.batch_size"],
      "length": shape.length,
    }


def _peer(shape: Shape, rows: int, compiled: bool, kit: Kit) -> Result:
  assert kit.torch is not None
  sizes = {name.removeprefix("model."): value for name, value in shape.fields}
  request = {
    "shape": llama_shape(shape.recipe, shape.length, sizes),
    "batch": [rows, shape.length],
    "dtype": DTYPE,
    "compiled": compiled,
  }
  with kit.worker([kit.torch, str(WORKERS / "torch_worker.py")], request) as worker:
    timed = _timed(kit, worker, rows * shape.length)
    versions = worker.facts["versions"]
    return timed | {"versions": versions, "parameters": worker.facts["parameters"], "rows": rows}


def _timed(kit: Kit, worker: Any, tokens: int) -> Result:
  """Medians over single steps, after some that are not counted."""
  worker.ask(steps=1 if kit.small else 3)
  worker.train(2 if kit.small else 12)
  median = statistics.median(worker.seconds)
  low, _, high = statistics.quantiles(worker.seconds, n=4)
  return {
    "seconds": median,
    "spread": (high - low) / median,
    "tokens_per_second": tokens / median,
    "compile_seconds": worker.facts["compile_seconds"],
    "peak_gb": worker.peak_gb,
  }

"""What this repository does on one accelerator: correctness, then speed beside torch, in one table.

    python -m benchmarks.accelerator [--out=FILE] [--minutes=9] [--torch=PYTHON] [--only tune/1b …] [--again]
    python -m benchmarks.accelerator --show [--out=FILE]

  tests       golden values and the fast numerical tests, on the device, in full float32 products
  resume      a run that is stopped and resumed against one that is not, bit by bit, in float32 and bfloat16
  attention   each implementation against the plain one in float32: errors, milliseconds
  tune        llama_71m, 250m, 1b in bfloat16 at 1,024 tokens: remat and rows
  torch       transformers' LlamaForCausalLM with flash attention, compiled and eager, where --torch names a Python
              that has both (the same one may have JAX too)
  placement   mix:0.25, post, lns and several streams against pre, at the best setting of llama_250m
  together    8 and 16 runs as one program against one by one, at 9m and 71m
  profile     the largest costs of a step

A call works for at most --minutes, and the same command resumes it: exit status 75 says that something is left, 0 that
nothing is. Each piece is a process of its own with a limit of its own; one that failed is told with its error, and
measured again only with --again. --out holds results of one kind of device: those of another are refused.
docs/accelerator.md says how what a bare machine lacks travels there as wheels. --small is for a test on a CPU.
"""

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial

from benchmarks.accelerator import training
from benchmarks.accelerator.kit import ROOT, Kit, Piece, Result, last_words, own_environment
from benchmarks.accelerator.table import table
from benchmarks.output import output_file

LEFT_STATUS = 75
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Golden values first: what a number is worth depends on them.
TESTS = {
  "golden": ("tests/model/test_golden.py", "tests/model/test_golden_topology.py"),
  "model": ("tests/model/test_transformer.py", "tests/model/test_loss.py", "tests/model/test_placements.py"),
  "training": ("tests/training/test_step.py", "tests/training/test_optimizer.py"),
  "diagnostics": ("tests/diagnostics/test_diagnose.py", "tests/diagnostics/test_removal.py"),
}
SHAPES = {"64 wide": (16, 1024, 16, 64), "128 wide": (4, 4096, 16, 128)}  # rows, length, heads, width
ATTENTIONS = ("xla", "cudnn", "blocks", "pallas", "tokamax")


def pieces(kit: Kit) -> list[Piece]:
  """All that is measured, in order."""
  found = [
    Piece(f"tests/{name}", 500, partial(_tests, paths))
    for name, paths in TESTS.items()
    if not kit.small or name == "golden"
  ]
  found += [Piece(f"resume/{dtype}", 300, partial(_resume, dtype)) for dtype in ("float32", "bfloat16")]
  for name, shape in SHAPES.items():
    for implementation in ATTENTIONS:
      found.append(Piece(f"attention/{name}/{implementation}", 120, partial(_attention, shape, implementation)))
  found += training.pieces(kit.small, kit.torch is not None)
  sizes = (("9m", 8),) if kit.small else (("9m", 8), ("9m", 16), ("71m", 8), ("71m", 16))
  for recipe, runs in sizes:
    found.append(Piece(f"together/{recipe}/{runs}", 400, partial(_together, recipe, runs)))
  shapes = training.LITTLE if kit.small else training.LARGE
  found += [Piece(f"profile/{shape.recipe}", 200, partial(_profile, shape)) for shape in shapes]
  return found


def _tests(paths: tuple[str, ...], kit: Kit) -> Result:
  environment = {"JAX_PLATFORMS": kit.document["machine"]["backend"], "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
  environment["XLA_FLAGS"] = "--xla_backend_optimization_level=3"  # what users have; the tests alone compile less
  selected = ("-k", "siamese") if kit.small else ("-m", "not slow")
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *selected, *paths]
  printed = kit.command(command, environment, statuses=(0, 1))
  failed = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
  return {"summary": printed.strip().splitlines()[-1].strip("= "), "failed": failed}


def _resume(dtype: str, kit: Kit) -> Result:
  fields = [f"model.dtype={dtype}", "evaluate.max_tokens=2048", "diagnostics.every_steps=0"]
  if kit.small:
    fields += ["model.num_layers=2", "model.embed_dim=32", "model.mlp_dim=64", "train.batch_size=2"]
  with tempfile.TemporaryDirectory() as folder:
    request = {"fields": fields, "steps": 8 if kit.small else 40, "folder": folder}
    flags = "--xla_gpu_deterministic_ops=true" if kit.document["machine"]["backend"] == "cuda" else ""
    return kit.module("resume", request, {"XLA_FLAGS": flags})


def _attention(shape: tuple[int, ...], implementation: str, kit: Kit) -> Result:
  rows, length, heads, width = (1, 128, 2, 64) if kit.small else shape
  request = {"rows": rows, "length": length, "heads": heads, "width": width, "only": implementation}
  return kit.module("attention", request | {"repeats": 2 if kit.small else 20})


def _together(recipe: str, runs: int, kit: Kit) -> Result:
  fields = {"model.dtype": training.DTYPE, "model.remat": "none", "train.batch_size": 16, "train.micro_batches": 1}
  if kit.small:
    fields |= {"model.num_layers": 2, "model.embed_dim": 32, "model.mlp_dim": 64, "data.sequence_length": 32}
  return kit.module("together", {"recipe": recipe, "fields": fields, "runs": runs, "repeats": 1 if kit.small else 8})


def _profile(shape: training.Shape, kit: Kit) -> Result:
  fields = training.fields_of(shape, "pre", *training.best_setting(kit, shape.recipe))
  return kit.module("profile", {"recipe": shape.recipe, "fields": fields, "steps": 1 if kit.small else 5})


def machine(torch: str | None) -> Result:
  """What the numbers are of. Asked of another process: this one must not hold the device."""
  asked = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind)"
  backend, kind = _said_by(sys.executable, asked, "JAX finds no device").split(maxsplit=1)
  found = {"device": kind, "backend": {"gpu": "cuda"}.get(backend, backend), "python": platform.python_version()}
  found |= {name: importlib.metadata.version(name) for name in PACKAGES}
  if torch is not None:
    asked = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    found["torch"], found["transformers"] = _said_by(torch, asked, f"--torch={torch}").split()
  return found


def _said_by(python: str, text: str, what: str) -> str:
  """The last line that a program in a process of its own prints."""
  try:
    done = subprocess.run([python, "-c", text], capture_output=True, text=True, env=own_environment())
  except OSError as error:
    raise SystemExit(f"error: {what}: {error.strerror}") from error
  if done.returncode:
    raise SystemExit(f"error: {what}: {last_words(done.stderr)}")
  return done.stdout.strip().splitlines()[-1]


def work(kit: Kit, todo: list[Piece], seconds: float) -> list[Piece]:
  """Measures what fits, in order; returns what is left."""
  deadline = time.monotonic() + seconds
  left = []
  for piece in todo:
    # A piece that is put off puts off those that stand on it: what follows may need its setting.
    if left or time.monotonic() + piece.seconds > deadline:
      left.append(piece)
      continue
    print(f"{piece.name:<36}", end="", flush=True)
    result = kit.run(piece)
    print(f"{result['took']:7.1f} s  {result.get('error', 'measured')}", flush=True)
  return left


def main() -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.accelerator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=output_file, default=str(ROOT / "benchmarks" / "results" / "accelerator.json"))
  parser.add_argument("--minutes", type=float, default=9.0, help="what a call may take")
  parser.add_argument("--torch", help="a Python with torch and transformers")
  parser.add_argument("--only", nargs="+", help="beginnings of the names of pieces")
  parser.add_argument("--again", action="store_true", help="measure the chosen pieces again that failed")
  parser.add_argument("--show", action="store_true", help="print the table and measure nothing")
  parser.add_argument("--small", action="store_true", help="sizes for a test on a CPU")
  arguments = parser.parse_args()
  started = time.monotonic()
  kit = Kit(arguments.out, small=arguments.small, torch=arguments.torch)
  if arguments.show:
    print(table(kit.document))
    return 0
  here = machine(arguments.torch)
  known = kit.document["machine"]
  if known and known["device"] != here["device"]:
    raise SystemExit(f"error: --out={arguments.out} holds results of {known['device']}; this is {here['device']}")
  kit.document["machine"] = known | here
  chosen = [piece for piece in pieces(kit) if piece.name.startswith(tuple(arguments.only or [""]))]
  if not chosen:
    raise SystemExit(f"error: --only={' '.join(arguments.only)}: no piece's name begins so")
  longest = max(piece.seconds for piece in chosen)
  if longest > arguments.minutes * 60:
    raise SystemExit(f"error: --minutes={arguments.minutes:g}: a piece may take {longest / 60:.1f} minutes")
  done = {name for name, result in kit.results.items() if not (arguments.again and "error" in result)}
  todo = [piece for piece in chosen if piece.name not in done]
  left = work(kit, todo, arguments.minutes * 60 - (time.monotonic() - started))
  print(table(kit.document))
  if left:
    print(f"{len(left)} of {len(chosen)} pieces are left, {left[0].name} next: run the same command again")
  return LEFT_STATUS if left else 0


if __name__ == "__main__":
  sys.exit(main())

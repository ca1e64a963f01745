"""What the training step needs on TPUs, from the real TPU compiler on a machine without one.

    pip install -r requirements-tpu.txt
    python -m benchmarks.compile_for_tpu [--out=benchmarks/results/tpu_memory.json] [RECIPE TOPOLOGY PLACEMENT ...]

Plans each case, by default all of CASES and every recipe as it is, and prints what a chip needs. It shows that the step
compiles and whether it fits; it measures no speed. Cases that --out holds already are not compiled again.

`counted` is the hand count of parameters, moments, counters and batch. The compiled arguments are equal but for the
tiles that a TPU keeps arrays in: each of the four counters takes 512 bytes, and sizes that no tile divides are padded.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from benchmarks.recipes import RECIPES, load
from mixln_jax.planning import topology
from mixln_jax.planning.plan import Plan, arithmetic, compile_plan

CASES = (
  *(("1b", "v5e:4x4", placement) for placement in ("pre", "mix:0.25")),
  *(("7b", slice_, placement) for slice_ in ("v5p:2x2x4", "v6e:4x4") for placement in ("pre", "mix:0.25")),
  ("7b", "v5e:16x16", "mix:0.25"),
)


def measure(recipe: str, slice_: str, placement: str) -> Plan:
  config = load(recipe)
  config.model.placement = placement
  shape = topology.parse(slice_, config)
  return compile_plan(arithmetic(config, shape), topology.devices(shape))


HEADER = (
  "recipe",
  "topology",
  "placement",
  "counted",
  "arguments",
  "temporaries",
  "total",
  "of",
  "fits",
  "compiled in",
)
LINE = "{:<8}{:<12}{:<12}{:>9}{:>11}{:>13}{:>8}{:>8}{:>7}{:>13}"


def show(row: dict[str, Any]) -> str:
  """A line of the table, sizes in GB a chip."""
  made = row["compiled"]
  memory = made["memory_bytes"]
  keys = ("arguments", "temporaries", "total")
  sizes = [f"{memory[key] / 1e9:.3f}" for key in keys] if memory else ["-", "-", made["too_much"]]
  counted, available = sum(row["counted_bytes"].values()) / 1e9, row["device_memory_bytes"] / 1e9
  fits = "yes" if row["fits"] else "no"
  seconds = f"{made['seconds']:.0f} s"
  return LINE.format(
    row["recipe"],
    row["topology"]["name"],
    row["config_placement"],
    f"{counted:.3f}",
    *sizes,
    f"{available:.2f}",
    fits,
    seconds,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("cases", nargs="*", help="triples of a recipe (130m), a topology (v5e:2x4) and a placement")
  parser.add_argument("--out", type=Path)
  arguments = parser.parse_args()
  given = list(zip(*(iter(arguments.cases),) * 3, strict=True))
  recipes = [(recipe, slice_, load(recipe).model.placement) for recipe, slice_ in RECIPES.items()]
  versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
  stored = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {"rows": []}
  if stored["rows"] and stored["versions"] != versions:
    sys.exit(f"{arguments.out} was measured with other versions than {versions}; give another --out")
  rows = {(row["recipe"], row["topology"]["name"], row["config_placement"]): row for row in stored["rows"]}
  print(LINE.format(*HEADER))
  for case in dict.fromkeys(given or [*CASES, *recipes]):
    if case not in rows:
      recipe, _, placement = case
      rows[case] = {"recipe": recipe, "config_placement": placement, **measure(*case).to_json()}
      if arguments.out:
        arguments.out.write_text(json.dumps({"versions": versions, "rows": list(rows.values())}, indent=1) + "\n")
    print(show(rows[case]), flush=True)


if __name__ == "__main__":
  main()

"""Memory and traffic of the training step on TPUs, from the real TPU compiler on a machine without a TPU.

    pip install -r requirements-tpu.txt
    python -m benchmarks.compile_for_tpu [--out=benchmarks/results/tpu_memory.json] [--texts=DIR] \\
        [RECIPE TOPOLOGY CASE ...]

Plans each case (by default all of CASES and every unchanged recipe) and prints the needs of one chip. A CASE is
PLACEMENT[/FIELD=VALUE...], as in `pre/remat=none/train.micro_batches=2`. The table shows that the step compiles,
whether it fits, and how many bytes it moves. It does not measure speed: `estimate` is the compiler's own estimate for
all instructions in sequence, without collectives and kernels. Cases that are in --out already are not compiled again.
With --texts the compiled programs are saved in that folder; existing ones are counted again but not compiled.

`counted` is the sum of parameters, moments, counters and batch, computed from their shapes. The compiled arguments
differ from it only by the tiles in which a TPU stores arrays: each of the four counters takes 512 bytes, and sizes that
are not a multiple of a tile are padded.
"""

import argparse
import gzip
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from benchmarks.output import output_file, output_folder
from benchmarks.recipes import RECIPES, case_fields, load
from mixln_jax.planning import topology
from mixln_jax.planning.plan import Memory, Plan, Step, arithmetic, compile_step, with_step

CASES = (
  *(("1b", "v5e:4x4", placement) for placement in ("pre", "mix:0.25")),
  *(("7b", slice_, placement) for slice_ in ("v5p:2x2x4", "v6e:4x4") for placement in ("pre", "mix:0.25")),
  ("7b", "v5e:16x16", "mix:0.25"),
)


def measure(recipe: str, slice_: str, case: str, texts: Path | None) -> Plan:
  config = load(recipe)
  config.update_from_flattened_dict(case_fields(case))
  shape = topology.parse(slice_, config)
  plan = arithmetic(config, shape)
  stored = texts and texts / (re.sub(r"[^\w.=-]+", "_", f"{recipe}-{slice_}-{case}") + ".json.gz")
  if stored and stored.is_file():
    return with_step(plan, read_step(stored))
  step = compile_step(plan, topology.devices(shape))
  if stored:
    write_step(stored, step)
  return with_step(plan, step)


def read_step(path: Path) -> Step:
  with gzip.open(path, "rt") as file:
    step = json.load(file)
  return Step(**(step | {"memory": step["memory"] and Memory(**step["memory"])}))


def write_step(path: Path, step: Step) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with gzip.open(path, "wt") as file:
    json.dump(step._asdict() | {"memory": step.memory and step.memory._asdict()}, file)


HEADER = ("recipe", "topology", "case", "counted", "arguments", "temporaries", "total", "of", "fits", "traffic", "sent")
HEADER += ("waited for", "estimate", "compiled in")
LINE = "{:<8}{:<12}{:<12}{:>9}{:>11}{:>13}{:>8}{:>8}{:>6}{:>9}{:>8}{:>12}{:>11}{:>13}"


def show(row: dict[str, Any]) -> str:
  """A line of the table: sizes in GB per chip, and bytes that a chip moves per step."""
  made = row["compiled"]
  memory = made["memory_bytes"]
  keys = ("arguments", "temporaries", "total")
  sizes = [f"{memory[key] / 1e9:.3f}" for key in keys] if memory else ["-", "-", made["too_much"]]
  moved = ["-"] * 3
  if made["collectives"] is not None:
    collectives = made["collectives"].values()
    sent, waited_for = (sum(one[key] for one in collectives) for key in ("sent", "waited_for"))
    moved = [f"{size / 1e9:.2f}" for size in (made["memory_traffic_bytes"], sent, waited_for)]
  estimate = (row["estimate"] or {}).get("by_the_compiler")
  return LINE.format(
    row["recipe"],
    row["topology"]["name"],
    row["config_placement"],
    f"{sum(row['counted_bytes'].values()) / 1e9:.3f}",
    *sizes,
    f"{row['device_memory_bytes'] / 1e9:.2f}",
    "yes" if row["fits"] else "no",
    *moved,
    f"{1000 * estimate:.0f} ms" if estimate else "-",
    f"{made['seconds']:.0f} s",
  )


def versions() -> dict[str, str]:
  return {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}


def write_results(path: Path, document: dict[str, Any]) -> None:
  path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("cases", nargs="*", help="triples of a recipe (130m), a topology (v5e:2x4) and a case")
  parser.add_argument("--out", type=output_file)
  parser.add_argument("--texts", type=output_folder, help="folder of compiled programs")
  arguments = parser.parse_args()
  given = list(zip(*(iter(arguments.cases),) * 3, strict=True))
  recipes = [(recipe, slice_, load(recipe).model.placement) for recipe, slice_ in RECIPES.items()]
  stored = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {"rows": []}
  if stored["rows"] and stored["versions"] != versions():
    sys.exit(f"{arguments.out} was measured with other versions than {versions()}; give another --out")
  rows = {(row["recipe"], row["topology"]["name"], row["config_placement"]): row for row in stored["rows"]}
  print(LINE.format(*HEADER))
  for case in dict.fromkeys(given or [*CASES, *recipes]):
    if case not in rows:
      rows[case] = {"recipe": case[0], "config_placement": case[2], **measure(*case, arguments.texts).to_json()}
      if arguments.out:
        write_results(arguments.out, stored | {"versions": versions(), "rows": list(rows.values())})
    print(show(rows[case]), flush=True)


if __name__ == "__main__":
  main()

"""This repository's training step and MaxText's, compiled for the same TPU slice on a machine without a TPU.

    python -m benchmarks.against_maxtext --maxtext=PYTHON [--path=DIR] --texts=DIR \\
        [--out=benchmarks/results/against_maxtext.json] [--lengths 256 2048] [--cases pre mix:0.25] [--flags ...]

PYTHON is an interpreter with MaxText and the same jax and libtpu as this one; --path is added to its PYTHONPATH, for a
MaxText that is unpacked but not installed. Both train the shape of configs/llama_1b.py on v5e:4x4: 131,072 tokens per
step, bf16 over fp32 weights, AdamW with clipping, remat full, fsdp 16, the MLP at its stored width (5,504). All numbers
are counted from the compiled programs by mixln_jax/planning/hlo.py, per chip and step; nothing is timed. `estimate` is
the compiler's own estimate for all instructions in sequence, without collectives and kernels. With --flags, MaxText is
compiled a second time with these compiler options.

Programs are saved in --texts and rows in --out; existing ones are not compiled again. A row with a `source` was not
counted here. docs/tpu_programs.md says how to set up such an interpreter.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks.compile_for_tpu import measure, versions, write_results
from benchmarks.output import output_file, output_folder
from benchmarks.recipes import load
from mixln_jax import config as config_lib
from mixln_jax.parallel.devices import DEVICES
from mixln_jax.planning.hlo import traffic

RECIPE, SLICE, CHIPS = "1b", "v5e:4x4", 16
TOKENS = 131_072  # a step
WORKER = Path(__file__).with_name("maxtext_worker.py")
UNWINDOWED = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"


def maxtext_arguments(length: int, flags: str, base: Path, output: Path) -> list[str]:
  """The recipe as arguments of MaxText's train_compile."""
  model = load(RECIPE).model
  fields = {
    "compile_topology": f"v5e-{CHIPS}",
    "compile_topology_num_slices": 1,
    "run_name": "compiled",
    "base_output_directory": output,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "decoder_block": "llama2",
    "base_emb_dim": model.embed_dim,
    "base_num_query_heads": model.num_heads,
    "base_num_kv_heads": config_lib.num_kv_heads(model),
    "head_dim": config_lib.head_dim(model),
    "base_mlp_dim": config_lib.stored_mlp_dim(model),
    "base_num_decoder_layers": model.num_layers,
    "vocab_size": model.vocab_size,
    "dtype": "bfloat16",
    "weight_dtype": "float32",
    "remat_policy": "full",
    "max_target_length": length,
    "per_device_batch_size": TOKENS // length // CHIPS,
  }
  if flags:
    fields["compile_xla_flags"] = flags
  return [str(base), *(f"{name}={str(value).lower()}" for name, value in fields.items())]


def of_maxtext(arguments: argparse.Namespace, length: int, flags: str) -> dict[str, Any]:
  """A row for MaxText, which its own Python compiles and this one counts."""
  stored = arguments.texts / f"maxtext-{length}{'-flags' if flags else ''}.json.gz"
  if not stored.is_file():
    places = [str(arguments.path)] if arguments.path else []
    environment = os.environ | {"DECOUPLE_GCLOUD": "TRUE", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    base = arguments.path / "maxtext" / "configs" / "base.yml" if arguments.path else Path("base.yml")
    command = [arguments.maxtext, str(WORKER), str(stored)]
    command += maxtext_arguments(length, flags, base, arguments.texts)
    subprocess.run(command, env=environment, check=True)
  with gzip.open(stored, "rt") as file:
    made = json.load(file)
  moved = traffic(made["step"]["text"])
  memory = made["step"]["memory"]
  clock = DEVICES["TPU v5 lite"].clock
  assert clock is not None
  return {
    "who": "MaxText, windowed products off" if flags else "MaxText",
    "length": length,
    "versions": made["versions"],
    "temporaries": memory["temporaries"],
    "compile_seconds": made["step"]["seconds"],
    **moved_numbers(moved._asdict(), {kind: one._asdict() for kind, one in moved.collectives.items()}),
    "estimate_seconds": moved.cycles / clock,
  }


def of_ours(arguments: argparse.Namespace, length: int, case: str) -> dict[str, Any]:
  """A row for this repository, from `benchmarks.compile_for_tpu`."""
  whole_case = f"{case}/data.sequence_length={length}/train.batch_size={TOKENS // length}"
  plan = measure(RECIPE, SLICE, whole_case, arguments.texts).to_json()
  made = plan["compiled"]
  return {
    "who": f"ours, {case}",
    "length": length,
    "versions": versions(),
    "temporaries": made["memory_bytes"]["temporaries"],
    "compile_seconds": made["seconds"],
    **moved_numbers(made | {"memory_bytes": made["memory_traffic_bytes"]}, made["collectives"]),
    "estimate_seconds": plan["estimate"]["by_the_compiler"],
  }


def moved_numbers(moved: dict[str, Any], collectives: dict[str, Any]) -> dict[str, Any]:
  return {
    "memory_bytes": moved["memory_bytes"],
    "kernel_runs": moved["kernel_runs"],
    "sent": sum(one["sent"] for one in collectives.values()),
    "waited_for": sum(one["waited_for"] for one in collectives.values()),
  }


LINE = "{:<44}{:>8}{:>12}{:>9}{:>13}{:>8}{:>12}{:>9}"


def show(row: dict[str, Any]) -> str:
  sizes = [f"{row[key] / 1e9:.2f}" for key in ("temporaries", "sent", "waited_for")]
  return LINE.format(
    row["who"],
    row["length"],
    f"{1000 * row['estimate_seconds']:.0f} ms",
    f"{row['memory_bytes'] / 1e9:.1f}",
    *sizes,
    "-" if row["kernel_runs"] is None else row["kernel_runs"],
    "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.0f} s",
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--maxtext", help="a Python with MaxText; without it only our own rows are made")
  parser.add_argument("--path", type=Path, help="folder of an unpacked MaxText")
  parser.add_argument("--texts", type=output_folder, required=True, help="folder of compiled programs")
  parser.add_argument("--out", type=output_file)
  parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
  parser.add_argument("--cases", nargs="+", default=["pre", "mix:0.25"])
  parser.add_argument("--flags", default=UNWINDOWED)
  arguments = parser.parse_args()
  arguments.texts.mkdir(parents=True, exist_ok=True)
  stored = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {"rows": []}
  rows = {(row["who"], row["length"]): row for row in stored["rows"]}
  jobs = []
  for length in arguments.lengths:
    if arguments.maxtext:
      jobs.append((("MaxText", length), of_maxtext, ""))
      jobs.append((("MaxText, windowed products off", length), of_maxtext, arguments.flags))
    jobs += [((f"ours, {case}", length), of_ours, case) for case in arguments.cases]
  print(
    LINE.format("", "length", "estimate", "traffic", "temporaries", "sent", "waited for", "kernels") + "   compiled in"
  )
  for key, make, what in jobs:
    if key not in rows:
      rows[key] = make(arguments, key[1], what)
      if arguments.out:
        write_results(arguments.out, {"rows": list(rows.values())})
    print(show(rows[key]), flush=True)


if __name__ == "__main__":
  sys.exit(main())

"""Cost of the depth suite: the time of each measurement in forward passes, and its memory on a TPU.

    python -m benchmarks.depth_suite_cost time [--repeats=3] [--out=benchmarks/results/depth_suite.json]
    python -m benchmarks.depth_suite_cost tpu [--recipe=1b --topology=v5e:4x4] [--out=…]   (requirements-tpu.txt)

`time`: on the shape of configs/tiny.py (12 layers of width 96) and one batch. The compiled programs are interleaved,
and the table has medians of the wall time and of the processor time of all threads. A forward pass computes the loss of
the model; a plain loop of the causal score would be L of them, one for each removed layer. `tpu`: the memory that each
program needs on a chip according to the real TPU compiler, for a batch of the recipe's evaluation. It shows that the
program compiles and fits, not how fast it is.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

if "tpu" in sys.argv[1:]:
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.output import output_file
from benchmarks.recipes import load
from configs import tiny
from mixln_jax.config import Config
from mixln_jax.diagnostics import depth, jacobian, lens, linear_fit, swaps
from mixln_jax.diagnostics.depth_suite import as_batches
from mixln_jax.diagnostics.layer_io import LayerIO, num_variants
from mixln_jax.diagnostics.removal import make_removal_step
from mixln_jax.diagnostics.substitution import Affine, make_substitution_step
from mixln_jax.model import Transformer
from mixln_jax.model.parameters import abstract_params, param_shardings
from mixln_jax.parallel.mesh import attach, make_mesh
from mixln_jax.parallel.rules import batch_sharding, on_mesh, replicated
from mixln_jax.planning import topology

VECTORS = 32


def programs(config: Config, rows: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
  """Each program of the suite, and its arguments after (params, batch)."""
  model = config.model
  num_layers, transformer = model.num_layers, Transformer(config.model)
  read, written = LayerIO(transformer).sizes()
  layer_C = np.arange(num_variants(model), dtype=np.int32)
  affine = Affine(
    jax.ShapeDtypeStruct((num_layers, read, written), jnp.float32),
    jax.ShapeDtypeStruct((num_layers, written), jnp.float32),
  )
  factors = jax.eval_shape(lambda: linear_fit.Factors.zeros(model))
  streams = LayerIO(transformer).columns.streams.num_carried
  vectors = jacobian.random_vectors(0, VECTORS, streams, model.embed_dim)
  ones = np.ones(rows, np.float32)
  fit, depth_step = linear_fit.make_fit_step(model), depth.make_depth_step(model)
  return {
    "forward": (make_removal_step(model), (np.ones(num_layers, np.int32),)),
    "causal and removal": (make_substitution_step(model), (layer_C, None)),
    "affine, scored": (make_substitution_step(model), (layer_C, affine)),
    "affine, fitted": (
      lambda params, batch, factors, first: fit(params, factors, batch, first),
      (factors, np.int32(0)),
    ),
    "permutation, one pair": (swaps.make_swap_step(model), (ones, swaps.swap(model, 0, num_layers - 1, "row_moves"))),
    "jacobian": (jacobian.make_jacobian_step(transformer), (ones, vectors, (0, 0))),
    "lens and angles": (lens.make_lens_step(model), ()),
    "angles and ranks": (
      lambda params, batch, sums: depth_step(params, sums, batch),
      (jax.eval_shape(lambda: depth.DepthSums.zeros(model)),),
    ),
  }


def forward_passes(name: str, num_layers: int) -> float:
  """How many forward passes a plain loop needs for the result of one call of a program; 0 if there is no such loop."""
  return {"causal and removal": num_layers + 1, "affine, scored": num_layers, "permutation, one pair": 1}.get(name, 0)


def measure_time(repeats: int) -> dict[str, Any]:
  config = tiny.get_config()
  rows, length = config.evaluate.batch_size, config.data.sequence_length
  tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length))
  (batch,) = as_batches(tokens, rows)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(np.random.default_rng(1).normal(size=leaf.shape) * 0.05, leaf.dtype),
    abstract_params(config.model),
  )
  compiled = {}
  for name, (program, more) in programs(config, rows).items():
    concrete = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype) if hasattr(leaf, "sharding") else leaf, more)
    began = time.perf_counter()
    made = jax.jit(program).lower(params, batch, *concrete).compile()
    compiled[name] = (made, concrete, time.perf_counter() - began)
  found: dict[str, Any] = {}
  for repeat in range(repeats + 1):
    for name, (made, concrete, compilation) in compiled.items():
      wall, processor = time.perf_counter(), time.process_time()
      jax.block_until_ready(made(params, batch, *concrete))
      if repeat:  # the first one warms up
        entry = found.setdefault(name, {"wall": [], "processor": [], "compilation": compilation})
        entry["wall"].append(time.perf_counter() - wall)
        entry["processor"].append(time.process_time() - processor)
  forward = statistics.median(found["forward"]["processor"])
  print(f"{'program':<24}{'wall s':>9}{'processor s':>13}{'in forwards':>13}{'plain loop':>12}")
  for name, entry in found.items():
    entry |= {key: statistics.median(entry[key]) for key in ("wall", "processor")}
    entry["forwards"] = entry["processor"] / forward
    entry["plain_loop"] = forward_passes(name, config.model.num_layers)
    plain = f"{entry['plain_loop']:g}" if entry["plain_loop"] else "-"
    print(f"{name:<24}{entry['wall']:>9.3f}{entry['processor']:>13.3f}{entry['forwards']:>13.2f}{plain:>12}")
  return {"rows": rows, "length": length, "vectors": VECTORS, "programs": found}


def measure_memory(recipe: str, slice_: str, only: list[str]) -> dict[str, Any]:
  config = load(recipe)
  shape = topology.parse(slice_, config)
  mesh = make_mesh(config.mesh, topology.devices(shape))
  rows, length = config.evaluate.batch_size, config.data.sequence_length
  everywhere = replicated(mesh)
  kinds = {"tokens_BT": jnp.int32, "labels_BT": jnp.int32, "weights_BT": jnp.float32}
  batch = {
    name: jax.ShapeDtypeStruct((rows, length), kind, sharding=batch_sharding(mesh)) for name, kind in kinds.items()
  }
  found: dict[str, Any] = {}
  print(f"{'program':<24}{'arguments':>11}{'temporaries':>13}{'total GB':>10}{'compiled in':>13}")
  with on_mesh(mesh):
    params = attach(abstract_params(config.model), param_shardings(config.model, mesh))
    for name, (program, more) in programs(config, rows).items():
      if only and name not in only:
        continue

      def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=everywhere)

      began = time.monotonic()
      lowered = jax.jit(program, out_shardings=everywhere).lower(params, batch, *jax.tree.map(abstract, more))
      analysis: Any = lowered.compile().memory_analysis()
      arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
      total = arguments + temporaries + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
      seconds = time.monotonic() - began
      found[name] = {"arguments": arguments, "temporaries": temporaries, "total": total, "seconds": seconds}
      print(
        f"{name:<24}{arguments / 1e9:>11.3f}{temporaries / 1e9:>13.3f}{total / 1e9:>10.3f}{seconds:>11.0f} s",
        flush=True,
      )
  return {"recipe": recipe, "topology": slice_, "rows": rows, "length": length, "programs": found}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("time", "tpu"))
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--recipe", default="1b")
  parser.add_argument("--topology", default="v5e:4x4")
  parser.add_argument("--only", nargs="+", default=[], help="tpu: these programs; --out leaves the others as they are")
  parser.add_argument("--out", type=output_file)
  arguments = parser.parse_args()
  if arguments.what == "time":
    result = measure_time(arguments.repeats)
  else:
    result = measure_memory(arguments.recipe, arguments.topology, arguments.only)
  if arguments.out:
    stored = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    earlier = stored.get(arguments.what, {})
    if arguments.only and all(earlier.get(field) == result[field] for field in ("recipe", "topology")):
      result["programs"] = earlier["programs"] | result["programs"]
    stored[arguments.what] = {"platform": platform.platform(), "jax": jax.__version__, **result}
    arguments.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
  main()

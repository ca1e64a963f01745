"""Memory of the training step on TPUs, from the real TPU compiler on a machine without one.

    pip install -r requirements-tpu.txt
    python -m benchmarks.compile_for_tpu [--out=benchmarks/results/tpu_memory.json] [RECIPE TOPOLOGY ...]

Compiles each recipe's step ahead of time for a topology (by default all of RECIPES) and prints what a chip needs:
arguments (state and batch) and temporaries. It shows that the step compiles and fits; it measures no speed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from mixln_jax.parallel.mesh import attach, make_mesh
from mixln_jax.parallel.rules import batch_sharding, logical_rules
from mixln_jax.training.step import abstract_state, make_train_step, state_shardings

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {
  **dict.fromkeys(("9m", "20m", "35m", "40m", "60m", "71m", "100m"), "v5e:2x2"),
  **dict.fromkeys(("130m", "250m"), "v5e:2x4"),
  **dict.fromkeys(("350m", "1b"), "v5e:4x4"),
  "3b": "v5e:8x8",
  "7b": "v5e:16x16",
}


def load(recipe: str) -> Any:
  path = CONFIGS / f"llama_{recipe}.py"
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  assert spec.loader is not None
  spec.loader.exec_module(module)
  return module.get_config()


def abstract_batch(config: Any, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, types and shardings of a training batch."""
  shape, sharding = (config.train.batch_size, config.data.sequence_length), batch_sharding(mesh)
  types = {"tokens_BT": jnp.int32, "labels_BT": jnp.int32, "weights_BT": jnp.float32}
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in types.items()}


def memory(recipe: str, topology: str) -> dict[str, Any]:
  """GB a chip, and the seconds that the compiler took."""
  config = load(recipe)
  mesh = make_mesh(config.mesh, topologies.get_topology_desc(topology, platform="tpu").devices)
  shardings = state_shardings(config, mesh)
  step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(shardings, None))
  started = time.perf_counter()
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
    compiled = step.lower(attach(abstract_state(config), shardings), abstract_batch(config, mesh)).compile()
  analysis: Any = compiled.memory_analysis()
  return {
    "recipe": recipe,
    "topology": topology,
    "placement": config.model.placement,
    "arguments_gb": round(analysis.argument_size_in_bytes / 1e9, 2),
    "temporaries_gb": round(analysis.temp_size_in_bytes / 1e9, 2),
    "compile_seconds": round(time.perf_counter() - started),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("cases", nargs="*", help="pairs of a recipe (130m) and a topology (v5e:2x4)")
  parser.add_argument("--out", type=Path)
  arguments = parser.parse_args()
  cases = dict(zip(arguments.cases[::2], arguments.cases[1::2], strict=True)) or RECIPES
  rows = []
  print(f"{'recipe':<8}{'topology':<12}{'arguments':>10}{'temporaries':>13}{'compiled in':>13}")
  for recipe, topology in cases.items():
    rows.append(row := memory(recipe, topology))
    sizes = f"{row['arguments_gb']:>7.2f} GB{row['temporaries_gb']:>10.2f} GB{row['compile_seconds']:>11} s"
    print(f"{recipe:<8}{topology:<12}{sizes}", flush=True)
  if arguments.out:
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    arguments.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
  main()

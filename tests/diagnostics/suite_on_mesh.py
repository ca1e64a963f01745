"""The depth suite on a mesh of eight devices and on one: prints by how much each array differs. Run by a test."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # of a clone that is not installed, too

from helpers import random_params, random_tokens, small_model

from mixln_jax import config as config_lib
from mixln_jax.diagnostics.depth_suite import as_batches, depth_suite
from mixln_jax.model.parameters import param_shardings
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.parallel.rules import batch_sharding, on_mesh


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  model = small_model(num_layers=2, placement="post*1,lns*1", vocab_size=64)
  params, parts = random_params(model), [random_tokens(model, 8, 16), random_tokens(model, 8, 16, seed=3)]
  options = {"readings": ["row_moves", "row_stays"], "jacobian_vectors": 4}
  alone = depth_suite(model, params, *parts, **options)
  config = config_lib.base()
  config.mesh.update(data=2, fsdp=2, tensor=2)
  mesh = make_mesh(config.mesh)
  batches = [jax.device_put(as_batches(part), batch_sharding(mesh)) for part in parts]
  with on_mesh(mesh):
    there = depth_suite(model, jax.device_put(params, param_shardings(model, mesh)), *batches, mesh=mesh, **options)
  gaps = {name: float(np.nanmax(np.abs(there[name] - alone[name]))) for name in alone}
  print(json.dumps(gaps))


if __name__ == "__main__":
  main()

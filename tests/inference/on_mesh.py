"""Generates and scores on meshes of 8 devices and says what came of it; run as a script, in a process of its own."""

import json
import re

import jax
import numpy as np
from helpers import random_params, small_model
from ml_collections import FrozenConfigDict

from mixln_jax import config as config_lib
from mixln_jax.inference import batching
from mixln_jax.inference.generate import generate, generate_batch
from mixln_jax.inference.sampling import Sampling
from mixln_jax.inference.scoring import score
from mixln_jax.model.parameters import abstract_sharded_params
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.parallel.rules import on_mesh

MESHES = {
  "one device": None,
  "fsdp 8": {"data": 1, "fsdp": 8},
  "data 8": {"data": 8},
  "fsdp 4, tensor 2": {"data": 1, "fsdp": 4, "tensor": 2},
}
PROMPTS = [[5, 9, 2, 44, 17], [8], [30, 31, 32]]
PAIRS = [(prompt, [7, 50]) for prompt in PROMPTS]


def answers(model, params):
  return {
    "greedy": generate(model, params, PROMPTS, 6),
    "drawn": generate(model, params, PROMPTS, 6, sampling=Sampling(1.0, top_k=20, seed=3), stop_ids=[9, 11]),
    "scores": score(model, params, PAIRS, batch_size=4),
  }


def gathered(model, params):
  """Shapes that the compiled loop gathers from several devices."""
  tokens_BT, lengths_B = batching.pad(PROMPTS, batching.bucket_rows(3), 16)
  sampling = (np.float32(0), None, np.uint32(0))
  numbers_B = np.arange(len(lengths_B))
  arguments = (params, tokens_BT, lengths_B, numbers_B, np.int32(6), np.full(4, -1, np.int32), sampling)
  text = generate_batch.lower(FrozenConfigDict(model), 32, 64, *arguments).compile().as_text()
  shapes = re.findall(r"= (\([^=]*?\)|\S+) all-gather(?:-start)?\(", text)
  found = {shape for result in shapes for shape in re.findall(r"\w+\[([\d,]+)\]", result)}
  return sorted([int(size) for size in shape.split(",")] for shape in found)


def run(sizes):
  model = small_model(placement="mix:0.5", vocab_size=64, mlp_dim=32)
  params = random_params(model)
  if sizes is None:
    return answers(model, params)
  mesh = make_mesh({**config_lib.base().mesh, **sizes})
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_sharded_params(model, mesh))
  params = jax.device_put(params, shardings)
  with on_mesh(mesh):
    return answers(model, params) | {"gathered": gathered(model, params), "rows": batching.bucket_rows(3)}


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  print(json.dumps({name: run(sizes) for name, sizes in MESHES.items()}))

"""One step on pairs on eight devices, cut in two ways, and on one; run as a script, in a process of its own."""

import json

import jax
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax.data.loader import example
from mixln_jax.data.records import Answered, PairPacker
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.parallel.rules import batch_sharding, replicated
from mixln_jax.training import step as step_lib
from mixln_jax.training.program import lower_train_step

LENGTH, ROWS = 32, 8
MESHES = {
  "one": {"data": 1},
  "cut by rows and width": {"data": 2, "fsdp": 2, "tensor": 2},
  "cut by positions": {"data": 2, "sequence": 4},
}


def config_of(mesh):
  config = config_lib.base()
  config.model.update(vocab_size=64, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, placement="mix:0.25")
  config.data.update(mode="preferences", document_mask=True, sequence_length=LENGTH)
  config.preference.loss = "dpo"
  config.train.update(num_steps=4, batch_size=ROWS)
  config.optimizer.warmup_steps = 0
  config.mesh.update(mesh)
  return config


def batch():
  """Packed rows of pairs of all lengths, with references."""
  rng = np.random.default_rng(0)
  packer, records = PairPacker(LENGTH, 0), []
  while len(records) < ROWS:
    chosen, rejected = (
      Answered(rng.integers(1, 64, length).tolist(), int(rng.integers(1, length - 1)))
      for length in rng.integers(4, 12, 2)
    )
    records += packer.add(chosen, rejected)
  rows = []
  for record in records[:ROWS]:
    references = -4.0 * rng.uniform(1, 8, record.starts.sum()).astype(np.float32)
    rows.append(example(record._replace(references=references), LENGTH, document_mask=True))
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def run(sizes):
  config = config_of(sizes)
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(list(sizes.values())))])
  shardings = step_lib.state_shardings(config, mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings)()
  step = lower_train_step(config, mesh, shardings).compile()
  rate = jax.device_put(np.float32(config.optimizer.learning_rate), replicated(mesh))
  metrics = []
  for _ in range(2):
    state, values = step(state, jax.device_put(batch(), batch_sharding(mesh)), None, rate)
    metrics.append({name: float(value) for name, value in values.items()})
  return metrics


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  print(json.dumps({name: run(sizes) for name, sizes in MESHES.items()}))

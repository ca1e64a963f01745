"""Trains a small model on a mesh and says what came of it; run as a script, in a process of its own with 8 devices."""

import json
import math
import re
import sys
import tempfile
import zlib

import jax
import numpy as np
from helpers import EXACT
from jax.sharding import NamedSharding, PartitionSpec

from mixln_jax import config as config_lib
from mixln_jax.diagnostics.diagnose import diagnose
from mixln_jax.errors import InputError
from mixln_jax.model import next_token_loss
from mixln_jax.opening import check_batch, make_loader, set_up
from mixln_jax.parallel.bits import bit_sums, hash_of_sums
from mixln_jax.parallel.mesh import attach, global_batch
from mixln_jax.parallel.rules import batch_sharding, on_mesh
from mixln_jax.planning.hlo import traffic
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.facts import parameter_table
from mixln_jax.training import step as step_lib
from mixln_jax.training.begin import initial_weights
from mixln_jax.training.evaluation import Evaluator
from mixln_jax.training.program import SingleProgram

MESHES = {
  "data 8": {"data": -1},
  "fsdp 8": {"data": 1, "fsdp": 8},
  "fsdp 4, tensor 2": {"data": 1, "fsdp": -1, "tensor": 2},
  "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
  "fsdp 2, sequence 2, tensor 2": {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
}
DIAGNOSED = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
REFUSED = {
  "heads": {"data": 1, "tensor": 8},
  "slices": {"data": 4, "dcn_data": 2},
  "devices": {"data": 3},
  "rows": {"data": 8, "batch": 12},
  "positions": {"data": 1, "sequence": 8, "length": 20},
}


def run(config_json, mesh):
  config = config_lib.from_json(config_json)
  config.mesh.update(mesh)
  setup = set_up(config)
  shardings = step_lib.state_shardings(config, setup.mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings, compiler_options=EXACT)()
  initial = {
    jax.tree_util.keystr(path): zlib.crc32(np.asarray(leaf).tobytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  }
  initial_hash = hash_of_sums(jax.jit(bit_sums)(state.params))
  shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
  share = sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])
  program = SingleProgram(config, setup.mesh)
  train_step = program.lower_step().compile()
  losses, samples = [], []
  for batch in make_loader(setup, config.train.batch_size).train():
    placed = global_batch(batch, setup.mesh)
    samples.append(sorted(zlib.crc32(row.tobytes()) for row in np.asarray(placed["tokens_BT"])))
    state, metrics = program.run_step(train_step, state, placed)
    losses.append(float(metrics["loss"]))
    if len(losses) == 4:
      break
  return {
    "initial": initial,
    "hash": initial_hash,
    "losses": losses,
    "samples": samples,
    "gathered": gathered(train_step.as_text()),
    "moved": {kind: list(one) for kind, one in traffic(train_step.as_text() or "").collectives.items()},
    "table": parameter_table(state.params, 0),
    "validation": Evaluator(SingleProgram(config, setup.mesh), setup)(state.params, 0)[0]._asdict(),
    "share_of_one_device": share / sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    "restored": restored_elsewhere(config_json, state.params),
  }


def gathered(text):
  """The shapes that the compiled step gathers from several devices onto each."""
  shapes = re.findall(r"= (\([^=]*?\)|\S+) all-gather(?:-start)?\(", text)
  found = {shape for result in shapes for shape in re.findall(r"\w+\[([\d,]+)\]", result)}
  return sorted([int(size) for size in shape.split(",")] for shape in found)


def head(config_json, mesh):
  """What the head and its loss cost on a mesh: FLOPs of a device with one chunk, and with chunks of 8 positions its
  value and each collective operation, whether it lies in the loop, and the elements that it moves."""
  config = config_lib.from_json(config_json)
  config.mesh.update(mesh)
  setup = set_up(config)
  rows, by_name = batch_sharding(setup.mesh), step_lib.state_shardings(config, setup.mesh).params
  batch, length = config.train.batch_size, config.data.sequence_length
  hidden_sharding = NamedSharding(setup.mesh, PartitionSpec(*rows.spec, None))
  rng = np.random.default_rng(0)
  arguments = [
    jax.device_put(np.asarray(value, dtype), sharding)
    for value, dtype, sharding in (
      (rng.normal(size=(batch, length, config.model.embed_dim)), np.float32, hidden_sharding),
      (rng.normal(size=(config.model.embed_dim, config.model.vocab_size)), np.float32, by_name["head"]),
      (rng.integers(0, config.model.vocab_size, (batch, length)), np.int32, rows),
      (rng.integers(0, 2, (batch, length)), np.int32, rows),
    )
  ]

  def compiled(chunk):
    step = jax.value_and_grad(lambda *a: next_token_loss(*a, chunk=chunk)[0], argnums=(0, 1))
    with on_mesh(setup.mesh):
      return jax.jit(step, out_shardings=(None, (hidden_sharding, by_name["head"]))).lower(*arguments).compile()

  program = compiled(8)
  return {
    "flops": compiled(length).cost_analysis()["flops"],
    "value": float(program(*arguments)[0]),
    "collectives": list(collectives(program.as_text())),
  }


def collectives(text):
  """(operation, whether it is in a loop's body, elements) of each collective operation of a compiled program."""
  inside = False
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith(" "):
      inside = not line.startswith("ENTRY")
    if found := re.search(
      r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)", line
    ):
      sizes = re.findall(r"\w+\[([\d,]*)\]", found[1])
      yield found[2], inside, max(math.prod(int(size) for size in shape.split(",") if size) for shape in sizes)


def diagnosed(config_json, mesh):
  """What a diagnostic step says of the first batch, and `diagnose` of the initial weights."""
  config = config_lib.from_json(config_json)
  config.mesh.update(mesh)
  setup = set_up(config)
  shardings = step_lib.state_shardings(config, setup.mesh)
  state = jax.jit(lambda: step_lib.init_state(config), out_shardings=shardings)()
  loader = make_loader(setup, config.train.batch_size)
  batches = [global_batch(batch, setup.mesh) for batch in loader.validation(500)]
  with on_mesh(setup.mesh):
    start = lambda: initial_weights(setup, shardings.params)  # noqa: E731
    result = diagnose(config, state.params, start, batches, setup.mesh, sizes=[1, 2])
  training = loader.train()
  batch = global_batch(next(training), setup.mesh)
  training.close()
  program = SingleProgram(setup.config, setup.mesh)
  _, metrics = program.run_step(program.lower_step(diagnose=True).compile(), state, batch)
  statistics = {name: np.asarray(value).tolist() for name, value in metrics["diagnostics"].items()}
  del result["definitions"]
  return {"step": statistics, "checkpoint": result}


def restored_elsewhere(config_json, params):
  """Whether a checkpoint of params comes back bit-equal when it is restored sharded over all devices."""
  config = config_lib.from_json(config_json)
  config.mesh.update(data=1, fsdp=-1)
  target = step_lib.state_shardings(config, set_up(config).mesh).params
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(folder)
    checkpoints.save(4, {"params": params}, {})
    abstract = attach(jax.eval_shape(lambda p: p, params), target)
    restored = checkpoints.restore(4, {"params": abstract})["params"]
    checkpoints.close()
  pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True))
  return all(np.array_equal(a, b) and b.sharding.mesh.shape["fsdp"] == jax.device_count() for a, b in pairs)


def refusal(config_json, mesh):
  config = config_lib.from_json(config_json)
  config.train.batch_size = mesh.get("batch", 16)
  length = mesh.get("length", config.data.sequence_length)
  config.mesh.update({axis: size for axis, size in mesh.items() if axis not in ("batch", "length")})
  try:
    setup = set_up(config)
    setup.config.data.sequence_length = length
    check_batch(setup, "config.train.batch_size", config.train.batch_size)
  except InputError as error:
    return str(error)
  return "not refused"


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  text = sys.stdin.read()
  if "diagnosed" in sys.argv:
    print(json.dumps(diagnosed(text, DIAGNOSED)))
    sys.exit()
  result = {name: run(text, mesh) for name, mesh in MESHES.items()}
  result["head"] = {name: head(text, mesh) for name, mesh in MESHES.items()}
  result["refused"] = {name: refusal(text, mesh) for name, mesh in REFUSED.items()}
  print(json.dumps(result))

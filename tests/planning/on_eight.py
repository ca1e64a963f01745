"""Compiles programs for 8 devices and says what was counted of them; run as a script, in a process of its own."""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mixln_jax import config as config_lib
from mixln_jax.planning import plan as planning
from mixln_jax.planning import topology
from mixln_jax.planning.hlo import traffic

MESHES = {
  "fsdp 4, tensor 2": {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2},
  "data 2, fsdp 2, sequence 2, documents": {
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.sequence": 2,
    "data.document_mask": True,
  },
}


def known_program():
  """Collectives that can be counted by hand, in loops that turn 5, 2 × 3 and 3 times, and outside of them."""
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

  def five(x, _):
    gathered = jax.lax.all_gather(x, "a", tiled=True)
    scattered = jax.lax.psum_scatter(jnp.sin(gathered), "a", scatter_dimension=0, tiled=True)
    return jax.lax.ppermute(scattered, "b", [(0, 1), (1, 0)]), None

  def six(x, _):
    return jax.lax.scan(lambda y, _: (jax.lax.psum(jnp.cos(y), "a"), None), x, None, length=3)[0], None

  def three(state):
    index, x = state
    return index + 4, jax.lax.psum(jnp.tanh(x), ("a", "b"))

  def local(x):  # [2, 16] float32: 128 bytes
    x, _ = jax.lax.scan(five, x, None, length=5)
    x, _ = jax.lax.scan(six, x, None, length=2)
    _, x = jax.lax.while_loop(lambda state: state[0] < 10, three, (1, x))
    return jax.lax.all_to_all(x, "b", split_axis=1, concat_axis=0, tiled=True)

  mapped = jax.shard_map(local, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
  argument = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("a")))
  text = jax.jit(mapped).lower(argument).compile().as_text()
  unwritten = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"x":1', text)
  assert unwritten != text
  return [{**traffic(version)._asdict(), "text": version} for version in (text, unwritten)]


def plan(config_json, changes):
  config = config_lib.from_json(config_json)
  config.update_from_flattened_dict(changes)
  here = topology.parse("cpu", config)
  return planning.compile_plan(planning.arithmetic(config, here), topology.devices(here)).to_json()


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  given = sys.stdin.read()
  print(json.dumps({"known": known_program(), **{name: plan(given, changes) for name, changes in MESHES.items()}}))

"""The mesh axes that each logical axis is sharded over: one table for parameters and activations."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixln_jax.errors import InputError

# logical axis -> mesh axes (None = replicated). Parameters first, then activations.
RULES: dict[str, str | tuple[str, ...] | None] = {
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "norm": None,
  "stream_from": None,
  "stream_to": None,
  "batch": ("data", "fsdp"),
  "data_batch": "data",  # for an array that fsdp shards along another dimension
  "length": "sequence",
  "key_length": None,  # keys and values: each device has all positions
  "activation_embed": None,
}

# A parameter with more elements than this that is replicated over an fsdp or tensor axis is a mistake (16 MB in fp32;
# the gains of a hundred layers of width 16,384 have 1.6 M).
LARGEST_REPLICATED = 4 * 2**20


def logical_rules() -> list[tuple[str, Any]]:
  """The table in the form that `flax.linen.logical_axis_rules` takes."""
  return list(RULES.items())


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
  """Sets the mesh, and the rules that map the model's logical axes to it, within the context."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
    yield


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains the sharding of an activation by the logical axes of its dimensions; without a mesh, does nothing.

  Raises:
    ValueError: as in `check_axes`.
  """
  check_axes("an activation", axes)
  return nn.with_logical_constraint(x, axes)


def gathered(axes: Sequence[str]) -> tuple[str, ...]:
  """The logical axes of a weight after it is gathered over fsdp: the same, except that the width is not sharded."""
  return tuple("activation_embed" if axis == "embed" else axis for axis in axes)


def shards(axis: str) -> int:
  """The number of shards of a logical axis on the mesh in use (`jax.set_mesh`); 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape.get(name, 1) for name in mesh_axes(RULES[axis]))


def platform() -> str:
  """The platform of the program that is being traced, `cpu`, `gpu` or `tpu`: the mesh's, or JAX's default backend."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def check_axes(name: str, axes: Iterable[str | None]) -> None:
  """Checks the logical axes of one tensor. (flax would silently replicate the tensor.)

  Raises:
    ValueError: an axis has no rule, or two of them are sharded over the same mesh axis.
  """
  taken: dict[str, str] = {}
  for axis in axes:
    if axis is None:
      continue
    if axis not in RULES:
      raise ValueError(f"{name}: axis {axis!r} has no rule in parallel/rules.py; known: {', '.join(RULES)}")
    for mesh_axis in mesh_axes(RULES[axis]):
      if mesh_axis in taken:
        raise ValueError(
          f"{name}: the rules of parallel/rules.py collide: {taken[mesh_axis]!r} and {axis!r} are both sharded over "
          f"the mesh axis {mesh_axis!r}"
        )
      taken[mesh_axis] = axis


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of a rule, or of an entry of a PartitionSpec."""
  if isinstance(entry, str):
    return (entry,)
  return entry or ()


def shardings(shapes: Any, axes: Any, mesh: Mesh) -> Any:
  """The sharding of each tensor of a tree.

  Args:
    shapes: a tree of arrays or shapes.
    axes: the same tree with a PartitionSpec over logical axes for each.
    mesh: the mesh to shard over.

  Raises:
    ValueError: as in `check_axes`.
    InputError: the mesh does not divide a tensor evenly, or leaves a large one replicated.
  """
  for path, spec in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_spec):
    check_axes(jax.tree_util.keystr(path, simple=True, separator="/"), spec)
  result = nn.logical_to_mesh_sharding(axes, mesh, logical_rules())
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(result), strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    check_divides(name, leaf.shape, sharding)
    check_not_replicated(name, leaf.shape, sharding)
  return result


def check_divides(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
  """Raises InputError, which names the tensor, the size and the axes, if the shards would not be equal."""
  for size, entry in zip(shape, sharding.spec, strict=False):
    axes = mesh_axes(entry)
    ways = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if size % ways:
      raise InputError(
        f"config.mesh.{' × '.join(axes)}={ways} does not divide the dimension {size} of {name} {shape}; "
        "change the mesh, or that size"
      )


def check_not_replicated(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
  """Rejects a large parameter that is replicated over the mesh's fsdp and tensor axes.

  Raises:
    InputError: it has more than LARGEST_REPLICATED elements, and no such axis shards it.
  """
  over = {axis: sharding.mesh.shape[axis] for axis in ("fsdp", "tensor") if sharding.mesh.shape[axis] > 1}
  sharded = {axis for entry in sharding.spec for axis in mesh_axes(entry)}
  if over and not sharded & over.keys() and math.prod(shape) > LARGEST_REPLICATED:
    mesh = " × ".join(f"{axis} {size}" for axis, size in over.items())
    raise InputError(
      f"{name} {shape}: its {math.prod(shape):,} elements would be replicated on every device of config.mesh ({mesh}), "
      f"which is allowed for at most {LARGEST_REPLICATED:,}; give its axes a rule in mixln_jax/parallel/rules.py, or "
      "set these mesh axes to 1"
    )


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the data axes, positions over the sequence axis."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["length"]))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())

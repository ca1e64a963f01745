"""Which mesh axes each logical axis is sharded over: one table for parameters and activations."""

import math
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
  "batch": ("data", "fsdp"),
  "length": "sequence",
  "activation_embed": None,
}


def logical_rules() -> list[tuple[str, Any]]:
  """The table as `flax.linen.logical_axis_rules` takes it."""
  return list(RULES.items())


def shardings(boxed: Any, mesh: Mesh) -> Any:
  """The sharding of each tensor of an abstract tree whose leaves are boxed with logical axes.

  Raises:
    ValueError: a leaf names a logical axis without a rule (flax would leave it unsharded in silence).
    InputError: the mesh does not divide a tensor.
  """
  specs = nn.get_partition_spec(boxed)
  for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec):
    for axis in spec:
      if axis is not None and axis not in RULES:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        known = ", ".join(RULES)
        raise ValueError(f"{name}: axis {axis!r} has no rule in parallel/rules.py; known: {known}")
  result = nn.logical_to_mesh_sharding(specs, mesh, logical_rules())
  for (path, leaf), sharding in zip(
    jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(result), strict=True
  ):
    check_divides(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, sharding)
  return result


def check_divides(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
  """Raises InputError, naming the tensor, its size and the axes, where a sharding can't cut it into equal pieces."""
  for size, axes in zip(shape, sharding.spec, strict=False):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    ways = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if size % ways:
      raise InputError(
        f"config.mesh.{' × '.join(axes)}={ways} does not divide the {size} of {name} {shape}; "
        "change the mesh, or that size"
      )


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the data axes, positions over the sequence axis."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["length"]))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())

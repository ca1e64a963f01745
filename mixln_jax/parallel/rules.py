"""Which mesh axes each logical axis is sharded over: one table for parameters and activations."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
  """
  specs = nn.get_partition_spec(boxed)

  def check(spec: PartitionSpec) -> None:
    for axis in spec:
      if axis is not None and axis not in RULES:
        raise ValueError(f"logical axis {axis!r} has no rule in mixln_jax/parallel/rules.py; known: {', '.join(RULES)}")

  for spec in _leaves(specs):
    check(spec)
  return nn.logical_to_mesh_sharding(specs, mesh, logical_rules())


def _leaves(specs: Any) -> list[PartitionSpec]:
  return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the data axes, positions over the sequence axis."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["length"]))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())

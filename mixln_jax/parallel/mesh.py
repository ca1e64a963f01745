"""The device mesh, and batches as global arrays on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from mixln_jax.errors import InputError
from mixln_jax.parallel import rules

AXES = ("run", "data", "fsdp", "sequence", "tensor")  # outermost first


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of `config.mesh` over all devices.

  Args:
    sizes: devices along each axis within a slice, and `dcn_AXIS` over slices; one may be -1, all that is left.
    devices: by default all of them.

  Raises:
    InputError: the sizes don't multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  filled = _fill(sizes, len(devices))
  ici = [filled[axis] for axis in AXES]
  dcn = [filled[f"dcn_{axis}"] for axis in AXES]
  if math.prod(dcn) > 1:
    try:
      grid = mesh_utils.create_hybrid_device_mesh(ici, dcn, devices)
    except ValueError as error:
      raise InputError(f"config.mesh.dcn_*: these devices don't form such slices ({error}); set them to 1") from error
  else:
    grid = mesh_utils.create_device_mesh(ici, devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes: Mapping[str, int], num_devices: int) -> Any:
  """The mesh of `config.mesh` without devices: enough to know the shardings on it, which take it as they take a mesh.

  Raises:
    InputError: the sizes don't multiply to the number of devices.
  """
  filled = _fill(sizes, num_devices)
  whole = [filled[axis] * filled[f"dcn_{axis}"] for axis in AXES]
  return AbstractMesh(tuple(whole), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fill(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
  sizes = {name: sizes[name] for name in (*AXES, *(f"dcn_{axis}" for axis in AXES))}
  known = math.prod(size for size in sizes.values() if size != -1)
  shown = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
  if num_devices % known:
    raise InputError(
      f"config.mesh ({shown}): the axes ask for a multiple of {known} devices, but there are {num_devices}"
    )
  filled = {name: num_devices // known if size == -1 else size for name, size in sizes.items()}
  if math.prod(filled.values()) != num_devices:
    raise InputError(
      f"config.mesh ({shown or 'all 1'}): the axes make {known} devices, but there are "
      f"{num_devices}; set one axis to -1 to use all"
    )
  return filled


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch as global arrays [B, T], sharded by rows."""
  sharding = rules.batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def attach(abstract: Any, shardings: Any) -> Any:
  """Shapes and types of `abstract` with the shardings of `shardings`: what orbax restores onto."""

  def leaf(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  return jax.tree.map(leaf, abstract, shardings)

"""The device mesh, and batches as global arrays on it."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from mixln_jax.config import MeshConfig
from mixln_jax.errors import InputError
from mixln_jax.parallel import rules

AXES = ("run", "data", "fsdp", "sequence", "tensor")  # outermost first
Sizes = Mapping[str, int] | MeshConfig  # devices along each axis within a slice, and `dcn_AXIS` over slices


def make_mesh(sizes: Sizes, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of `config.mesh` over all devices.

  Args:
    sizes: devices along each axis within a slice, and `dcn_AXIS` across slices; one may be -1, all remaining devices.
      If the devices don't say which slice they belong to (CPUs; GPUs of one NVLink domain), each process counts as a
      slice. A TPU slice is one slice, however many processes it has.
    devices: by default all devices of the run.

  Raises:
    InputError: the sizes don't multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  filled = _fill(sizes, len(devices))
  ici = [filled[axis] for axis in AXES]
  dcn = [filled[f"dcn_{axis}"] for axis in AXES]
  if math.prod(dcn) > 1:
    grid = _grid_over_slices(ici, dcn, devices)
  else:
    grid = _arranged(mesh_utils.create_device_mesh, ici, devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid_over_slices(ici: Sequence[int], dcn: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
  slices = {getattr(device, "slice_index", 0) for device in devices}
  processes = {device.process_index for device in devices}
  # Chips of one TPU slice are on one torus, whichever hosts they belong to.
  by_process = len(slices) == 1 and devices[0].platform != "tpu"
  arrange = functools.partial(mesh_utils.create_hybrid_device_mesh, process_is_granule=by_process)
  try:
    return _arranged(arrange, ici, dcn, devices)
  except ValueError as error:
    raise InputError(
      f"config.mesh.dcn_*: they ask for {math.prod(dcn)} slices of {math.prod(ici)} devices, but there are "
      f"{len(slices)} slices and {len(processes)} processes ({error}); change them, or set them to 1"
    ) from error


def describe_mesh(sizes: Mapping[str, int]) -> str:
  """The axes of a mesh that are longer than 1, in words: `data 2 × fsdp 4`."""
  return " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _arranged(arrange: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
  """A grid of devices whose axes follow those of the torus if possible (8 × 2 on 4 × 4 has to split one)."""
  try:
    return arrange(*arguments)
  except NotImplementedError:
    return arrange(*arguments, allow_split_physical_axes=True)


def abstract_mesh(sizes: Sizes, num_devices: int) -> Any:
  """The mesh of `config.mesh` without devices, which is enough to compute shardings on it.

  Raises:
    InputError: the sizes don't multiply to the number of devices.
  """
  filled = _fill(sizes, num_devices)
  whole = [filled[axis] * filled[f"dcn_{axis}"] for axis in AXES]
  return AbstractMesh(tuple(whole), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fill(sizes: Sizes, num_devices: int) -> dict[str, int]:
  names = (*AXES, *(f"dcn_{axis}" for axis in AXES))
  asked: dict[str, int] = {name: sizes[name] for name in names}  # pyright: ignore[reportAssignmentType]
  known = math.prod(size for size in asked.values() if size != -1)
  shown = ", ".join(f"{name}={size}" for name, size in asked.items() if size != 1)
  if num_devices % known:
    raise InputError(
      f"config.mesh ({shown}): the axes ask for a multiple of {known} devices, but there are {num_devices}"
    )
  filled = {name: num_devices // known if size == -1 else size for name, size in asked.items()}
  if math.prod(filled.values()) != num_devices:
    raise InputError(
      f"config.mesh ({shown or 'all 1'}): the axes make {known} devices, but there are "
      f"{num_devices}; set one axis to -1 to use all"
    )
  return filled


@functools.lru_cache
def rows_share(mesh: Mesh) -> tuple[int, int]:
  """(i, n): this process loads the i-th of n equal parts of the rows of a batch.

  Processes that are separated only along a tensor or sequence axis hold the same rows and load the same part. If the
  rows of two processes overlap only partly, every process loads all rows, (0, 1), and uses those that it holds.
  """
  groups = _row_groups(mesh)
  parts = sorted(set(groups.values()), key=min)
  overlap = sum(len(part) for part in parts) > len(set().union(*parts))
  equal = len({len(part) for part in parts}) == 1
  if overlap or not equal:
    return 0, 1
  return parts.index(groups[jax.process_index()]), len(parts)


def ways_of_rows(mesh: Mesh | AbstractMesh) -> int:
  """The number of shards of a batch's rows; 1 on a mesh without axes."""
  return math.prod(mesh.shape.get(axis, 1) for axis in rules.mesh_axes(rules.RULES["batch"]))


def _row_groups(mesh: Mesh) -> dict[int, frozenset[int]]:
  """The shards of a batch's rows that each process holds, numbered in their order."""
  ways = ways_of_rows(mesh)
  held: dict[int, set[int]] = {}
  for device, index in rules.batch_sharding(mesh).devices_indices_map((ways, mesh.shape["sequence"])).items():
    held.setdefault(device.process_index, set()).update(range(ways)[index[0]])
  return {process: frozenset(pieces) for process, pieces in held.items()}


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays [B, T], sharded by rows and positions, from the rows that this process loaded (`rows_share`)."""
  sharding = rules.batch_sharding(mesh)
  _, count = rows_share(mesh)
  # From the global shape JAX infers for each dimension whether this process has all of it or only its own shards.
  return {
    name: jax.make_array_from_process_local_data(sharding, rows, (len(rows) * count, *rows.shape[1:]))
    for name, rows in batch.items()
  }


def attach(abstract: Any, shardings: Any) -> Any:
  """Shapes and types of `abstract` with the shardings of `shardings`: a target for orbax to restore onto."""

  def leaf(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  return jax.tree.map(leaf, abstract, shardings)

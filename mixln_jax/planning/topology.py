"""Devices to plan for: a TPU slice that libtpu can compile for without having it, or the devices of this process."""

import importlib.util
import math
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from mixln_jax.config import Config
from mixln_jax.errors import InputError, one_line

HERE = ("cpu", "gpu")


class _Tpu(NamedTuple):
  kind: str  # as JAX names its devices
  dimensions: int
  options: dict[str, Any]


# By default libtpu counts the two cores of a v4 chip as devices; a TPU VM joins them (megacore).
TPUS = {
  "v4": _Tpu("TPU v4", 3, {"chip_config_name": "megacore"}),
  "v5e": _Tpu("TPU v5 lite", 2, {}),
  "v5p": _Tpu("TPU v5", 3, {}),
  "v6e": _Tpu("TPU v6 lite", 2, {}),
}


class MissingLibtpuError(InputError):
  """libtpu is not installed, so nothing can be compiled for a TPU."""


class Topology(NamedTuple):
  """The devices of a planned run.

  Attributes:
    name: the name that was given to `parse`.
    num_slices: from config.mesh.dcn_*.
    num_devices: in all slices together.
    device_kind: JAX's name of the devices.
  """

  name: str
  num_slices: int
  num_devices: int
  device_kind: str


def parse(name: str, config: Config) -> Topology:
  """The topology with a name.

  Args:
    name: the chips along each dimension of one slice, as in `v5e:4x4` or `v5p:2x2x4`; or `cpu` or `gpu`, for the
      devices of this process.
    config: the config, whose mesh.dcn_* is the number of slices.

  Raises:
    InputError: there is no such topology.
  """
  mesh = config.mesh
  slices = [mesh.dcn_run, mesh.dcn_data, mesh.dcn_fsdp, mesh.dcn_sequence, mesh.dcn_tensor]
  if name in HERE:
    devices = _here(name)
    return Topology(name, 1, len(devices), devices[0].device_kind)
  if -1 in slices:
    raise InputError(f"topology={name}: set config.mesh.dcn_* to the number of slices, without -1")
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  if match is None or match.group(1) not in TPUS:
    raise InputError(
      f"topology={name!r}: must be {' or '.join(HERE)} (the devices of this process), or the shape of a slice of "
      f"{', '.join(TPUS)}, as in v5e:4x4 or v5p:2x2x4"
    )
  tpu, shape = TPUS[match.group(1)], [int(size) for size in match.group(2).split("x")]
  if len(shape) != tpu.dimensions or 0 in shape:
    raise InputError(
      f"topology={name}: a slice of {match.group(1)} has {tpu.dimensions} dimensions, as in "
      f"{match.group(1)}:{'x'.join(['2', '2', '4'][: tpu.dimensions])}"
    )
  return Topology(name, math.prod(slices), math.prod(shape) * math.prod(slices), tpu.kind)


def _here(platform: str) -> list[Any]:
  try:
    return jax.devices(platform)
  except RuntimeError as error:
    raise InputError(f"topology={platform}: this process has no such device ({error})") from error


def devices(topology: Topology) -> list[Any]:
  """The devices of a topology; for TPUs, one can only compile for them.

  Raises:
    MissingLibtpuError: it is a TPU slice, and libtpu is not installed.
    InputError: libtpu does not know this slice.
  """
  if topology.name in HERE:
    return _here(topology.name)
  if importlib.util.find_spec("libtpu") is None:
    raise MissingLibtpuError(
      f"topology={topology.name}: the TPU compiler is missing; run `pip install -r requirements-tpu.txt` (no TPU is "
      "needed)"
    )
  name, _, shape = topology.name.partition(":")
  options: dict[str, Any] = dict(TPUS[name].options, num_slices=topology.num_slices)
  if math.prod(int(size) for size in shape.split("x")) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
  except jax.errors.JaxRuntimeError as error:
    reason = one_line(error).removeprefix("INVALID_ARGUMENT: ")
    raise InputError(f"topology={topology.name}: not a slice that libtpu knows ({reason})") from error

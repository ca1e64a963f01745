"""What one run will need: parameters, FLOPs, memory by kind, collectives, and an estimate of its time."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.model.flops import executed_flops_per_token, train_flops_per_token
from mixln_jax.model.parameters import abstract_sharded_params, count_params
from mixln_jax.parallel.devices import DEVICES, GIB, Device
from mixln_jax.parallel.mesh import abstract_mesh, attach, make_mesh
from mixln_jax.planning.hlo import Traffic, traffic
from mixln_jax.planning.topology import Topology
from mixln_jax.training.loop import check_batches
from mixln_jax.training.program import abstract_batch, lower_train_step, program_hash
from mixln_jax.training.step import abstract_state, state_shardings

EFFICIENCY = 0.5  # share of the peak that the matrix products reach: an assumption, not a measurement


class Counted(NamedTuple):
  """Bytes of the training step's arguments on one device, by kind, counted from shapes and shardings."""

  parameters: int
  moments: int
  counters: int  # of steps and of skipped updates
  batch: int


class Memory(NamedTuple):
  """Bytes of one device that the compiled step takes. The new state takes the place of the old."""

  arguments: int
  temporaries: int
  outputs: int  # beyond the state
  code: int

  @property
  def total(self) -> int:
    return sum(self)


class Compiled(NamedTuple):
  """What the compiler made of the step.

  Attributes:
    program: hash of its StableHLO; a run on the same mesh logs the same.
    seconds: that it took to compile.
    memory: None where it does not fit.
    too_much: why it does not fit; empty where it does.
    traffic: None where it does not fit.
  """

  program: str
  seconds: float
  memory: Memory | None
  too_much: str
  traffic: Traffic | None


class Estimate(NamedTuple):
  """Seconds of one training step, by arithmetic: nothing here was timed.

  Attributes:
    compute: executed FLOPs / (devices × peak × efficiency).
    memory: bytes that a device reads and writes / its memory's bandwidth; None where nothing was compiled.
    network: bytes that a device sends / the bandwidth of all its links to the slice; None where nothing was compiled.
  """

  compute: float
  memory: float | None
  network: float | None

  @property
  def step(self) -> float:
    """Where all three overlap: the largest."""
    return max(self.known())

  @property
  def step_without_overlap(self) -> float:
    return sum(self.known())

  def known(self) -> list[float]:
    return [seconds for seconds in self if seconds is not None]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run will need."""

  config: Config
  topology: Topology
  mesh: dict[str, int]  # devices along each axis
  parameters: int
  counted: Counted
  efficiency: float
  compiled: Compiled | None

  @property
  def device(self) -> Device | None:
    return DEVICES.get(self.topology.device_kind)

  @property
  def tokens_per_step(self) -> int:
    return self.config.train.batch_size * self.config.data.sequence_length

  @property
  def model_flops_per_token(self) -> float:
    return train_flops_per_token(self.config.model, self.config.data.sequence_length)

  @property
  def executed_flops_per_token(self) -> float:
    return executed_flops_per_token(self.config.model, self.config.data.sequence_length)

  @property
  def fits(self) -> bool | None:
    """None where it is not known: nothing was compiled, or the device's memory is not in the table."""
    if self.compiled is None or self.device is None:
      too_large = self.device is not None and sum(self.counted) > self.device.memory_bytes
      return False if too_large else None
    return self.compiled.memory is not None and self.compiled.memory.total <= self.device.memory_bytes

  @property
  def estimate(self) -> Estimate | None:
    """None where the device is not in the table."""
    if self.device is None:
      return None
    peak = self.topology.num_devices * self.device.peak_flops * self.efficiency
    compute = self.executed_flops_per_token * self.tokens_per_step / peak
    moved = self.compiled and self.compiled.traffic
    if not moved:
      return Estimate(compute, None, None)
    sent = sum(collective.sent for collective in moved.collectives.values())
    memory = moved.memory_bytes / self.device.memory_bandwidth
    return Estimate(compute, memory, sent / self.device.network_bandwidth)

  def to_json(self) -> dict[str, Any]:
    """For machines: bytes, seconds and FLOPs, of one device where not said otherwise."""
    table = placement.parse(self.config.model.placement, self.config.model.num_layers)
    result: dict[str, Any] = {
      "placement": table.layer_list,
      "parameters": self.parameters,
      "topology": self.topology._asdict(),
      "mesh": self.mesh,
      "flops_per_token": self.model_flops_per_token,
      "executed_flops_per_token": self.executed_flops_per_token,
      "tokens_per_step": self.tokens_per_step,
      "device_memory_bytes": self.device and self.device.memory_bytes,
      "counted_bytes": self.counted._asdict(),
      "fits": self.fits,
      "compiled": None,
      "estimate": None,
    }
    if (made := self.compiled) is not None:
      result["compiled"] = {
        "program": made.program,
        "seconds": round(made.seconds, 1),
        "too_much": made.too_much,
        "memory_bytes": made.memory and made.memory._asdict() | {"total": made.memory.total},
        "collectives": made.traffic and {kind: c._asdict() for kind, c in made.traffic.collectives.items()},
        "memory_traffic_bytes": made.traffic and made.traffic.memory_bytes,
        "unknown_loops": made.traffic and made.traffic.unknown_loops,
      }
    if (estimate := self.estimate) is not None:
      result["estimate"] = estimate._asdict() | {
        "assumed_efficiency": self.efficiency,
        "step": estimate.step,
        "step_without_overlap": estimate.step_without_overlap,
        "tokens_per_second": self.tokens_per_step / estimate.step,
        "hours": estimate.step * self.config.train.num_steps / 3600,
      }
    return result


def arithmetic(config: Config, topology: Topology, efficiency: float = EFFICIENCY) -> Plan:
  """The part of a plan that needs no compiler.

  Raises:
    InputError: config and topology contradict one another, as they would when the run starts.
  """
  config_lib.validate(config)
  mesh = abstract_mesh(config.mesh, topology.num_devices)
  abstract_sharded_params(config.model, mesh)  # for its checks
  check_batches(config, mesh)
  state = attach(abstract_state(config), state_shardings(config, mesh))
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  parameters = jax.tree.leaves(state.params)
  counted = Counted(
    parameters=_bytes_of_one_device(parameters),
    moments=_bytes_of_one_device(moments),
    counters=_bytes_of_one_device(jax.tree.leaves(state)) - _bytes_of_one_device([*parameters, *moments]),
    batch=_bytes_of_one_device(list(abstract_batch(config, mesh).values())),
  )
  return Plan(config, topology, dict(mesh.shape), count_params(config.model), counted, efficiency, None)


def _bytes_of_one_device(leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)  # pyright: ignore


def compile_plan(plan: Plan, devices: Sequence[Any]) -> Plan:
  """The plan with what the compiler makes of the very step that training runs.

  Raises:
    jax.errors.JaxRuntimeError: the compiler failed for another reason than too little memory.
  """
  mesh = make_mesh(plan.config.mesh, devices)
  lowered = lower_train_step(plan.config, mesh, state_shardings(plan.config, mesh))
  program, started = program_hash(lowered), time.monotonic()
  try:
    step = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    made = Compiled(program, time.monotonic() - started, None, too_much(str(error)), None)
    return dataclasses.replace(plan, compiled=made)
  seconds = time.monotonic() - started
  analysis: Any = step.memory_analysis()
  memory = Memory(
    arguments=analysis.argument_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    code=analysis.generated_code_size_in_bytes,
  )
  made = Compiled(program, seconds, memory, "", traffic(step.as_text() or ""))
  if plan.device and memory.total > plan.device.memory_bytes:
    over = (memory.total - plan.device.memory_bytes) / 1e9
    needed = f"{memory.total / 1e9:.2f} GB of {plan.device.memory_bytes / 1e9:.2f} GB"
    made = made._replace(too_much=f"it needs {needed} a device: {over:.2f} GB too much")
  return dataclasses.replace(plan, compiled=made)


def too_much(message: str) -> str:
  """What a compiler's message of too little memory says, in GB."""
  size = r"([\d.]+)([KMGT])"
  used = re.search(rf"Used {size}i?B? of {size}", message) or re.search(
    rf"\({size}\) exceeds available HBM \({size}\)", message
  )
  if used is None:
    return message.strip().splitlines()[0]
  units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
  needed, available = (float(used.group(i)) * units[used.group(i + 1)] / 1e9 for i in (1, 3))
  return f"the compiler needs {needed:.2f} GB of {available:.2f} GB a device: {needed - available:.2f} GB too much"


def advice(plan: Plan) -> list[str]:
  """What to try where a run does not fit, the cheapest first."""
  config, tried = plan.config, []
  if config.model.remat != "full":
    tried.append("--config.model.remat=full")
  rows = plan.mesh["data"] * plan.mesh["fsdp"]
  micro = 2 * config.train.micro_batches
  if config.train.batch_size % (micro * rows) == 0:
    tried.append(f"--config.train.micro_batches={micro}")
  if plan.mesh["data"] > 1:
    tried.append("--config.mesh.data=1 --config.mesh.fsdp=-1 (parameters and moments sharded over all devices)")
  return [*tried, "a larger slice", "--search, which tries them"]

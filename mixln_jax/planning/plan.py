"""The needs of one run: parameters, FLOPs, memory by kind, collectives, and an estimate of its time."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.model.flops import executed_flops_per_token, train_flops_per_token
from mixln_jax.model.parameters import abstract_sharded_params, count_params
from mixln_jax.parallel.devices import DEVICES, GIB, Device
from mixln_jax.parallel.mesh import abstract_mesh, attach, make_mesh
from mixln_jax.planning.hlo import Traffic, traffic
from mixln_jax.planning.topology import Topology
from mixln_jax.training.derived import with_derived
from mixln_jax.training.loop import check_batches
from mixln_jax.training.optimizer import update_flops
from mixln_jax.training.program import Memory, abstract_batch, lower_train_step, memory_of, program_hash
from mixln_jax.training.step import abstract_state, state_shardings

EFFICIENCY = 0.5  # the fraction of the peak that matrix products reach: an assumption, not a measurement


class Counted(NamedTuple):
  """Bytes of the training step's arguments on one device, by kind, counted from shapes and shardings."""

  parameters: int
  moments: int
  counters: int  # the counters of steps and of skipped updates, and the learning rate, which is an argument of the step
  batch: int


class Compiled(NamedTuple):
  """The compiled step.

  Attributes:
    program: hash of its StableHLO; a run on the same mesh logs the same hash.
    seconds: the time to compile it.
    memory: its memory; None if the compiler ran out of memory.
    too_much: why it does not fit; "" if it does.
    traffic: the bytes that it moves; None if the compiler ran out of memory.
  """

  program: str
  seconds: float
  memory: Memory | None
  too_much: str
  traffic: Traffic | None

  def to_json(self) -> dict[str, Any]:
    """The values for JSON, per device; None for values that are unknown because the step does not fit."""
    result: dict[str, Any] = {"program": self.program, "seconds": round(self.seconds, 1), "too_much": self.too_much}
    traffic_keys = ("collectives", "memory_traffic_bytes", "cycles", "kernel_runs", "unknown_loops")
    result |= dict.fromkeys(("memory_bytes", *traffic_keys))
    if self.memory is not None:
      result["memory_bytes"] = self.memory._asdict() | {"total": self.memory.total}
    if self.traffic is not None:
      collectives = self.traffic.collectives
      result["collectives"] = {kind: collective._asdict() for kind, collective in collectives.items()}
      result["memory_traffic_bytes"] = self.traffic.memory_bytes
      result["cycles"] = self.traffic.cycles
      result["kernel_runs"] = self.traffic.kernel_runs
      result["unknown_loops"] = self.traffic.unknown_loops
    return result


class Estimate(NamedTuple):
  """Estimated seconds of one training step; nothing here was timed.

  Attributes:
    compute: executed FLOPs / (devices × peak × efficiency), plus FLOPs of the update / (peak × efficiency).
    memory: bytes that a device reads and writes / the bandwidth of its memory; None if nothing was compiled.
    network: bytes that a device sends / the bandwidth of all its links within the slice; None if nothing was compiled.
  """

  compute: float
  memory: float | None
  network: float | None

  @property
  def step(self) -> float:
    """The time if all three overlap: the largest of them."""
    return max(self.known())

  @property
  def step_without_overlap(self) -> float:
    return sum(self.known())

  def known(self) -> list[float]:
    return [seconds for seconds in self if seconds is not None]


@dataclasses.dataclass(frozen=True)
class Plan:
  """The needs of a run."""

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
  def update_flops(self) -> float:
    """FLOPs of the matrix products of one update of the optimizer; 0 except for muon."""
    return update_flops(self.config)

  @property
  def fits(self) -> bool | None:
    """Whether it fits; None if unknown, because nothing was compiled or the device is not in the table."""
    if self.device is None:
      return None
    if self.compiled is None:
      return False if sum(self.counted) > self.device.memory_bytes else None
    return self.compiled.memory is not None and self.compiled.memory.total <= self.device.memory_bytes

  @property
  def compiler_seconds(self) -> float | None:
    """The compiler's own estimate of a step, as a sequence of instructions (`Traffic.cycles`); None without one.

    Collectives and Pallas kernels are not included.
    """
    moved = None if self.compiled is None else self.compiled.traffic
    if moved is None or not moved.cycles or self.device is None or self.device.clock is None:
      return None
    return moved.cycles / self.device.clock

  @property
  def estimate(self) -> Estimate | None:
    """The estimate; None if the device is not in the table."""
    if self.device is None:
      return None
    peak = self.topology.num_devices * self.device.peak_flops * self.efficiency
    compute = self.executed_flops_per_token * self.tokens_per_step / peak
    # As if each device did the whole update: an upper bound if the parameters are sharded.
    compute += self.update_flops * self.topology.num_devices / peak
    moved = None if self.compiled is None else self.compiled.traffic
    if moved is None:
      return Estimate(compute, None, None)
    sent = sum(collective.sent for collective in moved.collectives.values())
    memory = moved.memory_bytes / self.device.memory_bandwidth
    return Estimate(compute, memory, sent / self.device.network_bandwidth)

  def to_json(self) -> dict[str, Any]:
    """The plan for JSON: bytes, seconds and FLOPs, per device unless the name says otherwise."""
    return {
      "placement": config_lib.table(self.config.model).layer_list,
      "parameters": self.parameters,
      "topology": self.topology._asdict(),
      "mesh": self.mesh,
      "flops_per_token": self.model_flops_per_token,
      "executed_flops_per_token": self.executed_flops_per_token,
      "update_flops": self.update_flops,
      "tokens_per_step": self.tokens_per_step,
      "device_memory_bytes": self.device and self.device.memory_bytes,
      "counted_bytes": self.counted._asdict(),
      "fits": self.fits,
      "compiled": None if self.compiled is None else self.compiled.to_json(),
      "estimate": self._estimate_json(),
    }

  def _estimate_json(self) -> dict[str, Any] | None:
    estimate = self.estimate
    if estimate is None:
      return None
    return estimate._asdict() | {
      "assumed_efficiency": self.efficiency,
      "by_the_compiler": self.compiler_seconds,
      "step": estimate.step,
      "step_without_overlap": estimate.step_without_overlap,
      "tokens_per_second": self.tokens_per_step / estimate.step,
      "hours": estimate.step * self.config.train.num_steps / 3600,
    }


def arithmetic(config: Config, topology: Topology, efficiency: float = EFFICIENCY) -> Plan:
  """The part of a plan that needs no compiler.

  Raises:
    InputError: config and topology contradict each other, as they would when the run starts.
  """
  config = with_derived(config)
  config_lib.validate(config)
  mesh = abstract_mesh(config.mesh, topology.num_devices)
  abstract_sharded_params(config.model, mesh)  # for its checks
  check_batches(config, mesh)
  state = attach(abstract_state(config), state_shardings(config, mesh))
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  parameters = jax.tree.leaves(state.params)
  learning_rate = np.dtype(np.float32).itemsize
  counters = _bytes_of_one_device(jax.tree.leaves(state)) - _bytes_of_one_device([*parameters, *moments])
  counted = Counted(
    parameters=_bytes_of_one_device(parameters),
    moments=_bytes_of_one_device(moments),
    counters=counters + learning_rate,
    batch=_bytes_of_one_device(list(abstract_batch(config, mesh).values())),
  )
  return Plan(config, topology, dict(mesh.shape), count_params(config.model), counted, efficiency, None)


def _bytes_of_one_device(leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)  # pyright: ignore


class Step(NamedTuple):
  """The result of compiling the training step.

  Attributes:
    program: hash of its StableHLO; a run on the same mesh logs the same hash.
    seconds: the time to compile it.
    memory: its memory; None if the compiler ran out of memory.
    message: the compiler's message if it ran out of memory.
    text: the optimized program.
  """

  program: str
  seconds: float
  memory: Memory | None
  message: str
  text: str


def compile_step(plan: Plan, devices: Sequence[Any]) -> Step:
  """Compiles exactly the step that training runs.

  Raises:
    jax.errors.JaxRuntimeError: the compiler failed for a reason other than too little memory.
  """
  mesh = make_mesh(plan.config.mesh, devices)
  lowered = lower_train_step(plan.config, mesh, state_shardings(plan.config, mesh))
  program, started = program_hash(lowered), time.monotonic()
  try:
    step = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return Step(program, time.monotonic() - started, None, str(error), "")
  seconds = time.monotonic() - started
  return Step(program, seconds, memory_of(step), "", step.as_text() or "")


def with_step(plan: Plan, step: Step) -> Plan:
  """The plan completed with its compiled step."""
  if step.memory is None:
    made = Compiled(step.program, step.seconds, None, too_much(step.message), None)
    return dataclasses.replace(plan, compiled=made)
  made = Compiled(step.program, step.seconds, step.memory, "", traffic(step.text))
  if plan.device and step.memory.total > plan.device.memory_bytes:
    over = (step.memory.total - plan.device.memory_bytes) / 1e9
    needed = f"{step.memory.total / 1e9:.2f} GB of {plan.device.memory_bytes / 1e9:.2f} GB"
    made = made._replace(too_much=f"it needs {needed} per device: {over:.2f} GB too much")
  return dataclasses.replace(plan, compiled=made)


def compile_plan(plan: Plan, devices: Sequence[Any]) -> Plan:
  """The plan completed by compiling exactly the step that training runs; raises as `compile_step` does."""
  return with_step(plan, compile_step(plan, devices))


def too_much(message: str) -> str:
  """A compiler's out-of-memory message, with the numbers in GB."""
  size = r"([\d.]+)([KMGT])"
  patterns = (rf"Used {size}i?B? of {size}", rf"\({size}\) exceeds available HBM \({size}\)")
  matches = [match for pattern in patterns if (match := re.search(pattern, message))]
  if not matches:
    return message.strip().splitlines()[0]
  units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
  number, unit, other_number, other_unit = matches[0].groups()
  needed = float(number) * units[unit] / 1e9
  available = float(other_number) * units[other_unit] / 1e9
  return f"the compiler needs {needed:.2f} GB of {available:.2f} GB per device: {needed - available:.2f} GB too much"


def advice(plan: Plan) -> list[str]:
  """What to try if a run does not fit, cheapest first."""
  config, suggestions = plan.config, []
  if config.model.remat != "full":
    suggestions.append("config.model.remat=full")
  rows = plan.mesh["data"] * plan.mesh["fsdp"]
  micro = 2 * config.train.micro_batches
  if config.train.batch_size % (micro * rows) == 0:
    suggestions.append(f"config.train.micro_batches={micro}")
  if plan.mesh["data"] > 1:
    suggestions.append("config.mesh.data=1 and config.mesh.fsdp=-1 (parameters and moments sharded over all devices)")
  return [*suggestions, "a larger slice", "a search, which tries them"]

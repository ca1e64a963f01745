"""Tries remat policies, micro-batches and mesh shapes, and ranks those that fit."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixln_jax.config import Config
from mixln_jax.errors import InputError, one_line
from mixln_jax.model.flops import executed_flops_per_token
from mixln_jax.parallel.mesh import abstract_mesh, describe_mesh
from mixln_jax.planning.plan import Plan, arithmetic, compile_plan
from mixln_jax.planning.topology import Topology
from mixln_jax.training.loop import check_batches

REMAT = ("full", "dots_no_batch", "dots", "none")  # from least to most memory
MICRO_BATCHES = (1, 2, 4, 8, 16)
TENSOR = (1, 2, 4, 8)
NOT_TRIED = "not tried: max_compilations was reached"


class Candidate(NamedTuple):
  """The values of the config fields that a search varies."""

  mesh: tuple[tuple[str, int], ...]
  remat: str
  micro_batches: int

  @property
  def flags(self) -> str:
    """The candidate as config overrides of a command."""
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in self.mesh)
    return f"--config.model.remat={self.remat} --config.train.micro_batches={self.micro_batches} {mesh}"

  @property
  def label(self) -> str:
    mesh = describe_mesh(dict(self.mesh))
    return f"{mesh}, remat {self.remat}, micro-batches {self.micro_batches}"

  def needs_at_least(self, other: "Candidate") -> bool:
    """Whether it needs at least as much memory as another: same mesh, no more remat, no more micro-batches."""
    return (
      self.mesh == other.mesh
      and REMAT.index(self.remat) >= REMAT.index(other.remat)
      and self.micro_batches <= other.micro_batches
    )


@dataclasses.dataclass(frozen=True)
class Tried:
  """A candidate with its plan, or with the reason why it has none or does not fit."""

  candidate: Candidate
  plan: Plan | None
  reason: str

  @property
  def rank(self) -> tuple[float, float]:
    """Seconds per step (without an estimate, executed FLOPs per token), then memory."""
    assert self.plan is not None
    estimate, made = self.plan.estimate, self.plan.compiled
    memory = made.memory.total if made and made.memory else 0
    return (estimate.step if estimate else self.plan.executed_flops_per_token), memory


def search(
  config: Config,
  topology: Topology,
  devices: Sequence[Any],
  *,
  max_compilations: int,
  efficiency: float,
  report: Callable[[str], None],
  tried: list[Tried] | None = None,
) -> list[Tried]:
  """Compiles up to `max_compilations` candidates: first the unchanged config, then the most promising ones.

  A candidate is not compiled if it needs at least as much memory as one that did not fit, if its mesh does not divide
  the model or batch, or if its state alone is too large.

  Args:
    config: the config to vary.
    topology: the devices to plan for.
    devices: the devices of the topology.
    max_compilations: the most candidates to compile.
    efficiency: the assumed fraction of the peak.
    report: called with a line for each compilation.
    tried: an empty list to which each candidate is added as soon as its result is known, so that an interrupted search
      keeps its results.

  Returns:
    All candidates, `ranked`.
  """
  tried = [] if tried is None else tried
  compilations = 0
  own = _unchanged(config, topology)
  for candidate, plan, reason in _ordered(config, topology, efficiency, own):
    smaller = _too_large_and_needs_no_more(candidate, tried)
    if plan is None:
      result = Tried(candidate, None, reason)
    elif smaller is not None:
      result = Tried(candidate, None, f"needs no less than {smaller.label}, which does not fit")
    elif compilations == max_compilations:
      result = Tried(candidate, None, NOT_TRIED)
    else:
      compilations += 1
      result = _try(candidate, plan, devices)
      report(f"[{compilations}/{max_compilations}] {candidate.label}: {_outcome(result)}")
    tried.append(result)
  return ranked(tried)


def ranked(tried: Sequence[Tried]) -> list[Tried]:
  """The candidates that fit, from the fastest by estimate, and then all others."""
  fitting = sorted((result for result in tried if _fits(result)), key=lambda result: result.rank)
  return fitting + [result for result in tried if not _fits(result)]


def _too_large_and_needs_no_more(candidate: Candidate, tried: Sequence[Tried]) -> Candidate | None:
  """A candidate that was compiled, did not fit, and needs no more memory than this one; None if there is none."""
  for result in tried:
    if result.plan is not None and not _fits(result) and candidate.needs_at_least(result.candidate):
      return result.candidate
  return None


def _try(candidate: Candidate, plan: Plan, devices: Sequence[Any]) -> Tried:
  try:
    made = compile_plan(plan, devices)
  except jax.errors.JaxRuntimeError as error:
    return Tried(candidate, None, f"the compiler failed: {one_line(error, 200)}")
  return Tried(candidate, made, made.compiled.too_much if made.compiled else "")


def _fits(tried: Tried) -> bool:
  return tried.plan is not None and not tried.reason


def _outcome(tried: Tried) -> str:
  made = tried.plan and tried.plan.compiled
  if tried.reason or not made or not made.memory or not tried.plan:
    return tried.reason
  time = f", {tried.plan.estimate.step:.3g} s per step (estimate)" if tried.plan.estimate else ""
  return f"{made.memory.total / 1e9:.2f} GB{time}; compiled in {made.seconds:.0f} s"


def _unchanged(config: Config, topology: Topology) -> Candidate:
  """The candidate with the values of the config itself."""
  whole, slices = arithmetic(config, topology).mesh, config.mesh
  mesh = (
    ("data", whole["data"] // slices.dcn_data),
    ("fsdp", whole["fsdp"] // slices.dcn_fsdp),
    ("tensor", whole["tensor"] // slices.dcn_tensor),
  )
  return Candidate(mesh, config.model.remat, config.train.micro_batches)


def _ordered(
  config: Config, topology: Topology, efficiency: float, own: Candidate
) -> Iterator[tuple[Candidate, Plan | None, str]]:
  """Each candidate with its uncompiled plan, or the reason why there is none; `own` first, then by estimated time."""
  found: list[tuple[Candidate, Plan | None, str]] = []
  micro_batches = [number for number in MICRO_BATCHES if config.train.batch_size % number == 0]
  for mesh in dict.fromkeys((own.mesh, *_meshes(config, topology))):
    # Shapes and shardings depend on the mesh only, not on remat or micro-batches.
    first = Candidate(mesh, REMAT[0], 1)
    try:
      plan = arithmetic(_changed(config, first), topology, efficiency)
    except InputError as error:
      found.append((first, None, str(error)))
      continue
    if plan.fits is False:
      size = f"{sum(plan.counted) / 1e9:.2f} GB"
      found.append((first, None, f"parameters, moments and batch alone take {size} per device"))
      continue
    of_mesh = [Candidate(mesh, remat, number) for remat, number in itertools.product(REMAT, micro_batches)]
    if mesh == own.mesh:
      of_mesh.append(own)  # its number of micro-batches may not be in MICRO_BATCHES
    for candidate in dict.fromkeys(of_mesh):
      changed = _changed(config, candidate)
      try:
        check_batches(changed, abstract_mesh(changed.mesh, topology.num_devices))
      except InputError as error:
        found.append((candidate, None, str(error)))
      else:
        found.append((candidate, dataclasses.replace(plan, config=changed), ""))

  def order(entry: tuple[Candidate, Plan | None, str]) -> tuple[bool, tuple[bool, float]]:
    candidate, plan, _ = entry
    return plan is not None and candidate != own, _guess(plan)

  return iter(sorted(found, key=order))


def _changed(config: Config, candidate: Candidate) -> Config:
  changed = config.copy_and_resolve_references()
  changed.model.remat, changed.train.micro_batches = candidate.remat, candidate.micro_batches
  changed.mesh.update(dict(candidate.mesh))
  return changed


def _meshes(config: Config, topology: Topology) -> list[tuple[tuple[str, int], ...]]:
  """Shapes data × fsdp × tensor of a slice, with fsdp over all, a quarter or none of the devices left by tensor."""
  fixed = config.mesh.run * config.mesh.sequence
  devices = topology.num_devices // topology.num_slices
  if fixed < 1 or devices % fixed:
    return []
  devices //= fixed
  meshes = []
  for tensor in TENSOR:
    if devices % tensor:
      continue
    rest = devices // tensor
    for fsdp in dict.fromkeys((rest, max(1, rest // 4), 1)):
      if rest % fsdp == 0:
        meshes.append((("data", rest // fsdp), ("fsdp", fsdp), ("tensor", tensor)))
  return meshes


def _guess(plan: Plan | None) -> tuple[bool, float]:
  """A sort key, used only for the order in which candidates are tried: those that may fit first, by estimated time."""
  if plan is None:
    return False, 0.0
  too_large = plan.device is not None and _guess_bytes(plan) > plan.device.memory_bytes
  return too_large, _guess_seconds(plan)


def _guess_bytes(plan: Plan) -> float:
  """Estimated memory of a device: arguments, fp32 gradients, logits and their gradient, saved activations of layers."""
  model, mesh, length = plan.config.model, plan.mesh, plan.config.data.sequence_length
  width = jnp.dtype(model.dtype).itemsize
  tokens = plan.tokens_per_step / (mesh["data"] * mesh["fsdp"] * plan.config.train.micro_batches)
  scores = model.num_heads * length
  products = 6 * model.embed_dim + 2 * model.mlp_dim
  saved = {"full": 0, "dots_no_batch": products, "dots": products + scores, "none": 2 * (products + scores)}
  layer = width * (model.embed_dim + saved[model.remat] / mesh["tensor"])
  gradients = 4 / jnp.dtype(model.param_dtype).itemsize * plan.counted.parameters
  logits = (4 + width) * model.vocab_size / mesh["tensor"]
  return sum(plan.counted) + gradients + tokens * (model.num_layers * layer + logits)


def _guess_seconds(plan: Plan) -> float:
  """Estimated time of a step: the longer of compute and network.

  Compute is the matrix products at the assumed efficiency. Network is the traffic of weights (per micro-batch, gathered
  twice and reduced once over fsdp; reduced over data) and of activations (four all-reduces per layer over tensor).
  """
  model, mesh = plan.config.model, plan.mesh
  if plan.device is None:
    return executed_flops_per_token(model, plan.config.data.sequence_length) * plan.config.train.micro_batches
  width = jnp.dtype(model.dtype).itemsize
  weights = plan.parameters * width / mesh["tensor"]
  fsdp = 3 * plan.config.train.micro_batches * weights * (mesh["fsdp"] - 1) / mesh["fsdp"]
  data = 2 * 2 * weights / mesh["fsdp"] * (mesh["data"] - 1) / mesh["data"]
  rows = plan.tokens_per_step / (mesh["data"] * mesh["fsdp"])
  tensor = 8 * model.num_layers * rows * model.embed_dim * width * (mesh["tensor"] - 1) / mesh["tensor"]
  estimate = plan.estimate
  assert estimate is not None
  return max(estimate.compute, (fsdp + data + tensor) / plan.device.network_bandwidth)

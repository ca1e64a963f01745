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

REMAT = ("full", "dots_no_batch", "dots", "none")  # the least memory first
MICRO_BATCHES = (1, 2, 4, 8, 16)
TENSOR = (1, 2, 4, 8)
NOT_TRIED = "not tried: as many as max_compilations allows were compiled before"


class Candidate(NamedTuple):
  """What a search varies of a config."""

  mesh: tuple[tuple[str, int], ...]
  remat: str
  micro_batches: int

  @property
  def flags(self) -> str:
    """The overrides of a config that make it, as a command takes them."""
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in self.mesh)
    return f"--config.model.remat={self.remat} --config.train.micro_batches={self.micro_batches} {mesh}"

  @property
  def label(self) -> str:
    mesh = describe_mesh(dict(self.mesh))
    return f"{mesh}, remat {self.remat}, micro-batches {self.micro_batches}"

  def needs_at_least(self, other: "Candidate") -> bool:
    """Whether it takes at least as much memory as another: the same mesh, no more recomputed, no smaller pieces."""
    return (
      self.mesh == other.mesh
      and REMAT.index(self.remat) >= REMAT.index(other.remat)
      and self.micro_batches <= other.micro_batches
    )


@dataclasses.dataclass(frozen=True)
class Tried:
  """A candidate, and either its plan or why it has none."""

  candidate: Candidate
  plan: Plan | None
  reason: str

  @property
  def rank(self) -> tuple[float, float]:
    """Seconds a step, then memory; without an estimate the work that is executed."""
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
  """Compiles up to `max_compilations` candidates, the config as it is first, then the most promising.

  A candidate that needs at least as much as another one, which did not fit, is not compiled. Candidates that the mesh
  does not divide, or whose state alone is too large, cost nothing.

  Args:
    config: what is varied.
    topology: what it would run on.
    devices: those of the topology.
    max_compilations: how many candidates are compiled.
    efficiency: fraction of the peak that is assumed.
    report: gets a line for each compilation.
    tried: an empty list that gets each candidate when it is known; a search that is stopped leaves them there.

  Returns:
    All candidates, `ranked`.
  """
  tried = [] if tried is None else tried
  compilations = 0
  own = _own(config, topology)
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
  """First those that fit, the fastest by estimate before the others; then all others."""
  fitting = sorted((one for one in tried if _fits(one)), key=lambda one: one.rank)
  return fitting + [one for one in tried if not _fits(one)]


def _too_large_and_needs_no_more(candidate: Candidate, tried: Sequence[Tried]) -> Candidate | None:
  """One that was compiled, did not fit, and needs no more memory than the candidate."""
  for one in tried:
    if one.plan is not None and not _fits(one) and candidate.needs_at_least(one.candidate):
      return one.candidate
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
  time = f", {tried.plan.estimate.step:.3g} s a step (estimate)" if tried.plan.estimate else ""
  return f"{made.memory.total / 1e9:.2f} GB{time}; compiled in {made.seconds:.0f} s"


def _own(config: Config, topology: Topology) -> Candidate:
  """The config as it is."""
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
  """Each candidate with its plan before it is compiled, or why there is none: `own`, then by a guess of their time."""
  found: list[tuple[Candidate, Plan | None, str]] = []
  micro_batches = [number for number in MICRO_BATCHES if config.train.batch_size % number == 0]
  for mesh in dict.fromkeys((own.mesh, *_meshes(config, topology))):
    # Shapes and shardings are those of the mesh, whatever is recomputed and however the batch is cut.
    first = Candidate(mesh, REMAT[0], 1)
    try:
      plan = arithmetic(_changed(config, first), topology, efficiency)
    except InputError as error:
      found.append((first, None, str(error)))
      continue
    if plan.fits is False:
      size = f"{sum(plan.counted) / 1e9:.2f} GB"
      found.append((first, None, f"parameters, moments and batch alone take {size} a device"))
      continue
    of_mesh = [Candidate(mesh, remat, number) for remat, number in itertools.product(REMAT, micro_batches)]
    if mesh == own.mesh:
      of_mesh.append(own)  # its number of micro-batches may be another
    for candidate in dict.fromkeys(of_mesh):
      changed = _changed(config, candidate)
      try:
        check_batches(changed, abstract_mesh(changed.mesh, topology.num_devices))
      except InputError as error:
        found.append((candidate, None, str(error)))
      else:
        found.append((candidate, dataclasses.replace(plan, config=changed), ""))

  def order(one: tuple[Candidate, Plan | None, str]) -> tuple[bool, tuple[bool, float]]:
    candidate, plan, _ = one
    return plan is not None and candidate != own, _guess(plan)

  return iter(sorted(found, key=order))


def _changed(config: Config, candidate: Candidate) -> Config:
  changed = config.copy_and_resolve_references()
  changed.model.remat, changed.train.micro_batches = candidate.remat, candidate.micro_batches
  changed.mesh.update(dict(candidate.mesh))
  return changed


def _meshes(config: Config, topology: Topology) -> list[tuple[tuple[str, int], ...]]:
  """Shapes data × fsdp × tensor of a slice: parameters over all of it, over a quarter of it, or over tensor alone."""
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
  """The order in which candidates are tried, and nothing else: first those that may fit, by a guess of their time."""
  if plan is None:
    return False, 0.0
  too_large = plan.device is not None and _guess_bytes(plan) > plan.device.memory_bytes
  return too_large, _guess_seconds(plan)


def _guess_bytes(plan: Plan) -> float:
  """Memory of a device: arguments, fp32 gradients, logits and their gradient, and what the scan saves of each layer."""
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
  """Time of a step.

  Products at the assumed efficiency, or the traffic of weights (gathered twice and reduced once a micro-batch over
  fsdp, reduced over data) and of activations (four all-reduces a layer over tensor), whichever takes longer.
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

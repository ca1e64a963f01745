"""A plan, and a search, as text."""

from collections.abc import Iterator, Sequence

from mixln_jax import config as config_lib
from mixln_jax.parallel.mesh import describe_mesh
from mixln_jax.planning.plan import Compiled, Estimate, Plan, advice
from mixln_jax.planning.search import NOT_TRIED, Tried
from mixln_jax.text import aligned


def describe(plan: Plan) -> str:
  """The whole plan."""
  return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
  config, topology = plan.config, plan.topology
  table = config_lib.table(config.model)
  mesh = describe_mesh(plan.mesh)
  slices = f" × {topology.num_slices} slices" if topology.num_slices > 1 else ""
  yield f"placement  {table.layer_list}"
  shape = f"{config.model.num_layers} layers × {config.model.embed_dim}"
  yield f"model      {plan.parameters / 1e6:.2f} M parameters, {shape}"
  yield f"devices    {topology.name}{slices}: {topology.num_devices} × {topology.device_kind}, mesh: {mesh}"
  yield (
    f"FLOPs      {plan.model_flops_per_token:.4g} per token (counted); {plan.executed_flops_per_token:.4g} are "
    f"executed (with masked positions and what remat={config.model.remat} recomputes)"
  )
  if plan.update_flops:
    yield f"           {plan.update_flops:.4g} per update of {config.optimizer.name}, on each device (counted)"
  yield (
    f"step       {config.train.batch_size} × {config.data.sequence_length} = {plan.tokens_per_step:,} tokens in "
    f"{config.train.micro_batches} micro-batches"
  )
  if plan.compiled:
    yield f"program    training step, hash {plan.compiled.program}, compiled in {plan.compiled.seconds:.1f} s"
  yield from _memory(plan)
  if plan.compiled and plan.compiled.traffic:
    yield from _network(plan.compiled)
  yield from _estimate(plan)


def _gb(size: float) -> str:
  return f"{size / 1e9:.4g}"


def _memory(plan: Plan) -> Iterator[str]:
  counted, device, made = plan.counted, plan.device, plan.compiled
  kinds = ", ".join(f"{kind} {_gb(size)}" for kind, size in counted._asdict().items() if kind != "counters")
  yield f"memory     GB per device, counted: {kinds} = {_gb(sum(counted))}"
  if made and made.memory:
    memory = made.memory
    yield (
      f"           compiled: arguments {_gb(memory.arguments)} + temporaries {_gb(memory.temporaries)} + outputs "
      f"{_gb(memory.outputs)} + code {_gb(memory.code)} = {_gb(memory.total)}"
    )
  if device is None:
    yield f"           whether it fits is not known: no memory size for {plan.topology.device_kind!r}"
  elif plan.fits:
    left = device.memory_bytes - (made.memory.total if made and made.memory else 0)
    yield f"           fits: {_gb(left)} of {_gb(device.memory_bytes)} GB are left"
  elif plan.fits is None:
    yield f"           whether it fits in {_gb(device.memory_bytes)} GB is not known before it is compiled"
  else:
    why = made.too_much if made else f"of {_gb(device.memory_bytes)} GB, before any activation"
    yield f"           does not fit: {why}"
    yield f"           try {'; or '.join(advice(plan))}"


def _network(made: Compiled) -> Iterator[str]:
  assert made.traffic is not None
  yield "network    collectives of a device and step (optimized program; bodies of loops × their turns)"
  for kind, collective in made.traffic.collectives.items():
    yield (
      f"           {kind:<20}{collective.runs:>8,} ×  operands {_gb(collective.bytes):>9} GB, sent "
      f"{_gb(collective.sent):>9} GB"
    )
  if not made.traffic.collectives:
    yield "           none"
  if made.traffic.unknown_loops:
    yield f"           counted once, turns not known: {', '.join(made.traffic.unknown_loops)}"


def _estimate(plan: Plan) -> Iterator[str]:
  estimate, device = plan.estimate, plan.device
  if estimate is None or device is None:
    yield f"estimate   none: peak and bandwidths of {plan.topology.device_kind!r} are not known"
    return
  yield "estimate   of time, by arithmetic; nothing was timed"
  yield from _terms(plan, estimate)
  if plan.topology.num_slices > 1 and estimate.network is not None:
    yield "           (what goes from slice to slice is counted as if the slices were one)"
  steps = plan.config.train.num_steps
  bound = "at least " if estimate.network is None else ""
  without = f" ({estimate.step_without_overlap:.3g} s if nothing overlaps)" if estimate.network is not None else ""
  used = plan.model_flops_per_token * plan.tokens_per_step / estimate.step
  utilisation = used / (plan.topology.num_devices * device.peak_flops)
  yield (
    f"           step {bound}{estimate.step:.3g} s, the largest{without}: "
    f"{plan.tokens_per_step / estimate.step:,.0f} tokens/s, {utilisation:.0%} model-FLOPs utilisation"
  )
  yield f"           {steps:,} steps: {bound}{estimate.step * steps / 3600:.3g} h, without evaluations and checkpoints"


def _terms(plan: Plan, estimate: Estimate) -> Iterator[str]:
  device, made = plan.device, plan.compiled
  assert device is not None
  flops = plan.executed_flops_per_token * plan.tokens_per_step / plan.topology.num_devices + plan.update_flops
  yield (
    f"           compute  {estimate.compute:>8.3g} s = {flops / 1e12:.4g} TFLOP per device / ({plan.efficiency:g} "
    f"(assumed) × {device.peak_flops / 1e12:g} TFLOP/s)"
  )
  if plan.compiler_seconds is not None and made and made.traffic:
    without = "collectives"
    if made.traffic.kernel_runs:
      without += f" and {made.traffic.kernel_runs:,} runs of kernels"
    seconds = f"{plan.compiler_seconds:>8.3g} s"
    yield f"                    {seconds} by the compiler's own estimate of all instructions, without {without}"
  if made and made.traffic and estimate.memory is not None and estimate.network is not None:
    sent = sum(collective.sent for collective in made.traffic.collectives.values())
    yield (
      f"           memory   {estimate.memory:>8.3g} s = {_gb(made.traffic.memory_bytes)} GB read and written / "
      f"{device.memory_bandwidth / 1e9:g} GB/s"
    )
    yield (
      f"           network  {estimate.network:>8.3g} s = {_gb(sent)} GB sent / {device.network_bandwidth / 1e9:g} GB/s "
      "(all links of a device, one direction)"
    )


def describe_search(tried: Sequence[Tried]) -> str:
  """The ranking, the candidates that do not fit, and the flags of the best one."""
  fitting = [one for one in tried if one.plan and not one.reason]
  rows = [("rank", "GB per device", "s per step", "tokens/s", "candidate (times are estimates)")]
  for rank, one in enumerate(fitting, 1):
    assert one.plan is not None
    made, estimate = one.plan.compiled, one.plan.estimate
    memory = f"{made.memory.total / 1e9:.2f}" if made and made.memory else "-"
    step = f"{estimate.step:.3g}" if estimate else "-"
    rate = f"{one.plan.tokens_per_step / estimate.step:,.0f}" if estimate else "-"
    rows.append((str(rank), memory, step, rate, one.candidate.label))
  lines = aligned(rows, right=(1, 2, 3))
  if len(fitting) < len(tried):
    lines.append("not:")
  lines += [f"  {one.candidate.label}: {one.reason}" for one in tried if one.reason and one.reason != NOT_TRIED]
  if left := sum(one.reason == NOT_TRIED for one in tried):
    lines.append(f"  {left} others were {NOT_TRIED}")
  if fitting:
    lines.append(f"best   {fitting[0].candidate.flags}")
  else:
    lines.append("nothing fits: give a larger slice, or another mesh")
  return "\n".join(lines)

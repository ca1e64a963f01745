"""What a run will need before it is paid for: memory, collectives, and an estimate of its time on a given topology.

The very step that training runs is compiled, for a TPU by its real compiler, which needs no TPU
(`pip install -r requirements-tpu.txt`). No data is needed.

Exit status: 0 it fits, or nothing speaks against it; 1 it does not fit; 2 rejected; 3 nothing was compiled, since the
TPU compiler is missing, and only the arithmetic is given.
"""

import json
import os
import sys
from typing import Any

import jax

from mixln_jax import signals
from mixln_jax.command_line import CommandLine
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.planning import plan as planning
from mixln_jax.planning import text, topology
from mixln_jax.planning.search import Tried, ranked, search
from mixln_jax.planning.topology import MissingLibtpuError
from mixln_jax.training.finetune import follow_model, pin

FITS, DOES_NOT_FIT, NOT_COMPILED = 0, 1, 3


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.config()
  line.string(
    "topology", "a slice, as in v5e:4x4, v6e:8x8, v4:2x2x4 or v5p:2x2x4; or cpu, gpu: what is here", required=True
  )
  line.number("efficiency", "fraction of the peak FLOP/s that is assumed", default=planning.EFFICIENCY, minimum=0.01)
  line.boolean("json", "print one JSON object instead of text")
  line.boolean("search", "try remat policies, micro-batches and mesh shapes, and rank those that fit")
  line.integer("search_compilations", "what a search compiles at most", default=12, minimum=1)
  values = line.parse(argv)
  config = pin(follow_model(line.config_value(), line.overrides()))
  if values.efficiency > 1:
    raise InputError(f"--efficiency={values.efficiency:g}: must be at most 1, a fraction of the peak")
  if values.topology not in topology.HERE:
    _only_compile()
  shape = topology.parse(values.topology, config)
  arithmetic = planning.arithmetic(config, shape, values.efficiency)
  try:
    devices = topology.devices(shape)
  except MissingLibtpuError as error:
    _show(arithmetic, as_json=values.json)
    print(f"not compiled: {error}", file=sys.stderr)
    return NOT_COMPILED
  if values.search:
    return _search(config, shape, devices, values)
  if not values.json:
    print(f"compiling the training step for {shape.num_devices} × {shape.device_kind} …", file=sys.stderr, flush=True)
  plan = planning.compile_plan(arithmetic, devices)
  _show(plan, as_json=values.json)
  return DOES_NOT_FIT if plan.fits is False else FITS


def _only_compile() -> None:
  """Lets libtpu compile, no more: it asks no cloud what it runs on, and takes no TPU from a run that trains here."""
  for name, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),  # of no meaning for a topology that is named, but missed aloud
    ("TPU_WORKER_HOSTNAMES", "localhost"),
    ("TPU_MIN_LOG_LEVEL", "3"),
  ):
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")


def _show(plan: planning.Plan, *, as_json: bool) -> None:
  print(json.dumps(plan.to_json(), indent=1) if as_json else text.describe(plan))


def _search(config: Config, shape: topology.Topology, devices: list[Any], values: Any) -> int:
  found: list[Tried] = []
  try:
    tried = search(
      config,
      shape,
      devices,
      max_compilations=values.search_compilations,
      efficiency=values.efficiency,
      report=lambda one: print(one, file=sys.stderr, flush=True),
      tried=found,
    )
  except (signals.Stopped, KeyboardInterrupt):
    if found:
      print("stopped: the ranking of what was compiled so far", file=sys.stderr)
      _show_ranking(ranked(found), as_json=values.json)
    raise
  _show_ranking(tried, as_json=values.json)
  return FITS if tried and not tried[0].reason else DOES_NOT_FIT


def _show_ranking(tried: list[Tried], *, as_json: bool) -> None:
  if as_json:
    rows = [
      {**one.candidate._asdict(), "mesh": dict(one.candidate.mesh), "flags": one.candidate.flags, "reason": one.reason}
      | {"plan": one.plan and one.plan.to_json()}
      for one in tried
    ]
    print(json.dumps(rows, indent=1))
  else:
    print(text.describe_search(tried))

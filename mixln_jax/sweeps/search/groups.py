"""Trains the candidates of a search in groups of R, all under one compiled program, each in an ordinary run folder.

Between groups, a candidate's state lies in its folder as an ordinary checkpoint. So nothing of a group is lost in a
kill but the steps since the last one, a candidate can be opened and diagnosed as any run, and what is parked does not
have to fit into memory.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mixln_jax import config as config_lib
from mixln_jax import signals
from mixln_jax.data.opening import open_data
from mixln_jax.errors import InputError
from mixln_jax.files import NUMBER, OBJECTS, check_kinds, read_json, write_whole
from mixln_jax.parallel.devices import DEVICES, GIB
from mixln_jax.runs.folder import CHECKPOINTS, RunFolder
from mixln_jax.runs.outcome import ENDED_ITSELF, NON_FINITE, STOPPED, Outcome
from mixln_jax.sweeps.joint import opened_members
from mixln_jax.sweeps.search.plan import Rung, Search, uniform
from mixln_jax.sweeps.search.table import Candidate, Result
from mixln_jax.sweeps.study import Run
from mixln_jax.training.derived import with_derived
from mixln_jax.training.loop import train_members
from mixln_jax.training.program import JointProgram, compile_steps, lower_steps, memory_of
from mixln_jax.training.progress import Clock

CANDIDATES, LOG, COSTS = "candidates", "log.txt", "costs.json"
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event of one program


class Cost(NamedTuple):
  """What one group took of this machine.

  Attributes:
    rung: its number; 0 for the finals.
    group: its number in the rung, from 1.
    runs: in it.
    steps: of each run, by this process.
    seconds, processor_seconds: by the wall, and of all cores.
    programs: compiled meanwhile.
  """

  rung: int
  group: int
  runs: int
  steps: int
  seconds: float
  processor_seconds: float
  programs: int


class Groups:
  """Trains groups of a search's runs.

  Attributes:
    costs: of the groups that were trained, by any process, the first one first.
  """

  def __init__(self, search: Search, folder: Path, say: Callable[[str], None] = print):
    """Opens the data; nothing is compiled yet.

    Args:
      search: whose runs are trained.
      folder: of the search.
      say: takes a line for a person.

    Raises:
      InputError: the data is not there, several processes train together, or costs.json is damaged.
    """
    if jax.process_count() > 1:
      raise InputError("search: several processes can't search together yet; start one process on one machine")
    self._search, self._folder, self._say = search, folder, say
    self._corpus = open_data(search.base)
    self._program: JointProgram | None = None
    self._compilations = _compilations()
    self.costs = _read_costs(folder / COSTS)

  def __call__(self, candidates: Sequence[Candidate], rung: Rung) -> list[Result]:
    """Trains candidates to the end of a rung, from where their folders say they are."""
    runs = [self.run_of(candidate) for candidate in candidates]
    group = 1 + sum(cost.rung == rung.number for cost in self.costs)
    total = math.ceil(rung.size / self._search.group)
    title = f"rung {rung.number}/{len(self._search.rungs)} group {group}/{total}"
    outcomes = self.train(runs, rung.end, title, rung.number)
    return [_result(outcome, rung) for outcome in outcomes]

  def run_of(self, candidate: Candidate) -> Run:
    """The run of a candidate, in its folder."""
    fixed = dict.fromkeys(("mesh.run", "mesh.dcn_run"), 1)
    flat = config_lib.flatten(self._search.base) | dict(candidate.values) | fixed
    config = with_derived(config_lib.from_flat(flat))
    config_lib.validate(config)
    return Run(candidate.name, dict(candidate.values), config, RunFolder(self._folder / CANDIDATES / candidate.name))

  def give_up(self, candidates: Sequence[Candidate]) -> None:
    """Removes the states of candidates that don't go on; what was measured of them stays."""
    for candidate in candidates:
      shutil.rmtree(self._folder / CANDIDATES / candidate.name / CHECKPOINTS, ignore_errors=True)

  def train(self, runs: Sequence[Run], until: int, title: str, rung: int = 0) -> list[Outcome]:
    """Trains runs as one group, to a step.

    Args:
      runs: at most R, on the same batches.
      until: the step after which they pause, or end.
      title: what a person sees.
      rung: for the costs.

    Returns:
      Their outcomes.

    Raises:
      InputError: the group does not fit into memory, or a run contradicts what its folder holds.
      Stopped: a signal came; the runs have checkpoints, and the same command resumes them.
    """
    program = self._filled(runs)
    started, processor, compiled = time.monotonic(), time.process_time(), self._compilations.count
    with self._quiet(), opened_members(program, runs, self._corpus) as members:
      first = min((member.checkpoints.latest_step() or 0) for member in members)
      outcomes = train_members(program, members, Clock(), until)
    if any(outcome.status == STOPPED and outcome.step < until for outcome in outcomes):
      raise signals.Stopped(signals.requested_by() or "a signal")
    cost = Cost(
      rung,
      1 + sum(cost.rung == rung for cost in self.costs),
      len(runs),
      until - first,
      round(time.monotonic() - started, 3),
      round(time.process_time() - processor, 3),
      self._compilations.count - compiled,
    )
    self.costs.append(cost)
    content = {"costs": [cost._asdict() for cost in self.costs]}
    write_whole(self._folder / COSTS, json.dumps(content, indent=1) + "\n")
    self._program = program
    losses = sorted(outcome.validation["loss"] for outcome in outcomes if outcome.validation)
    lowest = f"{float(losses[0]):.4f}" if losses else "none"
    self._say(
      f"{title:<24}  step {until}  lowest loss {lowest}  {cost.seconds:.0f} s, {cost.processor_seconds:.0f} s of "
      f"processor  programs compiled: {cost.programs} by this group, {self._compilations.count} in all"
    )
    return outcomes

  def _filled(self, runs: Sequence[Run]) -> JointProgram:
    """The one program of the search with these runs in its slots; compiled at the first call."""
    configs = {run.name: run.config for run in runs}
    if self._program is not None:
      return self._program.refilled(configs)
    search = self._search
    tables = uniform([*search.space.rows, *search.baselines], search.space.num_layers)
    program = JointProgram(configs, search.base.mesh, slots=search.group, tables=tables)
    _check_fits(search.group, _bytes_of_state(program), program, "its parameters, moments and gradients alone")
    lowered = lower_steps(program)
    program.steps = signals.run_interruptibly(lambda: compile_steps(lowered))
    assert program.steps is not None  # of one process
    needed = memory_of(program.steps.train).total
    room = _check_fits(search.group, needed, program, "the compiled step")
    if room is not None:
      self._say(
        f"memory     a group of {search.group} takes {needed / GIB:.2f} GiB of {room / GIB:.1f} GiB of a device; about "
        f"{_most(search.group, needed, room, program)} would fit"
      )
    return program

  @contextlib.contextmanager
  def _quiet(self) -> Iterator[None]:
    """What the loop prints for each run and step goes to a file of the search."""
    sys.stdout.flush()
    with (self._folder / LOG).open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
      yield


def _result(outcome: Outcome, rung: Rung) -> Result:
  """A run that ended itself has no loss, also where it did so in the last step of the rung: it can't go on."""
  validation = outcome.validation
  if outcome.status in ENDED_ITSELF or validation is None or validation["step"] != rung.end:
    status = "non_finite" if outcome.status == NON_FINITE else "diverged"
    return Result(math.inf, status)
  loss = float(validation["loss"])
  if not math.isfinite(loss):
    return Result(math.inf, "non_finite")
  return Result(loss, "diverged" if outcome.diverged else "ok")


# Memory.


def _bytes_of_state(program: JointProgram) -> int:
  """Bytes on one device of the states of a group, and of as many gradients as parameters, before anything compiles."""

  def of_one_device(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
      total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total

  state = program.abstract_state()
  return of_one_device(state) + of_one_device(state.params)


def _room(device: Any) -> int | None:
  """Bytes that programs may use on a device; None where that is not known."""
  if device.platform == "cpu":
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // jax.local_device_count()
  statistics = device.memory_stats() or {}
  if "bytes_limit" in statistics:
    return int(statistics["bytes_limit"])
  known = DEVICES.get(device.device_kind)
  return None if known is None else known.memory_bytes


def _most(group: int, needed: int, room: int, program: JointProgram) -> int:
  """About how many runs fit, a multiple of the mesh's axis `run`."""
  ways = program.mesh.shape["run"]
  return int(room * group / needed) // ways * ways


def _check_fits(group: int, needed: int, program: JointProgram, what: str) -> int | None:
  """Rejects a group that is larger than a device's memory; returns that memory, None where it is not known.

  Raises:
    InputError: it does not fit; how many would is said.
  """
  room = _room(program.mesh.devices.flat[0])
  if room is not None and needed > room:
    most = _most(group, needed, room, program)
    raise InputError(
      f"SEARCH: group={group}: {what} takes {needed / GIB:.1f} GiB of a device's {room / GIB:.1f} GiB; at most about "
      f"{most} fit: lower group"
    )
  return room


# What it cost.


class _Compilations:
  """Counts the programs that this process compiles, or loads from the cache of compiled ones."""

  def __init__(self) -> None:
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._heard)

  def _heard(self, event: str, duration_secs: float, **kwargs: Any) -> None:
    del duration_secs, kwargs
    self.count += event == COMPILED


_counter: list[_Compilations] = []  # one for the process: a listener stays


def _compilations() -> _Compilations:
  if not _counter:
    _counter.append(_Compilations())
  return _counter[0]


def _read_costs(path: Path) -> list[Cost]:
  if not path.exists():
    return []
  costs = []
  for row in read_json(path, {"costs": OBJECTS})["costs"]:
    check_kinds(row, str(path), dict.fromkeys(Cost._fields, NUMBER))
    costs.append(Cost(**{name: row[name] for name in Cost._fields}))
  return costs

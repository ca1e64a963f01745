"""Runs of one shape as one program: `vmap` of the ordinary step over (state, placement, learning rate).

The batch is not mapped: all runs see the same samples. Each run keeps an ordinary folder, and its checkpoints are the
ordinary ones, of its own tree. Nothing else is stored: the joint state is put together from them, and a run that was
started here can go on alone.
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.data.opening import open_data
from mixln_jax.errors import InputError
from mixln_jax.model.columns import Columns
from mixln_jax.model.initial import starting_values
from mixln_jax.parallel.mesh import attach, global_batch, make_mesh
from mixln_jax.parallel.processes import agree, all_stop_at, is_first, wait_for_all
from mixln_jax.parallel.rules import replicated
from mixln_jax.runs.checkpoint import Checkpoints, DamagedError
from mixln_jax.runs.folder import OUTCOME
from mixln_jax.runs.metrics import Metrics
from mixln_jax.runs.opening import read_config
from mixln_jax.sweeps.sequence import DONE, state_of, write_whole
from mixln_jax.sweeps.study import Run, Study
from mixln_jax.training import loop
from mixln_jax.training import step as step_lib
from mixln_jax.training.checkpoints import check_facts, decay_start, facts_of, open_checkpoints, restore_state, split
from mixln_jax.training.dump import write_dump
from mixln_jax.training.evaluation import Evaluation, add_up
from mixln_jax.training.progress import Clock
from mixln_jax.training.resume import resume_point
from mixln_jax.training.setup import (
  Setup,
  abstract_batch,
  bytes_per_token,
  check_batches,
  make_loader,
  on_mesh,
)
from mixln_jax.training.stopping import stop_on_signals

TOGETHER = "together.json"
# What may differ between runs that are one program: all else is compiled into it.
AXES = (
  "model.placement",
  "model.init_deviation",
  "model.embedding_deviation",
  "optimizer.learning_rate",
  "seed",
)


class Program(NamedTuple):
  """One program for R runs.

  Attributes:
    config: what they share; its learning rate is 1, since theirs are data.
    mesh: with its axis `run`.
    columns: their placements, arrays [R, L].
    rates_R: their peak learning rates.
    seeds_R: of their initial weights.
    starts: what each parameter starts from, arrays [R, …].
  """

  config: Config
  mesh: Mesh
  columns: Columns
  rates_R: np.ndarray
  seeds_R: np.ndarray
  starts: dict[str, np.ndarray]

  @property
  def one(self) -> Columns:
    """The columns of one run: which parameters there are."""
    return self.columns.replace(varying={name: column[0] for name, column in self.columns.varying.items()})

  def shardings(self) -> step_lib.TrainState:
    """The sharding of the joint state: each run's, behind the axis `run`."""
    one = step_lib.state_shardings(self.config, self.mesh, self.one)
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec("run", *s.spec)), one)

  def by_run(self, tree: Any) -> Any:
    """Arrays [R, …] on the mesh, cut along `run`."""
    return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec("run")))

  def init(self) -> step_lib.TrainState:
    """The joint state before the first update, each leaf [R, …]."""
    init_all = jax.jit(self._init_all, out_shardings=self.shardings())
    return init_all(self.by_run(self.seeds_R), self.by_run(self.starts))

  def abstract_state(self) -> step_lib.TrainState:
    """Shapes, types and shardings of the joint state."""
    return attach(jax.eval_shape(self._init_all, self.seeds_R, self.starts), self.shardings())

  def _init_all(self, seeds_R: jax.Array, starts: Mapping[str, jax.Array]) -> step_lib.TrainState:
    return jax.vmap(lambda seed, start: step_lib.init_state(self.config, self.one, seed, start))(seeds_R, starts)

  def compile_step(self) -> jax.stages.Compiled:
    """The joint step `(state, batch, columns, rates) -> (state, metrics)`, compiled ahead of time, state donated."""
    columns, rates_R = self.by_run((self.columns, self.rates_R))
    step = self.map(step_lib.make_train_step(self.config), (0, None, 0, 0))
    # The host of every process reads the metrics of all runs.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings(), replicated(self.mesh)))
    state = self.abstract_state()
    with on_mesh(self.mesh):
      return jitted.lower(state, abstract_batch(self.config, self.mesh), columns, rates_R).compile()

  def map(self, step: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """A pure step of one run as a step of all."""
    return jax.vmap(step, in_axes=in_axes, spmd_axis_name="run")


def make_program(runs: Sequence[Run], mesh_sizes: Config) -> Program:
  """The program of runs that differ only in AXES.

  Raises:
    InputError: they differ in more, one needs a pass of its own (`admin`), or the mesh can't cut their number.
  """
  first = runs[0].config
  for run in runs[1:]:
    different = [field for field, _, _ in config_lib.differences(first, run.config) if field not in AXES]
    if different:
      raise InputError(
        f"--together: {runs[0].name} and {run.name} differ in {', '.join('config.' + field for field in different)}, "
        f"which is compiled into the program; only {', '.join(AXES)} are data: leave --together out"
      )
  if first.train.start_from:
    raise InputError(
      "--together: the runs start from another's weights (config.train.start_from); leave --together out"
    )
  tables = [placement.parse(run.config.model.placement, run.config.model.num_layers) for run in runs]
  for run, table in zip(runs, tables, strict=True):
    if any(table.column(sublayer, "vector_c_res").any() for sublayer in placement.SUBLAYERS):
      raise InputError(
        f"--together: {run.name} needs a profiling pass of its own (placement admin); leave --together out, or the run"
      )
  config = first.copy_and_resolve_references()
  config.optimizer.learning_rate = 1.0
  config.mesh.update(mesh_sizes)
  mesh = make_mesh(config.mesh)
  if len(runs) % mesh.shape["run"]:
    raise InputError(f"config.mesh.run={mesh.shape['run']} does not divide the {len(runs)} runs; choose a divisor")
  columns = Columns.of_many(tables)
  one = columns.replace(varying={name: column[0] for name, column in columns.varying.items()})
  each = [starting_values(run.config.model, one) for run in runs]
  starts = {path: np.stack([np.asarray(start[path], np.float32) for start in each]) for path in each[0]}
  rates = np.array([run.config.optimizer.learning_rate for run in runs], np.float32)
  return Program(config, mesh, columns, rates, np.array([run.config.seed for run in runs], np.uint32), starts)


class Member:
  """One run among those that are trained together: its folder, and whether it still moves."""

  def __init__(self, index: int, run: Run, setup: Setup, checkpoints: Checkpoints):
    self.index, self.run, self.setup, self.checkpoints = index, run, setup, checkpoints
    self.frozen_outcome: loop.Outcome | None = None  # of a run that ended before the others
    self.shardings = step_lib.state_shardings(run.config, setup.mesh)
    self.facts = facts_of(run.config, setup.corpus.manifest.fingerprint)
    self.metrics: Metrics | None = None
    self.divergence: loop.Divergence | None = None

  @property
  def live(self) -> bool:
    return self.frozen_outcome is None

  def state(self, joint: step_lib.TrainState) -> step_lib.TrainState:
    """The run's own state out of the joint one, without what only other placements use."""
    return _taker(*_key(self.shardings))(self._own(joint), self.index)

  def put(self, joint: step_lib.TrainState, own: step_lib.TrainState) -> step_lib.TrainState:
    """The joint state with the run's own in its place; what the run does not use stays as it was."""
    part = self._own(joint)
    changed = _by_path(_putter(*_key(jax.tree.map(lambda leaf: leaf.sharding, part)))(part, own, self.index))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: changed.get(jax.tree_util.keystr(path), leaf), joint)

  def _own(self, joint: step_lib.TrainState) -> step_lib.TrainState:
    """The part of the joint state, leaves [R, …], that this run has."""
    leaves = _by_path(joint)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], self.shardings)


def _key(shardings: Any) -> tuple[tuple[Any, ...], Any]:
  leaves, structure = jax.tree.flatten(shardings)
  return tuple(leaves), structure


@functools.cache
def _taker(shardings: tuple[Any, ...], structure: Any) -> Callable[..., Any]:
  """`(leaves [R, …], index) -> leaves`, sharded so; compiled once for all runs of one tree."""
  return jax.jit(
    lambda tree, index: jax.tree.map(lambda leaf_R: leaf_R[index], tree), out_shardings=structure.unflatten(shardings)
  )


@functools.cache
def _putter(shardings: tuple[Any, ...], structure: Any) -> Callable[..., Any]:
  """`(leaves [R, …], leaves, index) -> leaves [R, …]`, sharded so."""
  return jax.jit(
    lambda tree, own, index: jax.tree.map(lambda leaf_R, leaf: leaf_R.at[index].set(leaf), tree, own),
    out_shardings=structure.unflatten(shardings),
  )


def _by_path(tree: Any) -> dict[str, Any]:
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def joint_set(runs: Sequence[Run]) -> list[Run]:
  """The runs to be trained together: those that were when it was last begun, else all that are not done.

  A run that was frozen stays among them: another number of runs would round in another way. One that has finished does
  not: it is never trained again.
  """
  path = _study_folder(runs) / TOGETHER
  names = json.loads(path.read_text())["runs"] if path.exists() else []
  begun = [run for run in runs if run.name in names and loop.read_outcome(run.folder, (loop.FINISHED,)) is None]
  if any(state_of(run).state != DONE for run in begun):
    return begun
  return [run for run in runs if state_of(run).state != DONE]


def _study_folder(runs: Sequence[Run]) -> Path:
  return runs[0].folder.path.parents[1]


def train_together(study: Study, runs: Sequence[Run]) -> list[loop.Outcome]:
  """Trains runs as one program, from the newest step that all of them have a checkpoint of; returns their outcomes.

  A run whose updates stop being finite, or that diverges where the config ends such runs, is frozen and marked; the
  others go on.

  Raises:
    InputError: they can't be one program, or contradict what their folders hold; nothing was changed.
  """
  clock = Clock()
  program = make_program(runs, study.base.mesh)
  if is_first() and program.config.diagnostics.every_steps:
    print("note       config.diagnostics.every_steps is not for --together; `diagnose` looks at the checkpoints")
  corpus = open_data(program.config)
  setups = [
    Setup(run.config, program.mesh, corpus, placement.parse(run.config.model.placement, run.config.model.num_layers))
    for run in runs
  ]
  check_batches(runs[0].config, program.mesh)
  agree("the start of the study", {run.name: run.values for run in runs} | loop.start_facts(setups[0]))
  old_configs = [read_config(run.folder) if run.folder.has_run else run.config for run in runs]
  for run in runs:
    if not run.folder.has_run:
      run.folder.create(config_lib.to_json(run.config))
  wait_for_all("the runs' folders")
  with contextlib.ExitStack() as stack:
    members = []
    for index, (run, setup) in enumerate(zip(runs, setups, strict=True)):
      stack.enter_context(run.folder.lock())
      wait_for_all(f"the lock of {run.name}")
      checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(run.config, run.folder)))
      members.append(Member(index, run, setup, checkpoints))
    if is_first():
      write_whole(_study_folder(runs) / TOGETHER, json.dumps({"runs": [run.name for run in runs]}) + "\n")
    return _Joint(program, members, clock).train(old_configs)


class _Joint:
  """The joint loop: that of `training.loop`, over several runs."""

  def __init__(self, program: Program, members: Sequence[Member], clock: Clock):
    self._program, self._members, self._clock = program, members, clock
    self._config = members[0].run.config
    self._shardings = program.shardings()
    self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
    self._timer = time.monotonic()

  def train(self, old_configs: Sequence[Config]) -> list[loop.Outcome]:
    config, num_steps = self._config, self._config.train.num_steps
    step, state = self._restore(old_configs)
    if step == num_steps:
      return [
        self._finish(member, state, step, loop.FINISHED, f"all {step} steps were done already")
        for member in self._members
      ]
    evaluate = self._make_evaluator()
    stopped_by: str | None = None
    with contextlib.ExitStack() as stack:
      for member in self._members:
        if member.live:  # a frozen one has written its last line
          if is_first():
            (member.run.folder / OUTCOME).unlink(missing_ok=True)
          member.divergence = loop.Divergence(member.setup, member.run.folder, step)
          metrics = loop.open_metrics(member.setup, member.run.folder, step)
          member.metrics = stack.enter_context(contextlib.closing(metrics))
      bar = stack.enter_context(
        tqdm(total=num_steps, initial=step, unit="step", dynamic_ncols=True, disable=None if is_first() else True)
      )
      with self._clock("compile"):
        train_step = self._program.compile_step()
      columns, rates_R = self._program.by_run((self._program.columns, self._program.rates_R))
      loader = make_loader(self._members[0].setup, config.train.batch_size)
      batches = stack.enter_context(contextlib.closing(loader.train(step)))
      stop = stack.enter_context(stop_on_signals())
      self._timer = time.monotonic()
      while step < num_steps and stopped_by is None and any(member.live for member in self._members):
        with self._clock("input"):
          batch = global_batch(next(batches), self._program.mesh)
        with jax.transfer_guard("disallow"):
          state, values = train_step(state, batch, columns, rates_R)
        step += 1
        state = self._flush(state, step - 1, bar)
        self._pending = (step, values)
        for member in self._members:
          member.checkpoints.check()
        stopped_by = "SIGTERM" if all_stop_at(step) else stop.requested_by
        evaluate_now = step == num_steps or loop.due(step, config.evaluate.every_steps)
        save_now = (
          step in (num_steps, *decay_start(config))
          or loop.due(step, config.checkpoint.every_steps)
          or stopped_by is not None
        )
        if not (evaluate_now or save_now):
          continue
        state = self._flush(state, step, bar)
        losses: dict[int, float] = {}
        if evaluate_now:
          with self._clock("evaluation"):
            state, losses = self._evaluate(evaluate, state, columns, step)
        if save_now:
          with self._clock("checkpoint"):
            for member in self._members:
              if member.live:
                if member.metrics is not None:
                  member.metrics.flush()  # first: a checkpoint never lacks the metrics before it
                member.checkpoints.save(step, split(member.state(state)), member.facts, losses.get(member.index))
        self._timer = time.monotonic()
      with self._clock("checkpoint"):
        for member in self._members:
          member.checkpoints.wait()
    status = loop.FINISHED if stopped_by is None else loop.STOPPED
    message = f"all {num_steps} steps are done" if stopped_by is None else f"by {stopped_by} after step {step}"
    return [self._finish(member, state, step, status, message) for member in self._members]

  def _restore(self, old_configs: Sequence[Config]) -> tuple[int, step_lib.TrainState]:
    """The newest step of which every run that still moves has a whole checkpoint, and the joint state there."""
    for member in self._members:
      member.frozen_outcome = loop.read_outcome(member.run.folder, (loop.NON_FINITE, loop.DIVERGED))
    live = [member for member in self._members if member.live] or self._members
    common = set.intersection(*(set(member.checkpoints.all_steps()) for member in live))
    begun = any(member.checkpoints.all_steps() for member in live)
    state = self._program.init()
    for step in sorted(common, reverse=True) if begun else [0]:
      try:
        points = [
          resume_point(old, member.run.config, [step] if begun else [], member.run.folder.address)
          for old, member in zip(old_configs, self._members, strict=True)
        ]
        states = [self._restored(member, step, state) for member in self._members] if begun else []
      except DamagedError as error:
        print(f"warning: {error}; the runs go on from a step of which all have a whole checkpoint")
        continue
      break
    else:
      raise InputError(
        "--together: there is no step of which all of the runs have a whole checkpoint; leave --together out, and each "
        "goes on from its own"
      )
    agree("the step to go on from", {"step": step})
    for member, own in zip(self._members, states, strict=False):
      state = member.put(state, own)
    for member, point in zip(self._members, points, strict=True):
      later = [number for number in member.checkpoints.all_steps() if number > step]
      if member.live and later:
        loop.put_aside(member.run.folder, member.checkpoints, later, f"superseded_at_{step}")
      own = member.state(state)
      if is_first():
        print(f"run        {member.run.name}" + (f", goes on from step {step}" if step else ""))
      if step == 0:
        loop.report_initial_weights(member.run.folder, own.params)
      loop.write_facts(member.setup, member.run.folder, own.params, point)
    return step, state

  def _restored(self, member: Member, step: int, fresh: step_lib.TrainState) -> step_lib.TrainState:
    """A run's own state at a step; of a frozen run what it ended with, so that it stays frozen."""
    steps = [step] if member.live else member.checkpoints.all_steps()
    if steps:
      check_facts(member.checkpoints.facts(steps[-1]), member.setup, member.run.folder)
      own = restore_state(member.run.config, member.shardings, member.checkpoints, steps[-1])
    else:  # it froze before its first checkpoint
      own = member.state(fresh)
    return own if member.live else own.replace(skipped_in_a_row=own.skipped_in_a_row * 0 + self._max_skipped)

  @property
  def _max_skipped(self) -> int:
    return self._config.train.max_skipped_in_a_row

  def _flush(self, state: step_lib.TrainState, step: int, bar: Any) -> step_lib.TrainState:
    """Reads the metrics of the step that is pending, passes them on, and freezes the runs that can't go on."""
    if self._pending is None:
      return state
    step, pending = self._pending
    values_R = {name: np.asarray(value) for name, value in jax.device_get(pending).items()}
    self._pending = None
    seconds, self._timer = time.monotonic() - self._timer, time.monotonic()
    live = [member for member in self._members if member.live]
    for member in live:
      values = {name: float(value[member.index]) for name, value in values_R.items()}
      if member.metrics is not None:
        member.metrics.write(step, "train", values | {"tokens_per_second": values["tokens"] / seconds})
      if values["skipped_in_a_row"] >= self._max_skipped:
        what = f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}: not finite"
        state = self._freeze(state, member, step, loop.NON_FINITE, what)
    losses = [float(values_R["loss"][member.index]) for member in live]
    if losses:
      bar.set_postfix_str(f"losses {min(losses):.3f} to {max(losses):.3f}, {len(live)} runs", refresh=False)
    bar.update(step - bar.n)
    return state

  def _freeze(
    self, state: step_lib.TrainState, member: Member, step: int, status: str, why: str
  ) -> step_lib.TrainState:
    """Ends one run at a step: its outcome is written, and it is not updated any more.

    Its checkpoint is written as well, unless its parameters are what was seen not to be finite.
    """
    own = member.state(state)
    whole = status == loop.DIVERGED
    if int(own.skipped_in_a_row):  # the parameters are those from before; later steps were skipped as well
      own, whole = loop.without_last(own, int(own.step) - step, member.shardings), True
      why += f"; its batch and gradient norms are in {write_dump(member.run.folder, member.setup, own, step)}"
    if whole and step not in member.checkpoints.all_steps():
      member.checkpoints.save(step, split(own), member.facts)
      member.checkpoints.wait()
    end = loop.End(status, step, f"{why}; the other runs went on", int(own.skipped))
    member.frozen_outcome = loop.write_outcome(member.setup, member.run.folder, end, member.checkpoints, self._clock)
    if is_first():
      tqdm.write(f"frozen     {member.run.name}: {member.frozen_outcome.message}")
    halt = jax.jit(
      lambda skipped_R: skipped_R.at[member.index].set(self._max_skipped),
      out_shardings=self._shardings.skipped_in_a_row,
    )
    return state.replace(skipped_in_a_row=halt(state.skipped_in_a_row))

  def _make_evaluator(self) -> Callable[..., list[Evaluation]]:
    setup, config = self._members[0].setup, self._config
    step = step_lib.make_evaluate_step(self._program.config, bytes_per_token(setup))
    mapped = jax.jit(self._program.map(step, (0, None, 0)), out_shardings=replicated(self._program.mesh))
    loader = make_loader(setup, config.evaluate.batch_size)

    def evaluate(params: Any, columns: Columns) -> list[Evaluation]:
      with on_mesh(self._program.mesh):
        pending = [
          mapped(params, global_batch(batch, self._program.mesh), columns)
          for batch in loader.validation(config.evaluate.max_tokens)
        ]
      sums_N3R = np.array(jax.device_get(pending), np.float64)
      return [add_up(*sums_N3R[:, :, index].T) for index in range(len(self._members))]

    return evaluate

  def _evaluate(
    self, evaluate: Callable[..., list[Evaluation]], state: step_lib.TrainState, columns: Columns, step: int
  ) -> tuple[step_lib.TrainState, dict[int, float]]:
    """Evaluates all runs; returns the state, with those frozen that ended by it, and the losses of the rest."""
    losses: dict[int, float] = {}
    for member, validation in zip(self._members, evaluate(state.params, columns), strict=True):
      if not member.live or member.divergence is None:
        continue
      entropy = member.divergence.seen(step, validation.loss)
      line = validation.metrics(official_compat=self._config.evaluate.official_compat)
      if member.metrics is not None:
        member.metrics.write(step, "validation", line | {"unigram_entropy": entropy})
      tqdm.write(f"validation step {step}  loss {validation.loss:.4f}  {member.run.name}")
      if not math.isfinite(validation.loss):
        state = self._freeze(state, member, step, loop.NON_FINITE, f"step {step}: validation loss {validation.loss}")
      elif member.divergence.in_a_row >= 2 and self._config.train.stop_when_diverged:
        why = f"the validation loss stays at the unigram entropy {entropy:.4f} of its data"
        state = self._freeze(state, member, step, loop.DIVERGED, why)
      else:
        losses[member.index] = validation.loss
    return state, losses

  def _finish(self, member: Member, state: step_lib.TrainState, step: int, status: str, message: str) -> loop.Outcome:
    if member.frozen_outcome is not None:
      return member.frozen_outcome
    end = loop.End(status, step, message, int(member.state(state).skipped))
    return loop.write_outcome(member.setup, member.run.folder, end, member.checkpoints, self._clock)

"""The loop.

It trains members: one run, or several of one shape as one program (`training/program.py`). Order of operations of one
update: batch of the step -> dispatch the step -> read and report the metrics of the step before. After steps that are
due: report the step itself, evaluate, save checkpoints. In that order: what was seen not to be finite is never saved,
and a checkpoint never lacks the evaluation of its step. A member that can't go on is frozen; the loop ends with its
last member.
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mixln_jax import config as config_lib
from mixln_jax import signals
from mixln_jax.config import Config
from mixln_jax.errors import LostLockError, MachineError, UnreachableError, advice, exhausted, one_line
from mixln_jax.model.flops import train_flops_per_token
from mixln_jax.model.parameters import count_params
from mixln_jax.opening import Setup, attention_of, make_loader, set_up
from mixln_jax.parallel.devices import peak_flops
from mixln_jax.parallel.mesh import describe_mesh, global_batch
from mixln_jax.parallel.processes import agree, all_stop_at, begin_loop, is_first, wait_for_all
from mixln_jax.parallel.rules import batch_sharding, check_divides
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.facts import code_hash
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.outcome import DIVERGED, FAILED, FINISHED, NON_FINITE, STOPPED, Outcome
from mixln_jax.text import printable
from mixln_jax.training import finetune
from mixln_jax.training.begin import load_or_start, quarantine
from mixln_jax.training.checkpoints import decay_start
from mixln_jax.training.derived import with_derived
from mixln_jax.training.diagnosis import is_diagnostic
from mixln_jax.training.divergence import MEANING, STUCK
from mixln_jax.training.dump import write_dump
from mixln_jax.training.evaluation import Evaluator
from mixln_jax.training.member import Member, old_config_of
from mixln_jax.training.program import Program, SingleProgram, Steps, compile_steps, lower_steps
from mixln_jax.training.progress import Clock, Profiler, Progress
from mixln_jax.training.references import with_references
from mixln_jax.training.resume import ResumePoint
from mixln_jax.training.step import TrainState
from mixln_jax.training.stopping import StopRequest, stop_on_signals


def train(config: Config, workdir: str | Path) -> Outcome:
  """Trains config in workdir, from its newest whole checkpoint where it has one.

  Exactly `config.train.num_steps` updates are done, over however many processes and restarts.

  Raises:
    InputError: config, data, devices and the work directory contradict one another; nothing was changed.
  """
  clock = Clock()
  config = with_derived(config)
  setup = set_up(config)
  check_batches(config, setup.mesh)
  program = SingleProgram(setup.config, setup.mesh)
  folder = RunFolder(workdir)
  old_config = old_config_of(folder, config)
  agree("the start of the run", start_facts(setup))
  with clock("references"):
    setup = with_references(setup, [folder])
  if not folder.has_run:
    if config.train.start_from:
      finetune.find_start(setup)  # for its checks: nothing is written where they fail
    folder.create(config_lib.to_json(config))
  wait_for_all("the run's folder")
  folder.check_shared()
  with contextlib.ExitStack() as stack:
    stack.enter_context(folder.lock())
    wait_for_all("the lock of the run")  # orbax waits for all where it opens the checkpoints, and hears of no failure
    member = stack.enter_context(Member.opened(0, setup, folder, old_config, program.own_shardings(0)))
    return train_members(program, [member], clock)[0]


def check_batches(config: Config, mesh: Mesh) -> None:
  """Rejects a config whose micro-batches, or batches of the evaluation, the mesh can't cut; raises InputError."""
  sizes = {
    "config.train.batch_size / micro_batches": config.train.batch_size // config.train.micro_batches,
    "config.evaluate.batch_size": config.evaluate.batch_size,
  }
  for name, size in sizes.items():
    check_divides(name, (size, config.data.sequence_length), batch_sharding(mesh))


def start_facts(setup: Setup) -> dict[str, Any]:
  """What all processes of a run must have in common before anything is trained."""
  fields = {f"config.{name}": value for name, value in config_lib.flatten(setup.config).items()}
  fingerprint = setup.corpus.manifest.fingerprint
  return fields | {"the data's fingerprint": fingerprint, "the code": code_hash(), "jax": jax.__version__}


def train_members(program: Program, members: Sequence[Member], clock: Clock, until: int | None = None) -> list[Outcome]:
  """Trains runs whose folders are locked, from the newest step that all of them can resume from.

  Args:
    program: of as many members, or more: members lie in its first slots.
    members: the runs; one whose outcome is set has ended before, and is not trained any more.
    clock: has counted since the process began.
    until: the step after which they pause, with an evaluation and a checkpoint; by default their last one.

  Returns:
    How each of them ended.

  Raises:
    InputError: as `load_or_start`; nothing was changed.
    MachineError: the disk is full, or too few files can be open.
    Stopped: a signal came before the first step.
  """
  if not any(member.live for member in members):
    return _outcomes(members)  # they may have ended at steps of which no checkpoint is common to all
  points, state = load_or_start(program, members)
  last = program.config.train.num_steps if until is None else until
  if points[0].step == last:
    for member in members:
      if member.live:
        skipped = int(program.own(state, member.index).skipped)
        status = _status_at(last, program.config)
        member.end(status, last, f"all {last} steps were done already", clock, skipped)
    return _outcomes(members)
  loop = _Loop(program, members, points, state, clock, last)
  try:
    loop.run()
  except (LostLockError, UnreachableError):
    raise  # the run is another process's now, or the bucket that its outcome would lie in is away
  except signals.Stopped as stopped:  # before the first step: there is nothing new to save
    message = f"by {stopped} before its next step; run the same command to resume"
    for member in members:
      if member.live:
        member.end(STOPPED, loop.step, message, clock)
    raise
  except Exception as error:
    message = f"{type(error).__name__}: {one_line(error)}; run the same command to resume from the last checkpoint"
    reason = exhausted(error)
    if reason is not None:
      message = f"{reason} after step {loop.step}; {_last_checkpoints(members)}; {advice(reason)}"
    with contextlib.suppress(OSError):  # of a disk that is full
      for member in members:
        if member.live:
          member.end(FAILED, loop.step, message, clock)
    if reason is not None:
      raise MachineError(message) from error
    raise
  return _outcomes(members)


def _status_at(step: int, config: Config) -> str:
  """What a run is that did all that it was asked to: finished, or stopped where more is to come."""
  return FINISHED if step == config.train.num_steps else STOPPED


def _last_checkpoints(members: Sequence[Member]) -> str:
  """The newest checkpoint of each run that trained, in words."""
  words = []
  for member in members:
    if member.live:
      member.checkpoints.reload()  # one that was in the making may be missing
      newest = member.checkpoints.latest_step()
      found = "there is no checkpoint" if newest is None else f"the last checkpoint is that of step {newest}"
      words.append(f"{member.name}: {found}" if len(members) > 1 else found)
  return ", ".join(words)


def _outcomes(members: Sequence[Member]) -> list[Outcome]:
  return [member.outcome for member in members if member.outcome is not None]


class _Pending(NamedTuple):
  """A step that was dispatched, and whose metrics were not read yet."""

  step: int
  values: Mapping[str, Any]


class _Loop:
  """The loop itself.

  Attributes:
    step: updates dispatched.
  """

  def __init__(
    self,
    program: Program,
    members: Sequence[Member],
    points: Sequence[ResumePoint],
    state: TrainState,
    clock: Clock,
    last: int,
  ):
    """`last`: the step after which it ends."""
    self._program, self._members, self._points, self._clock, self._last = program, members, points, clock, last
    self._config: Config = members[0].config  # what the loop reads of it is the same for all members
    self.step = points[0].step
    self._state = state
    self._pending: _Pending | None = None
    self._timer = time.monotonic()

  def run(self) -> None:
    """Trains to the end, to a signal, or until no member can go on; every member has an outcome then."""
    config = self._config
    with contextlib.ExitStack() as stack:
      self._start(stack)
      steps = self._compile()
      begin_loop(self.step)
      setup = self._members[0].setup
      batches = stack.enter_context(contextlib.closing(make_loader(setup, config.train.batch_size).train(self.step)))
      stop = stack.enter_context(stop_on_signals())
      self._restart_timer()
      stopped_by: str | None = None
      while self.step < self._last and stopped_by is None and self._live:
        self._profiler.before(self.step + 1)
        with self._clock("input"):
          batch = global_batch(next(batches), setup.mesh)
        compiled = steps.train
        if steps.diagnostic is not None and is_diagnostic(self.step + 1, config.diagnostics.every_steps):
          compiled = steps.diagnostic
        self._dispatch(compiled, batch)
        for member in self._members:
          member.checkpoints.check()
        stopped_by = _stopped_by(self.step, stop)
        self._do_what_is_due(stopping=stopped_by is not None)
      self._finish(stopped_by)

  @property
  def _live(self) -> list[Member]:
    return [member for member in self._members if member.live]

  def _start(self, stack: contextlib.ExitStack) -> None:
    """Says what is trained, and opens the files of the members."""
    step = self.step
    for member in self._live:
      later = [saved for saved in member.checkpoints.all_steps() if saved > step]
      if later:
        quarantine(member.folder, member.checkpoints, later, f"superseded_at_{step}")
    if is_first():
      _announce(self._members, self._points)
    for member, point in zip(self._members, self._points, strict=True):
      if member.live:  # one that has ended wrote its last line
        params = self._program.own(self._state, member.index).params
        member.start(point, params, self._config.diagnostics.every_steps)
        stack.callback(member.close)
    self._progress = stack.enter_context(contextlib.closing(_progress_of(self._members, step)))
    # Of several runs the profile lies in the folder of the first one.
    profile = self._members[0].folder / folder_lib.PROFILE
    self._profiler = stack.enter_context(contextlib.closing(Profiler(self._config, profile)))
    self._evaluator = Evaluator(self._program, self._members[0].setup)

  def _compile(self) -> Steps:
    """The compiled steps of the program, which runs that lay in its slots before may have compiled."""
    started = time.monotonic()
    with self._clock("compile"):
      if self._program.steps is None:
        lowered = lower_steps(self._program)
        self._program.steps = signals.run_interruptibly(lambda: compile_steps(lowered))
      steps = self._program.steps
      wait_for_all("the first step")  # where one of several processes was asked to stop, all do so here
    seconds = time.monotonic() - started
    assert steps is not None  # it is None where a stop was noted, which the meeting has raised
    self._progress.say(f"program    training step, hash {steps.program}, compiled in {seconds:.1f} s")
    for member in self._live:
      member.write_environment(steps.program)
    return steps

  def _dispatch(self, compiled: jax.stages.Compiled, batch: Any) -> None:
    """Starts one update, and reads what the update before it gave, so that the device never waits for the host."""
    # Guarded: an array that slips over to the host here would stall every step.
    with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
      self._state, values = self._program.run_step(compiled, self._state, batch)
    self.step += 1
    self._flush()
    self._pending = _Pending(self.step, values)
    self._profiler.after(self.step, self._state)

  def _flush(self) -> None:
    """Reads the metrics that are pending, which waits for their step, and passes them on.

    A member of which too many consecutive updates were skipped is frozen.
    """
    if self._pending is None:
      return
    step, read = self._pending.step, jax.device_get(self._pending.values)
    self._pending = None
    seconds = time.monotonic() - self._timer
    self._restart_timer()
    shown = []
    for member in self._live:
      values = self._program.values_of(read, member.index)
      statistics = values.pop("diagnostics", None)
      metrics = {name: float(value) for name, value in values.items()}
      metrics["tokens_per_second"] = metrics["tokens"] / seconds
      member.trained(step, metrics, statistics)
      shown.append((member, metrics))
    self._progress.step(step, [metrics for _, metrics in shown], seconds)
    for member, metrics in shown:
      self._check_skipped(member, step, metrics)

  def _check_skipped(self, member: Member, step: int, metrics: Mapping[str, float]) -> None:
    """Says that an update was skipped; freezes the member after too many consecutive ones."""
    skipped = int(metrics["skipped_in_a_row"])
    if not skipped:
      return
    what = f"loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}"
    name = f"{member.name}, " if len(self._members) > 1 else ""
    self._progress.say(f"skipped    {name}step {step}: {what}, so nothing was updated ({skipped} consecutive)")
    if skipped >= self._config.train.max_skipped_in_a_row:
      self._freeze_non_finite(member, step, f"{what}, {skipped} consecutive updates skipped")

  def _do_what_is_due(self, *, stopping: bool) -> None:
    """Evaluates and saves where this step asks for it; a signal asks for a checkpoint."""
    config, last = self._config, self.step == self._last
    evaluate_now = last or _is_due(self.step, config.evaluate.every_steps)
    save_now = last or stopping or self.step in decay_start(config) or _is_due(self.step, config.checkpoint.every_steps)
    if not (evaluate_now or save_now):
      return
    self._flush()
    losses: dict[int, float] = {}
    if evaluate_now and self._live:
      with self._clock("evaluation"):
        losses = self._evaluate()
    if save_now:
      with self._clock("checkpoint"):
        # First: no run removes an older checkpoint for this one while another's newest is still being written.
        for member in self._live:
          member.checkpoints.wait()
        for member in self._live:
          member.save(self.step, self._program.own(self._state, member.index), losses.get(member.index))
    self._restart_timer()

  def _evaluate(self) -> dict[int, float]:
    """Evaluates all members; returns the losses of those that continue, by their number."""
    losses: dict[int, float] = {}
    compat = self._config.evaluate.official_compat
    evaluations = self._evaluator(self._state.params, self.step)
    for member in self._live:
      evaluation = evaluations[member.index]
      loss, entropy = evaluation.loss, member.evaluated(self.step, evaluation)
      name = f"  {member.name}" if len(self._members) > 1 else ""
      self._progress.say(f"validation step {self.step}  {evaluation.describe(official_compat=compat)}{name}")
      if not math.isfinite(loss):
        self._freeze_non_finite(member, self.step, f"validation loss {loss}")
      elif entropy is not None and member.divergence.consecutive >= 2 and self._config.train.stop_when_diverged:
        self._freeze_diverged(member, loss, entropy)
      else:
        losses[member.index] = loss
    return losses

  def _freeze_diverged(self, member: Member, loss: float, entropy: float) -> None:
    """Ends a run that has diverged; its checkpoint is saved."""
    own = self._program.own(self._state, member.index)
    message = f"{MEANING[member.divergence.state or STUCK]} (entropy {entropy:.4f})"
    self._freeze(member, DIVERGED, self.step, message, own, saved=True, loss=loss)

  def _freeze_non_finite(self, member: Member, step: int, what: str) -> None:
    """Ends a run whose loss or gradient is not finite.

    Where its updates were skipped, its parameters are those from before: they are saved as the checkpoint of that step,
    and the step can be tried again. Parameters that were seen not to be finite are never saved.
    """
    own = self._program.own(self._state, member.index)
    was_skipped = int(own.skipped_in_a_row) > 0
    message = (
      f"step {step}: {what}: not finite, so the run ended. Lower config.optimizer.learning_rate, or set "
      "config.optimizer.clip_norm, in another workdir"
    )
    if was_skipped:
      own = _without_last(own, int(own.step) - step, self._program.own_shardings(member.index))
      dump = write_dump(member.folder, member.setup, own, step)
      message += f"; its batch and gradient norms are in {member.folder.shown(dump)}"
      if isinstance(self._program, SingleProgram):
        self._state = own  # the loop ends with it, and its step counter says where
    self._freeze(member, NON_FINITE, step, message, own, saved=was_skipped)

  def _freeze(
    self,
    member: Member,
    status: str,
    step: int,
    message: str,
    own: TrainState,
    *,
    saved: bool,
    loss: float | None = None,
  ) -> None:
    """Ends one member: its outcome is written, its state saved where it is to be, and it is not updated any more.

    The outcome comes first. A process that was killed with the checkpoint alone would resume from it as if the run had
    not ended; and of runs that are trained together, this one would lack the steps that the others have.
    """
    with self._clock("checkpoint"):
      member.checkpoints.wait()
    others = [other for other in self._live if other is not member]
    if others:
      message += "; the other runs continue"
    skipped = int(own.skipped)
    member.end(status, step, message, self._clock, skipped)
    if saved and step not in member.checkpoints.all_steps():
      with self._clock("checkpoint"):
        member.save(step, own, loss)
        member.checkpoints.wait()
      member.end(status, step, message, self._clock, skipped)  # once more, with that checkpoint
    if others:
      self._progress.say(f"frozen     {member.name}: {message}")
      self._state = self._program.halt(self._state, member.index)

  def _finish(self, stopped_by: str | None) -> None:
    """Waits for checkpoints in the making, and writes how the members that still train ended."""
    with self._clock("checkpoint"):
      for member in self._members:
        member.checkpoints.wait()
    status, message = _status_at(self.step, self._config), f"all {self.step} steps are done"
    if self.step < self._last:
      message = f"by {stopped_by} after step {self.step}; run the same command to resume"
    elif status == STOPPED:
      message = f"paused after step {self.step}, as it was asked to"
    for member in self._live:
      skipped = int(self._program.own(self._state, member.index).skipped)
      member.end(status, self.step, message, self._clock, skipped)

  def _restart_timer(self) -> None:
    """After a pause that is not part of a step."""
    self._timer = time.monotonic()


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _stopped_by(step: int, stop: StopRequest) -> str | None:
  """What asks the run to stop after this step; the same on all processes. Read once: a signal may come at any time."""
  return all_stop_at(step) if jax.process_count() > 1 else stop.requested_by


def _without_last(state: TrainState, later: int, shardings: TrainState) -> TrainState:
  """The state as it was `later` steps ago, all of which were skipped, with the next one to be tried again."""

  def change(state: TrainState) -> TrainState:
    return state.replace(step=state.step - later, skipped=state.skipped - later, skipped_in_a_row=0 * state.skipped)

  return jax.jit(change, out_shardings=shardings, donate_argnums=0)(state)


def _progress_of(members: Sequence[Member], start_step: int) -> Progress:
  config, devices = members[0].config, members[0].setup.mesh.devices.flat
  peak = peak_flops(devices[0])
  length = config.data.sequence_length
  flops_per_token = sum(train_flops_per_token(member.config.model, length) for member in members)
  flops_per_step = flops_per_token * config.train.batch_size * length
  return Progress(start_step, config.train.num_steps, flops_per_step, peak and peak * len(devices))


def _announce(members: Sequence[Member], points: Sequence[ResumePoint]) -> None:
  """Prints what is trained, on what, and where."""
  setup = members[0].setup
  model, manifest, devices = setup.config.model, setup.corpus.manifest, setup.mesh.devices.flat
  if len(members) == 1:
    print(f"placement  {setup.table.layer_list}")
  print(f"model      {count_params(model) / 1e6:.2f} M parameters, {model.num_layers} layers × {model.embed_dim}")
  train = manifest.splits["train"]
  size = f"{train.counted:,} training tokens" if train.counted else f"{train.documents:,} documents on the fly"
  print(printable(f"data       {setup.corpus.folder}, {size}, fingerprint {manifest.fingerprint[:12]}"))
  print(f"devices    {len(devices)} × {devices[0].device_kind}, mesh: {describe_mesh(setup.mesh.shape)}")
  print(f"attention  {attention_of(setup.config, setup.mesh)}")
  for member, point in zip(members, points, strict=True):
    where = member.folder.address if len(members) == 1 else f"{member.name}: {member.setup.table.layer_list}"
    resumed = f", resumed from step {point.step}" if point.step else ""
    ended = "" if member.outcome is None else f", ended before at step {member.outcome.step}"
    print(printable(f"run        {where}{ended or resumed}"))
    for change in point.changes:
      print(printable(f"changed    {change}"))

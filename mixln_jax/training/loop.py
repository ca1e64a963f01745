"""The loop.

Order of operations of one update: batch of the step -> dispatch the step -> read and report the metrics of the step
before. After steps that are due: report the step itself, evaluate, save a checkpoint (in that order, so that what was
seen not to be finite is never saved, and a checkpoint never lacks the evaluation of its step).
"""

import contextlib
import datetime
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.data.loader import unigram_entropy
from mixln_jax.errors import InputError
from mixln_jax.model.flops import train_flops_per_token
from mixln_jax.model.parameters import count_params
from mixln_jax.parallel.bits import bit_sums, hash_of_sums
from mixln_jax.parallel.devices import peak_flops
from mixln_jax.parallel.mesh import describe_mesh, global_batch
from mixln_jax.parallel.processes import agree, all_stop_at, is_first, wait_for_all
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.checkpoint import Checkpoints, DamagedError
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import Metrics, TensorBoardMirror, WandbMirror, read_lines
from mixln_jax.runs.opening import read_config
from mixln_jax.training import step as step_lib
from mixln_jax.training.checkpoints import (
  check_facts,
  decay_start,
  facts_of,
  fresh_state,
  initial_state,
  open_checkpoints,
  restore_state,
  split,
)
from mixln_jax.training.diagnosis import Diagnosis
from mixln_jax.training.dump import write_dump
from mixln_jax.training.progress import Clock, NonFiniteError, Progress, Reporter
from mixln_jax.training.resume import ResumePoint, resume_point
from mixln_jax.training.setup import (
  Evaluator,
  Setup,
  attention_of,
  check_batches,
  lower_train_step,
  make_loader,
  program_hash,
  set_up,
)
from mixln_jax.training.start import find_start, starting_params
from mixln_jax.training.stopping import stop_on_signals

FINISHED, STOPPED, NON_FINITE, DIVERGED, FAILED = "finished", "stopped", "non_finite", "diverged", "failed"
DIVERGENCE_MARGIN = 0.1  # nats: a run that collapsed sits at the unigram entropy of its data and stays there


class Outcome(NamedTuple):
  """How a run ended; `outcome.json`."""

  status: str  # finished, stopped (by a signal; run it again to go on), non_finite, diverged, or failed
  step: int
  last_checkpoint: int | None
  validation: dict[str, Any] | None  # the last evaluation's line of metrics.jsonl
  best_validation: dict[str, Any] | None  # the one of lowest loss
  diverged: bool  # the last evaluation after the warm-up was at the unigram entropy
  skipped_updates: int  # of the whole run, since their loss or gradient was not finite
  seconds: dict[str, float]  # of this process: total, compile, input, evaluation, checkpoint, steps, and the goodput
  message: str


class End(NamedTuple):
  """How the loop ended."""

  status: str
  step: int
  message: str
  skipped: int = 0


def train(config: Config, workdir: str | Path) -> Outcome:
  """Trains config in workdir, from its newest whole checkpoint where it has one.

  Exactly `config.train.num_steps` updates are done, over however many processes and restarts.

  Raises:
    InputError: config, data, devices and the work directory contradict one another; nothing was changed.
  """
  clock = Clock()
  setup = set_up(config)
  check_batches(config, setup.mesh)
  folder = RunFolder(workdir)
  old_config = read_config(folder) if folder.has_run else config
  agree("the start of the run", start_facts(setup))
  if not folder.has_run:
    if config.train.start_from:
      find_start(setup)  # for its checks: nothing is written where they fail
    folder.create(config_lib.to_json(config))
  wait_for_all("the run's folder")
  folder.check_shared()
  with contextlib.ExitStack() as stack:
    stack.enter_context(folder.lock())
    wait_for_all("the lock of the run")  # orbax waits for all where it opens the checkpoints, and hears of no failure
    checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(config, folder)))
    if not checkpoints.all_steps() and not read_lines(folder / folder_lib.METRICS):
      old_config = config  # nothing was trained: a first start that failed pins nothing
    shardings = step_lib.state_shardings(config, setup.mesh)
    point, state = _go_on(setup, shardings, old_config, folder, checkpoints)
    if point.step == config.train.num_steps:
      done = f"all {point.step} steps were done already"
      return write_outcome(setup, folder, End(FINISHED, point.step, done, int(state.skipped)), checkpoints, clock)
    try:
      end = _train(setup, shardings, folder, checkpoints, point, state, clock)
    except Exception as error:
      reason = " ".join(str(error).split())[:300]
      message = f"{type(error).__name__}: {reason}; run the same command to go on from the last checkpoint"
      with contextlib.suppress(OSError):  # of a disk that is full
        write_outcome(setup, folder, End(FAILED, point.step, message), checkpoints, clock)
      raise
    return write_outcome(setup, folder, end, checkpoints, clock)


def start_facts(setup: Setup) -> dict[str, Any]:
  """What all processes of a run must have in common before anything is trained."""
  fields = {f"config.{name}": value for name, value in config_lib.flatten(setup.config).items()}
  fingerprint = setup.corpus.manifest.fingerprint
  return fields | {"the data's fingerprint": fingerprint, "the code": folder_lib.code_hash(), "jax": jax.__version__}


def _go_on(
  setup: Setup, shardings: step_lib.TrainState, old_config: Config, folder: RunFolder, checkpoints: Checkpoints
) -> tuple[ResumePoint, Any]:
  """Where the run goes on from, and the state there; None where it has no checkpoint yet.

  A damaged checkpoint is put aside, and the one before is taken.
  """
  damaged: dict[int, DamagedError] = {}
  while True:
    steps = [step for step in checkpoints.all_steps() if step not in damaged]
    if damaged and not steps:
      reasons = "; ".join(map(str, damaged.values()))
      raise InputError(f"no checkpoint of the run is whole: {reasons}; nothing was moved, use another --workdir")
    point = resume_point(old_config, setup.config, steps, folder.address)
    agree("the checkpoint to go on from", {"step": point.step, "checkpoints": steps})
    state = None
    try:
      if point.step in steps:
        check_facts(checkpoints.facts(point.step), setup, folder)
        state = restore_state(setup.config, shardings, checkpoints, point.step)
    except DamagedError as error:
      damaged[point.step] = error
      continue
    for step, error in damaged.items():
      aside = put_aside(folder, checkpoints, [step], f"damaged_{step}")
      if is_first():
        print(f"warning: {error}; it lies in {aside} now, and the run goes on from the one before", file=sys.stderr)
    return point, state


def put_aside(folder: RunFolder, checkpoints: Checkpoints, steps: list[int], name: str) -> Path:
  """Moves checkpoints, and a copy of the metrics, into a folder of the run; returns it."""
  aside = folder.unused(name)
  wait_for_all(f"{name} is chosen")
  if is_first():
    aside.mkdir()
    for file_name in (folder_lib.METRICS, folder_lib.DIAGNOSTICS):  # first: once the checkpoints are gone, nobody asks
      if (folder / file_name).exists():
        shutil.copy(folder / file_name, aside)
    folder.copy_out()
    checkpoints.move(steps, folder.place(aside.name))
  wait_for_all(f"{name} is made")
  checkpoints.reload()
  return aside


def _train(
  setup: Setup,
  shardings: step_lib.TrainState,
  folder: RunFolder,
  checkpoints: Checkpoints,
  point: ResumePoint,
  state: Any,
  clock: Clock,
) -> End:
  """The loop itself; `state` is the restored one, or None."""
  config, num_steps = setup.config, setup.config.train.num_steps
  if later := [step for step in checkpoints.all_steps() if step > point.step]:
    put_aside(folder, checkpoints, later, f"superseded_at_{point.step}")
  if is_first():
    (folder / folder_lib.OUTCOME).unlink(missing_ok=True)  # of an earlier, shorter run
    _announce(setup, folder, point)
  if state is None:
    state = first_state(setup, shardings, folder)
  write_facts(setup, folder, state.params, point)
  facts = facts_of(config, setup.corpus.manifest.fingerprint)
  evaluator = Evaluator(setup)
  step, end = point.step, None
  with contextlib.ExitStack() as stack:
    metrics = stack.enter_context(contextlib.closing(open_metrics(setup, folder, point.step)))
    progress = stack.enter_context(contextlib.closing(_progress(setup, point.step)))
    profiler = stack.enter_context(contextlib.closing(_Profiler(config, folder / folder_lib.PROFILE)))
    compile_started = time.monotonic()
    with clock("compile"):
      lowered = lower_train_step(config, setup.mesh, shardings)
      train_step, program = lowered.compile(), program_hash(lowered)
      diagnosis = stack.enter_context(contextlib.closing(Diagnosis(setup, shardings, folder, point.step)))
    progress.say(f"program    training step, hash {program}, compiled in {time.monotonic() - compile_started:.1f} s")
    folder.write_json(folder_lib.ENVIRONMENT, folder_lib.environment() | {"train_step": program})
    batches = stack.enter_context(contextlib.closing(make_loader(setup, config.train.batch_size).train(point.step)))
    stop = stack.enter_context(stop_on_signals())
    reporter = Reporter(metrics, progress, diagnosis, config.train.max_skipped_in_a_row)
    divergence = Divergence(setup, folder, point.step)
    stopped_by: str | None = None
    try:
      while step < num_steps and stopped_by is None and end is None:
        profiler.before(step + 1)
        with clock("input"):
          batch = global_batch(next(batches), setup.mesh)
        # Guarded: an array that slips over to the host here would stall every step.
        with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
          state, values = diagnosis.program(step + 1, train_step)(state, batch)
        step += 1
        reporter.dispatched(step, values)
        checkpoints.check()
        profiler.after(step, state)
        stopped_by = "SIGTERM" if all_stop_at(step) else stop.requested_by  # read once: a signal may come at any time
        evaluate_now = step == num_steps or due(step, config.evaluate.every_steps)
        save_now = (
          step in (num_steps, *decay_start(config))
          or due(step, config.checkpoint.every_steps)
          or stopped_by is not None
        )
        if not (evaluate_now or save_now):
          continue
        reporter.flush()
        loss = None
        if evaluate_now:
          with clock("evaluation"):
            validation = evaluator(state.params)
            loss = validation.loss
            entropy = divergence.seen(step, loss)
          line = validation.metrics(official_compat=config.evaluate.official_compat)
          metrics.write(step, "validation", line | {"unigram_entropy": entropy})
          progress.say(
            f"validation step {step}  {validation.describe(official_compat=config.evaluate.official_compat)}"
          )
          if not math.isfinite(loss):
            raise NonFiniteError(step, f"validation loss {loss}")
          if divergence.in_a_row >= 2 and config.train.stop_when_diverged:
            end = End(DIVERGED, step, f"the validation loss stays at the unigram entropy {entropy:.4f} of its data")
        if save_now or end is not None:
          with clock("checkpoint"):
            metrics.flush()
            folder.copy_out()  # first: a checkpoint never lacks the metrics before it
            checkpoints.save(step, split(state), facts, loss)
        reporter.restart_clock()
      if end is None and step == num_steps:
        end = End(FINISHED, step, f"all {num_steps} steps are done")
      elif end is None:
        end = End(STOPPED, step, f"by {stopped_by} after step {step}; run the same command to go on")
    except NonFiniteError as error:
      message = (
        f"{error}: not finite, so the run ended. Lower config.optimizer.learning_rate, or set "
        "config.optimizer.clip_norm, in another --workdir"
      )
      if int(state.skipped_in_a_row):  # the parameters are those from before: they are kept, and the step can be redone
        dispatched, step = step, error.step
        state = without_last(state, dispatched - step, shardings)
        folder.copy_out()
        checkpoints.save(step, split(state), facts)
        message += f"; its batch and gradient norms are in {write_dump(folder, setup, state, step)}"
      end = End(NON_FINITE, error.step, message)
    with clock("checkpoint"):
      checkpoints.wait()
  return end._replace(skipped=int(state.skipped))


def without_last(state: step_lib.TrainState, later: int, shardings: step_lib.TrainState) -> step_lib.TrainState:
  """The state as it was `later` steps ago, all of which were skipped, with the next one to be tried again."""

  def change(state: step_lib.TrainState) -> step_lib.TrainState:
    return state.replace(step=state.step - later, skipped=state.skipped - later, skipped_in_a_row=0 * state.skipped)

  return jax.jit(change, out_shardings=shardings, donate_argnums=0)(state)


class Divergence:
  """Whether a run sits at the unigram entropy of its data: that of a model that ignores its input.

  A run that collapsed does not blow up: the official code's logs show it at that plateau to the end.
  """

  def __init__(self, setup: Setup, folder: RunFolder, step: int):
    """`step`: updates done; process 0 cuts what the file has of later ones, at a time of its own."""
    self._setup = setup
    self._warmup = config_lib.warmup_steps(setup.config)
    self._entropy: float | None = None
    self.in_a_row = 0  # evaluations at the plateau, after the warm-up
    for line in read_lines(folder / folder_lib.METRICS):
      if line["split"] == "validation" and "unigram_entropy" in line and line["step"] <= step:
        self._count(line["step"], float(line["loss"]), float(line["unigram_entropy"]))

  def seen(self, step: int, loss: float) -> float:
    """Takes note of an evaluation; returns the entropy, in nats, of the labels that it is over."""
    if self._entropy is None:
      rows = make_loader(self._setup, self._setup.config.evaluate.batch_size, all_rows=True)
      self._entropy = unigram_entropy(rows.validation(self._setup.config.evaluate.max_tokens))
    self._count(step, loss, self._entropy)
    return self._entropy

  def _count(self, step: int, loss: float, entropy: float) -> None:
    at_plateau = step > self._warmup and loss > entropy - DIVERGENCE_MARGIN
    self.in_a_row = self.in_a_row + 1 if at_plateau else 0


def due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def first_state(setup: Setup, shardings: step_lib.TrainState, folder: RunFolder) -> step_lib.TrainState:
  """The state before the first update, of drawn weights or of another run's; says which, and writes it."""
  if setup.config.train.start_from:
    start = find_start(setup)
    state = fresh_state(setup.config, starting_params(setup, start), shardings)
    folder.write_json(folder_lib.START, start.identity())
    if is_first():
      print(f"start      {start.describe()}")
  else:
    state = initial_state(setup, shardings)
  report_initial_weights(folder, state.params)
  return state


def report_initial_weights(folder: RunFolder, params: Any) -> None:
  """Prints one hash of the initial weights and writes it with the sum behind it of each tensor: runs that start from
  the same numbers show the same, on any mesh (Admin's scales are means, which a mesh may round another way)."""
  sums = {name: int(value) for name, value in jax.device_get(jax.jit(bit_sums)(params)).items()}
  if is_first():
    print(f"weights    initial, hash {hash_of_sums(sums)}")
  folder.write_json(folder_lib.INITIAL_WEIGHTS, {"hash": hash_of_sums(sums), "bit_sums": sums})


def write_facts(setup: Setup, folder: RunFolder, params: Any, point: ResumePoint) -> None:
  if point.changes and is_first():
    now = datetime.datetime.now().astimezone().isoformat()
    with (folder / folder_lib.CHANGES).open("a") as file:
      file.write(json.dumps({"step": point.step, "time": now, "changes": point.changes}) + "\n")
  folder.write(folder_lib.CONFIG, config_lib.to_json(setup.config))
  folder.write(folder_lib.PLACEMENT, setup.table.layer_list + "\n")
  folder.write(folder_lib.PARAMETERS, folder_lib.parameter_table(params, count_params(setup.config.model)))
  manifest = setup.corpus.manifest
  data = {"fingerprint": manifest.fingerprint, "folder": str(setup.corpus.folder)}
  folder.write_json(folder_lib.DATA, data | {"tokenizer_sha256": manifest.tokenizer_sha256})
  folder.write_json(folder_lib.ENVIRONMENT, folder_lib.environment())


def open_metrics(setup: Setup, folder: RunFolder, start_step: int) -> Metrics:
  metrics = Metrics(folder / folder_lib.METRICS, start_step)
  logging = setup.config.logging
  if logging.tensorboard:
    metrics.add_mirror(TensorBoardMirror, folder / folder_lib.TENSORBOARD, start_step + 1)
  if logging.wandb_project:
    metrics.add_mirror(WandbMirror, logging.wandb_project, folder.path, folder.name, config_lib.flatten(setup.config))
  return metrics


def _progress(setup: Setup, start_step: int) -> Progress:
  config, devices = setup.config, setup.mesh.devices.flat
  peak = peak_flops(devices[0])
  length = config.data.sequence_length
  flops_per_step = train_flops_per_token(config.model, length) * config.train.batch_size * length
  return Progress(start_step, config.train.num_steps, flops_per_step, peak and peak * len(devices))


def _announce(setup: Setup, folder: RunFolder, point: ResumePoint) -> None:
  model, manifest = setup.config.model, setup.corpus.manifest
  devices = setup.mesh.devices.flat
  mesh = describe_mesh(setup.mesh.shape)
  print(f"placement  {setup.table.layer_list}")
  print(f"model      {count_params(model) / 1e6:.2f} M parameters, {model.num_layers} layers × {model.embed_dim}")
  train = manifest.splits["train"]
  size = f"{train.counted:,} training tokens" if train.counted else f"{train.documents:,} documents on the fly"
  print(f"data       {setup.corpus.folder}, {size}, fingerprint {manifest.fingerprint[:12]}")
  print(f"devices    {len(devices)} × {devices[0].device_kind}, mesh: {mesh}")
  print(f"attention  {attention_of(setup.config, setup.mesh)}")
  print(f"run        {folder.address}" + (f", goes on from step {point.step}" if point.step else ""))
  for change in point.changes:
    print(f"changed    {change}")


def write_outcome(setup: Setup, folder: RunFolder, end: End, checkpoints: Checkpoints, clock: Clock) -> Outcome:
  validations = [line for line in read_lines(folder / folder_lib.METRICS) if line["split"] == "validation"]
  outcome = Outcome(
    status=end.status,
    step=end.step,
    last_checkpoint=checkpoints.latest_step(),
    validation=validations[-1] if validations else None,
    best_validation=min(validations, key=_loss_of, default=None),
    diverged=Divergence(setup, folder, end.step).in_a_row > 0,
    skipped_updates=end.skipped,
    seconds={name: round(value, 3) for name, value in clock.seconds().items()},
    message=end.message,
  )
  folder.write_json(folder_lib.OUTCOME, outcome._asdict())
  return outcome


def read_outcome(folder: RunFolder, statuses: Sequence[str]) -> Outcome | None:
  """The outcome of a run that ended with one of the statuses; None where there is no such."""
  path = folder / folder_lib.OUTCOME
  outcome = Outcome(**json.loads(path.read_text())) if path.exists() else None
  return outcome if outcome is not None and outcome.status in statuses else None


def _loss_of(line: dict[str, Any]) -> float:
  loss = float(line["loss"])
  return loss if math.isfinite(loss) else math.inf


class _Profiler:
  """A JAX profile of config.profile.num_steps steps from config.profile.start_step on."""

  def __init__(self, config: Config, folder: Path):
    self._first, self._count, self._folder = config.profile.start_step, config.profile.num_steps, folder
    self._running = False

  def before(self, step: int) -> None:
    if self._count and step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, state: Any) -> None:
    if self._running and step == self._first + self._count - 1:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False

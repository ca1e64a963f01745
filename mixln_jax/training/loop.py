"""The loop.

Order of operations of one update: batch of the step -> dispatch the step -> read and report the metrics of the step
before. After steps that are due: report the step itself, evaluate, save a checkpoint (in that order, so that what was
seen not to be finite is never saved, and a checkpoint never lacks the evaluation of its step).
"""

import contextlib
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.model.flops import train_flops_per_token
from mixln_jax.model.initial import bit_sums, count_params, hash_of_sums
from mixln_jax.parallel.devices import peak_flops
from mixln_jax.parallel.mesh import global_batch
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import Metrics, TensorBoardMirror, WandbMirror, read_lines
from mixln_jax.runs.opening import read_config
from mixln_jax.training import step as step_lib
from mixln_jax.training.checkpoints import (
  check_facts,
  decay_start,
  facts_of,
  initial_state,
  open_checkpoints,
  restore_state,
  split,
)
from mixln_jax.training.progress import NonFiniteError, Progress, Reporter
from mixln_jax.training.resume import ResumePoint, resume_point
from mixln_jax.training.setup import Evaluator, Setup, check_batch, compile_train_step, make_loader, set_up
from mixln_jax.training.stopping import stop_on_signals

FINISHED, STOPPED, NON_FINITE = "finished", "stopped", "non_finite"


class Outcome(NamedTuple):
  """How a run ended."""

  status: str  # finished, stopped (by a signal; run it again to go on) or non_finite
  step: int
  last_checkpoint: int | None
  validation: dict[str, Any] | None  # the last evaluation's line of metrics.jsonl
  seconds: float  # of this process
  message: str


def train(config: Config, workdir: str | Path) -> Outcome:
  """Trains config in workdir, from its newest checkpoint where it has one.

  Exactly `config.train.num_steps` updates are done, over however many processes and restarts.

  Raises:
    InputError: config, data, devices and the work directory contradict one another; nothing was changed.
  """
  started = time.monotonic()
  setup = set_up(config)
  micro_batch = config.train.batch_size // config.train.micro_batches
  check_batch(setup, "config.train.batch_size / micro_batches", micro_batch)
  check_batch(setup, "config.evaluate.batch_size", config.evaluate.batch_size)
  folder = RunFolder(workdir)
  old_config = read_config(folder) if folder.has_run else config
  if not folder.has_run:
    folder.create(config_lib.to_json(config))
  with folder.lock(), contextlib.closing(open_checkpoints(config, folder)) as checkpoints:
    if not checkpoints.all_steps() and not read_lines(folder / folder_lib.METRICS):
      old_config = config  # nothing was trained: a first start that failed pins nothing
    point = resume_point(old_config, config, checkpoints.all_steps(), str(folder.path))
    if point.step in checkpoints.all_steps():
      check_facts(checkpoints.facts(point.step), setup, folder)
    if point.step == config.train.num_steps:
      status, step, message = FINISHED, point.step, f"all {point.step} steps were done already"
    else:
      status, step, message = _train(setup, folder, checkpoints, point)
    return _write_outcome(folder, status, step, checkpoints.latest_step(), time.monotonic() - started, message)


def _train(setup: Setup, folder: RunFolder, checkpoints: Checkpoints, point: ResumePoint) -> tuple[str, int, str]:
  """The loop itself. Returns how it ended, the last step, and a message."""
  config, num_steps = setup.config, setup.config.train.num_steps
  (folder / folder_lib.OUTCOME).unlink(missing_ok=True)  # of an earlier, shorter run
  if any(later > point.step for later in checkpoints.all_steps()):
    superseded = folder.unused(f"superseded_at_{point.step}")
    superseded.mkdir()
    shutil.copy(folder / folder_lib.METRICS, superseded)  # first: once the checkpoints are gone, nobody asks for it
    checkpoints.move_after(point.step, superseded)
  shardings = step_lib.state_shardings(config, setup.mesh)
  _announce(setup, folder, point)
  if point.step in checkpoints.all_steps():
    state = restore_state(config, shardings, checkpoints, point.step)
  else:
    state = initial_state(setup, shardings)
    _report_initial_weights(folder, state.params)
  _write_facts(setup, folder, state.params)
  facts = facts_of(config, setup.corpus.manifest.fingerprint)
  evaluator = Evaluator(setup)
  step, status, message = point.step, FINISHED, f"all {num_steps} steps are done"
  with contextlib.ExitStack() as stack:
    metrics = stack.enter_context(contextlib.closing(_open_metrics(setup, folder, point.step)))
    progress = stack.enter_context(contextlib.closing(_progress(setup, point.step)))
    profiler = stack.enter_context(contextlib.closing(_Profiler(config, folder / folder_lib.PROFILE)))
    compile_started = time.monotonic()
    train_step = compile_train_step(setup, shardings)
    progress.say(f"compiled   the step in {time.monotonic() - compile_started:.1f} s")
    batches = stack.enter_context(contextlib.closing(make_loader(setup, config.train.batch_size).train(point.step)))
    stop = stack.enter_context(stop_on_signals())
    reporter = Reporter(metrics, progress)
    stopped_by: str | None = None
    try:
      while step < num_steps and stopped_by is None:
        profiler.before(step + 1)
        batch = global_batch(next(batches), setup.mesh)
        # Guarded: an array that slips over to the host here would stall every step.
        with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
          state, values = train_step(state, batch)
        step += 1
        reporter.dispatched(step, values)
        profiler.after(step, state)
        stopped_by = stop.requested_by  # read once: a signal may come at any time
        evaluate_now = step == num_steps or _due(step, config.evaluate.every_steps)
        save_now = (
          step in (num_steps, *decay_start(config))
          or _due(step, config.checkpoint.every_steps)
          or stopped_by is not None
        )
        if not (evaluate_now or save_now):
          continue
        reporter.flush()
        loss = None
        if evaluate_now:
          validation = evaluator(state.params)
          loss = validation.loss
          metrics.write(step, "validation", validation.metrics(official_compat=config.evaluate.official_compat))
          progress.say(
            f"validation step {step}  {validation.describe(official_compat=config.evaluate.official_compat)}"
          )
          if not math.isfinite(loss):
            raise NonFiniteError(step, f"validation loss {loss}")
        if save_now:
          checkpoints.save(step, split(state), facts, loss)
        reporter.restart_clock()
      if step < num_steps:
        status, message = STOPPED, f"by {stopped_by} after step {step}; run the same command to go on"
    except NonFiniteError as error:
      status, step = NON_FINITE, error.step
      message = (
        f"{error}: not finite, so the run ended. Lower config.optimizer.learning_rate, or set "
        "config.optimizer.clip_norm, in another --workdir"
      )
    checkpoints.wait()
  return status, step, message


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _report_initial_weights(folder: RunFolder, params: Any) -> None:
  """Prints one hash of the initial weights and writes it with the sum behind it of each tensor: runs that start from
  the same numbers show the same, on any mesh (Admin's scales are means, which a mesh may round another way)."""
  sums = {name: int(value) for name, value in jax.device_get(jax.jit(bit_sums)(params)).items()}
  print(f"weights    initial, hash {hash_of_sums(sums)}")
  folder.write_json(folder_lib.INITIAL_WEIGHTS, {"hash": hash_of_sums(sums), "bit_sums": sums})


def _write_facts(setup: Setup, folder: RunFolder, params: Any) -> None:
  folder.write(folder_lib.CONFIG, config_lib.to_json(setup.config))
  folder.write(folder_lib.PLACEMENT, setup.table.strip + "\n")
  folder.write(folder_lib.PARAMETERS, folder_lib.parameter_table(params, count_params(setup.config.model)))
  folder.write_json(folder_lib.ENVIRONMENT, folder_lib.environment())


def _open_metrics(setup: Setup, folder: RunFolder, start_step: int) -> Metrics:
  metrics = Metrics(folder / folder_lib.METRICS, start_step)
  logging = setup.config.logging
  if logging.tensorboard:
    metrics.add_mirror(TensorBoardMirror, folder / folder_lib.TENSORBOARD, start_step + 1)
  if logging.wandb_project:
    metrics.add_mirror(WandbMirror, logging.wandb_project, folder.path, config_lib.flatten(setup.config))
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
  mesh = " × ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1) or "one device"
  print(f"placement  {setup.table.strip}")
  print(f"model      {count_params(model) / 1e6:.2f} M parameters, {model.num_layers} layers × {model.embed_dim}")
  train = manifest.splits["train"]
  size = f"{train.counted:,} training tokens" if train.counted else f"{train.documents:,} documents on the fly"
  print(f"data       {setup.corpus.folder}, {size}, fingerprint {manifest.fingerprint[:12]}")
  print(f"devices    {len(devices)} × {devices[0].device_kind}, mesh: {mesh}")
  print(f"run        {folder.path}" + (f", goes on from step {point.step}" if point.step else ""))
  for change in point.changes:
    print(f"changed    {change}")


def _write_outcome(
  folder: RunFolder, status: str, step: int, last_checkpoint: int | None, seconds: float, message: str
) -> Outcome:
  validations = [line for line in read_lines(folder / folder_lib.METRICS) if line["split"] == "validation"]
  outcome = Outcome(status, step, last_checkpoint, validations[-1] if validations else None, seconds, message)
  folder.write_json(folder_lib.OUTCOME, outcome._asdict())
  return outcome


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

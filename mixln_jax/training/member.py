"""One of the runs that a loop trains: its folder, what it writes there, and how it ends."""

import contextlib
import datetime
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.data.tokenizer_files import write_tokenizer
from mixln_jax.diagnostics.picture import layer_picture
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import count_params
from mixln_jax.opening import Setup
from mixln_jax.parallel.bits import bit_sums, hash_of_sums
from mixln_jax.parallel.processes import is_first
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.facts import environment, environment_changes, parameter_table, read_config, read_environment
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import Metrics, TensorBoardMirror, WandbMirror, read_metrics
from mixln_jax.runs.outcome import Outcome, best_of, write_outcome
from mixln_jax.text import printable
from mixln_jax.training.checkpoints import facts_of, open_checkpoints, restore_state, split
from mixln_jax.training.diagnosis import Diagnosis
from mixln_jax.training.divergence import Divergence, validation_entropy
from mixln_jax.training.evaluation import Evaluation, PairEvaluation
from mixln_jax.training.progress import Clock
from mixln_jax.training.resume import ResumePoint
from mixln_jax.training.step import TrainState


class Member:
  """One run of a loop.

  Attributes:
    index: its number among the runs of the loop.
    name: what people call it.
    setup: its config, with the mesh and the data that all members share.
    folder: the run's.
    checkpoints: the run's.
    old_config: what the run was last trained with; `setup.config` for a new one.
    outcome: how it ended; None while it trains.
  """

  def __init__(
    self,
    index: int,
    setup: Setup,
    folder: RunFolder,
    checkpoints: Checkpoints,
    old_config: Config,
    shardings: TrainState,
  ):
    self.index, self.name, self.setup = index, folder.name, setup
    self.folder, self.checkpoints, self.old_config = folder, checkpoints, old_config
    self.outcome: Outcome | None = None
    self._entropy: float | None = None  # of the validation labels
    self.shardings = shardings  # of its own state
    self._facts = facts_of(setup.config, setup.corpus.manifest.fingerprint)

  @classmethod
  @contextlib.contextmanager
  def opened(
    cls, index: int, setup: Setup, folder: RunFolder, old_config: Config, shardings: TrainState
  ) -> Iterator["Member"]:
    """A member of a run whose folder is made and locked; its checkpoints are closed with the context."""
    with contextlib.closing(open_checkpoints(setup.config, folder)) as checkpoints:
      if not checkpoints.all_steps() and not read_metrics(folder / folder_lib.METRICS):
        old_config = setup.config  # nothing was trained: a first start that failed pins nothing
      yield cls(index, setup, folder, checkpoints, old_config, shardings)

  @property
  def config(self) -> Config:
    return self.setup.config

  @property
  def live(self) -> bool:
    return self.outcome is None

  def restore(self, step: int) -> TrainState:
    """Its own state at a checkpoint, created sharded; raises DamagedError where it is not what was written."""
    return restore_state(self.config, self.shardings, self.checkpoints, step)

  def start(self, point: ResumePoint, params: Any, diagnosis_every: int) -> None:
    """Opens its files for the updates after `point.step`, and writes what the run says of itself.

    Args:
      point: where it starts, and what was changed since.
      params: its own parameters there.
      diagnosis_every: steps between diagnoses; 0 = none.
    """
    self._resumed_unchanged = point.step > 0 and not point.changes  # a config that changed makes another program
    if is_first():
      (self.folder / folder_lib.OUTCOME).unlink(missing_ok=True)  # of an earlier, shorter run
    if point.step == 0:
      report_initial_weights(self.folder, params)
    self._write_facts(point, params)
    # Process 0 cuts what the file has of later steps, at a time of its own.
    self.divergence = Divergence(self.config, read_metrics(self.folder / folder_lib.METRICS), point.step)
    self._metrics = self._open_metrics(point.step)
    self._diagnosis = Diagnosis(self.config, self.folder, point.step, every=diagnosis_every)

  def close(self) -> None:
    self._metrics.close()
    self._diagnosis.close()

  def _write_facts(self, point: ResumePoint, params: Any) -> None:
    folder, manifest = self.folder, self.setup.corpus.manifest
    if point.changes and is_first():
      now = datetime.datetime.now().astimezone().isoformat()
      with (folder / folder_lib.CHANGES).open("a") as file:
        file.write(json.dumps({"step": point.step, "time": now, "changes": point.changes}) + "\n")
    folder.write(folder_lib.CONFIG, config_lib.to_json(self.config))
    folder.write(folder_lib.PLACEMENT, self.setup.table.layer_list + "\n")
    folder.write(folder_lib.PARAMETERS, parameter_table(params, count_params(self.config.model)))
    data = {"fingerprint": manifest.fingerprint, "folder": str(self.setup.corpus.folder)}
    folder.write_json(folder_lib.DATA, data | {"tokenizer_sha256": manifest.tokenizer_sha256})
    if is_first():
      try:
        (folder / folder_lib.TOKENIZER).mkdir(exist_ok=True)
        write_tokenizer(self.setup.corpus.tokenizer, folder / folder_lib.TOKENIZER)
      except OSError as error:
        raise InputError(f"{folder.address}: the tokenizer can't be written ({error.strerror})") from error

  def write_environment(self, program: str) -> None:
    """Writes environment.json, and warns where a resumed run computes in another way than it did.

    Args:
      program: the hash of the training step that it runs.
    """
    now = environment() | {"train_step": program}
    changes = environment_changes(read_environment(self.folder), now) if self._resumed_unchanged else []
    if changes:
      warn(
        f"{self.name} resumes with another program or machine, so its numbers may not be the bits of an uninterrupted "
        f"run: {'; '.join(changes)}"
      )
    self.folder.write_json(folder_lib.ENVIRONMENT, now)

  def _open_metrics(self, start_step: int) -> Metrics:
    metrics = Metrics(self.folder / folder_lib.METRICS, start_step)
    logging = self.config.logging
    if logging.tensorboard:
      metrics.add_mirror(TensorBoardMirror, self.folder / folder_lib.TENSORBOARD, start_step + 1)
    if logging.wandb_project:
      flat = config_lib.flatten(self.config)
      metrics.add_mirror(WandbMirror, logging.wandb_project, self.folder.path, self.name, flat)
    return metrics

  def trained(self, step: int, values: Mapping[str, float], statistics: Mapping[str, Any] | None) -> None:
    """Writes the metrics of an update, and its statistics by layer where it was a diagnostic one."""
    self._metrics.write(step, "train", values)
    self.divergence.trained(values["loss"])
    self._diagnosis.seen(step, values["loss"], statistics)
    if statistics is not None:
      self._metrics.picture(step, "layers", lambda: layer_picture(statistics, f"{self.name}, step {step}"))

  def evaluated(self, step: int, evaluation: Evaluation | PairEvaluation) -> float | None:
    """Writes an evaluation; returns the unigram entropy, in nats, of the labels that it is over, None of pairs."""
    line = evaluation.metrics(official_compat=self.config.evaluate.official_compat)
    if isinstance(evaluation, PairEvaluation):  # no mark tells whether such a run has diverged
      self._metrics.write(step, "validation", line)
      return None
    if self._entropy is None:
      self._entropy = validation_entropy(self.setup)
    entropy = self._entropy
    self.divergence.evaluated(step, evaluation.loss, entropy)
    self._metrics.write(step, "validation", line | {"unigram_entropy": entropy})
    return entropy

  def save(self, step: int, own: TrainState, loss: float | None = None) -> None:
    """Starts to save a checkpoint of its own state; `loss`: the validation loss at that step."""
    self._metrics.flush()
    self.folder.copy_out()  # first: a checkpoint never lacks the metrics before it
    self.checkpoints.save(step, split(own), self._facts, loss)

  def end(self, status: str, step: int, message: str, clock: Clock, skipped: int = 0) -> Outcome:
    """Writes how the run ended."""
    lines = read_metrics(self.folder / folder_lib.METRICS)
    validations = [line for line in lines if line["split"] == "validation"]
    self.outcome = Outcome(
      status=status,
      step=step,
      last_checkpoint=self.checkpoints.latest_step(),
      validation=validations[-1] if validations else None,
      best_validation=best_of(validations),
      diverged=Divergence(self.config, lines, step).diverged,
      skipped_updates=skipped,
      seconds={name: round(value, 3) for name, value in clock.seconds().items()},
      message=message,
    )
    write_outcome(self.folder, self.outcome)
    return self.outcome


def report_initial_weights(folder: RunFolder, params: Any) -> None:
  """Prints one hash of the initial weights, and writes it with the sum of bits behind it of each tensor.

  Runs that start from the same numbers show the same, on any mesh. (Admin's scales are means, which a mesh may round in
  another way.)
  """
  sums = {name: int(value) for name, value in jax.device_get(jax.jit(bit_sums)(params)).items()}
  if is_first():
    print(f"weights    initial, hash {hash_of_sums(sums)}")
  folder.write_json(folder_lib.INITIAL_WEIGHTS, {"hash": hash_of_sums(sums), "bit_sums": sums})


def old_config_of(folder: RunFolder, config: Config) -> Config:
  """What a run was last trained with; `config` where there is no run yet."""
  return read_config(folder) if folder.has_run else config


def warn(text: str) -> None:
  """A warning on the first process's stderr."""
  if is_first():
    print(printable(f"warning: {text}"), file=sys.stderr)

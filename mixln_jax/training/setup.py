"""What a config stands for on this machine: its mesh, its data, its compiled step."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.data.loader import Data, Loader, example
from mixln_jax.data.opening import open_data
from mixln_jax.data.records import Record
from mixln_jax.errors import InputError
from mixln_jax.model.attention_kernels import choose_attention
from mixln_jax.model.parameters import abstract_sharded_params
from mixln_jax.parallel.mesh import attach, make_mesh, rows_share
from mixln_jax.parallel.processes import check_devices
from mixln_jax.parallel.rules import batch_sharding, check_divides, logical_rules, replicated
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.opening import OpenedRun, open_params
from mixln_jax.training import step as step_lib
from mixln_jax.training.evaluation import Evaluation, evaluate


class Setup(NamedTuple):
  """A config and what it stands for."""

  config: Config
  mesh: Mesh
  corpus: Data
  table: placement.Table


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
  """The contexts in which the model's logical axes mean something."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
    yield


def set_up(config: Config) -> Setup:
  """Opens the data and the mesh of a config.

  Raises:
    InputError: config, data and devices contradict one another.
  """
  config_lib.validate(config)
  check_devices(config.parallel)
  mesh = make_mesh(config.mesh)
  abstract_sharded_params(config.model, mesh)  # for its checks
  attention_of(config, mesh)
  return Setup(config, mesh, open_data(config), placement.parse(config.model.placement, config.model.num_layers))


def check_batch(setup: Setup, name: str, size: int) -> None:
  """Refuses a batch of `size` rows that the mesh can't cut; raises InputError naming it."""
  check_divides(name, (size, setup.config.data.sequence_length), batch_sharding(setup.mesh))


def attention_of(config: Config, mesh: Mesh) -> str:
  """The implementation of attention that a run trains with; raises InputError where it can't be the one asked for."""
  with on_mesh(mesh):
    return choose_attention(config.model, config.data.sequence_length, segments=config.data.document_mask)


def check_batches(config: Config, mesh: Mesh) -> None:
  """Refuses a config whose micro-batches, or batches of the evaluation, the mesh can't cut; raises InputError."""
  sizes = {
    "config.train.batch_size / micro_batches": config.train.batch_size // config.train.micro_batches,
    "config.evaluate.batch_size": config.evaluate.batch_size,
  }
  for name, size in sizes.items():
    check_divides(name, (size, config.data.sequence_length), batch_sharding(mesh))


def make_loader(setup: Setup, batch_size: int, *, all_rows: bool = False) -> Loader:
  """The loader of a setup: this process's rows of each batch, or `all_rows`."""
  data = setup.config.data
  part, parts = (0, 1) if all_rows else rows_share(setup.mesh)
  return Loader(
    setup.corpus,
    sequence_length=data.sequence_length,
    batch_size=batch_size,
    document_mask=data.document_mask,
    seed=data.seed,
    process_index=part,
    process_count=parts,
    num_threads=data.num_threads,
    num_workers=data.num_workers,
  )


def spread_over_all_devices(config: Config) -> Config:
  """The config of a run for the devices of this machine, whatever mesh trained it.

  Parameters are sharded over all devices where those divide them, else replicated.
  """
  here = config.copy_and_resolve_references()
  here.mesh.update(dict.fromkeys(here.mesh, 1) | {"fsdp": -1})
  here.parallel.update(expect_platform="", expect_devices=0)
  try:
    abstract_sharded_params(here.model, make_mesh(here.mesh))
  except InputError:
    here.mesh.update(data=-1, fsdp=1)
  return here


def open_run(folder: RunFolder, mesh: Mesh, step: int | None = None) -> OpenedRun:
  """The config and parameters of a run, sharded over `mesh`."""
  return open_params(folder, lambda config: abstract_sharded_params(config.model, mesh), step)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, types and shardings of a training batch; no data is needed."""
  length = config.data.sequence_length
  row = example(
    Record(np.zeros(length, np.int32), length, np.zeros(length, bool)), length, document_mask=config.data.document_mask
  )
  shape, sharding = (config.train.batch_size, length), batch_sharding(mesh)
  return {name: jax.ShapeDtypeStruct(shape, column.dtype, sharding=sharding) for name, column in row.items()}


def lower_train_step(
  config: Config, mesh: Mesh, shardings: step_lib.TrainState, *, diagnose: bool = False
) -> jax.stages.Lowered:
  """The step as it will run on the mesh: state donated, everything sharded. It needs shapes alone; `.compile()` it.

  Args:
    config: of the run.
    mesh: its devices; those of a topology that is not here will do.
    shardings: `step.state_shardings` of the two.
    diagnose: the diagnostic step, which gives statistics by layer besides.
  """
  state = attach(step_lib.abstract_state(config), shardings)
  # What the host reads of the layers must be whole on every process.
  metrics = replicated(mesh) if diagnose else None
  step = jax.jit(
    step_lib.make_train_step(config, diagnose=diagnose), donate_argnums=0, out_shardings=(shardings, metrics)
  )
  with on_mesh(mesh):
    return step.lower(state, abstract_batch(config, mesh))


def program_hash(lowered: jax.stages.Lowered) -> str:
  """A short hash of a lowered program: of its StableHLO, which names no source line and no path."""
  return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def bytes_per_token(setup: Setup) -> np.ndarray:
  """Bytes of text that each token stands for, [V]; 0 for rows of the embedding that no token has."""
  table_V = np.zeros(setup.config.model.vocab_size, np.float32)
  table_V[: setup.corpus.manifest.vocab_size] = setup.corpus.manifest.bytes_per_token
  return table_V


class Evaluator:
  """Evaluates parameters on the validation set of a setup."""

  def __init__(self, setup: Setup):
    self._setup = setup
    self._loader = make_loader(setup, setup.config.evaluate.batch_size)
    self._step = jax.jit(step_lib.make_evaluate_step(setup.config, bytes_per_token(setup)))

  def __call__(self, params: Any) -> Evaluation:
    batches = self._loader.validation(self._setup.config.evaluate.max_tokens)
    with on_mesh(self._setup.mesh):
      return evaluate(self._step, params, batches, self._setup.mesh)

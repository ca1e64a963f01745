"""What a config stands for on this machine: its mesh, its data, its compiled step."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.data.loader import Data, Loader
from mixln_jax.data.opening import open_data
from mixln_jax.errors import InputError
from mixln_jax.model.initial import abstract_sharded_params
from mixln_jax.parallel.mesh import attach, make_mesh
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
  mesh = make_mesh(config.mesh)
  abstract_sharded_params(config.model, mesh)  # for its checks
  return Setup(config, mesh, open_data(config), placement.parse(config.model.placement, config.model.num_layers))


def check_batch(setup: Setup, name: str, size: int) -> None:
  """Refuses a batch of `size` rows that the mesh can't cut; raises InputError naming it."""
  check_divides(name, (size, setup.config.data.sequence_length), batch_sharding(setup.mesh))


def make_loader(setup: Setup, batch_size: int, *, all_rows: bool = False) -> Loader:
  """The loader of a setup: this process's rows of each batch, or `all_rows`."""
  data = setup.config.data
  return Loader(
    setup.corpus,
    sequence_length=data.sequence_length,
    batch_size=batch_size,
    document_mask=data.document_mask,
    seed=data.seed,
    process_index=0 if all_rows else jax.process_index(),
    process_count=1 if all_rows else jax.process_count(),
    num_threads=data.num_threads,
    num_workers=data.num_workers,
  )


def spread_over_all_devices(config: Config) -> Config:
  """The config of a run for the devices of this machine, whatever mesh trained it.

  Parameters are sharded over all devices where those divide them, else replicated.
  """
  here = config.copy_and_resolve_references()
  here.mesh.update(dict.fromkeys(here.mesh, 1) | {"fsdp": -1})
  try:
    abstract_sharded_params(here.model, make_mesh(here.mesh))
  except InputError:
    here.mesh.update(data=-1, fsdp=1)
  return here


def open_run(folder: RunFolder, mesh: Mesh, step: int | None = None) -> OpenedRun:
  """The config and parameters of a run, sharded over `mesh`."""
  return open_params(folder, lambda config: abstract_sharded_params(config.model, mesh), step)


def compile_train_step(setup: Setup, shardings: step_lib.TrainState, *, diagnose: bool = False) -> jax.stages.Compiled:
  """The step as it will run: state donated, everything sharded, compiled ahead of time; or the diagnostic step."""
  return lower_train_step(setup, shardings, diagnose=diagnose).compile()


def lower_train_step(setup: Setup, shardings: step_lib.TrainState, *, diagnose: bool = False) -> jax.stages.Lowered:
  """The step before it is compiled."""
  config = setup.config
  example = make_loader(setup, config.train.batch_size).example()
  shape = (config.train.batch_size, config.data.sequence_length)
  sharding = batch_sharding(setup.mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, row.dtype, sharding=sharding) for name, row in example.items()}
  state = attach(step_lib.abstract_state(config), shardings)
  # What the host reads of the layers must be whole on every process.
  metrics = replicated(setup.mesh) if diagnose else None
  step = jax.jit(
    step_lib.make_train_step(config, diagnose=diagnose), donate_argnums=0, out_shardings=(shardings, metrics)
  )
  with on_mesh(setup.mesh):
    return step.lower(state, batch)


class Evaluator:
  """Evaluates parameters on the validation set of a setup."""

  def __init__(self, setup: Setup):
    self._setup = setup
    self._loader = make_loader(setup, setup.config.evaluate.batch_size)
    table_V = np.zeros(setup.config.model.vocab_size, np.float32)
    table_V[: setup.corpus.manifest.vocab_size] = setup.corpus.manifest.bytes_per_token
    self._step = jax.jit(step_lib.make_evaluate_step(setup.config, table_V))

  def __call__(self, params: Any) -> Evaluation:
    batches = self._loader.validation(self._setup.config.evaluate.max_tokens)
    with on_mesh(self._setup.mesh):
      return evaluate(self._step, params, batches, self._setup.mesh)

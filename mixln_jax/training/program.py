"""What is compiled for the runs that one loop trains: one run as it is, or several of one shape under `vmap`.

The loop (`training/loop.py`) sees a `Program`: it steps a state, gives the metrics of each member, cuts a member's own
state out and puts one in. One run is R = 1 without `vmap`, so its program is the plain step. Several runs are the
`vmap` of the same pure step over (state, placement, learning rate); the batch is not mapped: all see the same samples.
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import Config, MeshConfig
from mixln_jax.data.loader import Masking, example, masked_example
from mixln_jax.data.records import Record
from mixln_jax.errors import InputError
from mixln_jax.model.columns import Columns
from mixln_jax.model.initial import starting_values
from mixln_jax.model.parameters import LAYERS
from mixln_jax.parallel.mesh import attach, make_mesh
from mixln_jax.parallel.rules import batch_sharding, on_mesh, replicated
from mixln_jax.training import step as step_lib
from mixln_jax.training.groups import uses_roles
from mixln_jax.training.step import Batch, TrainState

# What may differ between runs that are one program: all else is compiled into it.
AXES = (
  "model.placement",
  "model.init_deviation",
  "model.embedding_deviation",
  "optimizer.learning_rate",
  "seed",
)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, types and shardings of a training batch; no data is needed."""
  length = config.data.sequence_length
  references = np.zeros(0, np.float32) if config.preference.loss == "dpo" else None
  record = Record(np.zeros(length, np.int32), length, np.zeros(length, bool), references=references)
  if config.model.bidirectional:
    masking = Masking(0, config.model.vocab_size, (None, None))
    row = masked_example(record, np.random.default_rng(0), sequence_length=length, masking=masking)
  else:
    row = example(record, length, document_mask=config.data.document_mask)
  shape, sharding = (config.train.batch_size, length), batch_sharding(mesh)
  return {name: jax.ShapeDtypeStruct(shape, column.dtype, sharding=sharding) for name, column in row.items()}


def program_hash(lowered: jax.stages.Lowered) -> str:
  """A short hash of a lowered program: of its StableHLO, which names no source line and no path."""
  return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def lower_train_step(
  config: Config, mesh: Mesh, shardings: TrainState, *, diagnose: bool = False
) -> jax.stages.Lowered:
  """The step of one run as `SingleProgram` runs it on the mesh: state donated, everything sharded. `.compile()` it.

  Its arguments are (state, batch, None, rate). The peak learning rate is data, an fp32 scalar: runs of a study that
  differ in nothing else are one program, which the compile cache then has.

  Args:
    config: of the run.
    mesh: its devices; those of a topology that is not here will do, since only shapes are needed.
    shardings: `step.state_shardings` of the two.
    diagnose: the diagnostic step, which also gives statistics by layer.
  """
  config = _at_rate_one(config)
  rate = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))
  state = attach(step_lib.abstract_state(config), shardings)
  # What the host reads of the layers must be whole on every process.
  metrics = replicated(mesh) if diagnose else None
  step = step_lib.make_train_step(config, diagnose=diagnose)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, metrics))
  with on_mesh(mesh):
    return jitted.lower(state, abstract_batch(config, mesh), None, rate)


def _at_rate_one(config: Config) -> Config:
  """A copy whose schedule peaks at 1, for a step that gets the peak as data."""
  config = config.copy_and_resolve_references()
  config.optimizer.learning_rate = 1.0
  return config


class Memory(NamedTuple):
  """Bytes of one device that a compiled step takes. The new state replaces the old one in place."""

  arguments: int
  temporaries: int
  outputs: int  # beyond the state
  code: int

  @property
  def total(self) -> int:
    return sum(self)


def memory_of(step: jax.stages.Compiled) -> Memory:
  """What the compiler says that a step takes."""
  analysis: Any = step.memory_analysis()
  return Memory(
    arguments=analysis.argument_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    code=analysis.generated_code_size_in_bytes,
  )


class Steps(NamedTuple):
  """The compiled steps of a program.

  Attributes:
    program: the hash of the training step.
    train: the training step.
    diagnostic: the one that also looks at the layers; None where no diagnostics are asked for.
  """

  program: str
  train: jax.stages.Compiled
  diagnostic: jax.stages.Compiled | None


def lower_steps(program: "Program") -> list[jax.stages.Lowered]:
  """The steps that the config of a program asks for, ready to be compiled: the training step comes first."""
  lowered = [program.lower_step()]
  if program.config.diagnostics.every_steps:
    lowered.append(program.lower_step(diagnose=True))
  return lowered


def compile_steps(lowered: Sequence[jax.stages.Lowered]) -> Steps:
  """Compiles what `lower_steps` gave."""
  compiled = [one.compile() for one in lowered]
  return Steps(program_hash(lowered[0]), compiled[0], compiled[1] if len(compiled) > 1 else None)


class Program(Protocol):
  """The programs of R runs, and their joint state."""

  config: Config  # what the members share
  mesh: Mesh
  num_members: int
  steps: Steps | None  # None until they are compiled

  def lower_step(self, *, diagnose: bool = False) -> jax.stages.Lowered:
    """The training step, ready to be compiled; with `diagnose` also the statistics by layer."""
    ...

  def run_step(self, step: jax.stages.Compiled, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    """One update of all members: the new state, and their metrics still on the devices. The old state is donated."""
    ...

  def evaluate_step(self, bytes_per_token_V: np.ndarray) -> Callable[[Any, Batch, Any], Any]:
    """`(joint params, batch, step) -> sums`, those of `make_evaluate_step`: of each member [R]; of one run scalars."""
    ...

  def initial_state(self) -> TrainState:
    """The joint state before the first update, with drawn weights."""
    ...

  def own_shardings(self, index: int) -> TrainState:
    """The sharding of a member's own state."""
    ...

  def own(self, state: TrainState, index: int) -> TrainState:
    """A member's own state out of the joint one."""
    ...

  def put(self, state: TrainState, index: int, own: TrainState) -> TrainState:
    """The joint state with a member's own in its place."""
    ...

  def halt(self, state: TrainState, index: int) -> TrainState:
    """The joint state in which a member is not updated any more."""
    ...

  def values_of(self, read: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A member's values out of metrics that were read to the host."""
    ...


class SingleProgram:
  """One run: the plain step, and the joint state is its own. Its learning rate is data, as that of several runs is."""

  num_members = 1
  steps: Steps | None = None

  def __init__(self, config: Config, mesh: Mesh):
    self.config, self.mesh = config, mesh
    self._shardings = step_lib.state_shardings(config, mesh)
    self._rate = jax.device_put(np.float32(config.optimizer.learning_rate), replicated(mesh))

  def lower_step(self, *, diagnose: bool = False) -> jax.stages.Lowered:
    return lower_train_step(self.config, self.mesh, self._shardings, diagnose=diagnose)

  def run_step(self, step: jax.stages.Compiled, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    return step(state, batch, None, self._rate)

  def evaluate_step(self, bytes_per_token_V: np.ndarray) -> Callable[[Any, Batch, Any], Any]:
    return jax.jit(step_lib.make_evaluate_step(self.config, bytes_per_token_V))

  def initial_state(self) -> TrainState:
    return jax.jit(lambda: step_lib.init_state(self.config), out_shardings=self._shardings)()

  def own_shardings(self, index: int) -> TrainState:
    del index
    return self._shardings

  def own(self, state: TrainState, index: int) -> TrainState:
    del index
    return state

  def put(self, state: TrainState, index: int, own: TrainState) -> TrainState:
    del state, index
    return own

  def halt(self, state: TrainState, index: int) -> TrainState:
    del index  # the loop ends with its only member
    return state

  def values_of(self, read: Mapping[str, Any], index: int) -> dict[str, Any]:
    del index
    return dict(read)


class JointProgram:
  """R runs that differ only in AXES, as one program. Leaves of the joint state are [R, …], cut along the axis `run`.

  A member's own state has only what its placement uses of the tree that all share. `refilled` puts other runs into the
  R slots of the same compiled program.
  """

  steps: Steps | None = None

  def __init__(
    self,
    configs: Mapping[str, Config],
    mesh_sizes: MeshConfig,
    *,
    slots: int | None = None,
    tables: Sequence[placement.Table] = (),
  ):
    """Checks that the runs can be one program, and makes what they differ in data.

    Args:
      configs: the runs' configs by name.
      mesh_sizes: `config.mesh` of the study, whose axis `run` cuts the runs over devices.
      slots: R; by default the number of runs. Slots that are left over hold copies of the last run, which nobody reads.
      tables: together they have every row that a run of this program may have in each layer; by default those of
        `configs`.

    Raises:
      InputError: they differ in more than AXES, one needs a pass of its own (`admin`), or the mesh does not divide
        their number.
    """
    self.num_members = len(configs) if slots is None else slots
    self.config = _at_rate_one(next(iter(configs.values())))  # theirs are data
    self.config.mesh.update(mesh_sizes)
    self.mesh = make_mesh(self.config.mesh)
    ways = self.mesh.shape["run"]
    if self.num_members % ways:
      raise InputError(f"config.mesh.run={ways} does not divide the {self.num_members} runs; choose a divisor")
    self._tables = tuple(tables)
    self._fill(configs)
    self._one = self._columns.of_run(0)  # which parameters there are
    one = step_lib.state_shardings(self.config, self.mesh, self._one)
    self.shardings = jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec("run", *s.spec)), one)
    self._initial = jax.jit(self._init_all, out_shardings=self.shardings)
    self._evaluate: Callable[..., Any] | None = None

  def refilled(self, configs: Mapping[str, Config]) -> "JointProgram":
    """The same program, with whatever of it is compiled, and other runs in its slots.

    Args:
      configs: at most as many runs as there are slots, each with rows of the `tables` that the program was made for.

    Raises:
      InputError: they differ in more than AXES from one another.
    """
    other = copy.copy(self)
    other._fill(configs)
    return other

  def _fill(self, configs: Mapping[str, Config]) -> None:
    """Makes data of what the runs differ in."""
    check_same_program(configs)
    runs = list(configs.values())
    runs += runs[-1:] * (self.num_members - len(runs))
    tables = [config_lib.table(config.model) for config in runs]
    columns = Columns.of_many([*tables, *self._tables])
    columns = columns.of_runs(slice(len(runs)))
    rates_R = np.array([config.optimizer.learning_rate for config in runs], np.float32)
    self._columns, self._rates_R = self._by_run((columns, rates_R))
    self._seeds_R = np.array([config.seed for config in runs], np.uint32)
    starts = [_starts_of(config, columns.of_run(0)) for config in runs]
    self._starts = {path: np.stack([start[path] for start in starts]) for path in starts[0]}
    self._own_shardings = [step_lib.state_shardings(config, self.mesh) for config in runs]

  def _by_run(self, tree: Any) -> Any:
    """Arrays [R, …] on the mesh, cut along `run`."""
    return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec("run")))

  def _map(self, step: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """A pure step of one run as a step of all."""
    return jax.vmap(step, in_axes=in_axes, spmd_axis_name="run")

  def _init_all(self, seeds_R: jax.Array, starts: Mapping[str, jax.Array]) -> TrainState:
    return jax.vmap(lambda seed, start: step_lib.init_state(self.config, self._one, seed, start))(seeds_R, starts)

  def initial_state(self) -> TrainState:
    return self._initial(self._by_run(self._seeds_R), self._by_run(self._starts))

  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings of the joint state."""
    return attach(jax.eval_shape(self._init_all, self._seeds_R, self._starts), self.shardings)

  def lower_step(self, *, diagnose: bool = False) -> jax.stages.Lowered:
    step = self._map(step_lib.make_train_step(self.config, diagnose=diagnose), (0, None, 0, 0))
    # The host of every process reads the metrics of all runs.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, replicated(self.mesh)))
    with on_mesh(self.mesh):
      batch = abstract_batch(self.config, self.mesh)
      return jitted.lower(self.abstract_state(), batch, self._columns, self._rates_R)

  def run_step(self, step: jax.stages.Compiled, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    return step(state, batch, self._columns, self._rates_R)

  def evaluate_step(self, bytes_per_token_V: np.ndarray) -> Callable[[Any, Batch, Any], Any]:
    if self._evaluate is None:
      step = self._map(step_lib.make_evaluate_step(self.config, bytes_per_token_V), (0, None, None, 0))
      self._evaluate = jax.jit(step, out_shardings=replicated(self.mesh))
    mapped = self._evaluate
    return lambda params, batch, done: mapped(params, batch, done, self._columns)

  def own_shardings(self, index: int) -> TrainState:
    return self._own_shardings[index]

  def own(self, state: TrainState, index: int) -> TrainState:
    shardings = self._own_shardings[index]
    return _taker(*_key(shardings))(_part_of(state, shardings), index)

  def put(self, state: TrainState, index: int, own: TrainState) -> TrainState:
    part = _part_of(state, self._own_shardings[index])
    putter = _putter(*_key(jax.tree.map(lambda leaf: leaf.sharding, part)))
    changed = _by_path(putter(part, own, index))  # what the run does not use stays as it was
    return jax.tree_util.tree_map_with_path(lambda path, leaf: changed.get(jax.tree_util.keystr(path), leaf), state)

  def halt(self, state: TrainState, index: int) -> TrainState:
    most = self.config.train.max_skipped_in_a_row
    halted = _setter(self.shardings.skipped_in_a_row)(state.skipped_in_a_row, index, most)
    return state.replace(skipped_in_a_row=halted)

  def values_of(self, read: Mapping[str, Any], index: int) -> dict[str, Any]:
    return jax.tree.map(lambda value_R: np.asarray(value_R)[index], dict(read))


def check_same_program(configs: Mapping[str, Config]) -> None:
  """Rejects runs that can't be one program; raises InputError naming the first two that differ, and in what."""
  (first_name, first), *others = configs.items()
  for name, config in others:
    different = [field for field, _, _ in config_lib.differences(first, config) if field not in AXES]
    if different:
      fields = ", ".join("config." + field for field in different)
      raise InputError(
        f"together: {first_name} and {name} differ in {fields}, which is compiled into the program; only "
        f"{', '.join(AXES)} are data: train them one by one"
      )
    if first.model.placement != config.model.placement and uses_roles(first):
      raise InputError(
        f"together: {first_name} and {name} have different placements, and config.optimizer gives multipliers to "
        "input_gains or output_gains, which differ with them: train them one by one"
      )
  for name, config in configs.items():
    table = config_lib.table(config.model)
    if any(table.column(sublayer, "vector_c_res").any() for sublayer in placement.SUBLAYERS):
      raise InputError(
        f"together: {name} needs a profiling pass of its own (placement admin); train it alone, or leave it out"
      )


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


@functools.cache
def _setter(sharding: NamedSharding) -> Callable[..., Any]:
  """`(array [R], index, value) -> array [R]`, sharded so."""
  return jax.jit(lambda array_R, index, value: array_R.at[index].set(value), out_shardings=sharding)


def _starts_of(config: Config, columns: Columns) -> dict[str, np.ndarray]:
  """`starting_values` as arrays whose shapes are those of any placement: of a parameter of the layers [L, …]."""
  starts = {}
  for path, value in starting_values(config.model, columns).items():
    start = np.asarray(value, np.float32)
    if path.startswith(LAYERS) and start.ndim == 0:
      start = np.broadcast_to(start, (config.model.num_layers,))
    starts[path] = start
  return starts


def _part_of(state: TrainState, shardings: TrainState) -> TrainState:
  """The leaves [R, …] of the joint state that a run with these shardings has."""
  leaves = _by_path(state)
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], shardings)


def _by_path(tree: Any) -> dict[str, Any]:
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

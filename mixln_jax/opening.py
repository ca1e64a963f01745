"""What a config stands for on this machine (its mesh, its data), and runs opened again.

`open_run` is the one door for everybody but training: evaluation, generation, diagnosis, export, notebooks.

    with mixln_jax.open_run("work/runs/mine") as run:
      tokens = run.tokenizer.encode("My fellow citizens")
      logits_BTV = run.logits([tokens])
"""

import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import BEST, NEWEST, Config
from mixln_jax.data.loader import Data, Loader, masking_of
from mixln_jax.data.opening import open_data
from mixln_jax.data.tokenizer import CONFIG as TOKENIZER_CONFIG
from mixln_jax.data.tokenizer import Tokenizer, content_hash
from mixln_jax.data.tokenizer_files import FILES, read_written_tokenizer
from mixln_jax.errors import InputError
from mixln_jax.files import TEXT
from mixln_jax.model import Transformer
from mixln_jax.model.attention_kernels import choose_attention
from mixln_jax.model.parameters import abstract_sharded_params
from mixln_jax.parallel import processes
from mixln_jax.parallel.mesh import make_mesh, rows_share
from mixln_jax.parallel.rules import batch_sharding, check_divides, on_mesh
from mixln_jax.parallel.settings import check_settings
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.checkpoint import Checkpoints, RemovedError
from mixln_jax.runs.facts import read_config
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics

READING_SECONDS = 60.0  # how long a reader follows a run that removes checkpoints as they are read


class Setup(NamedTuple):
  """A config and what it stands for."""

  config: Config
  mesh: Mesh
  corpus: Data

  @property
  def table(self) -> placement.Table:
    return config_lib.table(self.config.model)


def set_up(config: Config, data_fallback: Path | None = None) -> Setup:
  """Opens the mesh and the data of a config.

  Args:
    config: of a run.
    data_fallback: where its records lie if they are not where the config, from this working directory, says.

  Raises:
    InputError: config, data and devices contradict one another.
  """
  config_lib.validate(config)
  check_settings()
  processes.check_devices(config.parallel)
  mesh = make_mesh(config.mesh)
  abstract_sharded_params(config.model, mesh)  # for its checks
  attention_of(config, mesh)
  setup = Setup(config, mesh, open_data(config, data_fallback))
  if config.model.bidirectional:
    masking_of(setup.corpus.tokenizer)  # for its check
  return setup


def attention_of(config: Config, mesh: Mesh) -> str:
  """The implementation of attention that a run trains with; raises InputError where it can't be the one asked for."""
  with on_mesh(mesh):
    return choose_attention(config.model, config.data.sequence_length, segments=config.data.document_mask)


def check_batch(setup: Setup, name: str, size: int) -> None:
  """Rejects a batch of `size` rows that the mesh can't cut; raises InputError naming it."""
  check_divides(name, (size, setup.config.data.sequence_length), batch_sharding(setup.mesh))


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
    masking=masking_of(setup.corpus.tokenizer) if setup.config.model.bidirectional else None,
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


class OpenRun:
  """A run that was opened again. What is large is loaded when it is first asked for.

  Attributes:
    folder: the run's folder.
    config: its config, with a mesh over the devices of this machine, and its placement as it is at that step (of one
      with `+prores`, `pre+prores:linear:1000@40`).
    mesh: that mesh.
  """

  def __init__(self, folder: RunFolder, config: Config, mesh: Mesh, checkpoints: Checkpoints, wanted: int | str):
    """`wanted`: newest, best, or a step; raises InputError where the run has no such checkpoint."""
    self.folder, self.config, self.mesh = folder, config, mesh
    self._checkpoints, self._wanted = checkpoints, wanted
    self._placement = config.model.placement
    self._chosen = self._choose()

  def _choose(self) -> int:
    chosen = choose_step(self._checkpoints, self._wanted, f"workdir={self.folder.address}")
    self.config.model.placement = placement.at_step(self._placement, self.config.model.num_layers, chosen)
    return chosen

  @functools.cached_property
  def _loaded(self) -> tuple[int, Any]:
    """The step of the checkpoint that is open, and its parameters.

    A run that trains removes its older checkpoints: where the newest (or best) one is gone before it was read, the one
    that is newest by then is taken.
    """
    abstract = abstract_sharded_params(self.config.model, self.mesh)
    deadline = time.monotonic() + READING_SECONDS
    while True:
      try:
        return self._chosen, self._checkpoints.restore(self._chosen, {"params": abstract})["params"]
      except RemovedError:
        named = self._wanted not in (NEWEST, BEST)
        if named or jax.process_count() > 1 or time.monotonic() > deadline:
          raise
      self._checkpoints.reload()
      self._chosen = self._choose()

  @property
  def step(self) -> int:
    """The checkpoint that is open, in updates done; its parameters are loaded by then."""
    return self._loaded[0]

  @property
  def params(self) -> Any:
    """The parameters, sharded over the mesh and verified bit for bit.

    Raises:
      DamagedError: they are not what was written.
      RemovedError: the run, which trains, has removed the checkpoint.
    """
    return self._loaded[1]

  @property
  def model(self) -> Transformer:
    return Transformer(self.config.model)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer that lies in the run's folder; of a run of an earlier version, that of its records.

    Raises:
      InputError: it is neither here nor there.
    """
    tokenizer = _written_tokenizer(self.folder)
    if tokenizer is None:
      return self.setup.corpus.tokenizer
    stated = data_facts(self.folder).get("tokenizer_sha256")
    if stated not in (None, content_hash(tokenizer)):
      raise InputError(
        f"{self.folder.address}/{folder_lib.TOKENIZER}: is not the tokenizer that the run was trained with "
        f"({folder_lib.DATA} says sha256 {stated[:12]}…); copy it from the run's records"
      )
    return tokenizer

  @functools.cached_property
  def setup(self) -> Setup:
    """The run's mesh and data, for its validation set.

    Raises:
      InputError: the records are not on this machine, or are not those that the run was trained on.
    """
    setup = set_up(self.config, records_of(self.folder))
    found, stated = setup.corpus.manifest.fingerprint, data_facts(self.folder).get("fingerprint")
    if stated not in (None, found):
      raise InputError(
        f"workdir={self.folder.address}: the run was trained on data {stated[:12]}…, but {setup.corpus.folder} is "
        f"{found[:12]}…; set config.data.directory to the run's, or bring its records back"
      )
    return setup

  def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray | jax.Array) -> jax.Array:
    """Logits [B, T, V], fp32, of token ids [B, T] (or [T] for one row)."""
    params = self.params  # first: which checkpoint is open, and with it the model, is known by then
    return _logits(self.model, params, _as_rows(tokens))

  def hidden(self, tokens: Sequence[Sequence[int]] | np.ndarray | jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Final hidden states [B, T, D] of token ids [B, T] (or [T]), and the taps of `Transformer.hidden`."""
    params = self.params
    return _hidden(self.model, params, _as_rows(tokens))

  def metrics(self) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first."""
    return read_metrics(self.folder.fetched(folder_lib.METRICS))


def data_facts(folder: RunFolder) -> dict[str, Any]:
  """What a run says of its data; nothing for one that was never trained here.

  Raises:
    InputError: the file is damaged.
  """
  text = TEXT.optional()
  return folder.facts(folder_lib.DATA, {"folder": text, "fingerprint": text, "tokenizer_sha256": text}) or {}


def _written_tokenizer(folder: RunFolder) -> Tokenizer | None:
  """The tokenizer in a run's folder, which may lie in a bucket; None where there is none."""
  if folder.remote is None:
    return read_written_tokenizer(folder / folder_lib.TOKENIZER)
  with tempfile.TemporaryDirectory() as local:
    for file in (*FILES.values(), TOKENIZER_CONFIG):
      name = f"{folder_lib.TOKENIZER}/{file}"
      if folder.remote.exists(name):
        folder.remote.get(name, Path(local) / file)
    return read_written_tokenizer(Path(local))


def _as_rows(tokens: Any) -> jax.Array:
  tokens_BT = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))
  if tokens_BT.ndim != 2 or tokens_BT.shape[1] == 0:
    raise InputError(f"tokens: have shape {tokens_BT.shape}; give rows of at least one token, [B, T]")
  return tokens_BT


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: Any, tokens_BT: jax.Array) -> Any:
  return model.apply({"params": params}, tokens_BT)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: Transformer, params: Any, tokens_BT: jax.Array) -> Any:
  return model.apply({"params": params}, tokens_BT, method="hidden")


@contextlib.contextmanager
def open_run(
  path: str | Path, step: int | str = NEWEST, *, changes: Mapping[str, Any] | None = None
) -> Iterator[OpenRun]:
  """Opens a run: `run.config`, `run.params`, `run.model`, `run.tokenizer`, `run.mesh`, `run.logits(tokens)`, ….

  Inside the context the model's logical axes mean something, on all devices of this machine. Several processes that
  open one run together enter and leave it together, and fail together.

  Args:
    path: the run's folder, or `gs://BUCKET/FOLDER`.
    step: which checkpoint: newest, best (of lowest validation loss), or its step.
    changes: config fields to change, by name, `{"evaluate.batch_size": 8}`.

  Raises:
    InputError: there is no run or no such checkpoint, it is damaged, or a field can't be changed so.
  """
  folder = RunFolder(path)
  config = read_config(folder)
  config.update_from_flattened_dict(dict(changes or {}))
  config_lib.validate(config)
  processes.join(config.parallel)
  with processes.failing_together():
    here = spread_over_all_devices(config)
    mesh = make_mesh(here.mesh)
    with contextlib.closing(Checkpoints(folder.place(folder_lib.CHECKPOINTS), read_only=True)) as checkpoints:
      run = OpenRun(folder, here, mesh, checkpoints, step)
      with on_mesh(mesh):
        yield run
    processes.wait_for_all(f"the end of the work on {folder.address}")


def choose_step(checkpoints: Checkpoints, wanted: int | str, where: str, parameter: str = "step") -> int:
  """The step of the checkpoint that is meant.

  Args:
    checkpoints: of the run.
    wanted: newest, best, or a step.
    where: the run, for messages.
    parameter: what `wanted` was given as, for messages.

  Raises:
    InputError: the run has no such checkpoint.
  """
  steps = checkpoints.all_steps()
  if not steps:
    raise InputError(f"{where}: the run has no checkpoint yet; let it train to one")
  if wanted == NEWEST:
    return steps[-1]
  if wanted == BEST:
    best = checkpoints.best_step()
    if best is None:
      raise InputError(f"{where}: none of its checkpoints was evaluated, so none is {BEST}; name a step")
    return best
  if int(wanted) not in steps:
    known = ", ".join(map(str, steps))
    raise InputError(f"{parameter}={wanted!r}: {where} has no checkpoint of that step; it has {known}")
  return int(wanted)


def records_of(folder: RunFolder) -> Path | None:
  """The folder of the records that a run says it was trained on; None where it does not say, or not in full."""
  records = data_facts(folder).get("folder")
  if not isinstance(records, str) or not Path(records).is_absolute():
    return None
  return Path(records)

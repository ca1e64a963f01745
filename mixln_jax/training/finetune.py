"""What a fine-tuned run takes from the run that it starts from, and what must agree.

This decides the config and finds the weights. `training/begin.py` makes them the run's checkpoint of step 0, and from
then on nothing knows any more that a run is a fine-tuned one.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mixln_jax import config as config_lib
from mixln_jax.config import Config, ModelConfig, TrainConfig
from mixln_jax.data.checks import data_directory
from mixln_jax.data.records import MANIFEST, named_tokenizer
from mixln_jax.data.tokenizer import SENTENCEPIECE, content_hash
from mixln_jax.data.tokenizer_files import FILES, HUB, RECORDS
from mixln_jax.errors import InputError
from mixln_jax.files import local_path
from mixln_jax.model.parameters import abstract_sharded_params
from mixln_jax.opening import Setup, choose_step, data_facts
from mixln_jax.parallel.bits import hash_of_sums
from mixln_jax.placement import at_step, without_step
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.checkpoint import SUMS, Checkpoints
from mixln_jax.runs.facts import read_config
from mixln_jax.runs.folder import RunFolder

FIELD = "config.train.start_from"


class Start(NamedTuple):
  """A checkpoint to start from."""

  folder: RunFolder
  step: int
  facts: Mapping[str, Any]  # of the checkpoint

  def identity(self) -> dict[str, Any]:
    """What the run's folder says of it: which run and step, and a hash over the exact bits of its parameters."""
    config = self.facts["config"]
    return {
      "run": self.folder.address,
      "step": self.step,
      "hash": hash_of_sums(self.facts[SUMS]["params"]),
      "placement": config["model.placement"],
      "data_fingerprint": self.facts["fingerprint"],
    }

  def describe(self) -> str:
    """One line for a person."""
    return f"{self.folder.address}, step {self.step}, hash {hash_of_sums(self.facts[SUMS]['params'])}"


def resolve(config: Config, overrides: Mapping[str, Any], own: RunFolder) -> Config:
  """The config as it is trained: with what it takes from the run that it starts from, where it does.

  Args and errors are those of `follow` and `pin`.
  """
  return pin(follow(config, overrides, own), own)


def follow(config: Config, overrides: Mapping[str, Any], own: RunFolder | None = None) -> Config:
  """The config with the model and the tokenizer of the run that it starts from; as it is where it starts from none.

  Args:
    config: of the recipe and the command line.
    overrides: the fields that stand on the command line.
    own: the run's own folder; once it is there it knows both, even where the run that it started from is gone.

  Raises:
    InputError: the run is not there, or the recipe or the command line states another model or tokenizer.
  """
  if not config.train.start_from:
    return config
  config = follow_model(config, overrides, own)
  begun = _begun(config, own)
  stated = config.data.tokenizer
  if begun is not None:
    config.data.tokenizer = begun.data.tokenizer if stated == SENTENCEPIECE else stated
    return config
  folder = RunFolder(config.train.start_from)
  known = read_config(folder)
  if stated == SENTENCEPIECE:  # what nobody stated: none is trained where a model has one
    config.data.tokenizer = _tokenizer_name(folder, known)
  elif not (stated == known.data.tokenizer and stated.startswith(HUB)):
    _check_tokenizer(folder, known, content_hash(named_tokenizer(stated)), stated)
  return config


def follow_model(config: Config, overrides: Mapping[str, Any], own: RunFolder | None = None) -> Config:
  """As `follow`, but for the tokenizer."""
  if not config.train.start_from:
    return config
  config = config.copy_and_resolve_references()
  known = _begun(config, own) or read_config(_with_run(RunFolder(config.train.start_from)))
  config.model.update(_model_of(_at_start(known.model, config.train), config, overrides))
  return config


def _at_start(model: ModelConfig, train: TrainConfig) -> ModelConfig:
  """A run's config.model as it is at the checkpoint that config.train names, where that is a step: a ramp over its
  updates (`+prores`) does not begin again."""
  if train.start_checkpoint in (config_lib.NEWEST, config_lib.BEST):
    return model
  model = model.copy_and_resolve_references()
  model.placement = at_step(model.placement, model.num_layers, int(train.start_checkpoint))
  return model


def pin(config: Config, own: RunFolder | None = None) -> Config:
  """The config with the step of the checkpoint that it names: the run that it starts from may be trained further.

  Args:
    config: of the recipe and the command line.
    own: the run's own folder; once it is there, what it names stays.

  Raises:
    InputError: there is no such checkpoint.
  """
  if not config.train.start_from or config.train.start_checkpoint not in (config_lib.NEWEST, config_lib.BEST):
    return config
  config = config.copy_and_resolve_references()
  if begun := _begun(config, own):
    config.train.start_checkpoint = begun.train.start_checkpoint
  else:
    with _checkpoints(_with_run(RunFolder(config.train.start_from))) as checkpoints:
      config.train.start_checkpoint = str(_step(checkpoints, config.train))
  config.model.update(_at_start(config.model, config.train))
  return config


def _begun(config: Config, own: RunFolder | None) -> Config | None:
  """The config of the run's own folder, where it is there and started from the same run."""
  known = read_config(own) if own is not None and own.has_run else None
  return known if known is not None and known.train.start_from == config.train.start_from else None


def _with_run(folder: RunFolder) -> RunFolder:
  if not folder.has_run:
    raise InputError(f"{FIELD}={folder.address!r}: no run there; give the folder of a run")
  return folder


def _model_of(theirs: ModelConfig, config: Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `theirs`, but those that compute the same and are stated here.

  A field is stated where it stands on the command line, or differs from its default.
  """
  fields, wrong = dict(theirs.items()), []
  for name, value in config.model.items():
    field = config_lib.FIELDS[f"model.{name}"]
    if (f"model.{name}" not in overrides and value == field.default) or value == fields[name]:
      continue
    if name == "placement" and without_step(str(value)) == without_step(str(fields[name])):
      continue
    if field.on_resume == config_lib.FREE:
      fields[name] = value
    else:
      wrong.append(f"config.model.{name}={value!r}, there {fields[name]!r}")
  if wrong:
    raise InputError(
      f"the model of {FIELD}={config.train.start_from!r} is another: {'; '.join(wrong)}; leave them out, or start "
      "from another run"
    )
  return fields


def _tokenizer_name(folder: RunFolder, known: Config) -> str:
  """What config.data.tokenizer has to be for the tokenizer that a run was trained with."""
  data = known.data
  if data.mixture:
    records = Path(data.mixture.split(",")[0].rpartition(":")[0].strip())
  else:
    records = Path(data_facts(folder).get("folder") or data_directory(known))
  if not data.on_the_fly and (local_path(records) / MANIFEST).is_file():
    return f"{RECORDS}{records}"
  if data.tokenizer != SENTENCEPIECE:
    return data.tokenizer
  for file in FILES.values():
    written = folder.path / folder_lib.TOKENIZER / file
    if folder.remote is None and written.is_file():
      return str(written)
  raise InputError(
    f"{FIELD}={folder.address!r}: its tokenizer lies with its records, which are not in {records}; bring them back, or "
    "set config.data.tokenizer to a copy of it"
  )


def _check_tokenizer(folder: RunFolder, known: Config, sha256: str, name: str) -> None:
  """Refuses a tokenizer, known by its hash, that is not the one that the run was trained with."""
  theirs = data_facts(folder).get("tokenizer_sha256")
  if theirs is None:
    theirs = content_hash(named_tokenizer(_tokenizer_name(folder, known)))
  if sha256 != theirs:
    raise InputError(
      f"config.data.tokenizer={name!r} (sha256 {sha256[:12]}…) is not the tokenizer of {FIELD}={folder.address!r} "
      f"(sha256 {theirs[:12]}…), whose ids the weights know; leave the field out, and prepare again"
    )


@contextlib.contextmanager
def _checkpoints(folder: RunFolder) -> Iterator[Checkpoints]:
  with contextlib.closing(Checkpoints(folder.place(folder_lib.CHECKPOINTS), read_only=True)) as checkpoints:
    yield checkpoints


def find_start(setup: Setup) -> Start:
  """The checkpoint that config.train names.

  Raises:
    InputError: it is not there, or is of another model or tokenizer.
  """
  config = setup.config
  folder = _with_run(RunFolder(config.train.start_from))
  known = read_config(folder)
  theirs = _at_start(known.model, config.train)
  _model_of(theirs, config, {f"model.{name}": None for name in config.model})
  manifest = setup.corpus.manifest
  _check_tokenizer(folder, known, manifest.tokenizer_sha256, config.data.tokenizer)
  with _checkpoints(folder) as checkpoints:
    step = _step(checkpoints, config.train)
    return Start(folder, step, checkpoints.facts(step))


def _step(checkpoints: Checkpoints, train: TrainConfig) -> int:
  where, parameter = f"{FIELD}={train.start_from!r}", "config.train.start_checkpoint"
  return choose_step(checkpoints, train.start_checkpoint, where, parameter)


def starting_params(setup: Setup, start: Start) -> Any:
  """The parameters of a checkpoint, sharded as the run's; verified bit for bit.

  Raises:
    DamagedError: they are not what was written.
  """
  abstract = abstract_sharded_params(setup.config.model, setup.mesh)
  with _checkpoints(start.folder) as checkpoints:
    params = checkpoints.restore(start.step, {"params": abstract})["params"]
  return jax.block_until_ready(params)

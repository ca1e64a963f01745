"""The reference log-probabilities of a run that compares itself with the weights that it starts from (DPO)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.data import references as stored
from mixln_jax.data.records import SPLITS, Corpus
from mixln_jax.errors import InputError
from mixln_jax.files import TEXT
from mixln_jax.model import Transformer
from mixln_jax.model.preference import sequence_log_probabilities
from mixln_jax.opening import Setup, make_loader
from mixln_jax.parallel.mesh import global_batch
from mixln_jax.parallel.processes import agree, is_first, wait_for_all
from mixln_jax.parallel.rules import on_mesh, replicated
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.text import printable
from mixln_jax.training import finetune
from mixln_jax.training.step import columns_at


def with_references(setup: Setup, folders: Sequence[RunFolder]) -> Setup:
  """The setup whose records have the reference log-probabilities that its loss reads; as it is where it reads none.

  They are those that are stored with the records for the start checkpoint and the model, or are computed and stored
  now. A run that has begun also takes a file from before the model was stored: it was trained against that.

  Args:
    setup: of a run, or what several runs of one program share.
    folders: of these runs, which may not be there yet. One that has begun says which weights it started from.

  Raises:
    InputError: there is no start checkpoint, it is not the one that a run began with, or what is stored is damaged.
  """
  config, corpus = setup.config, setup.corpus
  if config.preference.loss != "dpo":
    return setup
  if not config.train.start_from:
    raise InputError(
      "config.preference.loss=dpo needs config.train.start_from: the run whose weights are the reference; set it, or "
      "use simpo or orpo, which have none"
    )
  assert isinstance(corpus, Corpus)  # `config.validate` refuses pairs that are no folder of records
  begun = _start_hashes(folders)
  start = None if begun else finetune.find_start(setup)
  start_hash = begun or (start.identity()["hash"] if start else "")
  reference = stored.Reference(start_hash, stored.model_hash(config.model))
  found = stored.with_stored(corpus, reference)
  if found is None and begun:
    found = stored.with_stored(corpus, stored.Reference(start_hash))
  agree("the reference log-probabilities", {"whether they are stored with the records": found is not None})
  if found is None:
    start = start or finetune.find_start(setup)
    theirs = start.identity()["hash"]
    if theirs != start_hash:
      raise InputError(
        f"config.train.start_from={config.train.start_from!r}: its checkpoint has weights {theirs} now, and the run "
        f"started from {start_hash}, whose log-probabilities are not in {corpus.folder}; bring "
        f"{stored.file_of(corpus.folder, reference).name} back, or use another workdir"
      )
    if is_first():
      print(printable(f"reference  log-probabilities of {start.describe()}"), flush=True)
    references = _compute(setup, finetune.starting_params(setup, start))
    found = stored.store(corpus, reference, references)
    wait_for_all("the reference log-probabilities")
  return setup._replace(corpus=found)


def _start_hashes(folders: Sequence[RunFolder]) -> str:
  """The hash of the weights that runs started from, as their folders say; empty where none has begun."""
  hashes = {}
  for folder in folders:
    facts = folder.facts(folder_lib.START, {"hash": TEXT}) if folder.has_run else None
    if facts is not None:
      hashes[facts["hash"]] = folder.name
  if len(hashes) > 1:
    raise InputError(
      f"together: {' and '.join(hashes.values())} started from different weights ({', '.join(hashes)}), and one "
      "reference serves all of them; train them one by one"
    )
  return next(iter(hashes), "")


def _compute(setup: Setup, params: Any) -> dict[str, np.ndarray]:
  """The log-probabilities under given parameters, of each split [records, documents of a record]."""
  config, mesh = setup.config, setup.mesh
  model, columns = Transformer(config.model), columns_at(config, None, jnp.int32(0))

  def of_batch(params: Any, batch: Any) -> jax.Array:
    return sequence_log_probabilities(model, params, batch, columns=columns)

  step = jax.jit(of_batch, out_shardings=replicated(mesh))  # every process stores all of them
  loader = make_loader(setup, config.evaluate.batch_size)
  references = {}
  with on_mesh(mesh):
    for split in SPLITS:
      pending = [step(params, global_batch(batch, mesh)) for batch in loader.once(split)]
      numbers_NS = np.concatenate(jax.device_get(pending))[: setup.corpus.manifest.splits[split].records]
      references[split] = np.ascontiguousarray(numbers_NS[:, : _columns_in_use(numbers_NS)], np.float32)
  return references


def _columns_in_use(numbers_NS: np.ndarray) -> int:
  """How many columns there are up to the last one that is not all zeros; those behind it stand for no document."""
  used_S = np.flatnonzero(np.any(numbers_NS != 0, axis=0))
  return int(used_S[-1]) + 1 if len(used_S) else 0

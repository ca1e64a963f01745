"""A run and another corpus: its validation set, cut into records by the run's own tokenizer."""

from pathlib import Path

from mixln_jax import config as config_lib
from mixln_jax.data.opening import open_data
from mixln_jax.data.prepare import prepare
from mixln_jax.data.records import has_records
from mixln_jax.data.tokenizer import BYTES
from mixln_jax.data.tokenizer_files import FILES, RECORDS
from mixln_jax.errors import InputError
from mixln_jax.opening import OpenRun, Setup
from mixln_jax.parallel import processes
from mixln_jax.runs import folder as folder_lib


def other_corpus(run: OpenRun, source: str) -> Setup:
  """The setup of a run with another corpus in place of its own; the records are prepared where they are not there.

  Held out is what a run that trains on that corpus would hold out, so that two runs on two corpora can each be
  evaluated on both.

  Args:
    run: whose tokenizer cuts the corpus, and whose sequence length and mode its records have.
    source: the corpus, as config.data.source names it.

  Raises:
    InputError: the corpus can't be used, or the run is of instructions or of pairs of answers.
  """
  config = run.config.copy_and_resolve_references()
  if config.data.mode in config_lib.WHOLE_EXAMPLES:
    raise InputError(
      f"corpus={source!r}: the run was trained on {config.data.mode} (config.data.mode), whose loss is that of "
      "answers; a corpus has none"
    )
  share = config_lib.FIELDS["data.validation_share"].default
  config.data.update(source=source, validation_source="", validation_share=share, tokenizer=_tokenizer(run))
  config.data.update(directory="", mixture="", on_the_fly=False)
  config_lib.validate(config)
  if processes.is_first():
    prepare(config)
  processes.wait_for_all(f"the records of {source}")
  return Setup(config, run.mesh, open_data(config))


def _tokenizer(run: OpenRun) -> str:
  """The run's tokenizer as config.data.tokenizer names one. That of its records comes first: runs that share those then
  share the records of the other corpus."""
  records = run.setup.corpus.folder
  if has_records(records):
    return f"{RECORDS}{records}"
  if run.tokenizer.name == BYTES:
    return BYTES
  path = Path(run.folder.fetched(f"{folder_lib.TOKENIZER}/{FILES[run.tokenizer.name]}"))
  return str(path.absolute())

"""Opens the data of a config: prepared records, a mixture of them, or documents tokenized on the fly."""

from pathlib import Path

from mixln_jax.config import Config
from mixln_jax.data.checks import check_corpus, check_shape, check_tokenizer, data_directory
from mixln_jax.data.loader import Data
from mixln_jax.data.mixture import open_mixture
from mixln_jax.data.on_the_fly import OnTheFly
from mixln_jax.data.records import has_records, no_records, open_corpus


def open_data(config: Config, fallback: Path | None = None) -> Data:
  """Opens the data of config.data.

  Args:
    config: the run's config.
    fallback: a folder of records to open if the config's own folder is relative to the working directory and has no
      records. To evaluate a run from another working directory, pass the absolute folder that it was trained on. It is
      not used for a mixture or for documents on the fly.

  Raises:
    InputError: the data does not exist, is damaged, or contradicts the config.
  """
  if config.data.on_the_fly:
    data = OnTheFly(config.data)
  elif config.data.mixture:
    data = open_mixture(config.data.mixture, verify=config.data.verify)
  else:
    corpus = open_corpus(_folder_of_records(config, fallback), verify=config.data.verify)
    check_corpus(corpus, config)
    return corpus
  where = f"the data {data.manifest.source}"
  check_shape(data.manifest, config, where)
  check_tokenizer(data.manifest, config, where)
  return data


def _folder_of_records(config: Config, fallback: Path | None) -> Path:
  folder = data_directory(config)
  # An absolute folder does not depend on the working directory: if it has no records, they are gone.
  if fallback is None or folder.is_absolute() or has_records(folder):
    return folder
  if not has_records(fallback):
    raise no_records(f"{folder.absolute()} or in {fallback}")
  return fallback

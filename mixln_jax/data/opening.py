"""The data that a config stands for: prepared records, a mixture of them, or documents on the fly."""

from typing import Any

from mixln_jax.data.loader import Data
from mixln_jax.data.mixture import open_mixture
from mixln_jax.data.on_the_fly import OnTheFly
from mixln_jax.data.prepare import check_corpus, check_shape, check_tokenizer, data_directory
from mixln_jax.data.records import open_corpus


def open_data(config: Any) -> Data:
  """Opens the data of config.data.

  Raises:
    InputError: it is not there, is damaged, or contradicts the config.
  """
  if config.data.on_the_fly:
    data = OnTheFly(config)
  elif config.data.mixture:
    data = open_mixture(config.data.mixture, verify=config.data.verify)
  else:
    corpus = open_corpus(data_directory(config), verify=config.data.verify)
    check_corpus(corpus, config)
    return corpus
  where = f"the data {data.manifest.source}"
  check_shape(data.manifest, config, where)
  check_tokenizer(data.manifest, config, where)
  return data

"""Checks that a recipe names the tokenizer that imported weights were trained with.

With another tokenizer's ids the weights are useless, without any error: two tokenizers may have the same number of ids
(T5's and LLaMA 2's both have 32,000).
"""

from pathlib import Path

from mixln_jax.config import Config
from mixln_jax.data.checks import data_directory
from mixln_jax.data.records import has_records, named_tokenizer, open_corpus
from mixln_jax.data.tokenizer import HUGGING_FACE, SENTENCEPIECE, Tokenizer, are_same
from mixln_jax.data.tokenizer_files import FILES, GGUF, read_tokenizer
from mixln_jax.errors import InputError

NAMES = (FILES[HUGGING_FACE], FILES[SENTENCEPIECE], "spiece.model")  # the last is T5's name


def check_tokenizer(place: Path, config: Config) -> str | None:
  """Rejects a config whose tokenizer is not the one beside the weights or in their file.

  Args:
    place: the folder of the weights, or a GGUF file, which contains its tokenizer.
    config: the recipe that the imported run is to be trained with.

  Returns:
    A warning if there is a tokenizer that can't be read and compared; None if they match or there is none.

  Raises:
    InputError: config.data.tokenizer is not the weights' tokenizer, can't be read, or has ids that the embedding lacks.
  """
  files = [place / name for name in NAMES if (place / name).is_file()]
  if place.suffix == GGUF:
    files = [place]
  theirs: dict[Path, Tokenizer] = {}
  problem = ""
  for file in files:
    try:
      theirs[file] = read_tokenizer(str(file))
    except InputError as error:
      problem = str(error)
  if not theirs:
    return f"not compared with config.data.tokenizer: {problem}" if files else None
  named = " or ".join(map(str, theirs))
  advice = f"the checkpoint's own is {named}: set config.data.tokenizer to it"
  try:
    ours = _tokenizer_of(config)
  except InputError as error:
    raise InputError(f"{error} ({advice})") from error
  if ours is None:
    raise InputError(
      f"config.data.tokenizer={config.data.tokenizer!r} would be trained on the corpus, but these weights need another "
      f"tokenizer; {advice}"
    )
  if not any(are_same(ours, other) for other in theirs.values()):
    raise InputError(f"config.data.tokenizer={config.data.tokenizer!r} is not the tokenizer of these weights; {advice}")
  if ours.vocab_size > config.model.vocab_size:
    raise InputError(
      f"config.data.tokenizer={config.data.tokenizer!r} has {ours.vocab_size:,} ids, and these weights an embedding of "
      f"{config.model.vocab_size:,} (config.model.vocab_size): weights and tokenizer are of two models, or one of them "
      "is damaged; download both again"
    )
  return None


def _tokenizer_of(config: Config) -> Tokenizer | None:
  """The tokenizer of a config; None if it is still to be trained on the corpus."""
  if config.data.tokenizer != SENTENCEPIECE:
    return named_tokenizer(config.data.tokenizer)
  records = data_directory(config)
  return open_corpus(records).tokenizer if has_records(records) else None

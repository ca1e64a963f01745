"""The folder of a config's records, and checks that records match the config that reads them."""

import hashlib
import re
from pathlib import Path

from mixln_jax.config import Config
from mixln_jax.data.corpus import EMBEDDED, EMBEDDED_PARAGRAPHS
from mixln_jax.data.records import Corpus, Manifest, named_tokenizer
from mixln_jax.data.tokenizer import BYTES, SENTENCEPIECE, content_hash
from mixln_jax.data.tokenizer_files import HUB, RECORDS
from mixln_jax.errors import InputError
from mixln_jax.files import local_path

DEFAULT_ROOT = Path("work/data")


def data_directory(config: Config) -> Path:
  """The folder of a config's records, absolute or relative to the working directory.

  It is config.data.directory, or a folder of DEFAULT_ROOT named after the source, the tokenizer and the mode.
  """
  data = config.data
  if data.directory:
    return local_path(data.directory)
  if data.source in (EMBEDDED, EMBEDDED_PARAGRAPHS):
    source = data.source
  else:
    stem = Path(data.source).stem.strip("*.") or "corpus"
    source = f"{stem}-{_short_hash(data.source + data.validation_source)}"
  if data.tokenizer == SENTENCEPIECE:
    tokenizer = f"bpe{config.model.vocab_size}"
  elif data.tokenizer == BYTES:
    tokenizer = BYTES
  else:
    tokenizer = f"{Path(data.tokenizer).stem}-{_short_hash(data.tokenizer)}"
  parts = [source, tokenizer, f"{data.mode}{data.sequence_length}"]
  if data.text_field != "text":
    parts.append(data.text_field)
  return DEFAULT_ROOT / re.sub(r"[^\w.-]+", "-", "-".join(parts))


def _short_hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def check_corpus(corpus: Corpus, config: Config) -> None:
  """Rejects records that don't match the config that reads them.

  Raises:
    InputError: the source, sequence length, mode, vocabulary or tokenizer differs.
  """
  manifest, data = corpus.manifest, config.data
  where = f"the records in {corpus.folder}"
  fields = ["source", "validation_source", "text_field"]
  if not data.validation_source:
    fields.append("validation_share")
  for field in fields:
    theirs = getattr(manifest, field)
    if data[field] != theirs:
      raise InputError(
        f"config.data.{field}={data[field]!r}, but {where} were made with {theirs!r}; set the field to that, or "
        "prepare records in another folder"
      )
  check_shape(manifest, config, where)
  check_tokenizer(manifest, config, where)


def check_tokenizer(manifest: Manifest, config: Config, where: str) -> None:
  """Rejects records that were made with another tokenizer than the one in config.data.

  A tokenizer file that no longer exists, or a name on the hub, is compared by name only; the records contain a copy.

  Args:
    manifest: the manifest of the records.
    config: the run's config.
    where: the name of the records in messages.

  Raises:
    InputError: the tokenizers differ, or the one in config.data can't be read.
  """
  name = config.data.tokenizer
  if name == SENTENCEPIECE:  # trained on the corpus with exactly config.model.vocab_size pieces
    matches = manifest.tokenizer == name and manifest.vocab_size == config.model.vocab_size
  elif name == BYTES:
    matches = manifest.tokenizer == name
  elif name.startswith(HUB):
    matches = name == manifest.tokenizer_source
  elif name == manifest.tokenizer_source and not local_path(name.removeprefix(RECORDS)).exists():
    matches = True
  else:
    matches = content_hash(named_tokenizer(name)) == manifest.tokenizer_sha256
  if not matches:
    raise InputError(
      f"config.data.tokenizer={name!r} is not the tokenizer of {where} (theirs: {manifest.tokenizer}, "
      f"sha256 {manifest.tokenizer_sha256[:12]}…); set it to theirs, or prepare the records again"
    )


def check_shape(manifest: Manifest, config: Config, where: str) -> None:
  """Rejects records whose length, mode or vocabulary does not match the config.

  Args:
    manifest: the manifest of the records.
    config: the run's config.
    where: the name of the records in messages.

  Raises:
    InputError: a field does not match; the message names it.
  """
  data = config.data
  if data.sequence_length > manifest.sequence_length:
    raise InputError(
      f"config.data.sequence_length={data.sequence_length} exceeds the {manifest.sequence_length} "
      f"tokens of {where}; lower it, or prepare longer records"
    )
  if data.mode != manifest.mode:
    raise InputError(
      f"config.data.mode={data.mode}, but {where} are in mode {manifest.mode}; prepare them again in another folder"
    )
  if manifest.mode != "pad" and data.sequence_length != manifest.sequence_length:
    raise InputError(
      f"config.data.sequence_length={data.sequence_length}, but {where} are packed at "
      f"{manifest.sequence_length} and cutting them would drop text; prepare records of that length"
    )
  if manifest.vocab_size > config.model.vocab_size:
    raise InputError(
      f"config.model.vocab_size={config.model.vocab_size} is below the {manifest.vocab_size} ids of "
      f"the tokenizer of {where}; raise it"
    )

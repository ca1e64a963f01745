"""Text to records: what `prepare` does."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import records as records_lib
from mixln_jax.data import tokenizer as tokenizer_lib
from mixln_jax.errors import InputError

DEFAULT_ROOT = Path("work/data")
WRITERS: dict[str, Callable[[Iterable[list[int]], int, int], Iterator[records_lib.Record]]] = {
  "pack": records_lib.packed_records,
  "pad": records_lib.padded_records,
}


def data_directory(config: Any) -> Path:
  """Where the records of a config lie: config.data.directory, or a folder named after what makes them what they are."""
  data = config.data
  if data.directory:
    return Path(data.directory).expanduser()
  source = (
    data.source
    if data.source in (corpus_lib.EMBEDDED, corpus_lib.EMBEDDED_PARAGRAPHS)
    else f"{Path(data.source).stem}-{_short_hash(data.source)}"
  )
  if data.tokenizer == tokenizer_lib.SENTENCEPIECE:
    tokenizer = f"bpe{config.model.vocab_size}"
  elif data.tokenizer == tokenizer_lib.BYTES:
    tokenizer = tokenizer_lib.BYTES
  else:
    tokenizer = f"{Path(data.tokenizer).stem}-{_short_hash(data.tokenizer)}"
  return DEFAULT_ROOT / "-".join((source.replace(":", "-"), tokenizer, f"{data.mode}{data.sequence_length}"))


def _short_hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def prepare(config: Any, *, progress: bool = True) -> records_lib.Corpus:
  """Writes the records of config.data, or reuses those that are there, and opens them.

  The folder appears whole or not at all: it is written beside its place and renamed.

  Raises:
    InputError: the corpus or the tokenizer can't be used, or the folder holds other records.
  """
  folder = data_directory(config)
  documents = list(corpus_lib.documents(config.data.source))
  source_sha256 = _documents_hash(documents)
  if (folder / records_lib.MANIFEST).is_file():
    corpus = records_lib.open_corpus(folder, verify=config.data.verify)
    _check_reusable(corpus, config, source_sha256)
    return corpus
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(
      f"config.data.directory={str(folder)!r} is not empty and holds no records; choose another, nothing was written"
    )
  train = [document for document in documents if not corpus_lib.is_validation(document.name)]
  validation = [document for document in documents if corpus_lib.is_validation(document.name)]
  if not train or not validation:
    missing = "validation" if train else "training"
    raise InputError(
      f"config.data.source={config.data.source!r}: no document is left for {missing} of {len(documents)} "
      f"({corpus_lib.VALIDATION_SHARE:.0%} are held out by the hash of their names); give a corpus of more documents"
    )
  tokenizer = _make_tokenizer(config, train)
  partial = folder.with_name(f".{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
  except OSError as error:
    raise InputError(
      f"config.data.directory={str(folder)!r}: can't be made ({error.strerror}); choose another"
    ) from error
  splits = {"train": train, "validation": validation}
  _write(partial, config, tokenizer, splits, source_sha256=source_sha256, progress=progress)
  if folder.exists():
    folder.rmdir()
  partial.rename(folder)
  return records_lib.open_corpus(folder)


def _documents_hash(documents: list[corpus_lib.Document]) -> str:
  digest = hashlib.sha256()
  for document in documents:
    digest.update(json.dumps(document).encode())
  return digest.hexdigest()


def _make_tokenizer(config: Any, train: list[corpus_lib.Document]) -> tokenizer_lib.Tokenizer:
  name = config.data.tokenizer
  if name == tokenizer_lib.BYTES:
    return tokenizer_lib.ByteTokenizer()
  if name == tokenizer_lib.SENTENCEPIECE:
    return tokenizer_lib.train_sentencepiece((document.text for document in train), config.model.vocab_size)
  return tokenizer_lib.read_tokenizer(name)


def _write(
  folder: Path,
  config: Any,
  tokenizer: tokenizer_lib.Tokenizer,
  splits: dict[str, list[corpus_lib.Document]],
  *,
  source_sha256: str,
  progress: bool,
) -> None:
  (folder / records_lib.TOKENIZER).write_bytes(tokenizer.content)
  length, dtype = config.data.sequence_length, records_lib.token_dtype(tokenizer.vocab_size)
  written = {}
  for split, documents in splits.items():
    writer = records_lib.SplitWriter(folder, split, dtype)
    tokens = 0

    def encoded(documents: list[corpus_lib.Document] = documents, split: str = split) -> Iterator[list[int]]:
      nonlocal tokens
      for document in tqdm(documents, desc=f"prepare {split}", unit=" documents", disable=None if progress else True):
        ids = [*tokenizer.encode(document.text), tokenizer.eos_id]
        tokens += len(ids)
        yield ids

    for record in WRITERS[config.data.mode](encoded(), length, tokenizer_lib.PAD):
      writer.write(record)
    written[split] = writer.finish(len(documents), tokens)
  manifest = records_lib.Manifest(
    source=config.data.source,
    source_sha256=source_sha256,
    tokenizer=tokenizer.name,
    tokenizer_sha256=tokenizer_lib.content_hash(tokenizer),
    vocab_size=tokenizer.vocab_size,
    sequence_length=length,
    mode=config.data.mode,
    bytes_per_token=tuple(tokenizer.bytes_per_token()),
    splits=written,
  )
  (folder / records_lib.MANIFEST).write_text(manifest.to_json())


def _check_reusable(corpus: records_lib.Corpus, config: Any, source_sha256: str) -> None:
  manifest = corpus.manifest
  problem = None
  if manifest.source_sha256 != source_sha256:
    problem = f"they were made from another text than config.data.source={config.data.source!r} has now"
  elif manifest.sequence_length != config.data.sequence_length:
    problem = (
      f"they hold {manifest.sequence_length} tokens, not config.data.sequence_length={config.data.sequence_length}"
    )
  if problem:
    raise InputError(
      f"the records in {corpus.folder} can't be reused: {problem}; set config.data.directory to a "
      "new folder, nothing was written"
    )
  check_corpus(corpus, config)


def check_corpus(corpus: records_lib.Corpus, config: Any) -> None:
  """Refuses records that don't fit the config that wants to read them.

  Raises:
    InputError: the sequence length, mode, vocabulary or tokenizer contradict the records.
  """
  manifest, data = corpus.manifest, config.data
  where = f"the records in {corpus.folder}"
  if data.sequence_length > manifest.sequence_length:
    raise InputError(
      f"config.data.sequence_length={data.sequence_length} is over the {manifest.sequence_length} "
      f"tokens of {where}; lower it, or prepare longer records"
    )
  if data.source != manifest.source:
    raise InputError(
      f"config.data.source={data.source!r}, but {where} were made from {manifest.source!r}; set it to that, "
      "or prepare in another folder"
    )
  if data.mode != manifest.mode:
    raise InputError(
      f"config.data.mode={data.mode}, but {where} are in mode {manifest.mode}; prepare them again in another folder"
    )
  if manifest.mode == "pack" and data.sequence_length != manifest.sequence_length:
    raise InputError(
      f"config.data.sequence_length={data.sequence_length}, but {where} are packed at "
      f"{manifest.sequence_length} and cutting them would drop text; prepare records of that length"
    )
  if manifest.vocab_size > config.model.vocab_size:
    raise InputError(
      f"config.model.vocab_size={config.model.vocab_size} is under the {manifest.vocab_size} ids of "
      f"the tokenizer of {where}; raise it"
    )
  if data.tokenizer == tokenizer_lib.SENTENCEPIECE:  # trained to exactly config.model.vocab_size
    matches = manifest.tokenizer == data.tokenizer and manifest.vocab_size == config.model.vocab_size
  elif data.tokenizer == tokenizer_lib.BYTES:
    matches = manifest.tokenizer == data.tokenizer
  else:
    matches = tokenizer_lib.content_hash(tokenizer_lib.read_tokenizer(data.tokenizer)) == manifest.tokenizer_sha256
  if not matches:
    raise InputError(
      f"config.data.tokenizer={data.tokenizer!r} did not make {where} (theirs: {manifest.tokenizer}, "
      f"sha256 {manifest.tokenizer_sha256[:12]}…); set it to theirs, or prepare again"
    )

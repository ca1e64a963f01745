"""Text to records: what `prepare` does.

A corpus is cut into parts (`corpus.parts_of`), and each part becomes one shard a split, written by whichever process is
free. Nothing depends on how many there are. What is finished stays: a run that was killed goes on with the parts that
are missing, and ends with the same bytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import instructions
from mixln_jax.data import records as records_lib
from mixln_jax.data import tokenizer as tokenizer_lib
from mixln_jax.data.corpus import Bad, Document, Part
from mixln_jax.data.files import File
from mixln_jax.data.instructions import Example
from mixln_jax.errors import InputError

DEFAULT_ROOT = Path("work/data")
PLAN, PARTS, LOCK, SOURCE_STATE = "plan.json", "parts", ".lock", ".source_state"
ADDRESSED = ("tfds", "hf")  # kinds of parts that are no files
EXAMPLES = 3  # of bad documents that a part remembers


def data_directory(config: Any) -> Path:
  """Where the records of a config lie: config.data.directory, or a folder named after what makes them what they are."""
  data = config.data
  if data.directory:
    return Path(data.directory).expanduser()
  source = (
    data.source
    if data.source in (corpus_lib.EMBEDDED, corpus_lib.EMBEDDED_PARAGRAPHS)
    else f"{Path(data.source).stem.strip('*.') or 'corpus'}-{_short_hash(data.source + data.validation_source)}"
  )
  if data.tokenizer == tokenizer_lib.SENTENCEPIECE:
    tokenizer = f"bpe{config.model.vocab_size}"
  elif data.tokenizer == tokenizer_lib.BYTES:
    tokenizer = tokenizer_lib.BYTES
  else:
    tokenizer = f"{Path(data.tokenizer).stem}-{_short_hash(data.tokenizer)}"
  field = "" if data.text_field == "text" else f"-{data.text_field}"
  name = "-".join((source, tokenizer, f"{data.mode}{data.sequence_length}{field}"))
  return DEFAULT_ROOT / re.sub(r"[^\w.-]+", "-", name)


def _short_hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


class Job(NamedTuple):
  """One part to write: all that a worker needs to know."""

  part: Part
  number: int
  total: int  # parts of the whole corpus
  split: str | None  # None = the documents' hash decides
  folder: Path
  sequence_length: int
  mode: str
  text_field: str
  validation_share: float
  tokenizer: str  # its kind; its content lies in the folder

  @property
  def result(self) -> Path:
    return self.folder / PARTS / f"{self.number:05d}.json"


def prepare(config: Any, *, progress: bool = True, workers: int | None = None) -> records_lib.Corpus:
  """Writes the records of config.data, or reuses those that are there, and opens them.

  The folder appears whole or not at all: it is written beside its place and renamed.

  Args:
    config: the run's config.
    progress: show a progress bar in a terminal.
    workers: processes; by default one a core, as far as there are parts.

  Raises:
    InputError: the corpus or the tokenizer can't be used, or the folder holds other records.
  """
  folder, data = data_directory(config), config.data
  sources = [(data.source, "train" if data.validation_source else None)]
  if data.validation_source:
    sources.append((data.validation_source, "validation"))
  parts_of = instructions.parts_of if data.mode == instructions.KIND else corpus_lib.parts_of
  parts = [(part, split) for source, split in sources for part in parts_of(source)]
  _check_disjoint(parts)
  state = _source_state([part for part, _ in parts], data.text_field)
  if (folder / records_lib.MANIFEST).is_file():
    return _reuse(folder, config, parts, state)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(
      f"config.data.directory={str(folder)!r} is not empty and holds no records; choose another, nothing was written"
    )
  partial = folder.with_name(f".{folder.name}.partial")
  given = _given_tokenizer(config)
  with _locked(partial, folder):
    if (folder / records_lib.MANIFEST).is_file():  # another process was quicker
      shutil.rmtree(partial)
      return _reuse(folder, config, parts, state)
    _start_or_go_on(partial, _plan(config, parts, state, given))
    tokenizer = _stored_tokenizer(partial, config, parts, given)
    jobs = [
      Job(
        part,
        number,
        len(parts),
        split,
        partial,
        data.sequence_length,
        data.mode,
        data.text_field,
        data.validation_share,
        tokenizer.name,
      )
      for number, (part, split) in enumerate(parts)
    ]
    results = _run(jobs, workers or os.cpu_count() or 1, progress=progress)
    _check_results(results, config, partial)
    _finish(partial, folder, config, tokenizer, results, state)
  return records_lib.open_corpus(folder)


# Parts


class _SplitOfPart:
  """Documents of one split of one part, on their way into its shard."""

  def __init__(self, job: Job, split: str, tokenizer: tokenizer_lib.Tokenizer):
    path = job.folder / f"{split}-{job.number:05d}-of-{job.total:05d}.array_record"
    self._tokenizer = tokenizer
    self._writer = records_lib.ShardWriter(path, records_lib.token_dtype(tokenizer.vocab_size))
    self._packer = records_lib.PACKERS[job.mode](job.sequence_length, tokenizer_lib.PAD)
    self._length = job.sequence_length
    self._documents = self._tokens = self._largest_id = 0
    self.cut_prompts = 0

  def add(self, document: Document | Example) -> Bad | None:
    """Takes a document; returns what is bad about one that no record can hold."""
    if isinstance(document, Document):
      ids = [*self._tokenizer.encode(document.text), self._tokenizer.eos_id]
      self._write(document.name, ids, self._packer.add(ids))
      return None
    tokens = instructions.tokenize(document, self._tokenizer, self._length)
    if tokens is None:
      return Bad(instructions.ANSWER_TOO_LONG, f"the example that answers {document.answer[:60]!r}")
    self.cut_prompts += tokens.num_cut > 0
    self._tokens += tokens.num_cut
    self._write(document.name, tokens.ids, self._packer.add(tokens.ids, tokens.num_answer))
    return None

  def _write(self, name: str, ids: Sequence[int], full: Iterable[records_lib.Record]) -> None:
    largest = max(ids)
    if largest >= self._tokenizer.vocab_size:
      raise InputError(
        f"config.data.tokenizer: gives id {largest} for document {name!r}, beyond its vocabulary of "
        f"{self._tokenizer.vocab_size}; choose another"
      )
    self._documents += 1
    self._tokens += len(ids)
    self._largest_id = max(self._largest_id, largest)
    for record in full:
      self._writer.write(record)

  def finish(self) -> records_lib.Split:
    for record in self._packer.finish():
      self._writer.write(record)
    shards = self._writer.finish()
    return records_lib.Split(self._documents, self._tokens, self._writer.counted, self._largest_id, shards)


def write_part(job: Job, count: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
  """Writes the shards of one part, and its result last, which says that it is done.

  Args:
    job: the part.
    count: called with the number of documents done since the last call.

  Returns:
    Its `splits`, the `sha256` of its documents, and how many it `skipped`, with a few examples of `where`.
  """
  path = job.folder / records_lib.TOKENIZER
  tokenizer = tokenizer_lib.load_tokenizer(job.tokenizer, path.read_bytes(), str(path))
  splits = {split: _SplitOfPart(job, split, tokenizer) for split in records_lib.SPLITS}
  skipped: Counter[str] = Counter()
  where: list[str] = []
  digest = hashlib.sha256()

  def skip(bad: Bad) -> None:
    skipped[bad.reason] += 1
    if len(where) < EXAMPLES:
      where.append(f"{bad.reason}: {bad.where}")

  for document in _read(job.part, job.text_field):
    if isinstance(document, Bad):
      skip(document)
      continue
    _hash_document(digest, document)
    if bad := splits[job.split or _split_of(document, job.validation_share)].add(document):
      skip(bad)
    else:
      count(1)
  result = {
    "splits": {name: dataclasses.asdict(split.finish()) for name, split in splits.items()},
    "sha256": digest.hexdigest(),
    "skipped": skipped,
    "where": where,
    "cut_prompts": sum(split.cut_prompts for split in splits.values()),
  }
  _write_whole(job.result, json.dumps(result))
  return result


def _read(part: Part, text_field: str) -> Iterator[Document | Example | Bad]:
  return instructions.read(part) if part.kind == instructions.KIND else corpus_lib.read(part, text_field)


def _hash_document(digest: Any, document: Document | Example) -> None:
  for text in document:
    data = text.encode(errors="surrogateescape")
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _split_of(document: Document | Example, validation_share: float) -> str:
  return "validation" if corpus_lib.is_validation(document.name, validation_share) else "train"


def _write_whole(path: Path, text: str) -> None:
  """Writes a file so that it is there whole or not at all."""
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  partial.write_text(text)
  partial.replace(path)


_counter: Any = None  # of a worker process: documents done by all of them


def _start_worker(counter: Any, parent: int) -> None:
  global _counter
  _counter = counter

  def watch() -> None:  # a worker whose parent was killed would wait for work for ever
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _work(job: Job) -> dict[str, Any]:
  def count(documents: int) -> None:
    # About right: a lock would be exact, but a worker that is killed with it would never give it back.
    _counter.value += documents

  return write_part(job, count)


def _result_of(job: Job) -> dict[str, Any] | None:
  """What a part gave that was done by an earlier process; None where it was not, or its shards are gone."""
  if not job.result.is_file():
    return None
  result = json.loads(job.result.read_text())
  shards = [shard for split in result["splits"].values() for shard in split["shards"]]
  paths = [job.folder / shard["file"] for shard in shards]
  whole = all(
    path.is_file() and path.stat().st_size == shard["bytes"] for path, shard in zip(paths, shards, strict=True)
  )
  return result if whole else None


def _run(jobs: Sequence[Job], workers: int, *, progress: bool) -> list[dict[str, Any]]:
  """The results of all jobs, in their order; those that are done already are read."""
  done = {job.number: result for job in jobs if (result := _result_of(job))}
  todo = [job for job in jobs if job.number not in done]
  if done:
    print(f"goes on     {len(done)} of {len(jobs)} parts were done already")
  bar = tqdm(desc="prepare", unit=" documents", disable=None if progress else True)
  with bar:
    if min(workers, len(todo)) <= 1:

      def count(documents: int) -> None:
        bar.update(documents)

      return [done.get(job.number) or write_part(job, count) for job in jobs]
    context = multiprocessing.get_context("spawn")
    counter = context.RawValue("q")
    with concurrent.futures.ProcessPoolExecutor(
      min(workers, len(todo)), context, initializer=_start_worker, initargs=(counter, os.getpid())
    ) as pool:
      futures = {pool.submit(_work, job): job.number for job in todo}
      try:
        while waiting := [future for future in futures if not future.done()]:
          concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION)
          bar.set_postfix_str(f"{len(jobs) - len(waiting)} of {len(jobs)} parts")
          bar.update(max(0, counter.value - bar.n))
          failed = [future for future in futures if future.done() and future.exception()]
          if failed:
            break
        done |= {number: future.result() for future, number in futures.items() if future.done()}
      except concurrent.futures.BrokenExecutor as error:
        raise InputError(
          "a process of `prepare` died, perhaps for want of memory; run it again with fewer --workers: the parts that "
          "are done are kept"
        ) from error
      except BaseException:
        for process in list((pool._processes or {}).values()):  # public from Python 3.14 on; a part may take hours
          process.kill()
        raise
      return [done[job.number] for job in jobs]


# The whole


@contextlib.contextmanager
def _locked(partial: Path, folder: Path) -> Iterator[None]:
  """Makes the folder of what is not finished, and keeps a second process out of it."""
  try:
    partial.mkdir(parents=True, exist_ok=True)
    (partial / PARTS).mkdir(exist_ok=True)
    lock = (partial / LOCK).open("a")
  except OSError as error:
    raise InputError(
      f"config.data.directory={str(folder)!r}: can't be made ({error.strerror}); choose another"
    ) from error
  with lock:
    busy = InputError(f"config.data.directory={str(folder)!r}: another process prepares it; wait for it")
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if not os.path.samestat(os.fstat(lock.fileno()), (partial / LOCK).stat()):
        raise busy  # it finished in between, and took the file with it
    except OSError as error:
      raise busy from error
    try:
      yield
    except OSError as error:
      raise InputError(
        f"config.data.directory={str(folder)!r}: can't be written ({error.strerror}); make room and run again, what is "
        "done is kept"
      ) from error


def _check_disjoint(parts: Sequence[tuple[Part, str | None]]) -> None:
  """Refuses a file, or a split of a data set, that is both trained and validated on."""
  places = {split: set() for split in ("train", "validation", None)}
  for part, split in parts:
    places[split] |= {part.paths} if part.kind in ADDRESSED else set(part.paths)
  if both := places["train"] & places["validation"]:
    raise InputError(
      f"config.data.source and config.data.validation_source both have {sorted(map(str, both))[0]}; what is trained on "
      "can't validate"
    )


def _source_state(parts: Sequence[Part], text_field: str) -> str:
  """Hash over the names, sizes and times of a corpus's files, and over some documents of each addressed part."""
  files = sorted({path for part in parts if part.kind not in ADDRESSED for path in part.paths})
  stats = [(path, *File(path).stat()) for path in files]
  first = [str(next(corpus_lib.read(part, text_field), "")) for part in parts if part.kind in ADDRESSED]
  described = [dataclasses.astuple(part) for part in parts]
  return hashlib.sha256(json.dumps([stats, first, described]).encode()).hexdigest()


def _plan(
  config: Any, parts: Sequence[tuple[Part, str | None]], state: str, given: tokenizer_lib.Tokenizer | None
) -> str:
  """What decides the bytes of the records, as text: work that was begun under another plan is not gone on with."""
  names = ("tokenizer", "sequence_length", "mode", "text_field", "validation_share")
  settings = {name: config.data[name] for name in names} | {"vocab_size": config.model.vocab_size}
  settings["tokenizer_sha256"] = given and tokenizer_lib.content_hash(given)
  described = [[dataclasses.asdict(part), split] for part, split in parts]
  return json.dumps({"format": records_lib.FORMAT, **settings, "state": state, "parts": described})


def _start_or_go_on(partial: Path, plan: str) -> None:
  path = partial / PLAN
  if path.is_file() and path.read_text() == plan:
    return
  for entry in partial.iterdir():
    if entry.name not in (LOCK, PARTS):
      entry.unlink()
  for entry in (partial / PARTS).iterdir():
    entry.unlink()
  _write_whole(path, plan)


def _given_tokenizer(config: Any) -> tokenizer_lib.Tokenizer | None:
  """The tokenizer that config.data names; None where one is to be trained on the corpus.

  Raises:
    InputError: it can't be read, or has more ids than the model.
  """
  name = config.data.tokenizer
  if name == tokenizer_lib.SENTENCEPIECE:
    if config.data.mode == instructions.KIND:
      raise InputError(
        f"config.data.tokenizer={name!r}: instructions need the tokenizer that the model was trained with; set "
        "config.train.start_from to its run, or name the tokenizer"
      )
    return None
  given = records_lib.named_tokenizer(name)
  if given.vocab_size > config.model.vocab_size:
    raise InputError(
      f"config.model.vocab_size={config.model.vocab_size} is under the {given.vocab_size} ids of "
      f"config.data.tokenizer={name!r}; raise it"
    )
  return given


def _stored_tokenizer(
  partial: Path, config: Any, parts: Sequence[tuple[Part, str | None]], given: tokenizer_lib.Tokenizer | None
) -> tokenizer_lib.Tokenizer:
  """The tokenizer of config.data, trained where none is given, and kept with the work."""
  path = partial / records_lib.TOKENIZER
  if given is None and path.is_file():
    return tokenizer_lib.SentencePieceTokenizer(path.read_bytes(), str(path))
  tokenizer = given or tokenizer_lib.train_sentencepiece(_training_texts(config, parts), config.model.vocab_size)
  partial_path = partial / f".{records_lib.TOKENIZER}"
  partial_path.write_bytes(tokenizer.content)
  partial_path.replace(path)
  return tokenizer


def _training_texts(config: Any, parts: Iterable[tuple[Part, str | None]]) -> Iterator[str]:
  """Text of the training split, as much as a tokenizer is trained on."""

  def texts() -> Iterator[str]:
    for part, split in parts:
      for document in corpus_lib.read(part, config.data.text_field):
        if isinstance(document, Bad):
          continue
        if (split or _split_of(document, config.data.validation_share)) == "train":
          yield document.text

  return tokenizer_lib.first_bytes(texts())


def train_tokenizer(config: Any, path: str, size: int) -> tokenizer_lib.Tokenizer:
  """Trains a tokenizer on the training split of config.data, and writes it.

  Args:
    config: the run's config.
    path: where to; a .model file is SentencePiece's, a .json file `tokenizers`'.
    size: its vocabulary.

  Raises:
    InputError: the path has another ending, or exists, or the corpus is too small.
  """
  target = Path(path).expanduser()
  makers = {".model": tokenizer_lib.train_sentencepiece, ".json": tokenizer_lib.train_hugging_face}
  if target.suffix not in makers:
    raise InputError(f"--train_tokenizer={path}: must end in .model (SentencePiece) or .json (tokenizers)")
  if target.exists():
    raise InputError(f"--train_tokenizer={path}: is there already; give another path, or use it")
  if config.data.mode == instructions.KIND:
    raise InputError("--train_tokenizer: not with config.data.mode=instructions, which need that of the trained model")
  parts = [
    (part, "train" if config.data.validation_source else None) for part in corpus_lib.parts_of(config.data.source)
  ]
  tokenizer = makers[target.suffix](_training_texts(config, parts), size, "--tokenizer_size")
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(tokenizer.content)
    partial.replace(target)
  except OSError as error:
    raise InputError(f"--train_tokenizer={path}: can't be written ({error.strerror})") from error
  return tokenizer


def _check_results(results: Sequence[dict[str, Any]], config: Any, partial: Path) -> None:
  """Refuses a corpus with too many bad documents (what is done is kept: the share may be raised), or an empty split."""
  documents = {name: sum(result["splits"][name]["documents"] for result in results) for name in records_lib.SPLITS}
  good, bad = sum(documents.values()), sum(sum(result["skipped"].values()) for result in results)
  source = f"config.data.source={config.data.source!r}"
  problem = None
  if bad > config.data.max_bad_share * (good + bad):
    examples = [where for result in results for where in result["where"]][:EXAMPLES]
    raise InputError(
      f"{source}: {bad} of {good + bad} documents can't be used ({'; '.join(examples)}), more than "
      f"config.data.max_bad_share={config.data.max_bad_share:g} allows; mend the corpus, or raise it"
    )
  if not good:
    problem = f"{source}: the corpus is empty; it needs at least one document with text"
  elif not all(documents.values()):
    missing = "training" if documents["validation"] else "validation"
    problem = (
      f"{source}: no document is left for {missing} of {good} ({config.data.validation_share:.1%} are held out by the "
      "hash of their names); give more documents, or config.data.validation_source"
    )
  if problem:
    shutil.rmtree(partial)
    raise InputError(problem)


def _finish(
  partial: Path,
  folder: Path,
  config: Any,
  tokenizer: tokenizer_lib.Tokenizer,
  results: Sequence[dict[str, Any]],
  state: str,
) -> None:
  """Writes the manifest, and renames the folder to what it is from now on."""
  skipped: Counter[str] = Counter()
  for result in results:
    skipped.update(result["skipped"])
  manifest = records_lib.Manifest(
    source=config.data.source,
    validation_source=config.data.validation_source,
    validation_share=config.data.validation_share,
    text_field=config.data.text_field,
    tokenizer_source=config.data.tokenizer,
    source_sha256=_documents_hash(result["sha256"] for result in results),
    skipped=dict(sorted(skipped.items())),
    tokenizer=tokenizer.name,
    tokenizer_sha256=tokenizer_lib.content_hash(tokenizer),
    vocab_size=tokenizer.vocab_size,
    sequence_length=config.data.sequence_length,
    mode=config.data.mode,
    bytes_per_token=tuple(tokenizer.bytes_per_token()),
    splits={name: _merge([result["splits"][name] for result in results]) for name in records_lib.SPLITS},
    cut_prompts=sum(result["cut_prompts"] for result in results) if config.data.mode == instructions.KIND else None,
  )
  for entry in partial.glob(".*.array_record.*"):  # of processes that were killed
    entry.unlink()
  (partial / SOURCE_STATE).write_text(state)
  (partial / records_lib.MANIFEST).write_text(manifest.to_json())
  if folder.exists():
    folder.rmdir()
  partial.rename(folder)
  shutil.rmtree(folder / PARTS)
  for name in (PLAN, LOCK):
    (folder / name).unlink()


def _documents_hash(digests: Iterable[str]) -> str:
  return hashlib.sha256("".join(digests).encode()).hexdigest()


def _merge(splits: Sequence[dict[str, Any]]) -> records_lib.Split:
  return records_lib.Split(
    documents=sum(split["documents"] for split in splits),
    tokens=sum(split["tokens"] for split in splits),
    counted=sum(split["counted"] for split in splits),
    largest_id=max(split["largest_id"] for split in splits),
    shards=tuple(records_lib.Shard(**shard) for split in splits for shard in split["shards"]),
  )


def _reuse(folder: Path, config: Any, parts: Sequence[tuple[Part, str | None]], state: str) -> records_lib.Corpus:
  """Opens the records that are there, where they are those of this corpus.

  Raises:
    InputError: they are of other text, or don't fit the config.
  """
  corpus = records_lib.open_corpus(folder, verify=config.data.verify)
  path = folder / SOURCE_STATE
  surely_the_same = (
    path.is_file() and path.read_text() == state and all(part.kind not in ADDRESSED for part, _ in parts)
  )
  if not surely_the_same:  # files that were touched, or a data set that has no times: do they still say the same?
    digests = []
    for part, _ in parts:
      digest = hashlib.sha256()
      for document in _read(part, config.data.text_field):
        if not isinstance(document, Bad):
          _hash_document(digest, document)
      digests.append(digest.hexdigest())
    if _documents_hash(digests) != corpus.manifest.source_sha256:
      raise InputError(
        f"the records in {corpus.folder} can't be reused: they were made from another text than "
        f"config.data.source={config.data.source!r} has now; set config.data.directory to a new folder, nothing was "
        "written"
      )
  if corpus.manifest.sequence_length != config.data.sequence_length:
    raise InputError(
      f"the records in {corpus.folder} can't be reused: they hold {corpus.manifest.sequence_length} tokens, not "
      f"config.data.sequence_length={config.data.sequence_length}; set config.data.directory to a new folder, nothing "
      "was written"
    )
  check_corpus(corpus, config)
  return corpus


def check_corpus(corpus: records_lib.Corpus, config: Any) -> None:
  """Refuses records that don't fit the config that wants to read them.

  Raises:
    InputError: the source, sequence length, mode, vocabulary or tokenizer contradict the records.
  """
  manifest, data = corpus.manifest, config.data
  where = f"the records in {corpus.folder}"
  fields = ("source", "validation_source", "text_field", *(() if data.validation_source else ("validation_share",)))
  for field in fields:
    if data[field] != getattr(manifest, field):
      raise InputError(
        f"config.data.{field}={data[field]!r}, but {where} were made with {getattr(manifest, field)!r}; set it to "
        "that, or prepare in another folder"
      )
  check_shape(manifest, config, where)
  check_tokenizer(manifest, config, where)


def check_tokenizer(manifest: records_lib.Manifest, config: Any, where: str) -> None:
  """Refuses records of another tokenizer than config.data names.

  A tokenizer file that is gone, or a name on the hub, is known by its name: the records have their own copy.
  """
  name = config.data.tokenizer
  if name == tokenizer_lib.SENTENCEPIECE:  # trained to exactly config.model.vocab_size
    matches = manifest.tokenizer == name and manifest.vocab_size == config.model.vocab_size
  elif name == tokenizer_lib.BYTES:
    matches = manifest.tokenizer == name
  elif name.startswith(tokenizer_lib.HUB):
    matches = name == manifest.tokenizer_source
  elif name == manifest.tokenizer_source and not _tokenizer_place(name).exists():
    matches = True
  else:
    matches = tokenizer_lib.content_hash(records_lib.named_tokenizer(name)) == manifest.tokenizer_sha256
  if not matches:
    raise InputError(
      f"config.data.tokenizer={name!r} did not make {where} (theirs: {manifest.tokenizer}, "
      f"sha256 {manifest.tokenizer_sha256[:12]}…); set it to theirs, or prepare again"
    )


def _tokenizer_place(name: str) -> Path:
  return Path(name.removeprefix(tokenizer_lib.RECORDS)).expanduser()


def check_shape(manifest: records_lib.Manifest, config: Any, where: str) -> None:
  """Refuses records whose length, mode or vocabulary don't fit the config.

  Args:
    manifest: of the records.
    config: the run's config.
    where: what to call them.
  """
  data = config.data
  if data.sequence_length > manifest.sequence_length:
    raise InputError(
      f"config.data.sequence_length={data.sequence_length} is over the {manifest.sequence_length} "
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
      f"config.model.vocab_size={config.model.vocab_size} is under the {manifest.vocab_size} ids of "
      f"the tokenizer of {where}; raise it"
    )

"""Converts text to records, for `prepare`.

A corpus is split into parts (`corpus.parts_of`), and each part becomes one shard of each split, written by any free
process. The records do not depend on the number of processes. Finished parts are saved: if `prepare` is killed and run
again, it resumes with the missing parts and produces the same bytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from mixln_jax import signals
from mixln_jax.config import WHOLE_EXAMPLES, Config
from mixln_jax.data import addressed, finding, instructions, preferences
from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import records as records_lib
from mixln_jax.data import tokenizer as tokenizer_lib
from mixln_jax.data.checks import check_corpus, data_directory
from mixln_jax.data.corpus import SOURCE, Document
from mixln_jax.data.files import File
from mixln_jax.data.parts import (
  EXAMPLES,
  RESULTS,
  TRAIN,
  VALIDATION,
  Job,
  Result,
  SplitPart,
  finished,
  hash_of_part,
  read_part,
  split_of,
  write_part,
)
from mixln_jax.data.records import SPLITS, Corpus, Manifest, Split, has_records
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.data.tokenizer_training import first_bytes, train_hugging_face, train_sentencepiece
from mixln_jax.errors import InputError
from mixln_jax.files import local_path, occupants, settle, work_folder, write_whole
from mixln_jax.text import printable

VALIDATION_SOURCE = "config.data.validation_source"
PLAN, LOCK, SOURCE_STATE = "plan.json", ".lock", ".source_state"


def prepare(config: Config, *, progress: bool = True, workers: int | None = None) -> Corpus:
  """Writes the records of config.data, or reuses existing ones, and opens them.

  The folder appears complete or not at all: it is written under another name and renamed, or written inside the folder
  if that exists and is empty (`files.work_folder`).

  Args:
    config: the run's config.
    progress: show a progress bar in a terminal.
    workers: processes, at most one per part; None = one per core.

  Raises:
    InputError: the corpus or the tokenizer can't be used, or the folder holds other records.
  """
  folder = data_directory(config)
  partial = _work_folder(folder)
  parts = _parts_of(config)
  state = _source_state(parts, config)
  if has_records(folder):
    return _reuse(folder, config, parts, state)
  given = _given_tokenizer(config)
  with _locked(partial, folder):
    if has_records(folder):  # another process wrote them between the check above and the lock
      shutil.rmtree(partial)
      return _reuse(folder, config, parts, state)
    _resume_or_clear(partial, _plan(config, parts, state, given))
    tokenizer = _saved_tokenizer(partial, config, parts, given)
    jobs = _jobs(config, parts, partial, tokenizer)
    results = _run(jobs, workers or os.cpu_count() or 1, progress=progress)
    _check_results(results, config, partial)
    _check_no_copies(jobs, results)
    _finish(partial, folder, _manifest(config, tokenizer, results), state)
  return records_lib.open_corpus(folder)


def _work_folder(folder: Path) -> Path:
  """The folder in which records are written; raises InputError if the target is occupied or can't be written."""
  where = f"config.data.directory={str(folder)!r}"
  try:
    partial = work_folder(folder)
    occupied = not has_records(folder) and occupants(folder)
  except OSError as error:
    raise InputError(f"{where}: can't be used ({error.strerror}); choose another, nothing was written") from error
  if occupied:
    raise InputError(f"{where} is not empty and holds no records; choose another, nothing was written")
  return partial


def train_tokenizer(config: Config, path: str, vocab_size: int) -> Tokenizer:
  """Trains a tokenizer on the training split of config.data and writes it.

  Args:
    config: the run's config.
    path: the file to write: .model for SentencePiece, .json for the library `tokenizers`.
    vocab_size: its number of tokens.

  Raises:
    InputError: the path has another suffix, exists, or can't be written, or the corpus is too small.
  """
  target = local_path(path)
  makers = {".model": train_sentencepiece, ".json": train_hugging_face}
  if target.suffix not in makers:
    raise InputError(f"tokenizer path={path!r}: must end in .model (SentencePiece) or .json (tokenizers)")
  if target.exists():
    raise InputError(f"tokenizer path={path!r}: exists already; give another path, or use it")
  if config.data.mode in WHOLE_EXAMPLES:
    raise InputError(
      f"tokenizer path={path!r}: config.data.mode={config.data.mode} needs the tokenizer of the trained model; don't "
      "train one"
    )
  split = TRAIN if config.data.validation_source else None
  parts = [SplitPart(part, split) for part in corpus_lib.parts_of(config.data.source)]
  tokenizer = makers[target.suffix](_training_texts(config, parts), vocab_size)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, tokenizer.content)
  except OSError as error:
    raise InputError(f"tokenizer path={path!r}: can't be written ({error.strerror}); choose another") from error
  return tokenizer


# The corpus


def _parts_of(config: Config) -> list[SplitPart]:
  """All parts, in the order of their shards. Prints which files there are not part of the corpus."""
  data = config.data
  if not data.validation_source:
    return _parts_of_source(config, SOURCE, None)
  train = _parts_of_source(config, SOURCE, TRAIN)
  validation = _parts_of_source(config, VALIDATION_SOURCE, VALIDATION)
  theirs = _places(validation)
  both = sorted(name for place, name in _places(train).items() if place in theirs)
  address, other = addressed.address_of(data.source), addressed.address_of(data.validation_source)
  if address and other:
    shared = addressed.overlap(address, other)
    both += [shared] if shared else []
  if both:
    raise InputError(
      f"{SOURCE} and {VALIDATION_SOURCE} both have {both[0]}; training data can't be used for validation"
    )
  return train + validation


def _parts_of_source(config: Config, field: str, split: str | None) -> list[SplitPart]:
  data = config.data
  readers = {instructions.KIND: instructions.parts_of, preferences.MODE: preferences.parts_of}
  parts_of = readers.get(data.mode, corpus_lib.parts_of)
  source = data.source if field == SOURCE else data.validation_source
  left_out: Counter[str] = Counter()
  parts = [SplitPart(part, split) for part in parts_of(source, field, left_out)]
  if left_out:
    print(printable(f"left out    of {field}: {finding.describe(left_out)}"))  # a suffix may hold anything
  return parts


def _places(parts: Sequence[SplitPart]) -> dict[Any, str]:
  """The files of parts: a key that is the same for all names of a file -> its name."""
  places: dict[Any, str] = {}
  for part, _ in parts:
    if part.kind not in addressed.KINDS:
      places |= {finding.identity(path): path for path in part.paths}
  return places


def _source_state(parts: Sequence[SplitPart], config: Config) -> str:
  """A hash of the names, sizes and times of a corpus's files, and of the first document of each addressed part."""
  files: set[str] = set()
  first_documents = []
  for part, _ in parts:
    if part.kind in addressed.KINDS:
      first_documents.append(str(next(read_part(part, config.data.mode, config.data.text_field), "")))
    else:
      files.update(part.paths)
  stats = [(path, *File(path).stat()) for path in sorted(files)]
  described = [dataclasses.astuple(part) for part, _ in parts]
  return hashlib.sha256(json.dumps([stats, first_documents, described]).encode()).hexdigest()


# Reuse


def _reuse(folder: Path, config: Config, parts: Sequence[SplitPart], state: str) -> Corpus:
  """Opens existing records, if they are those of this corpus.

  Raises:
    InputError: they were made from another text, or don't match the config.
  """
  data = config.data
  corpus = records_lib.open_corpus(folder, verify=data.verify)
  problem = None
  if not _same_files(folder, parts, state):  # compare the texts: a file may have been touched without a change
    source_sha256 = _hash_of_hashes(hash_of_part(part, data.mode, data.text_field) for part, _ in parts)
    if source_sha256 != corpus.manifest.source_sha256:
      problem = f"they were made from another text than config.data.source={data.source!r} has now"
  if problem is None and corpus.manifest.sequence_length != data.sequence_length:
    problem = (
      f"they hold {corpus.manifest.sequence_length} tokens, not config.data.sequence_length={data.sequence_length}"
    )
  if problem is not None:
    raise InputError(
      f"the records in {corpus.folder} can't be reused: {problem}; set config.data.directory to a new folder, nothing "
      "was written"
    )
  check_corpus(corpus, config)
  return corpus


def _same_files(folder: Path, parts: Sequence[SplitPart], state: str) -> bool:
  """Whether the corpus is certainly unchanged; False for data sets without file times."""
  path = folder / SOURCE_STATE
  if not path.is_file() or path.read_text() != state:
    return False
  return all(part.kind not in addressed.KINDS for part, _ in parts)


def _hash_of_hashes(digests: Iterable[str]) -> str:
  return hashlib.sha256("".join(digests).encode()).hexdigest()


# The folder of unfinished work


@contextlib.contextmanager
def _locked(partial: Path, folder: Path) -> Iterator[None]:
  """Creates the folder of unfinished work and locks it against other processes."""
  where = f"config.data.directory={str(folder)!r}"
  try:
    (partial / RESULTS).mkdir(parents=True, exist_ok=True)
    lock = (partial / LOCK).open("a")
  except OSError as error:
    raise InputError(f"{where}: can't be made ({error.strerror}); choose another") from error
  with lock:
    try:
      acquired = _acquire(lock, partial / LOCK)
    except OSError as error:  # a file system without locks
      raise InputError(f"{where}: can't be locked ({error.strerror}); choose another") from error
    if not acquired:
      raise InputError(f"{where}: another process is preparing it; wait for it")
    try:
      yield
    except OSError as error:
      raise InputError(
        f"{where}: can't be written ({error.strerror}); make room and run again, finished parts are reused"
      ) from error


def _acquire(lock: IO[str], path: Path) -> bool:
  """Takes the lock; returns whether this process holds it.

  The kernel releases an flock when its process ends, however it ends; over NFS the server does, for all machines.
  """
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # If another process finished between our `open` and `flock`, it removed the file, and the lock is void.
    return os.path.samestat(os.fstat(lock.fileno()), path.stat())
  except (BlockingIOError, FileNotFoundError):
    return False


def _plan(config: Config, parts: Sequence[SplitPart], state: str, given: Tokenizer | None) -> str:
  """Everything that determines the bytes of the records, serialized. Work with another plan is discarded."""
  names = ("tokenizer", "sequence_length", "mode", "text_field", "validation_share")
  settings = {name: config.data[name] for name in names}
  return json.dumps(
    {
      "format": records_lib.FORMAT,
      **settings,
      "vocab_size": config.model.vocab_size,
      "tokenizer_sha256": None if given is None else tokenizer_lib.content_hash(given),
      "state": state,
      "parts": [[dataclasses.asdict(part), split] for part, split in parts],
    }
  )


def _resume_or_clear(partial: Path, plan: str) -> None:
  """Keeps unfinished work that has this plan; otherwise removes it and writes the plan."""
  path = partial / PLAN
  if path.is_file() and path.read_text() == plan:
    return
  for entry in partial.iterdir():
    if entry.name not in (LOCK, RESULTS):
      entry.unlink()
  for entry in (partial / RESULTS).iterdir():
    entry.unlink()
  write_whole(path, plan)


# The tokenizer


def _given_tokenizer(config: Config) -> Tokenizer | None:
  """The tokenizer that config.data names; None if one is to be trained on the corpus.

  Raises:
    InputError: it can't be read, or has more ids than the model.
  """
  name = config.data.tokenizer
  if name == tokenizer_lib.SENTENCEPIECE:
    if config.data.mode in WHOLE_EXAMPLES:
      raise InputError(
        f"config.data.tokenizer={name!r}: {config.data.mode} need the tokenizer that the model was trained with; set "
        "config.train.start_from to its run, or name the tokenizer"
      )
    return None
  given = records_lib.named_tokenizer(name)
  if given.vocab_size > config.model.vocab_size:
    raise InputError(
      f"config.model.vocab_size={config.model.vocab_size} is below the {given.vocab_size} ids of "
      f"config.data.tokenizer={name!r}; raise it"
    )
  return given


def _saved_tokenizer(partial: Path, config: Config, parts: Sequence[SplitPart], given: Tokenizer | None) -> Tokenizer:
  """The given tokenizer, or one trained on the corpus, saved with the unfinished work."""
  path = partial / records_lib.TOKENIZER
  if given is None and path.is_file():  # trained before this process resumed the work
    return tokenizer_lib.SentencePieceTokenizer(path.read_bytes(), str(path))
  tokenizer = given
  if tokenizer is None:
    texts = _training_texts(config, parts)
    tokenizer = train_sentencepiece(texts, config.model.vocab_size, "config.model.vocab_size")
  write_whole(path, tokenizer.content)
  return tokenizer


def _training_texts(config: Config, parts: Iterable[SplitPart]) -> Iterator[str]:
  """The texts of the training split that a tokenizer is trained on."""

  def texts() -> Iterator[str]:
    for part, split in parts:
      for document in corpus_lib.read(part, config.data.text_field):
        if not isinstance(document, Document):
          continue
        if (split or split_of(document, config.data.validation_share)) == TRAIN:
          yield document.text

  return first_bytes(texts())


# The pool


def _jobs(config: Config, parts: Sequence[SplitPart], folder: Path, tokenizer: Tokenizer) -> list[Job]:
  data = config.data
  jobs = []
  for number, (part, split) in enumerate(parts):
    job = Job(
      part=part,
      number=number,
      total=len(parts),
      split=split,
      folder=folder,
      sequence_length=data.sequence_length,
      mode=data.mode,
      text_field=data.text_field,
      validation_fraction=data.validation_share,
      tokenizer=tokenizer.name,
      end_token=tokenizer.end_token,
    )
    jobs.append(job)
  return jobs


def _run(jobs: Sequence[Job], workers: int, *, progress: bool) -> list[Result]:
  """The results of all jobs, in their order; the results of finished parts are read."""
  results: dict[int, Result] = {}
  todo = []
  for job in jobs:
    result = finished(job)
    if result is None:
      todo.append(job)
    else:
      results[job.number] = result
  if results:
    print(f"resumed     {len(results)} of {len(jobs)} parts were finished before")
  workers = min(workers, len(todo))
  hidden = None if progress else True  # None: tqdm hides the bar if there is no terminal
  with tqdm(desc="prepare", unit=" documents", disable=hidden) as bar:
    if workers > 1:
      results |= _run_in_pool(todo, workers, bar, total=len(jobs))
    else:
      for job in todo:
        results[job.number] = write_part(job, bar.update)
  return [results[job.number] for job in jobs]


def _run_in_pool(jobs: Sequence[Job], workers: int, bar: "tqdm[Any]", *, total: int) -> dict[int, Result]:
  """The results of jobs by their numbers; the first error of a worker ends all workers."""
  context = multiprocessing.get_context("spawn")
  counter = context.RawValue("q")
  with concurrent.futures.ProcessPoolExecutor(
    workers, context, initializer=_start_worker, initargs=(counter, os.getpid())
  ) as pool:
    futures = {job.number: pool.submit(_work, job) for job in jobs}
    waiting = set(futures.values())
    try:
      while waiting:
        done, waiting = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION)
        bar.set_postfix_str(f"{total - len(waiting)} of {total} parts")
        bar.update(max(0, counter.value - bar.n))
        for future in futures.values():
          if future in done:
            future.result()  # for its error
      return {number: future.result() for number, future in futures.items()}
    except concurrent.futures.BrokenExecutor as error:
      raise InputError(
        f"workers={workers}: one of these processes died, perhaps out of memory; run again with fewer workers: "
        "finished parts are reused"
      ) from error
    except BaseException:
      for process in list((pool._processes or {}).values()):  # public since Python 3.14; a part may take hours
        process.kill()
      raise


_counter: Any = None  # in a worker process: number of documents that all workers have written


def _start_worker(counter: Any, parent: int) -> None:
  global _counter
  _counter = counter
  signals.start_worker(parent)  # otherwise a worker whose parent was killed would wait for work forever


def _work(job: Job) -> Result:
  def count(documents: int) -> None:
    # Approximate, since there is no lock: a worker that is killed while it holds a lock would never release it.
    _counter.value += documents

  return write_part(job, count)


# The whole


def _check_results(results: Sequence[Result], config: Config, partial: Path) -> None:
  """Rejects a corpus with too many bad documents, or with an empty split.

  With too many bad documents the unfinished work stays, since config.data.max_bad_share may be raised.
  """
  documents: Counter[str] = Counter()  # of each split
  bad = 0
  examples = []
  for result in results:
    bad += sum(result.skipped.values())
    examples += result.where
    for name, split in result.splits.items():
      documents[name] += split.documents
  good = sum(documents.values())
  source = f"config.data.source={config.data.source!r}"
  if bad > config.data.max_bad_share * (good + bad):
    raise InputError(
      f"{source}: {bad} of {good + bad} documents can't be used ({'; '.join(examples[:EXAMPLES])}), more than "
      f"config.data.max_bad_share={config.data.max_bad_share:g} allows; repair the corpus, or raise the limit"
    )
  if not good:
    shutil.rmtree(partial)
    if bad:
      raise InputError(
        f"{source}: none of {bad} documents can be used ({'; '.join(examples[:EXAMPLES])}); give another corpus, or "
        "repair this one"
      )
    raise InputError(f"{source}: the corpus is empty; it needs at least one document with text")
  if not all(documents.values()):
    shutil.rmtree(partial)
    missing = "training" if documents[VALIDATION] else "validation"
    raise InputError(
      f"{source}: no document is left for {missing} of {good} ({config.data.validation_share:.1%} are held out by the "
      "hash of their names); give more documents, or config.data.validation_source"
    )


def _check_no_copies(jobs: Sequence[Job], results: Sequence[Result]) -> None:
  """Rejects a validation source with a copy of a training file under another name."""
  trained = {result.sha256: job for job, result in zip(jobs, results, strict=True) if job.split == TRAIN}
  for job, result in zip(jobs, results, strict=True):
    if job.split == VALIDATION and result.splits[VALIDATION].documents and result.sha256 in trained:
      one, other = trained[result.sha256].part.paths[0], job.part.paths[0]
      raise InputError(
        f"{SOURCE} and {VALIDATION_SOURCE} have the same documents, in {one} and in {other}; training data can't be "
        "used for validation"
      )


def _manifest(config: Config, tokenizer: Tokenizer, results: Sequence[Result]) -> Manifest:
  data = config.data
  skipped: Counter[str] = Counter()
  for result in results:
    skipped.update(result.skipped)
  cut_prompts = None
  if data.mode in WHOLE_EXAMPLES:
    cut_prompts = sum(result.cut_prompts for result in results)
  splits = {}
  for name in SPLITS:
    splits[name] = Split.merged([result.splits[name] for result in results])
  return Manifest(
    source=data.source,
    validation_source=data.validation_source,
    validation_share=data.validation_share,
    text_field=data.text_field,
    tokenizer_source=data.tokenizer,
    source_sha256=_hash_of_hashes(result.sha256 for result in results),
    skipped=dict(sorted(skipped.items())),
    tokenizer=tokenizer.name,
    tokenizer_sha256=tokenizer_lib.content_hash(tokenizer),
    vocab_size=tokenizer.vocab_size,
    sequence_length=data.sequence_length,
    mode=data.mode,
    bytes_per_token=tuple(tokenizer.bytes_per_token()),
    splits=splits,
    cut_prompts=cut_prompts,
    end_token=tokenizer.end_token,
  )


def _finish(partial: Path, folder: Path, manifest: Manifest, state: str) -> None:
  """Writes the manifest and moves the folder to its final place."""
  for entry in partial.glob(".*"):  # partial files of processes that were killed
    if entry.name != LOCK:
      entry.unlink()
  (partial / SOURCE_STATE).write_text(state)
  (partial / records_lib.MANIFEST).write_text(manifest.to_json())
  settle(partial, folder, last=records_lib.MANIFEST)
  shutil.rmtree(folder / RESULTS)
  for name in (PLAN, LOCK):
    (folder / name).unlink()

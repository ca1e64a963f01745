"""Candidates by Optuna's ask and tell. Its storage is a file of the search: Optuna's journal, a line a change.

What makes it survive a kill, and give the same candidates afterwards:

* A trial is written whole, in one line, once all its parameters are chosen: it is asked of a study in memory, which
  holds the same trials. A process that is killed before the line is written asks the same again.
* Each trial is asked of a sampler of its own, whose seed is that of the search and the trial's number. So no state of
  a random generator is lost, and what is asked depends on nothing but the trials before.
* The last line may be torn; it is cut off before the journal is opened, since Optuna would append to it. Who writes the
  journal holds the lock of the search, so Optuna's own lock file, which a killed process leaves behind, is not used.

SQLite, Optuna's other storage in a file, survives a kill without these two, but took 93 ms to add a trial of six
parameters where the journal takes 1 ms, and needs locks that a network file system may not have.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixln_jax.errors import InputError, one_line
from mixln_jax.sweeps.search.plan import Search
from mixln_jax.sweeps.search.space import Parameter
from mixln_jax.sweeps.search.table import Candidate

JOURNAL = "optuna.jsonl"
STUDY_NAME = "search"
POPULATION = 16  # of NSGA-II: as 64 candidates leave it four generations
MOST_REPEATS = 50  # consecutive trials without a new candidate, after which one is drawn at random
MOST_TRIALS_WITHOUT = 10_000  # and after so many there seems to be none left


class Proposals:
  """The trials of a search, and the candidates that they are.

  Several trials may be one candidate: it is trained once, and its loss told to all of them.

  Attributes:
    candidates: in the order in which they were first asked for.
  """

  def __init__(self, search: Search, path: Path | None = None):
    """Opens the trials that are there; without a path they live in memory.

    Raises:
      InputError: Optuna is not installed, or the journal is damaged.
    """
    self._search, self._optuna = search, _optuna()
    self._distributions = {choice.name: _distribution(self._optuna, choice) for choice in search.space.choices}
    self._study = self._optuna.create_study()
    self._stored = None if path is None else _open_journal(self._optuna, path)
    self.candidates: list[Candidate] = []
    self._by_key: dict[tuple[Any, ...], int] = {}  # index of the candidate
    self._of_trial: list[int | None] = []  # candidate of each trial; None where its counts don't add up
    self._without_new = 0  # last trials that brought no new candidate
    self._open: set[int] = set()  # trials whose loss is not told
    if self._stored is not None:
      for trial in self._stored.get_trials(deepcopy=False):
        if set(trial.params) != set(self._distributions):
          raise InputError(f"{path}: trial {trial.number} is not one of this search; restore the file, or remove it")
        self._study.add_trial(trial)
        self._note(trial)

  def fill(self, count: int) -> None:
    """Asks until there are so many candidates.

    Raises:
      InputError: nothing new is found any more.
    """
    while len(self.candidates) < count:
      if self._without_new >= MOST_TRIALS_WITHOUT:
        raise InputError(
          f"SEARCH: candidates={self._search.candidates}, but the last {self._without_new} trials brought none beyond "
          f"{len(self.candidates)}; the space seems to have no more: lower candidates in another workdir"
        )
      self._ask()

  def tell(self, losses: Mapping[int, float], count: int) -> None:
    """Tells the loss of each open trial that was asked for among the first `count` candidates, in their order.

    A later trial may repeat a candidate whose loss is known. It stays open while its group is asked for, also where a
    process was killed meanwhile: a sampler that knew its loss would ask for other candidates in the rest of the group.

    Args:
      losses: by the candidate's number; an infinite one is told as it is, since a diverged candidate is a result.
      count: of the candidates up to the group that the losses are of.
    """
    last = self._of_trial.index(count - 1)  # asking for a group ends with the trial of its last candidate
    for number in sorted(self._open):
      index = self._of_trial[number]
      if number <= last and index is not None and self.candidates[index].number in losses:
        loss = losses[self.candidates[index].number]
        self._finish(number, {"values": math.inf if math.isnan(loss) else loss})

  def _finish(self, number: int, told: Mapping[str, Any]) -> None:
    if self._stored is not None:
      self._stored.tell(number, **told)
    self._study.tell(number, **told)
    self._open.discard(number)

  def _ask(self) -> None:
    """One more trial."""
    number = len(self._of_trial)
    if self._search.tries_all:
      trial = self._optuna.create_trial(
        state=self._optuna.trial.TrialState.RUNNING, params=self._next_point(), distributions=self._distributions
      )
      self._study.add_trial(trial)
    else:
      self._study.sampler = self._sampler(number)
      self._study.ask(self._distributions)
    trial = self._study.get_trials(deepcopy=False)[number]
    if self._stored is not None:
      self._stored.add_trial(trial)
    self._note(trial)

  def _next_point(self) -> dict[str, Any]:
    """The first choice of the space, in its order, that is no candidate yet."""
    space = self._search.space
    for point in space.points():
      values = space.values_of(point)
      if values is not None and space.key_of(values) not in self._by_key:
        return {choice.name: _as_stored(choice, point[choice.name]) for choice in space.choices}
    raise AssertionError("a space that is tried whole has as many candidates as were counted")

  def _sampler(self, number: int) -> Any:
    """The sampler of one trial."""
    seed = int(np.random.SeedSequence([self._search.sampler_seed, number]).generate_state(1)[0])
    samplers = self._optuna.samplers
    kind = "random" if self._without_new >= MOST_REPEATS else self._search.sampler
    if kind == "tpe":
      # Those that are trained at this moment count as bad ones, so that a group is not of one kind.
      return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    if kind == "nsga2":
      return samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
    return samplers.RandomSampler(seed=seed)

  def _note(self, trial: Any) -> None:
    """Takes note of a trial that is in the storage."""
    space = self._search.space
    choice = {one.name: _from_stored(one, trial.params[one.name]) for one in space.choices}
    values = space.values_of(choice)
    index = None
    self._without_new += 1
    if values is not None:
      key = space.key_of(values)
      if key not in self._by_key:
        self._by_key[key] = len(self.candidates)
        self.candidates.append(Candidate(len(self.candidates) + 1, values, space.layer_list(values).split()))
        self._without_new = 0
      index = self._by_key[key]
    self._of_trial.append(index)
    if not trial.state.is_finished():
      self._open.add(trial.number)
      if index is None:
        self._finish(trial.number, {"state": self._optuna.trial.TrialState.FAIL})


def _optuna() -> Any:
  """Optuna, which only a search needs."""
  try:
    import optuna  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise InputError(
      f"a search needs Optuna, which is not installed ({one_line(error)}): pip install -r requirements-search.txt"
    ) from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna


def _distribution(optuna: Any, choice: Parameter) -> Any:
  """Names are categories; numbers of a grid are their places in it, so that neighbours are near."""
  if choice.ordered:
    return optuna.distributions.IntDistribution(0, len(choice.values) - 1)
  return optuna.distributions.CategoricalDistribution(choice.values)


def _as_stored(choice: Parameter, value: Any) -> Any:
  return choice.values.index(value) if choice.ordered else value


def _from_stored(choice: Parameter, stored: Any) -> Any:
  return choice.values[stored] if choice.ordered else stored


def _open_journal(optuna: Any, path: Path) -> Any:
  """The study in the journal, which is made where there is none."""
  _cut_torn_line(path)
  try:
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_HeldAlready())
    storage = optuna.storages.JournalStorage(backend)
    return optuna.create_study(storage=storage, study_name=STUDY_NAME, load_if_exists=True)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{path}: damaged, no journal of Optuna ({one_line(error)}); restore it, or remove it") from error


class _HeldAlready:
  """What Optuna locks its journal with, where the lock of the search is held."""

  def acquire(self) -> bool:
    return True

  def release(self) -> None:
    pass


def _cut_torn_line(path: Path) -> None:
  """Cuts off what follows the last newline: a line that a process was killed in was never acted on."""
  with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
      file.truncate(whole)

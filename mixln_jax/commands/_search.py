"""`sweep --search`: a search over placements from its first candidate to the finals, or from where it was stopped."""

from pathlib import Path

from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.files import OBJECT, is_partial, local_path, read_json
from mixln_jax.parallel.compile_cache import use_compile_cache
from mixln_jax.runs.lock import lock
from mixln_jax.sweeps import sequence
from mixln_jax.sweeps.search import finals
from mixln_jax.sweeps.search.groups import Groups
from mixln_jax.sweeps.search.halving import run_search
from mixln_jax.sweeps.search.plan import SEARCH_FILE, Search, check_same, load_search, open_search
from mixln_jax.sweeps.search.proposals import JOURNAL, Proposals
from mixln_jax.sweeps.search.table import TABLE_FILE, Table
from mixln_jax.text import printable

SHOWN = 10  # candidates of the table that is printed
LOCK = ".lock"
PLACE = "a search lies in a folder on a disk"


def list_candidates(recipe: str, base: Config, workdir: str) -> None:
  """Prints the best candidates so far; raises InputError as `search_command`, and where there is no search."""
  search, folder = load_search(recipe, base), local_path(workdir, "workdir", PLACE).absolute()
  if not (folder / SEARCH_FILE).is_file():
    raise InputError(f"workdir={folder}: holds no search yet")
  check_same(search, read_json(folder / SEARCH_FILE, {"base": OBJECT}), folder)
  _show(search, Table(folder / TABLE_FILE))


def search_command(recipe: str, base: Config, workdir: str) -> None:
  """Runs what is missing of a search.

  Raises:
    InputError: the recipe, or what the folder holds, is invalid; nothing was trained.
    Stopped: a signal came; the same command resumes.
  """
  search = load_search(recipe, base)
  folder = local_path(workdir, "workdir", PLACE).absolute()
  _make_folder(folder)
  with lock(folder / LOCK, str(folder)):
    open_search(search, folder)
    table = Table(folder / TABLE_FILE)
    proposals = Proposals(search, folder / JOURNAL)
    use_compile_cache()
    groups = Groups(search, folder, _say)
    _announce(search)
    run_search(search, proposals, table, groups, groups.give_up)
    _show(search, table)
    runs = finals.run_finals(search, table, groups, folder)
  for run in runs:
    print(f"final      {run.name}  {sequence.state_of(run).describe()}")
  seconds = sum(cost.seconds for cost in groups.costs)
  processor = sum(cost.processor_seconds for cost in groups.costs)
  steps = sum(cost.steps * cost.runs for cost in groups.costs)
  print(f"cost       {seconds / 3600:.2f} h, {processor / 3600:.2f} core-hours for {steps:,} steps of a run")


def _make_folder(folder: Path) -> None:
  """Makes the folder; raises InputError where it holds something else than a search."""
  if folder.is_dir() and not (folder / SEARCH_FILE).exists():
    others = [path.name for path in folder.iterdir() if path.name != LOCK and not is_partial(path.name)]
    if others:
      raise InputError(f"workdir={folder}: holds no search, but {sorted(others)[0]!r}; choose a new folder")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"workdir={folder}: can't be made ({error.strerror}); choose another folder") from error


def _say(line: str) -> None:
  print(printable(line), flush=True)


def _announce(search: Search) -> None:
  distinct = search.space.num_distinct
  size = f"{search.space.num_points:.3g} points" if distinct is None else f"{distinct} candidates"
  how = "all of them" if search.tries_all else f"{search.candidates} by {search.sampler}"
  _say(f"search     {size}, {how}, in groups of {search.group} under one program")
  for rung in search.ladder():
    _say(f"rung       {rung.number}: {rung.size} candidates from step {rung.start} to {rung.end}")


def _show(search: Search, table: Table) -> None:
  """Prints the best candidates."""
  lines = finals.table_lines(search, table, SHOWN)
  _say(f"candidates {len(table.candidates)} of {search.candidates} were trained; the best of them:")
  for line in lines:
    _say(line)

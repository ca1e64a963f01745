"""Run a study: every run that its axes make, one after another here, shared among machines that see the same folder.

The same command again resumes it, with what is missing; more machines may run it in one --workdir.
Exit status: 0 all runs are done; 1 a run failed; 75 stopped by a signal, or others still train.
"""

import shlex
import sys

import jax
from tqdm import tqdm

from mixln_jax.command_line import CommandLine
from mixln_jax.commands._search import list_candidates, search_command
from mixln_jax.data.opening import open_data
from mixln_jax.errors import InputError
from mixln_jax.parallel import processes
from mixln_jax.parallel.compile_cache import use_compile_cache
from mixln_jax.runs.outcome import STOPPED
from mixln_jax.signals import STOPPED_STATUS
from mixln_jax.sweeps import sequence
from mixln_jax.sweeps.joint import joint_set, train_together
from mixln_jax.sweeps.progress import StudyProgress
from mixln_jax.sweeps.record import Held, hold_against, write_curves
from mixln_jax.sweeps.study import Run, Study, load_study, make_study, parse_axes
from mixln_jax.text import printable


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.config(named_by=("search",))
  line.string("workdir", "the study's folder", required=True)
  line.string(
    "search", "a recipe with a SEARCH (configs/searches/), instead of --config: search placements (docs/search.md)"
  )
  line.strings(
    "axis",
    "FIELD=VALUE VALUE …, one flag an axis; the runs are their product. Fields that move together: "
    "'num_layers;embed_dim=8;128 16;96'. By default the STUDY that the recipe defines (configs/studies/)",
  )
  line.integer("index", "train only the run of this number (from 1, as --list shows it), as in a job array", minimum=1)
  line.boolean("together", "train all runs as one program; --config.mesh.run cuts them over devices")
  line.boolean("list", "only show the runs and how they stand")
  line.string("export", "only write the curves of the runs to this CSV file")
  line.string("compare", "only hold the runs' last validation losses against such a file; status 1 where one is off")
  line.number("tolerance", "with --compare: nats that a loss may be off", default=0.05, minimum=0.0)
  values = line.parse(argv)
  base = line.config_value()
  recipe = line.config_path()
  if values.search is not None:
    for name in ("axis", "index", "together", "export", "compare"):
      if line.was_given(name):
        raise InputError(f"--search and --{name} exclude one another: a search makes its own runs")
    if not values.list:
      search_command(recipe, base, values.workdir)
      _say_how_to_report(values.workdir)
    else:
      list_candidates(recipe, base, values.workdir)
    return 0
  study = make_study(base, [parse_axes(values.axis)]) if values.axis else load_study(recipe, base)
  study = sequence.with_second_stage(study, values.workdir)
  runs = study.runs(values.workdir)
  if values.index is not None and values.index > len(runs):
    raise InputError(f"--index={values.index}: the study has {len(runs)} runs; the last one is {len(runs)}")
  if values.index is not None and values.together:
    raise InputError("--index and --together exclude one another: together all runs are one program")
  if not values.together:
    jax.config.update("jax_platforms", "cpu")  # the runs' own processes train: this one must not hold their devices
  if values.export:
    print(f"wrote      {values.export}: {write_curves(runs, values.export)} lines")
    return 0
  if values.compare:
    return _compare(hold_against(runs, values.compare), values.tolerance)
  if values.list:
    _show(runs, runs)
    return 0
  if values.together:
    processes.join(base.parallel)
  for config in {run.config.data.to_json(): run.config for run in runs}.values():
    open_data(config)  # what is not prepared is said before anything is trained
  runs = sequence.open_study(study, values.workdir, write=not values.together or processes.is_first())
  mine = runs if values.index is None else [runs[values.index - 1]]
  if values.together:
    return _train_together(study, runs, values.workdir)
  failed = _train(mine, runs)
  more = sequence.with_second_stage(study, values.workdir)
  if values.index is None and len(more.grids) > len(study.grids):
    runs = mine = sequence.open_study(more, values.workdir)
    print(f"study      its first runs are done; now those at the best {more.then.best if more.then else ''}")
    failed += _train(mine, runs)
  _show(runs, mine)
  print(f"weights    initial, {sequence.weights_line(runs)}")
  _say_how_to_report(values.workdir)
  if failed:
    print(f"error: {len(failed)} runs failed: {', '.join(failed)}; see their {sequence.LOG}", file=sys.stderr)
    return 1
  return 0 if all(sequence.state_of(run).state == sequence.DONE for run in mine) else STOPPED_STATUS


def _train_together(study: Study, runs: list[Run], workdir: str) -> int:
  use_compile_cache()
  with processes.failing_together():
    outcomes = []
    while chosen := joint_set(runs):  # runs that were added to the study since come after those that were begun
      outcomes = train_together(study, chosen)
      if any(outcome.status == STOPPED for outcome in outcomes):
        break
    processes.wait_for_all("the end of the study")
  if processes.is_first():
    if len(sequence.with_second_stage(study, runs[0].folder.path.parents[1]).grids) > len(study.grids):
      print("study      its first runs are done; the same command again trains the second stage")
    _show(runs, runs)
    print(f"weights    initial, {sequence.weights_line(runs)}")
    _say_how_to_report(workdir)
  return STOPPED_STATUS if any(outcome.status == STOPPED for outcome in outcomes) else 0


def _train(mine: list[Run], runs: list[Run]) -> list[str]:
  """Trains what is open; returns the names of the runs that failed."""
  tried: set[str] = set()
  failed = []
  progress = StudyProgress()
  while (run := sequence.next_run(mine, tried)) is not None:
    tried.add(run.name)
    print(f"run        {runs.index(run) + 1}/{len(runs)} {run.name}", flush=True)
    progress.start_run(sum(sequence.steps_left(later) for later in mine if later.name not in tried))
    with tqdm(total=run.config.train.num_steps, unit="step", dynamic_ncols=True, disable=None) as bar:

      def seen(text: str, bar: tqdm = bar) -> None:
        stands = progress.seen(text)
        if stands is None:
          return
        step, _, rest = stands.partition("  ")
        if not bar.disable:
          bar.set_postfix_str(rest, refresh=False)
          bar.update(int(step.removeprefix("step ").split("/")[0]) - bar.n)
        elif progress.is_due():
          print(f"           {printable(stands)}", flush=True)

      status = sequence.train_run(run, seen)
    print(f"           {sequence.state_of(run).describe()}", flush=True)
    if status not in (0, STOPPED_STATUS) and sequence.state_of(run).state == sequence.OPEN:
      failed.append(run.name)
      print(f"           exit status {status}: {printable(_last_line(run))}", flush=True)
    sequence.weights_line(runs)
  return failed


def _say_how_to_report(workdir: str) -> None:
  folder = workdir.rstrip("/")
  command = shlex.join(["python", "-m", "mixln_jax", "report", folder, f"--output={folder}/report"])
  print(printable(f"report     {command}"))


def _compare(held: list[Held], tolerance: float) -> int:
  width = max(len(one.run) for one in held)
  for one in held:
    found = "not there" if one.found is None else f"{one.found:.4f}  {one.found - one.recorded:+.4f}"
    verdict = "" if one.within(tolerance) else f"  more than {tolerance} off"
    print(f"{one.run:<{width}}  step {one.step}  {one.recorded:.4f}  {found}{verdict}")
  return 0 if all(one.within(tolerance) for one in held) else 1


def _last_line(run: Run) -> str:
  lines = (run.folder / sequence.LOG).read_text(errors="replace").strip().splitlines()
  return lines[-1] if lines else "it printed nothing"


def _show(runs: list[Run], shown: list[Run]) -> None:
  """Prints how runs of a study ended, each with its number in the study."""
  width = max(len(run.name) for run in shown)
  for run in shown:
    number = runs.index(run) + 1
    print(f"{number:>4}  {run.name:<{width}}  {sequence.state_of(run).describe()}")

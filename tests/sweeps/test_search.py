"""A search over placements: what it tries, who goes on, and that nothing is lost or done twice."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna", reason="a search needs Optuna: pip install -r requirements-search.txt")

from helpers import Killed

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.command_line import CommandLine
from mixln_jax.commands import _search, sweep
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import count_params
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.outcome import Outcome, read_outcome
from mixln_jax.sweeps.search import finals, groups, plan, proposals, table
from mixln_jax.sweeps.search.halving import run_search
from mixln_jax.sweeps.search.plan import make_search, open_search
from mixln_jax.sweeps.search.proposals import JOURNAL, Proposals
from mixln_jax.sweeps.search.space import make_space, spelled
from mixln_jax.sweeps.search.table import TABLE_FILE, Result, Table
from mixln_jax.training import loop

NAMES = ("pre", "post", "lns", "sandwich")


def base_of(num_layers=6, num_steps=9):
  config = config_lib.base()
  config.model.update(vocab_size=61, embed_dim=16, mlp_dim=24, num_layers=num_layers, num_heads=2)
  config.train.num_steps = num_steps
  return config


def toy(num_layers=6, **changes):
  """A search that nothing is trained for."""
  content = {"layers": NAMES, "candidates": 12, "group": 4, "rungs": (1, 3, 9), "eta": 3, "seeds": (1, 2)} | changes
  content = {name: value for name, value in content.items() if value is not None}
  return make_search(base_of(num_layers), content)


def distance(best):
  """A loss that is lowest, 0, for one known table: by how many layers a candidate differs from it."""

  def evaluate(candidates, rung):
    return [Result(float(sum(a != b for a, b in zip(one.layers, best, strict=True)))) for one in candidates]

  return evaluate


def run(search, evaluate, folder=None):
  found = Table(None if folder is None else folder / TABLE_FILE)
  trials = Proposals(search, None if folder is None else folder / JOURNAL)
  run_search(search, trials, found, evaluate, lambda candidates: None)
  return found


def test_tpe_finds_a_known_table_more_often_than_random_search():
  """With trials that are told late, or never, the sampler would be blind, and no better than chance."""
  best, found = ("post", "pre", "lns", "pre", "lns"), {"tpe": 0, "random": 0}
  for seed in range(50):
    for sampler in found:
      search = toy(5, layers=NAMES[:3], candidates=30, group=3, rungs=(9,), sampler=sampler, sampler_seed=seed)
      losses = run(search, distance(best)).losses(search.ladder()[0])
      found[sampler] += min(losses.values()) == 0
  # By chance: 30 of 3^5 tables, 12 %, so 6 of 50 times.
  assert found["random"] <= 15, found
  assert found["tpe"] >= found["random"] + 15, found


def test_nsga2_is_a_sampler_too():
  search = toy(sampler="nsga2", candidates=40, rungs=(9,))
  assert len(run(search, distance(NAMES[:1] * 6)).candidates) == 40


def test_each_rung_trains_the_best_of_the_one_before():
  """A rung that takes the highest losses, or the first candidates, would pass every test of the bookkeeping."""
  search, trained = toy(), {}

  def evaluate(candidates, rung):
    assert len(candidates) <= search.group
    trained.setdefault(rung.number, []).extend(one.number for one in candidates)
    return [Result(abs(one.number - 7) + 0.1 * rung.number) for one in candidates]

  found = run(search, evaluate)
  assert [rung.size for rung in search.ladder()] == [12, 4, 1]
  assert trained == {1: list(range(1, 13)), 2: [5, 6, 7, 8], 3: [7]}
  assert found.final_ranking(search.ladder())[0].number == 7


def test_a_diverged_candidate_is_a_result_and_never_goes_on():
  """A loss that is not finite must neither stop the search nor sort below the finite ones."""
  search = toy()

  def evaluate(candidates, rung):
    return [Result(math.inf, "non_finite") if one.number % 2 else Result(1.0 / one.number) for one in candidates]

  found = run(search, evaluate)
  first, second, _ = search.ladder()
  assert len(found.losses(first)) == 12
  assert sorted(found.losses(second)) == [6, 8, 10, 12]
  with pytest.raises(InputError, match="all 12 candidates diverged before step 1; lower config"):
    run(search, lambda candidates, rung: [Result(math.inf, "non_finite")] * len(candidates))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_any_write_it_gives_the_same_table(tmp_path, monkeypatch, before):
  """At each write in turn the process ends: what is written in the wrong order is lost, or done twice."""
  search = toy(candidates=6, group=3, rungs=(3, 9), sampler_seed=3)
  search = make_search(search.base, {**search.content, "layers": NAMES[:2]})
  trained = []

  def evaluate(candidates, rung):
    trained.append((rung.number, [one.number for one in candidates]))
    return distance(("post",) * 6)(candidates, rung)

  (tmp_path / "whole").mkdir()
  run(search, evaluate, tmp_path / "whole")
  expected = (tmp_path / "whole" / TABLE_FILE).read_bytes()
  backend = proposals._optuna().storages.journal.JournalFileBackend
  writes, kill_at = 0, 0

  def counted(write):
    def counting(*arguments):
      nonlocal writes
      writes += 1
      if before and writes == kill_at:
        raise Killed
      write(*arguments)
      if not before and writes == kill_at:
        raise Killed

    return counting

  monkeypatch.setattr(table, "write_whole", counted(table.write_whole))
  monkeypatch.setattr(backend, "append_logs", counted(backend.append_logs))
  for kill_at in range(1, 40):
    folder, writes = tmp_path / str(kill_at), 0
    folder.mkdir()
    trained.clear()
    try:
      run(search, evaluate, folder)
      break  # it makes fewer writes than that
    except Killed:
      writes = 1000
    with (folder / JOURNAL).open("ab") as journal:
      journal.write(b'{"op_code": 4, "torn')  # as a kill in the middle of a write leaves it
    run(search, evaluate, folder)
    assert (folder / TABLE_FILE).read_bytes() == expected
    assert len(trained) <= 4, trained  # three groups, one of them perhaps again where its result was not written
  assert kill_at > 15


@pytest.mark.parametrize("kill_at", [26, 28])
def test_killed_while_a_group_is_asked_for_the_rest_of_it_is_the_same(tmp_path, monkeypatch, kill_at):
  """A trial that repeats a known candidate was told at once by the next process, whose sampler then asked otherwise."""
  search = toy(4, layers=NAMES[:2], candidates=14, group=4, rungs=(9,), sampler_seed=1)  # of 16: many are repeated
  (tmp_path / "whole").mkdir()
  expected = run(search, distance(("post",) * 4), tmp_path / "whole").to_json()
  backend = proposals._optuna().storages.journal.JournalFileBackend
  writes = 0

  def append_logs(self, *arguments, append_logs=backend.append_logs):
    nonlocal writes
    writes += 1
    if writes == kill_at:
      raise Killed
    append_logs(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(backend, "append_logs", append_logs)
    with pytest.raises(Killed):
      run(search, distance(("post",) * 4), tmp_path)
  assert run(search, distance(("post",) * 4), tmp_path).to_json() == expected


def test_equal_candidates_are_trained_once():
  """The same layers spelled otherwise, or an argument that no layer has, must not be a candidate of its own."""
  search = toy(2, layers=("pre", "lns"), arguments={"lns": (0.25, 0.5)}, candidates=7, group=2, rungs=(9,))
  assert search.space.num_points == 8
  assert search.tries_all  # `pre` with either argument is one
  found = run(search, distance(("pre", "pre")))
  spelled = [candidate.values["model.placement"] for candidate in found.candidates.values()]
  assert len(set(spelled)) == 7
  assert {"pre", "lns:0.25", "lns:0.5", "pre,lns:0.25", "lns:0.5,pre"} <= set(spelled)


def test_segments_add_up_and_alpha_is_mix_ln():
  base = base_of(12)
  space = make_space(
    {"segments": [{"names": ("post", "lns"), "counts": range(2, 5)}, {"names": ("pre",), "counts": (8, 9)}]}, base
  )
  spelled = {space.spell(point) for point in space.points()} - {None}
  assert spelled == {"post*3,pre*9", "post*4,pre*8", "lns*3,pre*9", "lns*4,pre*8"}
  space = make_space({"alpha": (0.0, 0.25, 0.26, 1.0), "learning_rates": (1e-3, 3e-3)}, base)
  assert space.num_distinct == 6  # 0.26 of 12 layers are three, too
  assert space.values_of({"alpha": 0.25, "optimizer.learning_rate": 1e-3}) == {
    "model.placement": "mix:0.25",
    "optimizer.learning_rate": 1e-3,
  }


def test_every_table_of_names_with_modifiers_and_arguments_can_be_parsed():
  """A table that is spelled as nothing that the grammar knows would end the search after hours, at that candidate."""
  names = ("post+gpas", "lns", "post/pre", "pre+scaled_init")
  space = make_space({"layers": ("pre+gpas", "post+gpas", "sandwich+gpas")}, base_of(3))
  assert space.spell({f"layer_{n:02d}": "post+gpas" if n < 3 else "pre+gpas" for n in (1, 2, 3)}) == (
    "post*2+gpas,pre+gpas"
  )
  assert space.num_distinct == 27
  for counts in ((1, 1, 2, 2), (3, 2, 1, 1)):
    layers = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    table = placement.parse(spelled(layers), len(layers))
    assert table.layer_list == " ".join(placement.parse(name, 1).layer_list for name in layers)
  space = make_space({"layers": ("lns", "pre"), "arguments": {"lns": (0.5,)}}, base_of(3))
  assert space.spell({"layer_01": "lns", "layer_02": "lns", "layer_03": "pre", "argument_lns": 0.5}) == "lns:0.5*2,pre"


def test_trials_that_are_not_those_of_the_table_are_refused(tmp_path):
  """Without the journal other candidates would be told the losses of those that were trained."""
  run(toy(), distance(("post",) * 6), tmp_path)
  (tmp_path / JOURNAL).unlink()
  with pytest.raises(InputError, match=r"candidate 0001 is .* in the table, and .* by the trials"):
    run(toy(sampler_seed=7), distance(("post",) * 6), tmp_path)


def test_a_run_that_ended_itself_at_the_end_of_a_rung_does_not_go_on():
  """It is frozen: in the next rung it would take the place of a candidate that can be trained."""
  rung = toy().ladder()[0]
  validation = {"step": rung.end, "loss": 5.0}
  assert groups._result(Outcome("diverged", rung.end, validation=validation, diverged=True), rung).loss == math.inf
  assert groups._result(Outcome("stopped", rung.end, validation=validation, diverged=True), rung).loss == 5.0


def test_a_group_whose_runs_all_ended_is_not_opened_again():
  """Killed before its results were written, it would have no checkpoint in common, and the search could not go on."""
  outcomes = [Outcome("non_finite", step) for step in (3, 5)]
  members = [types.SimpleNamespace(live=False, outcome=outcome) for outcome in outcomes]
  assert loop.train_members(None, members, None, 9) == outcomes


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layers": None}, "given by one of layers, segments, alpha, not by none"),
    ({"layers": ()}, r"layers=\(\) must be a list of names.*empty"),
    ({"layers": ("pre",)}, "the space has 1 candidate"),
    ({"layers": ("pre", "poost")}, "unknown placement 'poost'; did you mean 'post'"),
    ({"layers": ("pre", "pre")}, "layers has 'pre' twice"),
    ({"layers": ("pre", "mix:0.25")}, "'mix:0.25', which is not the name of a layer's row"),
    ({"layers": ("pre", "layerscale")}, "'pre' and 'layerscale' have different trees of parameters"),
    ({"layers": ("pre", "hc:4")}, "'pre' and 'hc:4' have different trees of parameters"),
    ({"layers": ("pre", "admin")}, "'admin' needs a profiling pass"),
    ({"baselines": ("pre", "siamese")}, "'pre' and 'siamese' have different trees|different trees"),
    ({"layers": None, "segments": [{"names": ("pre",), "counts": (7, 8)}]}, "no counts.*num_layers=6.*between 7 and 8"),
    ({"layers": None, "segments": []}, "segments=.*empty space"),
    ({"layers": None, "alpha": (0.5, 1.5)}, "alpha has 1.5"),
    ({"arguments": {"post": (1.0,)}}, r"arguments\['post'\]: there is no placement of this name that takes"),
    ({"arguments": {"deepnorm": (1.0,)}}, r"arguments\['deepnorm'\] belongs to no name of the space"),
    ({"learning_rates": (0.001, math.nan)}, "learning_rates has nan"),
    ({"rungs": (0, 9)}, "rung 1 has 0 steps, from 0 to 0"),
    ({"rungs": (3, 3, 9)}, "rung 2 has 0 steps, from 3 to 3"),
    ({"rungs": (3, 8)}, "end at step 8, but config.train.num_steps=9"),
    ({"group": 13}, "group=13 is more than candidates=12"),
    ({"candidates": 5000}, "candidates=5000, but the space has 4096"),
    ({"sampler": "cma"}, "sampler='cma' must be one of tpe, nsga2, random"),
    ({"eta": 1}, "eta=1 must be a whole number, at least 2"),
    ({"seeds": (0, 1)}, r"seeds=\(0, 1\) has 0, which is config.seed"),
    ({"candidate": 3}, "'candidate', which is none of its fields"),
    ({"rungs": None}, "has no rungs; the fields are"),
    ({"baselines": "pre"}, "baselines='pre' must be a list of placements"),
    ({"baselines": ("pre", 1)}, r"baselines=\('pre', 1\) must be a list of placements"),
    ({"baselines": ("pre", "pre")}, "baselines has 'pre' twice"),
    ({"seeds": (1, 2**40)}, "seeds has 1099511627776, and config.seed must be int and >= 0"),
    ({"arguments": ("lns",)}, r"arguments=\('lns',\) must be a mapping"),
    ({"question": 3}, "question=3 must be text"),
  ],
)
def test_searches_that_mean_nothing_are_refused(changes, message):
  with pytest.raises(InputError, match=message):
    toy(**changes)


def test_a_search_that_changed_is_refused_and_its_finals_may_grow(tmp_path):
  open_search(toy(), tmp_path)
  before = (tmp_path / plan.SEARCH_FILE).read_bytes()
  with pytest.raises(InputError, match=r"SEARCH.layers: \['pre', 'post', 'lns', 'sandwich'\] there, \['pre', 'post'\]"):
    open_search(toy(layers=("pre", "post")), tmp_path)
  with pytest.raises(InputError, match=r"SEARCH\.group: 4 there, 3 now"):
    open_search(toy(group=3), tmp_path)
  changed = make_search(base_of(num_steps=9), toy().content)
  changed.base.optimizer.learning_rate = 0.5
  with pytest.raises(InputError, match=r"config.optimizer.learning_rate: 0.001 there, 0.5 now|learning_rate"):
    open_search(changed, tmp_path)
  assert (tmp_path / plan.SEARCH_FILE).read_bytes() == before
  open_search(toy(seeds=(1, 2, 3), winners=2), tmp_path)


def test_a_search_is_named_by_its_own_flag_alone():
  line = CommandLine("")
  line.config(named_by=("search",))
  line.string("search", "")
  with pytest.raises(InputError, match="--search and --config exclude one another"):
    line.parse(["--search=configs/tiny.py", "--config=configs/tiny.py"])
  with pytest.raises(InputError, match="--search and --track exclude one another"):
    sweep.main(["--search=configs/searches/alpha.py", "--track=configs/tracks/cpu.py", "--workdir=nowhere"])
  line = CommandLine("")
  line.config(named_by=("search",))
  line.string("search", "")
  line.parse(["--config.seed=7", "--search", "configs/tiny.py"])  # fields may stand in front
  assert line.config_value().seed == 7


def test_winners_are_tables_that_are_no_baseline():
  """`post*3,pre*3` is mix:0.5 otherwise spelled: as a winner it would be compared with itself."""
  search = toy(baselines=("pre", "mix:0.5"), winners=2)
  found = Table()
  rung = search.ladder()[-1]
  layers = [("post",) * 3 + ("pre",) * 3, ("lns",) * 6, ("pre",) * 6, ("post",) * 6]
  for number, one in enumerate(layers, start=1):
    values = {"model.placement": ",".join(one)}
    found.put(rung, [table.Candidate(number, values, one)], [Result(float(number))])
  assert [winner.number for winner in finals.winners_of(search, found)] == [2, 4]
  study = finals.finals_study(search, found)
  runs = study.runs("nowhere")
  assert len(runs) == 2 * 2 + 2 * 2
  assert {(run.config.seed, run.config.data.seed) for run in runs} == {(1, 1), (2, 2)}


@pytest.mark.parametrize(("name", "sizes"), [("layers", [64, 16]), ("alpha", [13, 4, 1])])
def test_the_searches_that_are_shipped_are_valid(name, sizes):
  """A recipe that is refused would be found by whoever has waited for its data to be prepared."""
  recipe = Path("configs/searches") / f"{name}.py"
  base = runpy.run_path(str(recipe))["get_config"]()
  search = plan.load_search(str(recipe), base)
  assert [rung.size for rung in search.ladder()] == sizes
  assert search.tries_all == (name == "alpha")
  assert base.model.num_layers == 12
  assert count_params(search.base.model) == pytest.approx(0.59e6, rel=0.01)


# With training. One search of a small model serves these tests.

RECIPE = """
from pathlib import Path
from mixln_jax import config
SEARCH = {search!r}
def get_config():
  return config.from_json(Path({config!r}).read_text())
"""
SEARCH = {
  "layers": ("pre", "post", "sandwich"),
  "candidates": 6,
  "group": 2,
  "rungs": (2, 4),
  "eta": 2,  # three go on: the last group of a rung has a free slot
  "winners": 1,
  "seeds": (1,),
  "baselines": ("mix:0.5",),
}


def recipe_of(make_config, folder, **changes):
  config = make_config(**{"train.num_steps": 4, "checkpoint.every_steps": 1, "evaluate.every_steps": 0} | changes)
  (folder / "config.json").write_text(config_lib.to_json(config))
  path = folder / "recipe.py"
  path.write_text(RECIPE.format(search=SEARCH, config=str(folder / "config.json")))
  return path


@pytest.fixture(scope="module")
def searched(make_config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("searched")
  path = recipe_of(make_config, folder)
  assert sweep.main([f"--search={path}", f"--workdir={folder / 'work'}"]) == 0
  return path, folder / "work"


def test_a_group_gives_what_each_candidate_gives_alone(searched, tmp_path):
  """Slots that mix up placements, rates or states, or a pause that changes the schedule, would show here."""
  path, work = searched
  search = plan.load_search(str(path), config_lib.from_json((path.parent / "config.json").read_text()))
  found = Table(work / TABLE_FILE)
  trainer = groups.Groups(search, work)
  last = search.ladder()[-1]
  with_another, _, in_a_group_of_one = sorted(found.ranked(last), key=lambda one: one.number)
  for candidate in (with_another, in_a_group_of_one):
    alone = loop.train(trainer.run_of(candidate).config, tmp_path / candidate.name)
    np.testing.assert_allclose(found.result(last, candidate.number).loss, alone.validation["loss"], atol=1e-5)


def test_compilations_do_not_grow_with_the_candidates(searched):
  """The first group compiles all; a later one at most what cuts a state of another tree out of the joint one."""
  costs = groups._read_costs(searched[1] / groups.COSTS)
  assert [cost.rung for cost in costs] == [1, 1, 1, 2, 2, 0]
  assert costs[0].programs >= 1
  assert sum(cost.programs for cost in costs[1:]) <= 4
  assert costs[1].steps == 2


def test_the_finals_are_an_ordinary_study_with_fresh_seeds(searched):
  runs = sorted((searched[1] / "finals" / "runs").iterdir())
  assert len(runs) == 2
  assert all(read_outcome(RunFolder(run)).status == "finished" for run in runs)
  names = {re.sub(r"-.*", "", run.name) for run in runs}
  assert "mix_0.5" in names


def test_finals_may_grow_by_a_winner(searched, tmp_path):
  """The groups are cut anew, and what has finished had no step in common with what was added."""
  path, work = searched
  shutil.copytree(work, tmp_path / "work")
  more = tmp_path / "more.py"
  more.write_text(path.read_text().replace("'winners': 1", "'winners': 2"))
  before = {run: (run / "outcome.json").read_bytes() for run in (tmp_path / "work" / "finals" / "runs").iterdir()}
  assert sweep.main([f"--search={more}", f"--workdir={tmp_path / 'work'}"]) == 0
  runs = list((tmp_path / "work" / "finals" / "runs").iterdir())
  assert len(runs) == 3
  assert all(read_outcome(RunFolder(run)).status == "finished" for run in runs)
  assert all((run / "outcome.json").read_bytes() == outcome for run, outcome in before.items())


def test_stopped_in_each_rung_it_gives_the_same_table(searched, tmp_path, monkeypatch, capsys):
  """A kill while a group trains must lose nothing that decides who goes on: the same bits come out."""
  path, work = searched
  expected = (work / TABLE_FILE).read_bytes()
  for step in (1, 3):  # within the first rung, and within the second

    def flush(self, step=step, flush=loop._Loop._flush):
      flush(self)
      if self.step == step + 1:  # after the checkpoint of `step`, before the next one
        raise Killed

    with monkeypatch.context() as patch:
      patch.setattr(loop._Loop, "_flush", flush)
      with pytest.raises(Killed):
        sweep.main([f"--search={path}", f"--workdir={tmp_path / 'work'}"])
  assert not (tmp_path / "work" / "finals").exists()
  assert sweep.main([f"--search={path}", f"--workdir={tmp_path / 'work'}"]) == 0
  assert (tmp_path / "work" / TABLE_FILE).read_bytes() == expected
  capsys.readouterr()
  assert sweep.main([f"--search={path}", f"--workdir={tmp_path / 'work'}", "--list"]) == 0
  assert "candidates 6 of 6 were trained" in capsys.readouterr().out


def test_a_group_larger_than_memory_is_refused_with_how_many_fit(searched, tmp_path, monkeypatch):
  """Without it the machine would swap, or the process be killed without a word, an hour later."""
  path, _ = searched
  monkeypatch.setattr(groups, "_room", lambda device: 200_000)
  with pytest.raises(InputError, match=r"group=2: its parameters.*at most about \d+ fit: lower group"):
    sweep.main([f"--search={path}", f"--workdir={tmp_path / 'work'}"])
  assert not (tmp_path / "work" / "candidates").exists()


def test_another_folder_is_left_alone(searched, tmp_path):
  path, _ = searched
  (tmp_path / "other.txt").write_text("mine")
  with pytest.raises(InputError, match=r"holds no search, but 'other\.txt'"):
    sweep.main([f"--search={path}", f"--workdir={tmp_path}"])
  with pytest.raises(InputError, match="--search and --together exclude one another"):
    sweep.main([f"--search={path}", f"--workdir={tmp_path / 'work'}", "--together"])
  with pytest.raises(InputError, match="holds no search yet"):
    sweep.main([f"--search={path}", f"--workdir={tmp_path}", "--list"])
  assert sorted(file.name for file in tmp_path.iterdir()) == ["other.txt"]


def test_a_changed_recipe_lists_nothing_of_another_search(searched, tmp_path):
  """Losses of other rungs would stand there as those of this recipe."""
  path, work = searched
  other = tmp_path / "other.py"
  other.write_text(path.read_text().replace("'eta': 2", "'eta': 3"))
  with pytest.raises(InputError, match=r"holds another search: SEARCH\.eta: 2 there, 3 now"):
    sweep.main([f"--search={other}", f"--workdir={work}", "--list"])


def test_a_folder_with_what_a_kill_left_half_written_is_that_of_a_search(tmp_path):
  """Killed while it wrote search.json, a search would call its own folder somebody else's."""
  (tmp_path / f".{plan.SEARCH_FILE}.host-1.partial").write_text("{")
  _search._make_folder(tmp_path)


def _command(path, work, **environment):
  command = [sys.executable, "-m", "mixln_jax", "sweep", f"--search={path}", f"--workdir={work}"]
  path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
  return command, os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment


@pytest.mark.slow
def test_sigkill_at_any_time_gives_the_same_table(searched, tmp_path):
  """The real signal, in the real command, some time after each group: what a process leaves is all that counts."""
  path, work = searched
  command, environment = _command(path, tmp_path / "work")
  killed = 0
  for num_groups in range(6):
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not _has_come_to(tmp_path / "work", num_groups):
      time.sleep(0.05)
    time.sleep(0.2 + 0.3 * num_groups)
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      killed += 1
    process.wait()
  subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
  assert killed >= 4
  assert (tmp_path / "work" / TABLE_FILE).read_bytes() == (work / TABLE_FILE).read_bytes()
  assert len(list((tmp_path / "work" / "candidates").iterdir())) == 6


def _has_come_to(work, num_groups):
  """Whether so many groups of a search are done, or the first one has begun."""
  if num_groups == 0:
    return (work / groups.LOG).exists()
  return len(groups._read_costs(work / groups.COSTS)) >= num_groups


@pytest.mark.slow
def test_groups_lie_over_the_mesh_axis_run(searched, make_config, tmp_path):
  """Eight devices, two runs of a group: four devices each along `data`, and the same losses."""
  recipe = recipe_of(make_config, tmp_path, **{"mesh.run": 2, "mesh.data": 4})
  command, environment = _command(recipe, tmp_path / "work")
  environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
  subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
  _, work = searched
  there, here = (json.loads((folder / TABLE_FILE).read_text()) for folder in (tmp_path / "work", work))
  for one, other in zip(there["candidates"], here["candidates"], strict=True):
    assert one["layers"] == other["layers"]
    for result, expected in zip(one["results"], other["results"], strict=True):
      np.testing.assert_allclose(result["loss"], expected["loss"], atol=1e-5)

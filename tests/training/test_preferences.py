"""Tuning on pairs: it learns what is preferred, exactly over a crash, against references that are its start's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixln_jax import config as config_lib
from mixln_jax.__main__ import main
from mixln_jax.data import references
from mixln_jax.data.records import open_corpus
from mixln_jax.errors import InputError
from mixln_jax.model.initial import initial_params
from mixln_jax.opening import set_up
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.recipes import recipe as load_recipe
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.sweeps.joint import train_together
from mixln_jax.sweeps.sequence import open_study
from mixln_jax.sweeps.study import make_study, parse_axes
from mixln_jax.training import loop
from mixln_jax.training import step as step_lib
from mixln_jax.training.begin import begin_from
from mixln_jax.training.checkpoints import open_checkpoints, restore_state, split
from mixln_jax.training.finetune import resolve
from mixln_jax.training.program import abstract_batch, lower_train_step, program_hash
from mixln_jax.training.references import with_references
from training import pairs_on_eight
from training.test_start import curve

NUM_STEPS = 24
PLACEMENTS = ("mix:0.25", pytest.param("pre", marks=pytest.mark.slow))  # each compiles programs of its own
KEYS = "ijklmnopqrstuvwx"


def pairs():
  """The last letter of a question decides which of two answers is the right one: A and B take turns in the alphabet.

  Many letters, because what drawn weights prefer after each of them is a toss of a coin.
  """
  rng = np.random.default_rng(0)
  for number in range(400):
    word, key = "".join(rng.choice(list("abcdefgh"), 4)), number % len(KEYS)
    answers = ("A", "B") if key % 2 else ("B", "A")
    yield {"prompt": f"{word}{number}{KEYS[key]}", "chosen": answers[0], "rejected": answers[1]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
  """`recipe(placement, seed=0)`: the file of a recipe, and the run that it starts from; its records are prepared."""
  folder = tmp_path_factory.mktemp("recipe")
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs())))

  def make(placement, seed=0):
    name = f"{placement.partition(':')[0]}{seed}"
    start, path = folder / f"start_{name}", folder / f"{name}.py"
    if path.exists():
      return path, start
    config = config_lib.base()
    config.model.update(vocab_size=259, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=2, placement=placement)
    config.data.tokenizer = "bytes"
    begin_from(config, jax.jit(lambda: initial_params(config.model, seed))(), start)
    fields = {
      "data.source": str(folder / "pairs.jsonl"),
      "data.tokenizer": "bytes",
      "data.validation_share": 0.2,
      "data.directory": str(folder / "records"),
      "data.mode": "preferences",
      "data.document_mask": True,
      "data.sequence_length": 64,
      "preference.loss": "dpo",
      "train.start_from": str(start),
      "train.num_steps": NUM_STEPS,
      "train.batch_size": 8,
      "optimizer.learning_rate": 0.02,
      "optimizer.warmup_steps": 2,
      "checkpoint.every_steps": 8,
      "evaluate.every_steps": NUM_STEPS,
      "evaluate.batch_size": 8,
      "logging.tensorboard": False,
    }
    path.write_text(
      "from mixln_jax.config import base\n\n\ndef get_config():\n  config = base()\n"
      f"  config.update_from_flattened_dict({fields!r})\n  return config\n"
    )
    assert main(["prepare", f"--config={path}"]) == 0
    return path, start

  return make


@pytest.fixture(scope="module")
def tuned(recipe, tmp_path_factory):
  """`tuned(placement)`: a run that nobody stopped."""
  folder, done = tmp_path_factory.mktemp("tuned"), {}

  def run(placement):
    if placement not in done:
      path, _ = recipe(placement)
      done[placement] = folder / placement.replace(":", "_")
      assert main(["finetune", f"--config={path}", f"--workdir={done[placement]}"]) == 0
    return done[placement]

  return run


def config_of(workdir):
  return config_lib.from_json((workdir / "config.json").read_text())


def corpus_of(workdir) -> Any:
  """The records of a run, with the references of its start."""
  config = config_of(workdir)
  corpus = open_corpus(RunFolder(workdir).path.parent / config.data.directory)
  start = json.loads((workdir / "start.json").read_text())
  reference = references.Reference(start["hash"], references.model_hash(config.model))
  found = references.with_stored(corpus, reference)
  assert found is not None
  assert found.references is not None
  return found


def state_of(workdir):
  """Every leaf of the last checkpoint, optimizer and all."""
  config = config_of(workdir)
  checkpoints = open_checkpoints(config, RunFolder(workdir))
  state = restore_state(config, step_lib.state_shardings(config, make_mesh(config.mesh)), checkpoints, NUM_STEPS)
  checkpoints.close()
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(split(state))}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_learns_what_is_preferred_on_questions_that_it_has_not_seen(placement, tuned, capsys):
  """A sign, a side, or a reference that is another pair's would leave the accuracy at chance, where it begins."""
  workdir = tuned(placement)
  likelihoods = corpus_of(workdir).references["validation"]
  chosen, rejected = likelihoods[:, 0::2], likelihoods[:, 1::2]
  is_pair = chosen != 0
  assert 0.3 < np.mean((chosen > rejected)[is_pair]) < 0.7  # by likelihood, before it is tuned: chance
  first, last = read_metrics(workdir / "metrics.jsonl")[0], read_metrics(workdir / "metrics.jsonl")[-1]
  np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-4)
  assert abs(first["margin"]) < 1e-4  # it is its own reference
  assert last["split"] == "validation"
  assert last["pairs"] == is_pair.sum()
  assert last["accuracy"] > 0.9
  np.testing.assert_allclose(last["margin"], last["chosen_reward"] - last["rejected_reward"], rtol=1e-6)
  capsys.readouterr()
  assert main(["evaluate", f"--workdir={workdir}"]) == 0
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found == {name: value for name, value in last.items() if name != "split"}


def test_after_a_crash_it_is_the_untouched_run_even_where_its_start_is_gone(recipe, tuned, tmp_path, monkeypatch):
  """References that were computed again from other weights, or rows that lost theirs, would show in the last bit."""
  path, start = recipe("mix:0.25")
  copy = shutil.copytree(start, tmp_path / "start")
  workdir = tmp_path / "run"
  command = ["finetune", f"--config={path}", f"--workdir={workdir}", f"--config.train.start_from={copy}"]
  calls = []
  real = loop.global_batch

  def crash(*arguments):
    calls.append(None)
    if len(calls) == 12:
      raise RuntimeError("out of the blue")
    return real(*arguments)

  monkeypatch.setattr(loop, "global_batch", crash)
  with pytest.raises(RuntimeError, match="out of the blue"):
    main(command)
  monkeypatch.undo()
  shutil.rmtree(copy)
  assert main(command) == 0
  assert curve(workdir) == curve(tuned("mix:0.25"))
  expected, found = state_of(tuned("mix:0.25")), state_of(workdir)
  assert expected.keys() == found.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_two_placements_that_start_from_equal_weights_have_references_of_their_own(recipe, tmp_path):
  """Drawn weights are the same numbers for every placement: one would be trained against what the other makes of them.

  That was so: `pre` began at a loss of 0.69298 instead of log 2, against the log-probabilities of `mix:0.25`.
  """
  starts = {}
  for placement in ("mix:0.25", "pre"):
    path, _ = recipe(placement)
    config = resolve(load_recipe(str(path)), {}, RunFolder(tmp_path / "none"))
    setup = with_references(set_up(config), [RunFolder(tmp_path / "none")])
    assert setup.corpus.references is not None
    starts[placement] = setup.corpus.references["validation"]
  assert starts["mix:0.25"].shape == starts["pre"].shape
  assert np.abs(starts["mix:0.25"] - starts["pre"]).max() > 1e-3


def test_a_start_that_is_another_one_by_now_is_refused(recipe, tuned, tmp_path):
  """Its log-probabilities are not those that the run was trained against."""
  _, other = recipe("mix:0.25", seed=1)
  workdir = shutil.copytree(tuned("mix:0.25"), tmp_path / "run")
  config = config_of(workdir)
  config.data.directory = str(shutil.copytree(corpus_of(tuned("mix:0.25")).folder, tmp_path / "records"))
  config.train.start_from = str(other)
  setup = set_up(config)
  assert (
    getattr(with_references(setup, [RunFolder(workdir)]).corpus, "references", None) is not None
  )  # stored: nobody asks the start
  for path in (tmp_path / "records").glob("references-*"):
    path.unlink()
  with pytest.raises(InputError, match=r"has weights \w+ now, and the run started from \w+, whose log-probabilities"):
    with_references(setup, [RunFolder(workdir)])
  config.train.start_from = ""
  with pytest.raises(InputError, match=r"loss=dpo needs config.train.start_from"):
    with_references(set_up(config), [RunFolder(tmp_path / "none")])


def test_the_planned_step_is_the_one_that_a_run_runs(tuned):
  """`plan` has no data: a batch without references, or with more than dpo reads, would be another program's."""
  config = config_of(tuned("mix:0.25"))
  mesh = make_mesh(config.mesh)
  lowered = lower_train_step(config, mesh, step_lib.state_shardings(config, mesh))
  environment = json.loads((tuned("mix:0.25") / "environment.json").read_text())
  assert program_hash(lowered) == environment["train_step"]
  assert "references_BT" in abstract_batch(config, mesh)
  config.preference.loss = "orpo"
  assert "references_BT" not in abstract_batch(config, mesh)


@pytest.mark.slow
def test_two_rates_as_one_program_are_the_runs_that_they_would_be_alone(recipe, tuned, tmp_path):
  """One reference serves all runs of a program, since all of them start from the same weights."""
  config = resolve(config_of(tuned("mix:0.25")), {}, RunFolder(tmp_path / "none"))
  runs = open_study(make_study(config, [parse_axes(["learning_rate=0.02 0.01"])]), tmp_path / "study")
  train_together(make_study(config, [parse_axes(["learning_rate=0.02 0.01"])]), runs)
  alone = read_metrics(tuned("mix:0.25") / "metrics.jsonl")
  for line, other in zip(alone, read_metrics(runs[0].folder / "metrics.jsonl"), strict=True):
    assert line["step"] == other["step"]
    np.testing.assert_allclose(line["loss"], other["loss"], rtol=1e-4)
  last = read_metrics(runs[1].folder / "metrics.jsonl")[-1]
  assert last["split"] == "validation"
  assert last["loss"] != alone[-1]["loss"]


@pytest.mark.slow
def test_eight_devices_train_on_pairs_as_one_does():
  """Sums over a sequence whose positions lie on several devices, or pairs that one of them counts alone, would show."""
  script = Path(pairs_on_eight.__file__)
  root = Path(__file__).parents[2]
  environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
  result = subprocess.run(
    [sys.executable, str(script)], capture_output=True, text=True, timeout=900, env=environment, check=False
  )
  assert result.returncode == 0, result.stderr[-3000:]
  found = json.loads(result.stdout.splitlines()[-1])
  for mesh in pairs_on_eight.MESHES:
    for actual, expected in zip(found[mesh], found["one"], strict=True):
      assert actual.keys() == expected.keys()
      for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=f"{mesh}: {name}")

"""`sweep --track` and `report --track`: an entry is run by the track's protocol, and what is not free is named."""

import json
from pathlib import Path

import pytest

from mixln_jax import config as config_lib
from mixln_jax.commands import report, sweep
from mixln_jax.data.opening import open_data
from mixln_jax.errors import InputError
from mixln_jax.runs.outcome import Outcome, write_outcome
from mixln_jax.sweeps import sequence

RECIPE = """
from pathlib import Path
from mixln_jax import config

TRACK = {"name": "small", "title": "A small track", "rates": (1e-3, 2e-3, 4e-3), "first_rates": (1e-3, 2e-3),
  "placements": ("pre", "post"), "seeds": 2, "close_seeds": 3, "baseline_seeds": 4, "fingerprint": %r}

def get_config():
  return config.from_json(Path(%r).read_text())
"""


@pytest.fixture
def recipe(make_config, tmp_path):
  """A track whose records are those of the tests' corpus."""
  config = make_config(**{"train.num_steps": 2, "optimizer.warmup_steps": 0, "model.placement": "pre"})
  (tmp_path / "config.json").write_text(config_lib.to_json(config))
  fingerprint = open_data(config).manifest.fingerprint
  (tmp_path / "small.py").write_text(RECIPE % (fingerprint, str(tmp_path / "config.json")))
  return tmp_path / "small.py"


def loss_of(run):
  """The best rate is 2e-3; post is 0.02 above pre on average."""
  values = run.values
  seed = values["seed"]
  loss = 5.0 + 100 * abs(values["optimizer.learning_rate"] - 2e-3) + 0.01 * seed
  return loss + (0.02 + 0.001 * seed if values["model.placement"] == "post" else 0.0)


@pytest.fixture
def trained(monkeypatch):
  """Runs end at once, with the losses of `loss_of`; the names of those that were trained."""
  names = []

  def train_run(run, _):
    names.append(run.name)
    run.folder.create(config_lib.to_json(run.config))
    validation = {"step": 2, "split": "validation", "loss": loss_of(run), "perplexity": 1.0, "bits_per_byte": 1.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(validation) + "\n")
    write_outcome(run.folder, Outcome("finished", 2, validation={"step": 2, "loss": loss_of(run)}))
    return 0

  monkeypatch.setattr(sequence, "train_run", train_run)
  return names


def test_one_command_runs_every_stage_and_its_board_follows(recipe, trained, tmp_path, capsys):
  """Would catch a protocol that has to be driven by hand, or a board that can't be made of what it trained."""
  study = tmp_path / "study"
  assert sweep.main([f"--track={recipe}", f"--workdir={study}"]) == 0
  seeds = {}
  for name in trained:
    placement, rate, seed = name.split("-")
    seeds.setdefault((placement, rate), []).append(int(seed.removeprefix("seed")))
  assert seeds == {
    ("pre", "learning_rate0.001"): [0],
    ("pre", "learning_rate0.002"): [0, 1, 2, 3],
    ("pre", "learning_rate0.004"): [0],
    ("post", "learning_rate0.001"): [0],
    ("post", "learning_rate0.002"): [0, 1, 2],
    ("post", "learning_rate0.004"): [0],
  }
  assert f"report --track={recipe}" in capsys.readouterr().out
  assert sweep.main([f"--track={recipe}", f"--workdir={study}"]) == 0
  assert len(trained) == 11  # nothing again
  output = tmp_path / "board"
  assert report.main([f"--track={recipe}", str(study), f"--output={output}", "--store_noise"]) == 0
  assert (
    "Ranked entries: 1. By intervals that exclude 0, 0 are lower than pre and 1 is higher" in capsys.readouterr().out
  )
  assert json.loads((tmp_path / "small.json").read_text())["runs"] == 4  # beside the recipe
  recipe.write_text(recipe.read_text().replace('"baseline_seeds": 4', '"baseline_seeds": 20'))
  with pytest.raises(InputError, match="pre has 4 of the 20 seeds that the track asks for"):
    report.main([f"--track={recipe}", str(study), f"--output={output}", "--store_noise"])
  assert "stored with the track" in _board_again(recipe, study, output)


def _board_again(recipe: Path, study: Path, output: Path) -> str:
  assert report.main([f"--track={recipe}", str(study), f"--output={output}"]) == 0
  return (output / "board.html").read_text().lower()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["--config.optimizer.clip_norm=0"],
      r"not free in track small: config\.optimizer\.clip_norm=0\.0, the track has 1\.0",
    ),
    (["--config.train.num_steps=3"], r"config\.train\.num_steps=3, the track has 2"),
    (["--axis=optimizer.learning_rate=1e-3"], "varies model.placement; its rates and seeds are those of the track"),
    (["--axis=model.placement=pre pos"], "unknown placement 'pos'"),
  ],
)
def test_what_is_not_free_is_named_before_anything_is_trained(recipe, trained, tmp_path, arguments, message):
  """Would catch hours of runs that no board counts."""
  with pytest.raises(InputError, match=message):
    sweep.main(["--track", str(recipe), f"--workdir={tmp_path / 'study'}", *arguments])
  assert trained == []


def test_other_records_are_named_before_anything_is_trained(recipe, trained, tmp_path):
  """Would catch a tokenizer of another version, whose losses are no losses of the track."""
  text = recipe.read_text()
  recipe.write_text(text.replace('"fingerprint": \'', '"fingerprint": \'00'))
  with pytest.raises(InputError, match=r"have the fingerprint \w+…, the track 00\w+…: another text, tokenizer or"):
    sweep.main([f"--track={recipe}", f"--workdir={tmp_path / 'study'}"])
  assert trained == []


def test_flags_that_mean_nothing_together_are_rejected(recipe, tmp_path):
  output = f"--output={tmp_path / 'out'}"
  with pytest.raises(InputError, match="--store_noise has no meaning without --track"):
    report.main([str(tmp_path), output, "--store_noise"])
  with pytest.raises(InputError, match="--baseline has no meaning with --track"):
    report.main([str(tmp_path), output, f"--track={recipe}", "--baseline=post"])
  with pytest.raises(InputError, match=r"track=nowhere\.py: no such file"):
    report.main([str(tmp_path), output, "--track=nowhere.py"])

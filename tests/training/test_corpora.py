"""A run evaluated on another corpus than its own."""

import json

import pytest

from mixln_jax.__main__ import main
from mixln_jax.errors import InputError
from mixln_jax.training import loop

OTHER = "It is a truth universally acknowledged. "


@pytest.fixture(scope="module")
def runs(make_config, tmp_path_factory):
  """Two runs of one step, on the same records."""
  root = tmp_path_factory.mktemp("corpora")
  for name in ("a", "b"):
    loop.train(make_config(**{"train.num_steps": 1, "optimizer.warmup_steps": 0}), root / name)
  other = root / "other"
  other.mkdir()
  for number in range(40):
    (other / f"{number}.txt").write_text(f"{number}: {OTHER}" * (number + 5))
  return root


def evaluated(run, *arguments):
  assert main(["evaluate", f"--workdir={run}", *arguments]) == 0
  (path,) = (run / "corpora").glob("*/corpora.json")
  return json.loads(path.read_text())["corpora"]


def test_each_corpus_is_cut_by_the_runs_tokenizer_and_counted_alone(runs, monkeypatch, capsys):
  """Would catch the run's own set under another's name, or records that each run of a study prepares again."""
  monkeypatch.chdir(runs)
  found = evaluated(runs / "a", f"--corpus={runs / 'other'}")
  own, other = found.values()
  assert list(found)[1] == str(runs / "other")
  assert own["fingerprint"] != other["fingerprint"]
  assert own["loss"] != other["loss"]
  assert other["tokens"] > 0
  # The run's own loss is the one that training found.
  lines = [json.loads(line) for line in (runs / "a" / "metrics.jsonl").read_text().splitlines()]
  assert own["loss"] == pytest.approx(next(line["loss"] for line in lines if line["split"] == "validation"), abs=1e-6)
  assert "bits/byte can be compared across corpora" in capsys.readouterr().out
  prepared = sorted((runs / "work" / "data").iterdir())
  assert evaluated(runs / "b", f"--corpus={runs / 'other'}")[str(runs / "other")]["fingerprint"] == other["fingerprint"]
  assert sorted((runs / "work" / "data").iterdir()) == prepared


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--corpus=sotu", "--tasks=mixln"], "--corpus and --tasks are two evaluations"),
    (["--corpus=nowhere"], "no corpus there"),
  ],
)
def test_what_is_no_corpus_is_rejected_and_nothing_is_written(runs, monkeypatch, capsys, arguments, message):
  """Would catch a traceback, or half an evaluation in the run's folder."""
  monkeypatch.chdir(runs)
  for path in (runs / "a").glob("corpora/*/corpora.json"):
    path.unlink()
  status = main(["evaluate", f"--workdir={runs / 'a'}", *arguments])
  assert status == 2
  assert message in capsys.readouterr().err
  assert not list((runs / "a").glob("corpora/*/corpora.json"))


@pytest.mark.parametrize("mode", ["instructions", "preferences"])
def test_a_run_on_answers_has_no_other_corpus(mode, make_config, runs):
  """Would catch a loss of answers beside a loss of text."""
  from types import SimpleNamespace

  from mixln_jax.training.corpora import other_corpus

  config = make_config()
  config.data.mode = mode
  with pytest.raises(InputError, match=f"was trained on {mode}"):
    other_corpus(SimpleNamespace(config=config), "sotu")

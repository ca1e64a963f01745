"""A run of an earlier version opens, evaluates, resumes, generates, diagnoses and reports (tests/data/old_run)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mixln_jax.__main__ import main
from mixln_jax.runs.metrics import read_metrics

OLD = Path(__file__).parents[1] / "data" / "old_run"
EXPECTED = json.loads((OLD / "expected.json").read_text())
# The same program on another processor sums in another order; a loss is a mean of a thousand fp32 terms.
LOSS = 1e-5


@pytest.fixture
def old(tmp_path, monkeypatch):
  """A copy of the run with its records, as it lay: its config names the records relative to the working directory."""
  shutil.copytree(OLD, tmp_path / "old")
  monkeypatch.chdir(tmp_path / "old")
  return tmp_path / "old" / "run"


def printed(capsys):
  return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("number", [0, 1])
def test_it_evaluates_to_the_same_loss(old, capsys, number):
  """A field or a column whose default is not what the code did before would change the model."""
  expected = EXPECTED["evaluate"][number]
  assert main(["evaluate", f"--workdir={old}", f"--step={expected['step']}"]) == 0
  lines = printed(capsys)
  actual = json.loads(lines[-1])
  assert lines[-2].endswith("nats above it")  # a model that is worse than the unigram entropy
  assert actual["loss"] == pytest.approx(expected["loss"], abs=LOSS)
  assert actual["unigram_entropy"] == pytest.approx(expected["unigram_entropy"], abs=1e-9)


def test_it_resumes_from_its_earlier_checkpoint_to_the_same_losses(old):
  """A state, a batch or a schedule that is read in another way would show in the ten steps that are done again."""
  before = read_metrics(old / "metrics.jsonl")
  shutil.rmtree(old / "checkpoints" / "20")
  assert main(["train", f"--workdir={old}"]) == 0
  after = read_metrics(old / "metrics.jsonl")
  assert [(line["split"], line["step"]) for line in after] == [(line["split"], line["step"]) for line in before]
  np.testing.assert_allclose([line["loss"] for line in after], [line["loss"] for line in before], atol=LOSS)
  diagnoses = [json.loads(line)["step"] for line in (old / "diagnostics.jsonl").read_text().splitlines()]
  assert diagnoses == [1, 10, 20]


def test_it_generates_and_diagnoses(old, capsys):
  """Its tokenizer lies with its records, and none in its folder."""
  arguments = ["--prompt=The people", "--temperature=0", "--num_tokens=20", "--json"]
  assert main(["generate", f"--workdir={old}", *arguments]) == 0
  assert json.loads(printed(capsys)[-1]) == EXPECTED["generate"]
  assert main(["diagnose", f"--workdir={old}", "--tokens=2048", "--json"]) == 0
  actual, expected = json.loads(printed(capsys)[-1]), EXPECTED["diagnose"]
  assert actual["angular_distance"].keys() == expected["angular_distance"].keys()
  without = [entry["loss"] if isinstance(entry, dict) else entry for entry in _numbers(actual["removal"])]
  np.testing.assert_allclose(without, _numbers(expected["removal"]), atol=10 * LOSS)


def _numbers(tree):
  """All numbers of a JSON value, in order."""
  if isinstance(tree, dict):
    return [number for value in tree.values() for number in _numbers(value)]
  if isinstance(tree, list):
    return [number for value in tree for number in _numbers(value)]
  return [tree] if isinstance(tree, (int, float)) else []


def test_it_reports(old, tmp_path, capsys):
  assert main(["report", f"--workdir={old}", f"--output={tmp_path / 'report'}"]) == 0
  assert "warning" not in capsys.readouterr().err
  assert (tmp_path / "report" / "report.html").is_file()


def change(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_field_that_is_not_known_is_named_with_the_version_that_wrote_it(old, capsys):
  """Ignoring it would compute another model than the one that was trained."""
  change(old / "config.json", **{"model.num_experts": 8})
  assert main(["evaluate", f"--workdir={old}"]) == 2
  error = capsys.readouterr().err
  assert "config.model.num_experts=8" in error
  assert "revision bf7b90e" in error


def test_a_column_that_is_not_known_is_named(old, capsys, monkeypatch):
  """A renamed column ended in a traceback."""
  from mixln_jax.runs.checkpoint import Checkpoints

  real = Checkpoints.facts

  def facts(self, step):
    facts = real(self, step)
    facts["placement"][0]["attention"]["norm_before"] = True
    return facts

  monkeypatch.setattr(Checkpoints, "facts", facts)
  assert (
    main(
      [
        "train",
        f"--workdir={old}",
      ]
    )
    == 2
  )
  error = capsys.readouterr().err
  assert "column norm_before=True" in error
  assert "revision bf7b90e" in error

"""Run folders as they really are: still training, torn, damaged, or none at all."""

import json
import math

import numpy as np
import pytest

from mixln_jax.errors import InputError
from mixln_jax.reporting.loading import load, read_diagnosis
from reporting.making import make_run, make_study


def test_a_run_that_still_trains(tmp_path):
  folder = make_run(tmp_path / "run", ended=False)
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  (folder / "metrics.jsonl").write_text("\n".join(lines[:7]) + '\n{"step": 8, "spl')
  (run,) = load([str(folder)]).runs
  assert (run.step, run.final_loss, run.status, run.problems) == (7, None, "running or killed", [])


def test_numbers_that_are_not_finite(tmp_path):
  folder = make_run(tmp_path / "run")
  line = {"step": 20, "split": "validation", "loss": "nan", "perplexity": "inf"}
  (folder / "metrics.jsonl").write_text(json.dumps(line))
  (folder / "outcome.json").write_text('{"status": "non_finite", "diverged": false}')
  (run,) = load([str(folder)]).runs
  assert math.isnan(run.validation["loss"][0])
  assert (run.final_loss, run.diverged) == (None, True)


@pytest.mark.parametrize(
  ("file", "text", "words"),
  [
    ("metrics.jsonl", '{"step": 1\n{"step": 2, "split": "train", "loss": 1}\n', "line 1 is not JSON"),
    ("metrics.jsonl", '{"step": 1, "split": "train"}\n', "has no loss"),
    ("outcome.json", "[]", "holds no JSON object"),
    ("outcome.json", "{", "can't be read"),
    ("diagnostics.jsonl", '{"stp": 1}\n', "line 1 has no step"),
    ("diagnose/20/diagnose.json", '{"step": 20}', "diagnose.json: damaged (KeyError: 'num_layers')"),
    (
      "diagnose/20/diagnose.json",
      '{"step": 1, "num_layers": 3, "effective_rank": [1]}',
      "shape (1,) stands where (4,)",
    ),
  ],
)
def test_a_damaged_file_is_named_and_the_rest_is_read(file, text, words, tmp_path):
  folder = make_run(tmp_path / "run")
  (folder / file).write_text(text)
  (run,) = load([str(folder)]).runs
  (problem,) = run.problems
  assert words in problem
  assert run.placement == "mix:0.25"


def test_a_run_without_a_readable_config_is_left_out_and_named(tmp_path):
  whole, broken = make_run(tmp_path / "whole"), make_run(tmp_path / "broken")
  (broken / "config.json").write_text('{"seed": 0')
  material = load([str(whole), str(broken)])
  assert [run.name for run in material.runs] == ["whole"]
  assert "broken/config.json: can't be read" in material.problems[0]
  with pytest.raises(InputError, match=r"config\.json"):
    load([str(broken)])


def test_what_is_not_there_is_refused(tmp_path):
  with pytest.raises(InputError, match="holds neither a run"):
    load([str(make_run(tmp_path / "run")), str(tmp_path)])


def test_names_are_as_short_as_they_can_be(tmp_path):
  folders = [make_run(tmp_path / sweep / "pre") for sweep in ("a", "b")]
  assert [run.name for run in load(list(map(str, folders))).runs] == ["a/pre", "b/pre"]
  assert [run.name for run in load([str(folders[0])] * 2).runs] == ["pre"]  # given twice, read once


def test_a_study_is_reported_alone_and_says_what_has_not_started(tmp_path):
  losses = {name: ({"model.placement": name}, 5.0) for name in ("pre", "post")}
  folder = make_study(tmp_path / "study", losses)
  (folder / "runs" / "post").rename(tmp_path / "post")
  material = load([str(folder)])
  assert [run.name for run in material.runs] == ["pre"]
  assert material.not_started == ["post"]
  with pytest.raises(InputError, match="reported alone"):
    load([str(folder), str(tmp_path / "post")])
  study = json.loads((folder / "study.json").read_text())
  for change in ({"axes": 3}, {"runs": [{"name": "../../post", "values": {}}]}, {"runs": "x"}):
    (folder / "study.json").write_text(json.dumps(study | change))
    with pytest.raises(InputError, match=r"study\.json: damaged"):
      load([str(folder)])


def test_null_is_nan_in_a_diagnosis(tmp_path):
  folder = make_run(tmp_path / "run", diagnosed=True)
  diagnosis = read_diagnosis(folder / "diagnose" / "20" / "diagnose.json")
  last = diagnosis.angular_distance["last"]
  assert last.shape == (4, 4)
  assert np.isfinite(last).sum() == 4 + 3 + 2 + 1
  assert diagnosis.removal[2].tolist() == [7.0, 6.5, 6.0]

"""Run folders as they really are: still training, torn, damaged, or none at all."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from mixln_jax.errors import InputError
from mixln_jax.reporting import figures
from mixln_jax.reporting.groups import differing_fields
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.model_diagnosis import read_diagnosis
from mixln_jax.reporting.page import write_report
from reporting.making import make_run, make_study

OLD_RUN = Path(__file__).parents[1] / "data" / "old_run" / "run"


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
    ("metrics.jsonl", '{"step": 1\n{"step": 2, "split": "train", "loss": 1}\n', "line 1: damaged, not JSON"),
    ("metrics.jsonl", '{"step": 1, "split": "train"}\n', "line 1: damaged, it has no loss"),
    ("outcome.json", "[]", "a JSON list and not an object"),
    ("outcome.json", "{", "damaged, not JSON"),
    ("diagnostics.jsonl", '{"stp": 1}\n', "line 1: damaged, it has no step"),
    ("diagnose/20/diagnose.json", '{"step": 20}', "diagnose.json: damaged (KeyError: 'num_layers')"),
    (
      "diagnose/20/diagnose.json",
      '{"step": 1, "num_layers": 3, "effective_rank": [1]}',
      "an array has shape (1,), expected (4,)",
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
  assert "broken/config.json: damaged, not JSON" in material.problems[0]
  with pytest.raises(InputError, match=r"config\.json"):
    load([str(broken)])


def test_a_folder_without_a_run_is_an_error(tmp_path):
  with pytest.raises(InputError, match="holds neither a run"):
    load([str(make_run(tmp_path / "run")), str(tmp_path / "none")])


def test_names_are_as_short_as_they_can_be(tmp_path):
  folders = [make_run(tmp_path / sweep / "pre") for sweep in ("a", "b")]
  assert [run.name for run in load(list(map(str, folders))).runs] == ["a/pre", "b/pre"]
  assert [run.name for run in load([str(folders[0])] * 2).runs] == ["pre"]  # given twice, read once


def test_a_study_says_what_has_not_started_and_runs_beside_it_make_it_none(tmp_path):
  losses = {name: ({"model.placement": name}, 5.0) for name in ("pre", "post")}
  folder = make_study(tmp_path / "study", losses)
  (folder / "runs" / "post").rename(tmp_path / "post")
  material = load([str(folder)])
  assert [run.name for run in material.runs] == ["pre"]
  assert material.not_started == ["post"]
  shutil.copytree(folder, tmp_path / "copy")  # its planned runs have the same names, and are other runs
  assert load([str(folder), str(tmp_path / "copy"), str(folder)]).not_started == ["post", "post"]
  assert material.study.question == "Which?"
  both = load([str(folder), str(tmp_path / "post")])
  assert ([run.name for run in both.runs], both.study) == (["pre", "post"], None)
  study = json.loads((folder / "study.json").read_text())
  for change in ({"axes": 3}, {"runs": [{"name": "../../post", "values": {}}]}, {"runs": "x"}):
    (folder / "study.json").write_text(json.dumps(study | change))
    with pytest.raises(InputError, match=r"study\.json: .*damaged"):
      load([str(folder)])


def test_folders_of_runs_and_several_studies(tmp_path):
  """Would catch ten runs that need ten flags, and runs of two studies whose names are the same."""
  losses = {name: ({"model.placement": name}, 5.0) for name in ("pre", "post")}
  for name in ("a", "b"):
    make_study(tmp_path / "studies" / name, losses)
  make_run(tmp_path / "studies" / "alone")
  (tmp_path / "studies" / "notes").mkdir()  # neither: not asked for by name
  expected = ["runs/pre", "runs/post"]
  material = load([str(tmp_path / "studies")])
  assert len(material.runs) == 5
  assert material.study is None
  assert len({run.name for run in material.runs}) == 5
  assert [run.path.parent.parent.name for run in load([str(tmp_path / "studies" / "a")]).runs] == ["a", "a"]
  assert [f"runs/{run.name}" for run in load([str(tmp_path / "studies" / "a" / "runs")]).runs] == sorted(expected)


def test_null_is_nan_in_a_diagnosis(tmp_path):
  folder = make_run(tmp_path / "run", diagnosed=True)
  diagnosis = read_diagnosis(folder / "diagnose" / "20" / "diagnose.json")
  last = diagnosis.angular_distance["last"]
  assert last.shape == (4, 4)
  assert np.isfinite(last).sum() == 4 + 3 + 2 + 1
  assert diagnosis.removal[2].tolist() == [7.0, 6.5, 6.0]


def test_a_field_that_an_earlier_version_lacked_has_its_default(tmp_path):
  """Would catch a run of an earlier version that is not compared with a new one of the same settings."""
  old, new = make_run(tmp_path / "old"), make_run(tmp_path / "new")
  config = json.loads((old / "config.json").read_text())
  del config["model.qkv_bias"], config["data.seed"]
  (old / "config.json").write_text(json.dumps(config))
  material = load([str(old), str(new)])
  assert material.runs[0].config == material.runs[1].config
  assert differing_fields(material.runs) == []
  assert material.runs[0].problems == []


@pytest.mark.parametrize(
  ("environment", "words"),
  [
    ({"version": "9.9", "git": "abc"}, "written by version 9.9;"),
    ({"git": "abc"}, "written by revision abc;"),
    ({"git": None}, "written by another version;"),
  ],
)
def test_a_field_that_this_version_lacks_is_named_with_the_version_that_wrote_it(environment, words, tmp_path):
  """Would catch a setting of another version that is ignored without a word."""
  folder = make_run(tmp_path / "run", environment=environment, model__streams=4)
  (run,) = load([str(folder)]).runs
  (problem,) = run.problems
  assert words in problem
  assert "does not know model.streams=4" in problem
  assert run.config["model.streams"] == 4


def test_a_run_of_an_earlier_version_is_reported(tmp_path, monkeypatch):
  """Would catch a report that can't read, or silently leaves out, what an earlier version wrote."""
  monkeypatch.setattr(figures, "FORMATS", ("svg",))  # one format shows whether it is drawn
  shutil.copytree(OLD_RUN, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoints"))
  material = load([str(tmp_path / "old")])
  (run,) = material.runs
  assert run.problems == []
  assert (run.step, run.status) == (20, "finished, diverged")
  assert run.final_loss == 2.9891420534143895
  assert run.layer_list == ["post+gpas", "pre", "layerscale+qk_norm", "lns"]
  report = write_report(material, tmp_path / "report")
  drawn = {path.stem for path in report.figures}
  while_training = {"layer_gradient_norm", "residual_growth", "update_ratio", "branch_ratio", "norm_gain", "attention"}
  assert drawn == {"loss", "gradient_norm", "cosine"} | while_training
  assert "(perplexity 19.87); there is nothing to compare it with" in report.headline
  assert "19.87" in report.page.read_text()

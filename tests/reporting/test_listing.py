"""`runs`: how the runs of a folder stand, and which are comparable."""

import re
import shutil

from mixln_jax.__main__ import main
from reporting.making import make_run, make_study


def test_a_line_for_each_run_and_which_are_comparable(tmp_path, capsys):
  """Would catch runs of another length or other data that are shown as comparable, and a status that is not so."""
  make_run(tmp_path / "pre", 5.0, model__placement="pre")
  make_run(tmp_path / "post", 4.5, model__placement="post", seed=1, optimizer__learning_rate=3e-3)
  make_run(tmp_path / "long", 4.0, train__num_steps=40)
  make_run(tmp_path / "other", 4.0, fingerprint="e" * 16, ended=False)
  assert main(["runs", str(tmp_path)]) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = {line.split()[0]: line for line in lines[1:5]}
  assert re.search(r"pre +finished +20/20 +5\.0000 +\d+ s +\d+ kB  \w$", rows["pre"])
  assert re.search(r"mix:0\.25 +killed or waiting +20/20 ", rows["other"])
  sets = {name: line.split()[-1] for name, line in rows.items()}
  assert sets["pre"] == sets["post"]
  assert len(set(sets.values())) == 3
  assert any(line.startswith("  A: ") and "steps" in line for line in lines)


def test_a_folder_of_folders_is_looked_through_and_a_study_may_not_have_begun(tmp_path, capsys):
  """Would catch `runs work` that names nothing, and a study that can't be looked at before its first run."""
  make_run(tmp_path / "work" / "runs" / "alone", 4.0)
  make_study(tmp_path / "work" / "studies" / "done", {"pre": ({"model.placement": "pre"}, 5.0)})
  planned = make_study(tmp_path / "work" / "studies" / "planned", {"post": ({"model.placement": "post"}, 5.0)})
  shutil.rmtree(planned / "runs")
  assert main(["runs", str(tmp_path / "work")]) == 0
  out = capsys.readouterr().out
  assert {line.split()[0] for line in out.splitlines()[1:3]} == {"alone", "pre"}
  assert "planned and not started: 1, the first is post" in out
  assert main(["runs", str(planned)]) == 0
  assert capsys.readouterr().out == "planned and not started: 1, the first is post\n"
  assert main(["report", str(planned), f"--output={tmp_path / 'report'}"]) == 2
  assert "no run of the study has started yet" in capsys.readouterr().err


def test_an_empty_default_says_what_to_name(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(["runs"]) == 2
  assert "name a folder" in capsys.readouterr().err

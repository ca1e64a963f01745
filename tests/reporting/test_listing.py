"""`runs`: how the runs of a folder stand, and which are comparable."""

import re

from mixln_jax.__main__ import main
from reporting.making import make_run


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


def test_an_empty_default_says_what_to_name(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(["runs"]) == 2
  assert "name a folder" in capsys.readouterr().err

"""A search beside its finals: what it saw is never shown as what held."""

import json
import math

import pytest

from mixln_jax.commands.report import main
from mixln_jax.errors import InputError
from mixln_jax.reporting import figures
from mixln_jax.reporting.analysis import analyze
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.search import layer_effects, search_effects, search_layers, search_rungs
from mixln_jax.reporting.search_record import read_search
from reporting.making import config_of, make_run, make_study

# Post-LN in the first layer costs 0.5 nats here, sandwich in the last one gains 0.25.
LAYERS = [(a, "pre", b, c) for a in ("pre", "post") for b in ("pre", "lns") for c in ("pre", "sandwich")] * 2


def loss_of(layers, number):
  return 5.0 + 0.5 * (layers[0] == "post") - 0.25 * (layers[3] == "sandwich") + 0.001 * number


def make_search(folder, *, diverged=()):
  folder.mkdir()
  rows = []
  for number, layers in enumerate(LAYERS, start=1):
    results = [{"rung": 1, "loss": loss_of(layers, number), "status": "ok"}]
    if number in diverged:
      results = [{"rung": 1, "loss": "inf", "status": "non_finite"}]
    elif number in (2, 4):
      results.append({"rung": 2, "loss": 4.0 + 0.01 * number, "status": "ok"})
    values = {"model.placement": ",".join(layers)}
    rows.append({"number": number, "values": values, "layers": layers, "results": results})
  (folder / "table.json").write_text(json.dumps({"candidates": rows}))
  plan = {"base": config_of(), "sampler": "tpe", "rungs": [10, 20]}
  (folder / "search.json").write_text(json.dumps(plan))
  return folder


def with_finals(folder):
  (folder / "finals").mkdir()
  losses = {}
  for placement, offset in (("pre", 0.3), ("pre*3,sandwich", 0.1)):
    for seed in (1, 2, 3):
      name = f"{placement.replace('*', '_').replace(',', '_')}-{seed}"
      losses[name] = ({"model.placement": placement, "seed": seed}, 4.0 + offset + 0.01 * seed * (1 + offset))
  return make_study(folder / "finals", losses)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
  folder = make_search(tmp_path_factory.mktemp("search") / "search", diverged=(9,))
  with_finals(folder)
  return analyze(load([str(folder)]))


def test_the_answer_is_of_the_finals_and_the_table_has_both(analysis):
  """The lowest of many losses is too low: it must not stand in the headline, nor in the paired difference."""
  assert "0.1" in analysis.headline.text
  assert len(analysis.material.runs) == 6
  table = next(table for table in analysis.tables if table.name == "search_and_finals")
  by_group = {row["group"]: row for row in table.data}
  winner = by_group["pre*3,sandwich"]
  assert (winner["candidate"], winner["search_loss"]) == (2, 4.02)
  assert winner["held_mean"] == pytest.approx(4.122)
  assert winner["difference"] == pytest.approx(-0.204)
  assert by_group["pre"]["search_loss"] is None
  assert any("place 1" in cell for cell in table.rows[1])


def test_each_layers_effect_has_the_sign_that_was_put_in(analysis):
  """Of all 16 candidates but the diverged one; a name turned around, or one layer off, shows here."""
  effects = layer_effects(analysis.material.search)
  mean, half = effects["post"][0]
  assert mean == pytest.approx(0.5, abs=0.05)
  assert mean - half > 0
  mean, half = effects["sandwich"][3]
  assert mean == pytest.approx(-0.25, abs=0.1)
  assert math.isnan(effects["post"][1][0])  # nobody has it there
  figure = search_effects(analysis.source)
  assert "higher one post at layer 1" in figure.caption
  assert [panel.title for panel in figure.panels] == ["pre", "sandwich", "lns", "post"]


def test_rungs_and_layers_are_those_of_the_candidates(analysis):
  rungs = search_rungs(analysis.source)
  assert list(rungs.looks.values()) == ["trained to the end", "given up after rung 1"]
  assert [list(series.x) for series in rungs.panels[0].series[:3]] == [[10.0, 20.0], [10.0, 20.0], [10.0]]
  rows = search_layers(analysis.source).panels[0].layer_rows
  assert [row.label.split(":")[0] for row in rows[:2]] == ["2", "4"]
  assert rows[-1].label == "9: diverged"
  assert list(rows[0].layers) == ["pre", "pre", "pre", "sandwich"]


def test_a_search_in_a_folder_is_found_there(tmp_path):
  """`report work/searches` would find nothing, or leave a search out without a word."""
  folder = make_search(tmp_path / "search")
  with_finals(folder)
  assert len(load([str(tmp_path)]).search.candidates) == len(LAYERS)
  make_run(tmp_path / "alone")
  assert len(load([str(tmp_path)]).runs) == 7


def test_what_the_search_saw_is_of_the_same_rate(tmp_path):
  """Where all finals have one rate no group names it: the loss of the same layers at another rate would stand there."""
  folder = make_search(tmp_path / "search")
  with_finals(folder)
  content = json.loads((folder / "table.json").read_text())
  for row in content["candidates"]:
    row["values"]["optimizer.learning_rate"] = 5e-3 if row["number"] == 2 else 1e-3
  content["candidates"][9]["results"].append({"rung": 2, "loss": 4.5, "status": "ok"})  # the same layers as of 2
  (folder / "table.json").write_text(json.dumps(content))
  table = next(table for table in analyze(load([str(folder)])).tables if table.name == "search_and_finals")
  assert {row["group"]: row["candidate"] for row in table.data} == {"pre": None, "pre*3,sandwich": 10}


def test_the_page_shows_it(tmp_path, monkeypatch, capsys):
  folder = make_search(tmp_path / "search")
  with_finals(folder)
  monkeypatch.setattr(figures, "FORMATS", ("svg",))
  assert main([str(folder), f"--output={tmp_path / 'report'}"]) == 0
  page = (tmp_path / "report" / "report.html").read_text()
  assert "What the search saw, and what held" in page
  for name in ("search_rungs", "search_layers", "search_effects"):
    assert f'id="{name}"' in page
    assert (tmp_path / "report" / "tables" / f"{name}.csv").stat().st_size > 0


def test_a_search_without_finals_and_damaged_ones_are_refused(tmp_path):
  folder = make_search(tmp_path / "search")
  with pytest.raises(InputError, match="best candidates were not tried again yet"):
    load([str(folder)])
  with_finals(folder)
  (folder / "table.json").write_text('{"candidates": [{"number": 1, "values": {}, "layers": [], "results": []}]}')
  with pytest.raises(InputError, match=r"table\.json: damaged, it has no model\.placement"):
    load([str(folder)])
  (folder / "search.json").write_text('{"base": {}, "sampler": "tpe", "rungs": "10"}')
  with pytest.raises(InputError, match=r"search\.json: damaged, rungs are '10'"):
    read_search(folder)


def test_without_a_search_there_is_nothing_of_it(tmp_path):
  folder = tmp_path / "study"
  folder.mkdir()
  analysis = analyze(load([str(make_study(folder, {"pre": ({"model.placement": "pre", "seed": 0}, 5.0)}))]))
  assert analysis.material.search is None
  assert not search_rungs(analysis.source).panels
  assert "search_and_finals" not in {table.name for table in analysis.tables}

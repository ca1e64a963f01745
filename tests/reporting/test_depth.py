"""Loss against depth with slopes known beforehand, and the figures of the depth suite."""

import dataclasses
import math
import re

import numpy as np
import pytest

from mixln_jax.reporting import suite
from mixln_jax.reporting.analysis import analyze
from mixln_jax.reporting.depth import Rung, ladders, loss_by_depth, slope_of
from mixln_jax.reporting.figures import page_svgs
from mixln_jax.reporting.groups import Group
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.page import figure_view
from mixln_jax.reporting.panels import Figure, Panel, Style
from reporting.making import make_run, make_suite

# placement, layers, rate -> losses of seeds. The best rates lie on 6 − 0.5 log2(layers) for pre, whose grid ends there
# at 4 layers; post is flat and has one rate of each shape.
LOSSES = {
  ("pre", 2, 1e-3): (5.6,),
  ("pre", 2, 3e-3): (5.4, 5.6),
  ("pre", 2, 1e-2): (5.9,),
  ("pre", 4, 1e-3): (5.4,),
  ("pre", 4, 3e-3): (4.9, 5.1),
  ("pre", 8, 3e-3): (5.0,),
  ("pre", 8, 1e-2): (4.4, 4.6),
  ("post", 2, 3e-3): (6.0,),
  ("post", 4, 3e-3): (6.0,),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  root, folders = tmp_path_factory.mktemp("ladder"), []
  for (placement, layers, rate), losses in LOSSES.items():
    for seed, loss in enumerate(losses):
      values = {"model__placement": placement, "model__num_layers": layers, "model__embed_dim": 512 // layers}
      name = f"{placement}-{layers}-{rate}-{seed}"
      folders.append(str(make_run(root / name, loss, seed=seed, optimizer__learning_rate=rate, **values)))
  return analyze(load(folders))


def test_each_placement_is_taken_at_its_best_rate_of_each_depth(report):
  """A mean over rates; a slope through all rates; a rate at the edge that is called the best without a word."""
  found = {ladder.name: ladder for ladder in ladders(report.source)}
  assert set(found) == {"pre", "post"}
  assert [(rung.depth, rung.rate) for rung in found["pre"].rungs] == [(2, 3e-3), (4, 3e-3), (8, 1e-2)]
  assert found["pre"].at_edge == [4, 8]
  assert found["pre"].slope.value == pytest.approx(-0.5)
  # Six runs 0.1 off the line: s² = 0.06 / 4, Σ (x − mean)² = 4, t(4; 0.975) = 2.776445.
  reach = 2.776445 * (0.06 / 4 / 4) ** 0.5
  assert found["pre"].slope.interval == pytest.approx((-0.5 - reach, -0.5 + reach), rel=1e-5)
  assert found["post"].slope.value == 0
  assert found["post"].slope.interval is None  # two runs fit any line


def test_the_figure_and_the_table_say_the_same(report):
  """A slope that the legend lacks; an edge that is not marked; a table in another order."""
  (panel,) = loss_by_depth(report.source).panels
  line = next(series for series in panel.series if series.name.startswith("pre: -0.5000 ["))
  assert line.x == [2, 4, 8]
  assert line.y == pytest.approx([5.5, 5.0, 4.5])
  assert line.marked == [1, 2]
  assert "at the edge of its grid" in line.notes[1]
  table = next(table for table in report.tables if table.name == "depth")
  assert table.headers == ("placement", "2 layers", "4 layers", "8 layers", "slope")
  row = next(row for row in table.rows if row[0] == "pre")
  assert row[1:4] == ["5.5000 ± 0.1414 at 0.003", "5.0000 ± 0.1414 at 0.003 (edge)", "4.5000 ± 0.1414 at 0.01 (edge)"]


def test_one_depth_has_no_slope():
  """A line through one point."""
  group = Group("pre", "pre", {}, (0,), Style())
  assert slope_of([Rung(4, group, (5.0, 5.1), None, False)]) is None


def test_the_suite_is_drawn_side_by_side(tmp_path):
  """A map that is turned around: what was removed belongs on the horizontal axis; depths beside layers."""
  folders = []
  for number, placement in enumerate(("pre", "post")):
    values = {"model__placement": placement}
    diagnosis = {"depth_suite": {"arrays": make_suite(0.5 + number)}}
    folders.append(str(make_run(tmp_path / placement, 5.0, diagnosed=True, diagnosis=diagnosis, **values)))
  source = analyze(load(folders)).source
  maps = suite.causal_maps(source)
  assert [panel.title for panel in maps.panels] == ["pre", "post"]
  assert maps.panels[1].matrix[3, 0] == 1.5
  assert np.isnan(maps.panels[1].matrix[0, 3])
  assert maps.colour_range == (0.0, 1.0)  # which ends at 1
  causal, exchanged, useful, _ = suite.suite_by_layer(source).panels
  assert causal.series[0].x == [1, 2, 3]
  assert causal.series[0].y[0] == 0.5
  assert exchanged.series[0].y[0] == pytest.approx(0.05)
  assert useful.series[1].y == [0, 1, 2, 3]
  assert [panel.series[0].x[0] for panel in suite.lens_by_depth(source).panels] == [0, 0]
  assert dataclasses.replace(maps).colour_label == "causal score"


def test_maps_on_the_page_share_a_scale_and_tables_have_the_words_of_their_axes():
  """Maps side by side whose colours mean different numbers, under a caption that says they don't; rows called n."""
  small, large = np.array([[np.nan, np.nan], [0.25, np.nan]]), np.array([[np.nan, np.nan], [4.0, np.nan]])
  panels = [Panel(name, "removed", "later", matrix=matrix) for name, matrix in (("a", small), ("b", large))]
  figure = Figure("scores", "Scores", "of layers", panels, "score")
  for limit, expected in ((math.inf, (0.0, 4.0)), (1.0, (0.0, 1.0))):
    limited = dataclasses.replace(figure, largest_colour=limit)
    assert limited.colour_range == limited.alone(0).colour_range == limited.alone(1).colour_range == expected
    scales = [set(re.findall(r">([0-9]\.[0-9]+|[0-9])<", svg)) for svg in page_svgs(limited)]
    assert scales[0] == scales[1]
  table = figure_view(figure)["tables"][1]
  assert table["title"] == "b – down: later; across: removed"
  assert table["headers"] == ["", "1", "2"]
  assert table["rows"] == [("1", "", ""), ("2", "4.00", "")]

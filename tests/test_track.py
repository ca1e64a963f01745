"""Tracks: what of a config is free, and the study that an entry is."""

import pytest

from mixln_jax.errors import InputError
from mixln_jax.sweeps.study import make_study
from mixln_jax.track import load_track

TRACKS = ("cpu", "depth", "gpu")
RECIPE = """
from mixln_jax.config import base
TRACK = {{"name": "small", "title": "Small", "rates": (1e-3, 2e-3, 4e-3), "first_rates": (1e-3, 2e-3),
  "placements": ("pre", "post"){more}}}
def get_config():
  return base()
"""


def load(tmp_path, more=""):
  (tmp_path / "small.py").write_text(RECIPE.format(more=more))
  return load_track(tmp_path / "small.py")[0]


@pytest.mark.parametrize("name", TRACKS)
def test_the_runs_of_each_track_keep_its_own_rules(name):
  """Would catch a recipe whose own protocol leaves the grid, a shape, or a fixed field."""
  track, config = load_track(f"configs/tracks/{name}.py")
  planned = make_study(config, **track.study()).planned()
  assert len(planned) == len(track.placements) * 3 * max(1, len(track.shapes))
  for values in planned.values():
    assert track.departures_in_words({**track.fixed, **values}) == []


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("data.seed", 1, "config.data.seed=1, the track has 0"),
    ("train.num_steps", 1100, "config.train.num_steps=1100, the track has 1000"),
    ("model.embed_dim", 64, "config.model.embed_dim=64, the track has 56"),
    ("optimizer.learning_rate", 3e-3, "config.optimizer.learning_rate=0.003, the track has one of 0.0005, 0.001, "),
    ("optimizer.clip_norm", 0.0, "config.optimizer.clip_norm=0.0, the track has 1.0"),
    ("data.tokenizer", "bytes", "config.data.tokenizer='bytes', the track has 'sentencepiece'"),
    ("data.validation_share", 0.5, "config.data.validation_share=0.5, the track has 0.05"),
    ("evaluate.max_tokens", 4096, "config.evaluate.max_tokens=4096, the track has 65536"),
    ("model.new_trick", 3, "config.model.new_trick=3, the track has None"),
  ],
)
def test_each_fixed_field_that_differs_is_named(field, value, message):
  """Would catch a field that an entry can change in silence, also one that this version does not know."""
  track, _ = load_track("configs/tracks/cpu.py")
  (found,) = track.departures_in_words({**track.fixed, field: value})
  assert found.startswith(message)


def test_what_is_free_and_what_only_says_how_a_run_is_computed_may_differ():
  """Would catch a track that rejects another placement, seed or initial std, or another way to compute the same."""
  track, _ = load_track("configs/tracks/cpu.py")
  free = {"model.placement": "post*3,pre*9", "seed": 7, "model.embedding_deviation": 0.6, "model.remat": "full"}
  assert track.departures_in_words({**track.fixed, **free, "optimizer.learning_rate": 8e-3}) == []


def test_a_shape_of_the_ladder_is_whole():
  """Would catch the depth of one shape with the width of another."""
  track, _ = load_track("configs/tracks/depth.py")
  shape = dict(track.shapes[0]) | {"model.num_layers": track.shapes[2]["model.num_layers"]}
  found = track.departures_in_words({**track.fixed, **shape})
  assert any(
    "config.model.num_layers=24, the track has 5 or 11 or 24, with the rest of that shape" in one for one in found
  )


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (', "colour": 1', "TRACK does not know colour"),
    (', "score": "speed"', "score must be one of loss, slope"),
    (', "score": "slope"', "a slope needs two shapes"),
    (', "baseline": "lns"', "baseline='lns' must be one of its placements"),
    (', "seeds": 9', "close_seeds=8 must be at least seeds=9"),
    (', "seeds": "3"', "TRACK has seeds='3', which must be a whole number"),
    (', "baseline_seeds": None', "baseline_seeds=None, which must be a whole number"),
    (', "rates": 5', "rates=5, which must be a list of learning rates"),
    (', "placements": "pre"', "placements='pre', which must be a list of placements"),
    (', "close": "near"', "close='near', which must be a finite number"),
    (', "claims": ({"id": "c", "lower": "pre"},)', "claim 'c': than=None must be a placement"),
    ("}; 1 / 0; {", r"small\.py, line \d: ZeroDivisionError: division by zero"),
  ],
)
def test_a_track_that_contradicts_itself_is_rejected(tmp_path, more, message):
  """Would catch a recipe that ends in the middle of a study, or in a traceback, since nobody looked at what it says."""
  with pytest.raises(InputError, match=message):
    load(tmp_path, more)


def test_a_track_has_no_variants(tmp_path):
  """Two variants would be two tracks with one file of noise."""
  load(tmp_path)
  with pytest.raises(InputError, match="a track has no variants"):
    load_track(f"{tmp_path / 'small.py'}:wide")


def test_an_entry_is_tuned_first_and_has_more_seeds_where_it_is_close(tmp_path):
  """Would catch an entry whose study is not the protocol of the track: its stages in their order."""
  stages = load(tmp_path).study(("pre", "mix:0.5"))["then"]
  assert [sorted(set(stage) - {"best"}) for stage in stages] == [
    ["widen"],
    ["grid"],
    ["grid", "near"],
    ["grid", "only"],
  ]
  without_baseline = load(tmp_path).study(("mix:0.5",))["then"]
  assert [sorted(set(stage) - {"best"}) for stage in without_baseline] == [["widen"], ["grid"]]
  assert without_baseline[-1]["grid"] == {"seed": range(8)}  # as of one that is close: it can't know that it is not

"""The statistics by layer as a picture, and its way to TensorBoard."""

import numpy as np
import pytest

from mixln_jax.diagnostics.picture import layer_picture
from mixln_jax.runs.metrics import Metrics, TensorBoardMirror

STATISTICS = {"stream_rms": np.array([1.0, 2.0, 100.0]), "cosine": np.array([0.5, np.nan, -0.1]), "loss": 3.0}


def test_only_what_is_of_layers_is_drawn():
  """Would catch a panel of a number that is of no layer, and a value that is not finite and ends the run."""
  both = layer_picture(STATISTICS, "run, step 1")
  assert both is not None
  assert both.dtype == np.uint8
  assert both.shape[2] == 3
  assert both.min() < 100
  one = layer_picture({"stream_rms": STATISTICS["stream_rms"]}, "run, step 1")
  assert one is not None
  assert (one != 255).sum() < (both != 255).sum()
  assert layer_picture({"loss": 3.0}, "x") is None


def test_a_picture_reaches_tensorboard_and_one_that_fails_stops_nothing(tmp_path, capsys):
  """Would catch layers that are only in diagnostics.jsonl, and a mirror's trouble that ends a run."""
  metrics = Metrics(tmp_path / "metrics.jsonl", 0)
  metrics.picture(1, "layers", lambda: pytest.fail("drawn though nobody looks"))
  metrics.add_mirror(TensorBoardMirror, tmp_path / "tensorboard", 1)
  metrics.picture(1, "layers", lambda: layer_picture(STATISTICS, "run, step 1"))
  metrics.picture(2, "layers", lambda: 1 / 0)
  metrics.flush()
  metrics.close()
  (events,) = (tmp_path / "tensorboard").glob("events.*")
  content = events.read_bytes()
  assert b"layers" in content
  assert b"PNG" in content
  assert "the picture layers of step 2 can't be drawn: division by zero" in capsys.readouterr().err

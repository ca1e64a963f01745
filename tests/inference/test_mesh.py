"""Generation and scores on meshes of 8 devices equal those of one; no device gathers the cache or others' keys."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("on_mesh.py")


@pytest.mark.slow
def test_any_mesh_gives_the_same_answers():
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(("tests", "."))}
  process = subprocess.run(
    [sys.executable, SCRIPT], cwd=SCRIPT.parents[2], capture_output=True, text=True, check=False, env=environment
  )
  assert process.returncode == 0, process.stderr[-2000:]
  results = json.loads(process.stdout)
  one = results.pop("one device")
  for name, result in results.items():
    assert result["greedy"] == one["greedy"], name
    assert result["drawn"] == one["drawn"], name
    scores, expected = ([score for score, _ in answers["scores"]] for answers in (result, one))
    np.testing.assert_allclose(scores, expected, atol=1e-5, err_msg=name)
    rows = result["rows"]  # each device has its own rows of keys, values and cache
    assert not [shape for shape in result["gathered"] if len(shape) >= 4 and rows in shape], name

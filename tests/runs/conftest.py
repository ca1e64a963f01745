"""A bucket on this machine, and the front door in a process that sees it."""

import os
import subprocess
import sys

import pytest

from mixln_jax import config as config_lib
from mixln_jax.runs import lock as lock_lib
from runs import buckets


@pytest.fixture(scope="module")
def bucket():
  with buckets.serve() as store, buckets.environment(store.variables):
    yield store


@pytest.fixture
def quick(monkeypatch):
  for name, seconds in (("STALE_SECONDS", 1.5), ("TOUCH_SECONDS", 0.2), ("POLL_SECONDS", 0.05)):
    monkeypatch.setattr(lock_lib, name, seconds)


@pytest.fixture(scope="module")
def command(tmp_path_factory, make_config, bucket):
  """The front door in a process of its own, on a machine (home, temporary folder) that knows nothing."""
  config = make_config(**{"logging.tensorboard": True, "checkpoint.keep_last": 2, "data.num_threads": 1})
  place = tmp_path_factory.mktemp("recipe")
  (place / "config.json").write_text(config_lib.to_json(config))
  (place / "recipe.py").write_text(
    f"from pathlib import Path\nfrom mixln_jax import config\ndef get_config():\n"
    f"  return config.from_json(Path({str(place / 'config.json')!r}).read_text())\n"
  )

  def run(*arguments, env=None, stale_seconds=lock_lib.STALE_SECONDS, **options):
    machine = tmp_path_factory.mktemp("machine")
    times = f"lock.STALE_SECONDS, lock.TOUCH_SECONDS = {stale_seconds}, {stale_seconds / 8}"
    front_door = f"{times}; sys.exit(__main__.main(sys.argv[1:]))"
    script = f"import sys; from mixln_jax import __main__; from mixln_jax.runs import lock; {front_door}"
    return subprocess.Popen(
      [sys.executable, "-c", script, *arguments],
      env=os.environ | bucket.variables | {"PYTHONPATH": str(buckets.ROOT), "TMPDIR": str(machine), **(env or {})},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      **options,
    )

  run.recipe = place / "recipe.py"
  return run

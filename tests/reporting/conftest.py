"""One whole report for all tests that look at one: every figure, and names that are out to harm."""

import json

import pytest

from mixln_jax.reporting.loading import load
from mixln_jax.reporting.page import write_report
from reporting.making import make_run

EVIL = "<img src=x onerror=pwned()>$\\frac$ & 'q' </script><script>pwned()</script> %{x}".replace("/", "∕")
EVIL_QUESTION = "</script><script>pwned()</script><img src='http://evil.invalid/x' onerror='pwned()'>"


@pytest.fixture(scope="session")
def whole_report(tmp_path_factory):
  """The folder of a report with every figure: three placements, two seeds and rates, all diagnosed, one damaged."""
  root = tmp_path_factory.mktemp("whole")
  folders = []
  for offset, placement in enumerate(("pre", "mix:0.5", "post")):
    for seed, rate in ((0, 1e-3), (1, 1e-3), (0, 3e-3)):
      changes = {"model__placement": placement, "seed": seed, "optimizer__learning_rate": rate}
      name = f"{placement.replace(':', '')}_{seed}_{rate}" if folders else EVIL
      folders.append(make_run(root / name, 4.0 + offset + 0.1 * seed, diagnosed=True, **changes))
  (folders[1] / "outcome.json").write_text(
    json.dumps({"status": "diverged", "diverged": True, "message": EVIL_QUESTION})
  )
  (folders[2] / "environment.json").write_text(EVIL_QUESTION)
  write_report(load(list(map(str, folders))), root / "report")
  return root / "report"

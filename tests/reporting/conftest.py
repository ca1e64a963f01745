"""One whole report for all tests that look at one: every figure, and names that are out to harm."""

import json
from pathlib import Path

import pytest

from mixln_jax.reporting import figures
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.page import write_report
from reporting.making import make_run

EVIL = "<img src=x onerror=pwned()>$\\frac$ & 'q' </script><script>pwned()</script> %{x}".replace("/", "∕")
SPREAD = 0.3  # by how much more seeds differ from one placement to the next: differences have intervals
EVIL_QUESTION = "</script><script>pwned()</script><img src='http://evil.invalid/x' onerror='pwned()'>"


def make_whole_runs(root, name=EVIL):
  """Runs with everything: three placements, seeds and two rates, all diagnosed; the first one is called `name`."""
  folders = []
  for offset, placement in enumerate(("pre", "mix:0.5", "post")):
    for seed, rate in ((0, 1e-3), (1, 1e-3), (0, 3e-3)):
      changes = {"model__placement": placement, "seed": seed, "optimizer__learning_rate": rate}
      own = f"{placement.replace(':', '')}_{seed}_{rate}" if folders else name
      loss = 4.0 + offset + 0.1 * seed * (1 + offset * SPREAD)
      folders.append(str(make_run(root / own, loss, diagnosed=True, **changes)))
  return folders


@pytest.fixture(scope="session")
def whole_report(tmp_path_factory):
  """The folder of a report with every figure, as SVG alone; some files are damaged."""
  root = tmp_path_factory.mktemp("whole")
  folders = make_whole_runs(root)
  (Path(folders[1]) / "outcome.json").write_text(
    json.dumps({"status": "diverged", "diverged": True, "message": EVIL_QUESTION})
  )
  (Path(folders[2]) / "environment.json").write_text(EVIL_QUESTION)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "FORMATS", ("svg",))  # most of the time of a report goes into the fonts of its PDFs
    write_report(load(folders), root / "report")
  return root / "report"

"""The accelerator kit: what fits a slot, what a failure leaves, and all of it in a small form on a CPU."""

import json
import subprocess
import sys

import pytest

from benchmarks.accelerator import __main__ as command
from benchmarks.accelerator import training
from benchmarks.accelerator.kit import ROOT, Kit, Piece
from benchmarks.accelerator.table import table

MACHINE = {"device": "a device", "backend": "cpu"}


@pytest.fixture
def kit(tmp_path):
  kit = Kit(tmp_path / "results.json", small=True, torch=None)
  kit.document["machine"] = MACHINE
  return kit


def python(text):
  """A measurement that runs these lines in a process of its own, and keeps what they print."""
  return lambda kit: {"printed": kit.command([sys.executable, "-c", text])}


def test_a_slot_stops_before_what_does_not_fit_and_the_next_goes_on(kit):
  """Would catch a piece that is begun without the time it may take, one that is lost, and one measured twice."""
  begun = []
  todo = [Piece(name, 3600 if name == "b" else 1, lambda kit, name=name: begun.append(name) or {}) for name in "abc"]
  left = command.work(kit, todo, seconds=60)
  assert [piece.name for piece in left] == ["b", "c"]
  again = Kit(kit.out, small=True, torch=None)
  assert list(again.results) == ["a"]
  assert not command.work(again, left, seconds=7200)
  assert begun == ["a", "b", "c"]
  assert list(Kit(kit.out, small=True, torch=None).results) == ["a", "b", "c"]


def test_what_fails_or_hangs_is_a_line_of_the_table(kit):
  """Would catch a failure that ends the kit, one that is told as a success, and a process that outlives its limit."""
  complaint = "import sys; print('first', file=sys.stderr); raise MemoryError('RESOURCE_EXHAUSTED: 3 | 4 GB')"
  pieces = [
    Piece("profile/broken", 60, python(complaint)),
    Piece("profile/hangs", 1.0, python("import time; time.sleep(600)")),
    Piece("profile/works", 60, lambda kit: {"busy_seconds_a_step": 0.25, "fractions": {"dot": 0.75, "copy": 0.25}}),
  ]
  assert not command.work(kit, pieces, seconds=300)
  assert "RESOURCE_EXHAUSTED" in kit.results["profile/broken"]["error"]
  assert "longer than" in kit.results["profile/hangs"]["error"]
  assert kit.results["profile/hangs"]["took"] < 30
  lines = table(kit.document).splitlines()
  assert any(line.startswith("| broken | failed: ") and line.count("|") == 3 for line in lines)
  assert "| works | 250.0 | dot 75.0%; copy 25.0% |" in lines


def test_the_best_setting_is_the_fastest_that_ran(kit):
  """Would catch a placement timed at a setting that ran out of memory, or at that of another recipe."""
  kit.results["tune/71m/none/64"] = {"error": "RESOURCE_EXHAUSTED"}
  kit.results["tune/71m/full/128"] = {"tokens_per_second": 5.0}
  kit.results["tune/71m/dots_no_batch/32"] = {"tokens_per_second": 9.0}
  kit.results["tune/9m/none/8"] = {"tokens_per_second": 99.0}
  assert training.best_setting(kit, "71m") == ("dots_no_batch", 32)
  with pytest.raises(Exception, match="no setting of 1b ran"):
    training.best_setting(kit, "1b")


def test_the_summary_holds_the_best_of_ours_against_the_best_of_torch():
  """Would catch a ratio of the wrong way round, or of settings that are not each trainer's best."""
  timed = {"seconds": 1.0, "spread": 0.0, "peak_gb": 1.0, "compile_seconds": 1.0}
  pieces = {
    "tune/1b/full/32": timed | {"tokens_per_second": 300.0, "utilisation": 0.5},
    "tune/1b/full/64": timed | {"tokens_per_second": 330.0, "utilisation": 0.55},
    "torch compile/1b/8": timed | {"tokens_per_second": 200.0},
    "torch compile/1b/16": timed | {"tokens_per_second": 220.0},
  }
  text = table({"machine": MACHINE, "pieces": pieces})
  assert "| 1b: tokens/s against torch.compile | 1.50 times | 1.3 |" in text
  assert "| 1b: utilisation of the device's peak | 55.0% | 55 % at 1b |" in text


def run_kit(out, *arguments):
  return subprocess.run(
    [sys.executable, "-m", "benchmarks.accelerator", "--small", f"--out={out}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_results_of_another_device_are_refused(tmp_path):
  """Would catch numbers of two machines in one table."""
  out = tmp_path / "results.json"
  out.write_text(json.dumps({"machine": {"device": "NVIDIA H100"}, "pieces": {}}))
  done = run_kit(out)
  assert done.returncode == 1
  assert done.stderr.strip() == f"error: --out={out} holds results of NVIDIA H100; this is cpu"


def test_a_python_that_is_not_there_is_named(tmp_path):
  """Would catch a traceback, or a table without its peer."""
  done = run_kit(tmp_path / "results.json", "--torch=/nowhere/python")
  assert done.returncode == 1
  assert done.stderr.strip() == "error: --torch=/nowhere/python: No such file or directory"


@pytest.mark.slow
def test_every_piece_in_a_small_form(tmp_path):
  """Would catch a piece that can't run at all; only kernels that a CPU or this environment lacks may fail."""
  out = tmp_path / "results.json"
  for _ in range(12):
    done = run_kit(out)
    assert done.returncode in (0, command.LEFT_STATUS), done.stderr
    if not done.returncode:
      break
  results = json.loads(out.read_text())["pieces"]
  failed = {name.rpartition("/")[2] for name, result in results.items() if "error" in result}
  assert failed <= {"cudnn", "pallas", "tokamax"}
  assert results["resume/bfloat16"]["differing"] == []
  assert results["tests/golden"]["failed"] == []
  assert results["placement/9m/pre"]["rows"] == training.best_setting(Kit(out, small=True, torch=None), "9m")[1]

"""docs/tutorial.ipynb: small, whole, and what it shows is what it prints today."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def printed(cells):
  """What the cells printed, line by line, without what libraries warn of."""
  outputs = [output for cell in cells for output in cell.get("outputs", [])]
  texts = ["".join(output["text"]) for output in outputs if output.get("name") == "stdout"]
  return [line for text in texts for line in text.splitlines()]


def test_the_notebook_is_small_and_shows_its_outputs():
  """Would catch a notebook that was saved without outputs, with an error, or with the log of a training."""
  notebook = json.loads(NOTEBOOK.read_text())
  outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
  assert NOTEBOOK.stat().st_size < 200_000
  assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
  assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
  assert len(printed(notebook["cells"])) < 20
  assert "/" not in "".join(printed(notebook["cells"]))  # no path of the machine that ran it


def test_the_names_that_it_imports_are_there():
  """Would catch a name that moved before the slow test below, which trains."""
  code = "\n".join("".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"])
  imports = re.findall(r"^from (mixln_jax[\w.]*) import (.+)$", code, re.MULTILINE)
  assert imports
  for module, names in imports:
    for name in names.split(","):
      assert hasattr(importlib.import_module(module), name.split(" as ")[0].strip()), f"{module}: {name}"


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
  """Would catch a name of the library that the notebook still calls, and numbers that are no longer so."""
  nbformat = pytest.importorskip("nbformat", reason="needs requirements-docs.txt")
  nbclient = pytest.importorskip("nbclient", reason="needs requirements-docs.txt")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  shown = printed(notebook["cells"])
  nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
  found = printed(notebook["cells"])
  number = r"[+-]?\d+\.\d+"
  assert [re.sub(number, "", line) for line in found] == [re.sub(number, "", line) for line in shown]
  for expected, line in zip(shown, found, strict=True):
    numbers = [[float(text) for text in re.findall(number, one)] for one in (line, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.05), line

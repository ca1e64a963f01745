"""The package as it is installed: what importing costs, its names, its command, and the recipes that it holds."""

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mixln_jax
from mixln_jax import recipes
from mixln_jax.__main__ import main
from mixln_jax.config import base
from mixln_jax.errors import InputError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code, cwd, path):
  return subprocess.run(
    [sys.executable, "-c", code], cwd=cwd, env={"PYTHONPATH": str(path), "PATH": ""}, capture_output=True, text=True
  )


def test_importing_is_cheap(tmp_path):
  """Would catch an import of JAX, of NumPy or of a room of ours at the top of the package: seconds for a fraction."""
  code = "import mixln_jax, sys; print(*sorted(name.partition('.')[0] for name in sys.modules))"
  loaded = set(python(code, tmp_path, ROOT).stdout.split())
  assert "mixln_jax" in loaded
  assert not loaded & {"jax", "flax", "numpy", "absl", "ml_collections", "orbax", "etils"}


def test_every_name_is_there_and_documented():
  """Would catch a name that moved, and one that the reference does not have."""
  page = (ROOT / "docs" / "api.md").read_text()
  for name in mixln_jax.__all__:
    assert getattr(mixln_jax, name).__doc__, name
    assert f":: {name}\n" in page, f"docs/api.md: add {name}"
  assert set(mixln_jax.__all__) <= set(dir(mixln_jax))
  with pytest.raises(AttributeError, match="no attribute 'opn_run'"):
    _ = mixln_jax.opn_run


def test_the_command_is_the_front_door():
  """Would catch an entry point that names what is not there."""
  module, _, function = PROJECT["scripts"]["mixln"].partition(":")
  assert callable(getattr(importlib.import_module(module), function))


def test_recipes_are_found_by_name_outside_a_clone(tmp_path):
  """Would catch a recipe that imports another one by a path that only a clone has, and one that is not packaged."""
  shutil.copytree(ROOT / "mixln_jax", tmp_path / "site" / "mixln_jax", ignore=shutil.ignore_patterns("__pycache__"))
  (tmp_path / "elsewhere").mkdir()
  code = "import mixln_jax; from mixln_jax import recipes; print(*(n for n in recipes.names() if mixln_jax.recipe(n)))"
  result = python(code, tmp_path / "elsewhere", tmp_path / "site")
  assert result.returncode == 0, result.stderr
  files = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").glob("**/*.py")}
  assert set(result.stdout.split()) == files


@pytest.mark.parametrize("spelling", ["tiny", "tiny.py", "configs/tiny", "configs/tiny.py", "./configs/tiny.py"])
def test_spellings_of_a_recipe(spelling, tmp_path, monkeypatch):
  """Would catch a command that works in a clone and not in the folder beside it."""
  monkeypatch.chdir(tmp_path)
  assert Path(recipes.resolve(spelling)) == recipes.FOLDER / "tiny.py"
  assert mixln_jax.recipe(spelling, {"model.num_layers": 3}).model.num_layers == 3


def test_a_file_that_is_there_is_itself(tmp_path, monkeypatch):
  """Would catch a recipe of one's own that a shipped one of the same name hides."""
  monkeypatch.chdir(tmp_path)
  Path("tiny.py").write_text(
    "from mixln_jax.config import base\n\n\ndef get_config():\n  c = base()\n  c.seed = 7\n  return c\n"
  )
  assert recipes.resolve("tiny.py") == "tiny.py"
  assert mixln_jax.recipe("tiny.py").seed == 7
  assert mixln_jax.recipe("tiny").seed == base().seed


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("tinny", "config=tinny: no such file; did you mean 'tiny'?"),
    ("../tiny", "no such file"),
    (".", "no such file"),
    ("", "no such file"),
    ("gs://bucket/tiny.py", "must be on this machine"),
    ("studies", "no such file"),
  ],
)
def test_names_that_are_no_recipe(name, words):
  """Would catch a traceback, or another recipe that is taken for the one that was meant."""
  with pytest.raises(InputError) as error:
    mixln_jax.recipe(name)
  assert words in str(error.value)


def test_changes_of_a_recipe_are_checked():
  """Would catch a misspelt field that passes silently."""
  with pytest.raises(InputError, match=r"model\.placment: unknown field; did you mean"):
    mixln_jax.recipe("tiny", {"model.placment": "pre"})
  with pytest.raises(InputError, match="num_heads"):
    mixln_jax.recipe("tiny", {"model.num_heads": 5})
  assert mixln_jax.recipe("llama_130m:official").model.param_dtype == "bfloat16"


def test_commands_take_names(tmp_path, monkeypatch, capsys):
  """Would catch a name that the Python function knows and the command line does not."""
  monkeypatch.chdir(tmp_path)
  assert main(["train", "--config=llama_130m:official", "--workdir=x", "--config.model.num_heads=5"]) == 2
  assert "num_heads=5" in capsys.readouterr().err
  assert main(["train", "--config", "lama_130m", "--workdir=x"]) == 2
  assert "did you mean 'llama_130m'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wheel_holds_all_that_a_run_needs(tmp_path):
  """Would catch recipes, templates or the command that are left out of a wheel."""
  shutil.copytree(ROOT, tmp_path / "clone", symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "work"))
  build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tmp_path / "clone")]
  subprocess.run(build, check=True, capture_output=True, text=True)
  (wheel,) = tmp_path.glob("*.whl")
  names = set(zipfile.ZipFile(wheel).namelist())
  for file in ("configs/tiny.py", "configs/studies/first_norm.py", "reporting/templates/report.html"):
    assert f"mixln_jax/{file}" in names
  assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "configs/"))]
  entries = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
  assert f"mixln = {PROJECT['scripts']['mixln']}" in entries

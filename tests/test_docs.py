"""README, CONTRIBUTING and docs/ say what is so: commands parse, links lead somewhere, numbers are their files'."""

import ast
import importlib
import json
import re
import shlex
import statistics
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from mixln_jax import commands
from mixln_jax.command_line import CommandLine
from mixln_jax.errors import InputError
from mixln_jax.version import VERSION

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MIXLN = re.compile(r"(?:\S*python[\w.]* -m mixln_jax|mixln)(?= |$)")
BENCHMARK = re.compile(r"(?:[A-Z]\w*=\S+ )*\S*python[\w.]* -m (benchmarks[\w.]*)")


def fences(text, *languages):
  """The contents of a page's code blocks in some languages."""
  return re.findall(rf"^ *```(?:{'|'.join(languages)})\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def typed_in(block):
  """The command lines of a block, each on one line, without comments."""
  lines = block.replace("\\\n", " ").splitlines()
  return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def inline_commands(text):
  """The commands between backticks in the prose of a page."""
  prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
  spans = (re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose))
  return [span for span in spans if MIXLN.match(span) and " --" in span]


class _Read(Exception):
  """Ends a command where its arguments have been read."""


def check_arguments(words):
  """Reads the arguments of a command as it would, and its recipe; raises InputError where they are wrong."""
  command, *argv = words
  if command == "COMMAND":
    return
  assert command in commands.COMMANDS, command
  parse = CommandLine.parse

  def read(line, _):
    parse(line, argv)
    if line._with_config and line._values["config"].present:
      line.config_value()
    raise _Read

  module = importlib.import_module(f"mixln_jax.commands.{command}")
  with mock.patch.object(CommandLine, "parse", read), pytest.raises((_Read, SystemExit)):
    module.main(argv)


def expanded(line, variables):
  """A command with the shell's variables of its page put in, and placeholders that name a recipe or a new row."""
  for name, value in variables.items():
    line = re.sub(rf'"?\$\{{{name}\[@\]\}}"?|"?\${name}\b"?', lambda _, value=value: value, line)
  line = re.sub(r"placement=mine\b", "placement=pre", line)
  return line.replace("--config=RECIPE", "--config=tiny").replace("--config.data.source=…", "")


def variables_of(text):
  """`NAME=(words)` and `NAME=value` of a page's blocks."""
  found = {}
  for block in fences(text, "bash"):
    for line in typed_in(block):
      for name, words, value in re.findall(r"(?:^| )([A-Z]+)=(?:\(([^)]*)\)|(\S+))", line):
        found[name] = re.sub(r"\s+#.*", "", words or value)
  return found


def check_command(line, root=ROOT):
  """Checks one line of a shell by what it runs: a command of ours, a script, a benchmark, or pip with a file."""
  line = re.sub(r"\s+#\s.*", "", line)
  line = line.split(" | ")[0].split(" && ")[0].split("; then")[0].split(" > ")[0]
  if match := MIXLN.match(line):
    words = shlex.split(line[match.end() :])
    if words:
      check_arguments(words)
  elif match := BENCHMARK.match(line):
    module = match.group(1).replace(".", "/")
    path = root / f"{module}.py"
    path = path if path.exists() else root / module / "__main__.py"
    source = (
      "".join(file.read_text() for file in path.parent.glob("*.py")) if path.stem == "__main__" else path.read_text()
    )
    for flag in re.findall(r"(?<= )--([a-z_]+)", line):
      assert f'"--{flag}"' in source or f'"{flag}"' in source, f"{line}: {path.name} has no --{flag}"
  elif line.startswith("bash launch/local.sh"):  # what it runs last; tests/launch/ tests the script
    given = [word for word in shlex.split(line)[2:] if word != "--print"]
    defaults = {"--config": "configs/tiny.py", "--workdir": "work/runs/new"}
    missing = [f"{flag}={value}" for flag, value in defaults.items() if f"{flag}=" not in " ".join(given)]
    check_arguments(["train", *missing, *given])
  elif line.startswith("bash "):
    script, *arguments = shlex.split(line)[1:]
    assert (root / script).is_file(), line
    for argument in arguments:
      if argument.startswith("tests/"):
        assert (root / argument).exists(), line
  for file in re.findall(r"pip install .*?-r (\S+)", line):
    assert (root / file).is_file(), line


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name, monkeypatch, capsys):
  """Would catch a flag that was renamed, a recipe that moved, a field that no longer exists, a script that is gone."""
  monkeypatch.chdir(ROOT)
  text = (ROOT / name).read_text()
  variables = variables_of(text)
  lines = [line for block in fences(text, "bash") for line in typed_in(block)]
  for line in [*lines, *inline_commands(text)]:
    try:
      check_command(expanded(line, variables))
    except (InputError, AssertionError, ValueError) as error:
      raise AssertionError(f"{name}: {line}: {error}") from error
  capsys.readouterr()


@pytest.mark.parametrize(
  "line",
  [
    "mixln train --config=tinny --workdir=x",
    "mixln train --config=tiny --workdri=x",
    "mixln train --config=tiny --workdir=x --config.model.placment=pre",
    "mixln train --config=tiny --workdir=x --config.model.num_heads=7",
    "mixln trian --config=tiny",
    ".venv/bin/python -m mixln_jax evaluate --workdir=x --tassks=y",
    "bash launch/local.sh --config=configs/none.py",
    "bash launch/none.sh",
    "bash tests/run.sh tests/none",
    "python -m benchmarks.parts --no_such_flag",
    ".venv/bin/pip install -r requirements-none.txt",
  ],
)
def test_a_wrong_command_is_noticed(line, monkeypatch, capsys):
  """Would catch a check of commands that lets everything pass."""
  monkeypatch.chdir(ROOT)
  with pytest.raises((InputError, AssertionError)):
    check_command(line)
  capsys.readouterr()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_python_name_what_is_there(name):
  """Would catch an example that imports or calls what was renamed."""
  for block in fences((ROOT / name).read_text(), "python"):
    entry = re.match(r'"\w+": ', block)  # a line of a dictionary
    tree = ast.parse(f"{{{block}}}" if entry else block)
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mixln_jax"):
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mixln_jax":
        assert hasattr(importlib.import_module("mixln_jax"), node.attr), ast.unparse(node)


def anchors_of(text):
  """The anchors that GitHub and the site give to a page's headings."""
  found = set()
  for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
    words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
    found.add(words.strip().replace(" ", "-"))
  return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
  """Would catch a page or heading that was renamed while others still link to it."""
  page = ROOT / name
  prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  for target in re.findall(r"\]\(([^)\s]+)\)", prose):
    if re.match(r"[a-z]+:", target):
      continue
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    assert path.exists(), f"{name}: {target}"
    if anchor and path.name not in ("commands.md", "configs.md"):  # whose headings the site makes
      assert anchor in anchors_of(path.read_text()), f"{name}: {target}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_stand_in_fences(name):
  """Would catch a block of commands that is merely indented, which the test of commands does not read."""
  prose = re.sub(r"^ *```.*?^ *```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
  indented = re.findall(r"\n\n    ((?:\S*python|mixln|bash|pip|\.venv)\b.*)", prose)
  assert not indented, indented


def test_no_page_takes_the_place_of_one_of_the_site_s_own():
  """Would catch a page search.md, which the site's page of search results overwrites."""
  assert not {"docs/search.md", "docs/genindex.md", "docs/py-modindex.md"} & set(NAMES)


def test_readme_is_one_page():
  """Would catch a README that grows again: what is longer belongs into docs/."""
  text = (ROOT / "README.md").read_text()
  lines = text.splitlines()
  assert len(lines) <= 150
  assert len(text.split()) <= 1100
  long = [line for line in lines if len(line) > 120]
  assert not long, long


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("docs/studies")])
def test_prose_fits_a_line(name):
  """Would catch prose that nobody can read in a terminal; rows of tables may be longer on the site's pages."""
  text = re.sub(r"^ *```.*?^ *```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
  long = [line for line in text.splitlines() if len(line) > 125 and not line.startswith("|")]
  assert not long, long


def test_the_results_of_the_readme_are_those_of_the_measurements():
  """Would catch a number that was measured again and mended in one place alone."""
  readme = (ROOT / "README.md").read_text()
  measured = (ROOT / "docs" / "measurements.md").read_text()
  table = readme[readme.index("## Results") : readme.index("**Not measured**")]
  numbers = re.findall(r"[−+]?\d+\.\d+", re.sub(r"`[^`]*`", "", table))
  assert len(numbers) >= 8
  for number in numbers:
    assert number in measured, number


def leaves(tree, key=""):
  """(key, number) of a results file; of a list of numbers its median too."""
  if isinstance(tree, dict):
    for name, value in tree.items():
      yield from leaves(value, name)
  elif isinstance(tree, list):
    numbers = [entry for entry in tree if isinstance(entry, (int, float))]
    if numbers and len(numbers) == len(tree):
      yield key, float(statistics.median(numbers))
    for entry in tree:
      yield from leaves(entry, key)
  elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
    yield key, float(tree)


UNITS = (1.0, 1e-9, 1e-6, 1e-3, 1e3, 100.0)  # bytes to GB, s to ms, parts to per cent, …


FEW = 40  # numbers of a file, of which any two may make a ratio; in a larger one those of the same name


def known_numbers(file):
  """The numbers of a results file in the units that tables use, and the ratios of two of them."""
  by_key = {}
  for key, value in leaves(json.loads((ROOT / "benchmarks" / "results" / file).read_text())):
    by_key.setdefault(key, set()).add(value)
  values = {value for of_key in by_key.values() for value in of_key}
  if len(values) <= FEW:
    by_key = {"": values}
  ratios = {a / b for of_key in by_key.values() if len(of_key) <= 200 for a in of_key for b in of_key if b}
  return sorted({value * unit for value in values for unit in UNITS} | ratios)


def numbers_in(row):
  """(as it stands, value, half of its last digit) of the numbers of a row that have three digits or a decimal point."""
  row = re.sub(r"`[^`]*`|\([^)]*\bas\b[^)]*\)", "", row)
  for text in re.findall(r"(?<![\w.:−])\d[\d,]*(?:\.\d+)?(?![\w:]|e-)", row):
    text = text.rstrip(",")
    decimals = len(text.partition(".")[2])
    if decimals or len(text.replace(",", "")) >= 3:
      yield text, float(text.replace(",", "")), 0.5 * 10**-decimals * 1.0001


def held_tables():
  """(page, results file, row) of each row of the tables that say whose numbers they hold, in a comment or a cell."""
  for name in NAMES:
    if not name.startswith("docs/"):
      continue
    file, begun = None, False
    for line in (ROOT / name).read_text().splitlines():
      if match := re.match(r"<!-- numbers: (\w+\.json) -->", line):
        file, begun = match.group(1), False
      elif line.startswith("|"):
        begun = True
        stated = re.search(r"`(\w+\.json)` \|$", line)
        if stated or file:
          yield name, stated.group(1) if stated else file, line
      elif begun:
        file = None


def stray_numbers(rows):
  known = {}
  stray = []
  for name, file, row in rows:
    if file not in known:
      known[file] = known_numbers(file)
    for text, value, half in numbers_in(row):
      if not any(abs(number - value) <= half for number in known[file]):
        stray.append(f"{name}: {text} is not in {file}: {row}")
  return stray


def test_numbers_of_tables_are_those_of_their_results_files():
  """Would catch a results file that was measured again beside a table that was not."""
  rows = list(held_tables())
  assert len({file for _, file, _ in rows}) >= 8
  assert not stray_numbers(rows)


def test_a_wrong_number_is_noticed():
  """Would catch a comparison that finds any number somewhere."""
  rows = [("docs/x.md", "train_speed.json", "| `pre` | 2,516 (1.67) | 50 % | 0.84 (0.58) |")]
  assert len(stray_numbers(rows)) == 1


def test_the_diffs_of_contributing_are_those_of_their_commits():
  """Would catch an example that was made up, or drifted from what was really written."""
  if not (ROOT / ".git").exists():
    pytest.skip("needs the repository's history")
  text = (ROOT / "CONTRIBUTING.md").read_text()
  hashes = re.findall(r"from `([0-9a-f]{7})`", text)
  diffs = fences(text, "diff")
  assert len(hashes) == len(diffs) >= 6
  for commit, diff in zip(hashes, diffs, strict=True):
    shown = subprocess.run(["git", "show", commit], cwd=ROOT, capture_output=True, text=True, check=False)
    if shown.returncode:
      pytest.skip("a clone without the whole history")
    added = set(shown.stdout.splitlines())
    for line in diff.splitlines():
      if line.startswith("--- "):
        assert f"+++ b/{line[4:]}" in added, f"{commit}: {line}"
      else:
        assert line in added, f"{commit}: {line}"


def test_one_version():
  """Would catch a release whose citation or changelog is of another one."""
  assert f"version: {VERSION}" in (ROOT / "CITATION.cff").read_text()
  assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == VERSION


if __name__ == "__main__":
  print("\n".join(stray_numbers(held_tables())))

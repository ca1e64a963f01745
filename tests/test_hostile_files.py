"""Files of run and study folders that hold anything: each reader answers with one line, and never with a traceback."""

import json

import pytest
from reporting.making import make_run

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.errors import InputError
from mixln_jax.files import DEEPEST_JSON, check_folder_name, json_object, read_json
from mixln_jax.opening import data_facts
from mixln_jax.reporting.loading import load
from mixln_jax.runs.facts import read_config, read_environment
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.lock import describe_holder, holder_of
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.runs.outcome import read_outcome
from mixln_jax.sweeps.sequence import read_study
from mixln_jax.text import shown, whole_number

DEEP = b"[" * 100_000
CONTENTS = {
  "nested 100,000 deep": DEEP,
  "an object nested 100,000 deep": b'{"a":' * 100_000,
  "nested as deep as Python allows": b'{"step": ' + b"[" * 500 + b"]" * 500 + b', "status": "a", "split": "b"}',
  "not UTF-8": b'{"step": 1, "split": "\xff\xfe", "status": "\xff"}',
  "a list": b"[1, 2]",
  "a number": b"7",
  "5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
  "wrong types": b'{"step": "x", "split": 3, "status": [], "loss": {}, "model.num_layers": "n", "base": 1, "runs": 2}',
  "wrong types below": b'{"step": 1, "status": "a", "validation": {"loss": "high"}, "base": {}, "runs": [{"name": 5}]}',
  "a step of 10^400": b'{"step": 1e400, "split": "train", "status": "finished", "loss": 1}',
}
READERS = {
  "config.json": lambda run: read_config(RunFolder(run)),
  "outcome.json": lambda run: read_outcome(RunFolder(run)),
  "metrics.jsonl": lambda run: read_metrics(run / "metrics.jsonl"),
  "data.json": lambda run: data_facts(RunFolder(run)),
  "study.json": lambda run: read_study(run / "study.json"),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", READERS)
def test_a_reader_names_the_file(name, content, tmp_path):
  """A RecursionError, UnicodeDecodeError, KeyError or TypeError of a reader is a traceback for the user."""
  run = make_run(tmp_path / "run", 4.0)
  (run / name).write_bytes(CONTENTS[content] + b"\n\n")
  if name == "data.json" and content.startswith(("5,000", "wrong", "a step")):
    return  # other members are not its own
  with pytest.raises(InputError, match=r"(?s)^(?=.*json)(?!.*\n)") as raised:
    READERS[name](run)
  assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("content", CONTENTS)
def test_a_report_names_what_it_leaves_out(content, tmp_path):
  """One damaged file must cost its own part of a report, and no more."""
  run = make_run(tmp_path / "run", 4.0, diagnosed=True)
  files = [path for path in run.rglob("*.json*") if path.name != "config.json"]
  assert len(files) > 5
  for path in files:
    path.write_bytes(CONTENTS[content] + b"\n\n")
  (loaded,) = load([str(run)]).runs
  assert loaded.problems
  (run / ".lock").write_bytes(CONTENTS[content])
  describe_holder(holder_of((run / ".lock").read_bytes()))
  read_environment(RunFolder(run))


def test_a_config_with_more_layers_than_there_are_atoms(tmp_path):
  """`report` went through 10^30 layers."""
  run = make_run(tmp_path / "run", 4.0)
  flat = json.loads((run / "config.json").read_text())
  (run / "config.json").write_text(json.dumps(flat | {"model.num_layers": 10**30}))
  with pytest.raises(InputError, match=r"model\.num_layers"):
    load([str(run)])
  with pytest.raises(InputError, match=r"config\.model\.num_layers=10000"):
    read_config(RunFolder(run))
  assert not config_lib.FIELDS["model.num_layers"].admits(2_000_000_000)


@pytest.mark.parametrize("name", ["", " ", "..", ".", "a/b", "/etc", "a\0b", "a\nb", "\x1b[2J", " a", "x" * 300])
def test_names_in_a_study_are_those_of_folders(name, tmp_path):
  """A run of this name would lie somewhere else, or in every folder at once, or speak to the terminal."""
  with pytest.raises(InputError, match="is not the name of a folder") as raised:
    check_folder_name(name, "study.json: run 1")
  assert str(raised.value).isprintable()
  (tmp_path / "study.json").write_text(json.dumps({"base": {}, "axes": {}, "runs": [{"name": name, "values": {}}]}))
  with pytest.raises(InputError, match="is not the name of a folder"):
    read_study(tmp_path / "study.json")
  with pytest.raises(InputError, match="is not the name of a folder"):
    load([str(tmp_path)])


def test_what_a_file_must_not_be(tmp_path):
  """A device has no end; a link to one is as bad."""
  (tmp_path / "config.json").symlink_to("/dev/zero")
  with pytest.raises(InputError, match="is a device, not a regular file"):
    read_json(tmp_path / "config.json")
  assert json_object('{"a": ' + "[" * (DEEPEST_JSON - 2) + "]" * (DEEPEST_JSON - 2) + "}", "here")


def test_numbers_and_values_of_any_size():
  """Python raises for more than 4,300 digits, and int() reads digits of other scripts."""
  assert whole_number("12") == 12
  assert [whole_number(text) for text in ("", "-1", "1.5", "٣", "²", "9" * 5000, str(2**31))] == [None] * 7
  with pytest.raises(InputError, match="must be a whole number above 0"):
    placement.parse("post*" + "9" * 5000, 2)
  assert len(shown("x" * 10_000)) < 300
  assert shown("\x1b[2J\u202e").isprintable()
  with pytest.raises(InputError, match="unknown field") as raised:
    config_lib.from_flat({"model.\x1b[2J": 1})
  assert str(raised.value).isprintable()

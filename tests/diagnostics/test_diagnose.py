"""The command on an open model that was imported: a LLaMA of transformers, from its folder to JSON and table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import WORDS
from model.rounding import NETWORK

from mixln_jax import config as config_lib
from mixln_jax.__main__ import main
from mixln_jax.data.prepare import prepare
from mixln_jax.diagnostics.depth_suite import MEASUREMENTS
from mixln_jax.diagnostics.diagnose import DEFINITIONS, finite, suite_lines, table
from mixln_jax.interop.safetensors_folder import write_folder

FIXTURE = Path(__file__).parents[1] / "data" / "transformers" / "llama.npz"


@pytest.fixture(scope="module")
def llama(make_config, tmp_path_factory):
  """A run made of the LLaMA, on records of words of its vocabulary of 40."""
  folder = tmp_path_factory.mktemp("llama")
  data = np.load(FIXTURE, allow_pickle=False)
  tensors = {key.removeprefix("weight/"): data[key] for key in data.files if key.startswith("weight/")}
  write_folder(folder / "weights", tensors, json.loads(bytes(data["config"])), 10**9)
  vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS)))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  tokenizer.decoder = tokenizers.decoders.Metaspace()
  tokenizer.add_special_tokens(["</s>"])
  tokenizer.save(str(folder / "tokenizer.json"))
  changes = {"data.tokenizer": str(folder / "tokenizer.json"), "data.directory": str(folder / "records")}
  config = make_config(**changes, **{"data.mode": "pad", "model.vocab_size": 40, "evaluate.batch_size": 4})
  prepare(config, progress=False)
  recipe = folder / "recipe.py"
  text = config_lib.to_json(config)
  recipe.write_text(f"from mixln_jax.config import from_json\n\n\ndef get_config():\n  return from_json({text!r})\n")
  arguments = [f"--workdir={folder / 'run'}", f"--input={folder / 'weights'}", f"--config={recipe}"]
  assert main(["convert", *arguments]) == 0
  return folder / "run"


def numbers_of(value):
  if isinstance(value, dict):
    return [number for item in value.values() for number in numbers_of(item)]
  if isinstance(value, list):
    return [number for item in value for number in numbers_of(item)]
  return [value] if isinstance(value, (int, float)) else []


def test_diagnose_an_imported_llama(llama, capsys):
  assert main(["diagnose", f"--workdir={llama}"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert "started from imported weights" in lines[-2]  # "initial" in the table is a fresh draw
  result = json.loads((llama / "diagnose" / "0" / "diagnose.json").read_text())
  figures = {path.suffix for path in (llama / "diagnose" / "0").iterdir()}
  assert lines[-1].startswith(f"wrote      {llama / 'diagnose' / '0'}: diagnose.json and ")
  assert figures >= {".json", ".png", ".svg"}
  assert [line.split()[:2] for line in lines[2:4]] == [["1", "pre"], ["2", "pre"]]
  assert (result["step"], result["placement"], result["num_layers"]) == (0, "pre", 2)
  assert result["definitions"] == DEFINITIONS
  assert all(math.isfinite(number) for number in numbers_of(result))

  assert main(["evaluate", f"--workdir={llama}"]) == 0
  evaluation = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert result["tokens"] == evaluation["tokens"]
  assert result["removal"]["loss"] == pytest.approx(evaluation["loss"], rel=NETWORK)
  assert {size: len(losses) for size, losses in result["removal"]["blocks"].items()} == {"1": 2, "2": 1}
  # The end of the lens is the model; without any layer, its beginning is. A loss of up to 4 nats within NETWORK of
  # itself is a perplexity within four times that.
  assert result["logit_lens_perplexity"][2] == pytest.approx(evaluation["perplexity"], rel=1e-4)
  nothing = math.exp(result["removal"]["blocks"]["2"][0])
  assert result["logit_lens_perplexity"][0] == pytest.approx(nothing, rel=1e-4)
  for name in ("last", "all"):
    (first, both), (second, none) = result["angular_distance"][name]
    assert none is None
    assert max(first, second, both) < 1
    assert abs(first - second) < both < first + second  # angles are a metric
  norms = result["gradient_norm"]
  assert all(len(norms[when][sublayer]) == 2 for when in ("initial", "checkpoint") for sublayer in ("attention", "mlp"))
  assert norms["initial"]["mlp"] != norms["checkpoint"]["mlp"]
  assert all(1 <= rank <= 16 for rank in result["effective_rank"])
  assert len(result["effective_rank"]) == 3
  check_depth_suite(result)


def check_depth_suite(result):
  """All its measurements are there, on two thirds of the tokens, and agree with what was there before it."""
  suite = result["depth_suite"]
  assert suite["calibration_tokens"] + suite["heldout_tokens"] == result["tokens"]
  assert suite["calibration_tokens"] > suite["heldout_tokens"] > 0
  arrays = suite["arrays"]
  assert {name.split("/")[0] for name in arrays} == {*MEASUREMENTS, "loss", "removal", "angular"}
  assert arrays["lens/cross_entropy"][2] == pytest.approx(arrays["loss/calibration"], rel=NETWORK)
  assert arrays["permutation/row_moves"] == arrays["permutation/row_stays"]  # of one placement for all layers
  assert arrays["causal/mean_of_ratios"][0][0] is None
  assert suite["fractions"]["causal/mean_of_ratios"] == float(arrays["causal/mean_of_ratios"][0][1] > 0.45)


@pytest.mark.slow
def test_tasks_without_each_layer(llama, tmp_path, capsys):
  (tmp_path / "fox.jsonl").write_text('{"q": "the quick", "c": [" brown", " dog"], "a": 0}\n' * 3)
  (tmp_path / "fox.yaml").write_text(
    f"""task: fox
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "fox.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: q
doc_to_choice: c
doc_to_target: a
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""
  )
  tasks = f"--tasks={tmp_path / 'fox.yaml'}"
  command = ["diagnose", f"--workdir={llama}", "--tokens=60", "--suite=none", f"--output={tmp_path / 'out'}", tasks]
  assert main(command) == 0
  assert "the mean of fox" in capsys.readouterr().out
  scores = json.loads((tmp_path / "out" / "diagnose.json").read_text())["removal"]["scores"]["fox"]
  assert main(["evaluate", f"--workdir={llama}", tasks]) == 0
  evaluated = json.loads((llama / "tasks" / "0" / "tasks.json").read_text())["tasks"]["fox"]
  assert scores["score"] == evaluated["metrics"]["acc"]["value"]
  assert {size: len(values) for size, values in scores["blocks"].items()} == {"1": 2, "2": 1}


@pytest.mark.slow
def test_other_tokens_blocks_and_folders(llama, tmp_path, capsys):
  command = ["diagnose", f"--workdir={llama}", "--tokens=60", "--blocks=2", "--batch_size=1", "--suite=lens", "--json"]
  assert main([*command, f"--output={tmp_path / 'out'}"]) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed == json.loads((tmp_path / "out" / "diagnose.json").read_text())
  assert 60 <= printed["tokens"] < 60 + 32
  assert list(printed["removal"]["blocks"]) == ["2"]
  assert {name.split("/")[0] for name in printed["depth_suite"]["arrays"]} == {"lens", "loss", "angular"}


def test_what_can_not_be_measured_is_refused_before_anything_is(llama, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  for extra, words in (
    ("--blocks=1,3", "--blocks=1,3: must be whole numbers from 1 to the run's 2 layers"),
    ("--blocks=one", "--blocks=one: must be whole numbers"),
    ("--suite=causal,lense", "--suite=causal,lense: 'lense' is none of causal, permutation"),
    ("--swaps=rows", "--swaps=rows: 'rows' is none of row_moves"),
    ("--step=7", "has no checkpoint of that step; it has 0"),
    (f"--output={tmp_path / 'file'}", "can't be written"),
    ("--tokens=0", "tokens"),
  ):
    assert main(["diagnose", f"--workdir={llama}", f"--output={tmp_path / 'no'}", extra]) == 2
    assert words in capsys.readouterr().err
  assert not (tmp_path / "no").exists()


def test_what_is_not_finite_is_none_in_the_json_and_said_in_the_table():
  result = {
    "tokens": 9,
    "angular_distance": {"last": [[0.25]], "all": [[math.nan]]},
    "removal": {"loss": 2.0, "blocks": {"1": [math.inf]}},
    "gradient_norm": {when: {"attention": [1.0], "mlp": [2.0]} for when in ("initial", "checkpoint")},
    "effective_rank": [1.0, None],
    "logit_lens_perplexity": [5.0, math.inf],
  }
  result = finite(result)
  assert result["removal"]["blocks"]["1"] == result["angular_distance"]["all"][0] == [None]
  assert result["logit_lens_perplexity"] == [5.0, None]
  layer, end = table(result, "post").splitlines()[2:4]
  assert layer.split() == ["1", "post", "0.2500", "n/a", "n/a", *["1.000e+00", "2.000e+00"] * 2, "1.0", "5"]
  assert end.split() == ["end", "n/a", "n/a"]


def test_the_suite_counts_layers_as_the_table_above_it_does():
  """Layer 1 of one table that is layer 0 of the other; a column of pairs that is a row off."""
  nan = math.nan
  arrays = {
    "causal/mean_of_ratios": [[nan, 0.5, 0.7], [nan, nan, 0.1], [nan, nan, nan]],
    "permutation/row_moves": [[nan, 0.25, 0.5], [nan, nan, 0.125], [nan, nan, nan]],
    "lens/kl_final_to_depth": [3.0, 2.0, 1.0, 0.0],
  }
  suite = {"arrays": finite(arrays), "fractions": {"causal/mean_of_ratios": 1 / 3, "permutation/row_moves": nan}}
  _, _, *rows, causal, permutation = suite_lines(finite(suite), "post post pre")
  assert [row.split() for row in rows] == [
    ["1", "post", "0.600", "0.2500", "3.0000"],
    ["2", "post", "0.100", "0.1250", "2.0000"],
    ["3", "pre", "1.0000"],
    ["end", "0.0000"],
  ]
  assert causal == "causal/mean_of_ratios: 33.3% of late pairs above 0.45"
  assert permutation == "permutation/row_moves: n/a of late pairs above 0.15"

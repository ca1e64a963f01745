"""The command line as a person meets it: help, overrides, and every bad input in one line with status 2."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_params, saved_params, small_model

from mixln_jax import commands
from mixln_jax import config as config_lib
from mixln_jax.__main__ import main
from mixln_jax.parallel.bits import bit_sums
from mixln_jax.reporting.loading import load

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(make_config, tmp_path):
  """A recipe file of the small config."""
  path = tmp_path / "recipe.py"
  text = config_lib.to_json(make_config())
  path.write_text(f"from mixln_jax.config import from_json\n\n\ndef get_config():\n  return from_json({text!r})\n")
  return path


def refused(argv, capsys):
  """The one line that a refused command prints."""
  status = main([str(argument) for argument in argv])
  output = capsys.readouterr()
  lines = output.err.strip().splitlines()
  assert status == 2, output
  assert len(lines) == 1, output.err
  assert lines[0].startswith("error: ")
  return lines[0]


def test_the_commands_are_listed_without_loading_jax():
  code = "import sys; from mixln_jax.__main__ import main; main([]); sys.exit('jax' in sys.modules)"
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  listed = re.findall(r"^  (\w+)  ", result.stdout, re.MULTILINE)
  assert tuple(listed) == commands.COMMANDS
  modules = {path.stem for path in (ROOT / "mixln_jax" / "commands").glob("*.py") if not path.stem.startswith("_")}
  assert modules == set(listed)


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_has_help(command, capsys):
  with pytest.raises(SystemExit) as stop:
    main([command, "--help"])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert commands.help_line(command) in text
  if command == "train":
    assert all(name in text for name in config_lib.FIELDS)


def test_train_evaluate_generate_from_the_command_line(recipe, tmp_path, capsys):
  workdir = tmp_path / "run"
  overrides = [
    "--config.model.placement=pre",
    "--config.train.sample_tokens=5",
    "--config.evaluate.official_compat=true",
  ]
  assert main(["train", f"--config={recipe}", f"--workdir={workdir}", *overrides]) == 0
  output = capsys.readouterr().out
  assert "placement  pre pre" in output
  assert "official evaluator: loss" in output
  assert re.search(r"step 6/6  loss [\d.]+  lr [\d.e-]+  grad [\d.]+  tok/s [\d,]+  mfu n/a  left 0:00:00", output)
  assert re.search(r"validation loss [\d.]+, perplexity [\d.]+ \(step 6\)", output)
  assert "sample     " in output
  assert f"files      {workdir}" in output
  assert json.loads((workdir / "config.json").read_text())["model.placement"] == "pre"

  assert main(["evaluate", f"--workdir={workdir}", "--batch_size=3"]) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  trained = json.loads((workdir / "outcome.json").read_text())["validation"]
  assert result["loss"] == pytest.approx(trained["loss"], rel=1e-5)
  assert result["unigram_entropy"] > 2
  (run,) = load([str(workdir)]).runs  # what `report` reads
  assert (run.final_loss, run.outcome["status"], run.problems) == (trained["loss"], "finished", [])
  assert run.fingerprint
  assert run.initial_weights["bit_sums"]

  assert main(["generate", f"--workdir={workdir}", "--prompt=the quick", "--num_tokens=4", "--step=4"]) == 0
  assert capsys.readouterr().out.startswith("the quick")
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "the"}\n{"prompt": "naïve"}\n')
  many = ["generate", f"--workdir={workdir}", f"--prompts={prompts}", "--num_tokens=9", "--stop=e", "--top_p=0.9"]
  assert main([*many, "--json"]) == 0
  texts = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
  assert [text["prompt"] for text in texts] == ["the", "naïve"]
  assert all(text["stopped"] or text["tokens"] == 9 for text in texts)
  assert "num_tokens=40: with the 7 tokens" in refused([*many[:3], "--num_tokens=40"], capsys)
  assert "--stop='': an empty text" in refused([*many[:3], "--stop="], capsys)
  prompts.write_text("{}\n")
  assert "is not a JSON object with a text" in refused(many, capsys)

  (tmp_path / "fox.jsonl").write_text('{"q": "the quick", "c": [" brown", " x"], "a": 0}\n' * 3)
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
  assert main(["evaluate", f"--workdir={workdir}", f"--tasks={tmp_path / 'fox.yaml'}", "--limit=2"]) == 0
  assert re.search(r"fox +2 +0  acc +[01]\.0000", capsys.readouterr().out)
  written = json.loads((workdir / "tasks" / "6" / "tasks.json").read_text())
  assert (written["step"], written["limit"], written["placement"]) == (6, 2, "pre")
  assert written["tasks"]["fox"]["num_documents"] == 2
  assert str(tmp_path) not in json.dumps(written)
  for flag, words in (
    ("--limit=3", "no meaning without --tasks"),
    ("--tasks=no.yaml", "tasks=no.yaml: no such file"),
  ):
    assert words in refused(["evaluate", f"--workdir={workdir}", flag], capsys)
  assert "has no checkpoint of that step; it has 4, 6" in refused(
    ["evaluate", f"--workdir={workdir}", "--step=5"], capsys
  )


def test_doctor(tmp_path, capsys):
  assert main(["doctor", f"--workdir={tmp_path}"]) == 0
  output = capsys.readouterr().out
  assert "device     cpu:0" in output
  assert "all is well" in output
  (tmp_path / "file").write_text("")
  assert main(["doctor", f"--workdir={tmp_path / 'file' / 'folder'}"]) == 1
  assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--config.model.placement=mixx:0.25", ["unknown placement 'mixx'", "did you mean 'mix'?", "choices:"]),
    ("--config.model.placment=pre", ["config.model.placment: unknown field", "did you mean config.model.placement"]),
    ("--config.modl.placement=pre", ["config.modl.placement", "did you mean config.model.placement?"]),
    ("--config.train.num_steps=abc", ["config.train.num_steps", "abc"]),
    ("--config.train.num_steps=1.5", ["config.train.num_steps"]),
    ("--config.model.tied_embeddings=perhaps", ["config.model.tied_embeddings", "perhaps"]),
    ("--config.optimizer.learning_rate=-1", ["config.optimizer.learning_rate=-1", ">= 0"]),
    ("--config.model.num_heads=3", ["num_heads=3 does not divide", "embed_dim=16"]),
    ("--config.model.remat=ful", ["config.model.remat='ful'", "one of none, full, dots"]),
    ("--config.data.sequence_length=64", ["config.data.sequence_length=64 exceeds the 32 tokens"]),
    ("--config.data.sequence_length=16", ["packed at 32"]),
    ("--config.data.mode=pad", ["config.data.mode=pad", "in mode pack"]),
    ("--config.data.tokenizer=sentencepiece", ["config.data.tokenizer='sentencepiece' is not the tokenizer of"]),
    ("--config.data.tokenizer=/no/such.model", ["config.data.tokenizer='/no/such.model'", "can't be read"]),
    ("--config.model.vocab_size=100", ["config.model.vocab_size=100 is below the 259 ids"]),
    ("--config.data.directory=/no/such/folder", ["no records in /no/such/folder", "prepare"]),
    ("--config.mesh.fsdp=2", ["config.mesh", "devices"]),
    ("--workdri=x", ["workdri", "--help"]),
    ("stray", ["unexpected argument 'stray'"]),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(argument, words, recipe, tmp_path, capsys):
  workdir = tmp_path / "run"
  line = refused(["train", f"--config={recipe}", f"--workdir={workdir}", argument], capsys)
  for word in words:
    assert word in line
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("argv", "words"),
  [
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["train", "--workdir=x"], "--config is required"),
    (["train", "--config=configs/tiny.py"], "--workdir is required"),
    (["train", "--config=configs/none.py", "--workdir=x"], "configs/none.py"),
    (["train", "--config=configs/llama_130m.py:offical", "--workdir=x"], "unknown variant 'offical'"),
    (["evaluate", "--workdir=/no/such/run"], "no run there"),
    (["generate", "--workdir=/no/such/run", "--num_tokens=0"], "num_tokens"),
    (["prepare", "--config=configs/tiny.py", "--config.data.source=/no/corpus"], "config.data.source='/no/corpus'"),
    (["evaluate", f"--workdir=/{'x' * 300}"], "File name too long"),
    (["report", f"--workdir=/{'x' * 300}", "--output=x"], "File name too long; give another path"),
    (["train", f"--config={'x' * 300}.py", "--workdir=x"], "File name too long"),
    (["generate", "--workdir=~nobody-of-that-name/x"], "~nobody-of-that-name"),
  ],
)
def test_bad_commands(argv, words, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert words in refused(argv, capsys)


def test_a_recipe_that_is_wrong_is_refused(tmp_path, capsys):
  path = tmp_path / "recipe.py"
  for text, words in (
    ("def get_config():\n  return {}\n", "does not return a config"),
    (
      "from mixln_jax.config import base\n\n\ndef get_config():\n  c = base()\n  c.model.wdith = 3\n  return c\n",
      "config.wdith: unknown field",
    ),
    ("def get_config(:\n", "invalid syntax"),
    ("x = 1\n", "get_config"),
  ):
    path.write_text(text)
    sys.modules.pop("config_config", None)  # ml_collections loads each recipe under this name
    assert words in refused(["train", f"--config={path}", f"--workdir={tmp_path / 'run'}"], capsys)


def test_weights_go_out_and_come_back_as_a_run_that_trains_on(recipe, tmp_path, capsys):
  run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
  assert main(["train", f"--config={recipe}", f"--workdir={run}"]) == 0
  assert "not a stock decoder" in refused(["convert", f"--workdir={run}", f"--output={out}", "--layout=stock"], capsys)
  assert not out.exists()
  assert main(["convert", f"--workdir={run}", f"--output={out}", "--shard_gb=1e-5"]) == 0
  assert "modeling_mixln.py" in capsys.readouterr().out
  assert len(list(out.glob("*.safetensors"))) > 1
  described = json.loads((out / "config.json").read_text())
  assert all((out / f"{name.split('.')[0]}.py").is_file() for name in described["auto_map"].values())
  assert described["eos_token_id"] == 1
  arguments = ["convert", f"--workdir={back}", f"--input={out}"]
  assert "--config is required" in refused(arguments, capsys)
  assert main([*arguments, f"--config={recipe}"]) == 0
  assert "placement  post pre" in capsys.readouterr().out
  for folder in (run, back):
    assert main(["evaluate", f"--workdir={folder}"]) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
  assert [line.pop("step") for line in lines] == [6, 0]
  assert lines[0] == lines[1]
  assert main(["train", f"--workdir={back}"]) == 0  # as it was configured
  output = capsys.readouterr().out
  assert "step 6/6" in output
  sums = json.loads((back / "initial_weights.json").read_text())["bit_sums"]  # of what was imported
  assert sums == {name: int(value) for name, value in bit_sums(saved_params(run)).items()}
  first = json.loads((back / "metrics.jsonl").read_text().splitlines()[0])
  assert first["loss"] < json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
  assert "holds a run already" in refused([*arguments, f"--config={recipe}"], capsys)
  assert main(["train", f"--config={recipe}", f"--workdir={back}"]) == 0  # the recipe is what was imported
  assert "all 6 steps were done already" in capsys.readouterr().out
  other = ["convert", f"--workdir={tmp_path / 'other'}", f"--input={out}", f"--config={recipe}"]
  wrong = refused([*other, "--config.model.placement=pre"], capsys)
  assert "the checkpoint says 'mix:0.5'; say it with --placement" in wrong
  assert "--step has no meaning with --input" in refused([*other, "--step=3"], capsys)
  both = ["convert", f"--workdir={run}", f"--output={tmp_path / 'x'}"]
  assert "--placement has no meaning with --output" in refused([*both, "--placement=pre"], capsys)
  override = refused(["train", f"--workdir={back}", "--config.train.num_steps=8"], capsys)
  assert "only the schedules constant, wsd and trapezoid" in override  # the run's own recipe is meant
  missing = ["train", f"--workdir={tmp_path / 'none'}"]
  assert "--config is required for a new run" in refused(missing, capsys)


def test_an_import_takes_the_tokenizer_of_the_weights_or_says_so(recipe, tmp_path, capsys):
  """Would catch weights that read another tokenizer's ids (10.8 nats for 4.03), and a head that can't be imported."""
  import numpy as np

  from mixln_jax.data.tokenizer_training import train_hugging_face
  from mixln_jax.interop import hf
  from mixln_jax.interop.safetensors_folder import write_folder

  model = small_model(placement="pre", vocab_size=262, tied_embeddings=True)
  exported = dict(hf.export_weights(random_params(model), model))
  exported[hf.HEAD] = exported[hf.EMBEDDING] + np.float32(0.5)  # of its own, beside a config that ties them
  write_folder(tmp_path / "in", exported, hf.hf_config(model, 32), 10**9)
  tokenizers = [train_hugging_face([text * 50], 262).content for text in ("the cat sat ", "over seas and hills ")]
  (tmp_path / "other.json").write_bytes(tokenizers[1])
  arguments = ["convert", f"--config={recipe}", f"--input={tmp_path / 'in'}"]
  untied = "--config.model.tied_embeddings=False"
  assert "set config.model.tied_embeddings=False" in refused([*arguments, f"--workdir={tmp_path / 'run'}"], capsys)
  (tmp_path / "in" / "tokenizer.json").write_bytes(tokenizers[0])
  for name in ("bytes", str(tmp_path / "other.json"), "sentencepiece", str(tmp_path / "gone.json")):
    flags = [untied, f"--config.data.tokenizer={name}", f"--config.data.directory={tmp_path / 'none'}"]
    error = refused([*arguments, *flags, f"--workdir={tmp_path / 'run'}"], capsys)
    assert name in error
    assert f"the checkpoint's own is {tmp_path / 'in' / 'tokenizer.json'}: set config.data.tokenizer to it" in error
  (tmp_path / "copy.json").write_text(json.dumps(json.loads(tokenizers[0]), indent=1))
  flags = [untied, f"--config.data.tokenizer={tmp_path / 'copy.json'}", f"--workdir={tmp_path / 'run'}"]
  assert main([*arguments, *flags]) == 0
  assert "head" in saved_params(tmp_path / "run")


def test_an_import_that_is_cut_off_leaves_no_run(recipe, tmp_path, capsys, monkeypatch):
  from mixln_jax.runs.checkpoint import Checkpoints

  run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
  assert main(["train", f"--config={recipe}", f"--workdir={run}", "--config.model.placement=pre"]) == 0
  assert main(["convert", f"--workdir={run}", f"--output={out}"]) == 0
  capsys.readouterr()

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Checkpoints, "save", full)
  arguments = ["convert", f"--workdir={back}", f"--input={out}", f"--config={recipe}"]
  assert "No space left" in refused(arguments, capsys)
  assert not back.exists()
  assert {path.name for path in tmp_path.iterdir()} >= {"run", "out"}
  assert not [path for path in tmp_path.iterdir() if path.name.startswith(".back")]


def test_admin_starts_from_a_profile_and_the_run_says_the_hash_of_its_weights(recipe, tmp_path, capsys):
  import numpy as np

  from mixln_jax.interop.safetensors_folder import SafetensorsFolder

  arguments = [f"--config={recipe}", "--config.train.num_steps=1", "--config.optimizer.warmup_steps=0"]
  arguments += ["--config.optimizer.learning_rate=0.0"]
  hashes = []
  for number in (1, 2):
    workdir, out = tmp_path / f"run{number}", tmp_path / f"out{number}"
    assert main(["train", *arguments, f"--workdir={workdir}", "--config.model.placement=admin"]) == 0
    hashes.append(re.search(r"weights    initial, hash (\w{16})", capsys.readouterr().out).group(1))
    assert json.loads((workdir / "initial_weights.json").read_text())["hash"] == hashes[-1]
    assert main(["convert", f"--workdir={workdir}", f"--output={out}", "--layout=official"]) == 0
  assert hashes[0] == hashes[1]
  tensors = SafetensorsFolder(out)
  scales = [tensors[f"model.layers.{layer}.{name}.vector_c_res"] for layer in (0, 1) for name in ("self_attn", "mlp")]
  assert all(np.ptp(scale) == 0 for scale in scales)
  assert scales[0][0] == 1
  assert len({float(scale[0]) for scale in scales}) == 4


def test_nothing_reads_a_pickle():
  for path in (ROOT / "mixln_jax").rglob("*.py"):
    assert "pickle" not in path.read_text(), path


def test_what_a_person_typed_does_not_speak_to_the_terminal(recipe, tmp_path, capsys):
  """An escape sequence in a folder's name or a field could rewrite the lines above, or hide an error."""
  line = refused(
    ["train", f"--config={recipe}", f"--workdir={tmp_path / 'x'}", "--config.data.directory=\x1b[2J"], capsys
  )
  assert line.isprintable()
  line = refused(["evaluate", f"--workdir={tmp_path}/\x1b]0;title\x07"], capsys)
  assert line.isprintable()


def test_help_by_section_and_switches_without_a_value(capsys):
  """Would catch 300 lines of fields, most without a meaning for the command, and `--list=…`."""

  def help_of(*words):
    with pytest.raises(SystemExit):
      main([*words])
    return capsys.readouterr().out

  text = help_of("prepare", "--help")
  assert "data.source" in text
  assert "mesh.fsdp" not in text
  assert len(text.splitlines()) < 60
  text = help_of("train", "--help", "optimizer")
  assert "--config.optimizer.learning_rate=" in text
  assert "--config.model.placement" not in text
  assert "no section 'modle'; choices: seed, model, " in help_of("train", "--help", "modle")
  assert "  --list\n" in help_of("sweep", "--help")
  assert "--list=" not in help_of("sweep", "--help")
  # Who asks for help has often typed a part of the command already.
  assert help_of("train", "--workdir=there", "--help") == help_of("train", "--help")
  assert help_of("train", "--workdir", "there", "--help") == help_of("train", "--help")
  assert help_of("train", "--workdir", "--help") == help_of("train", "--help")
  assert help_of("report", "there", "--help") == help_of("report", "--help")


def test_a_run_is_extended_without_its_recipe(recipe, tmp_path, capsys):
  """Would catch a run that can be trained further only by who remembers the command that made it."""
  workdir = f"--workdir={tmp_path / 'run'}"
  constant = ["--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=1"]
  assert main(["train", f"--config={recipe}", workdir, "--config.train.num_steps=3e0", *constant]) == 0
  spaced = [word for argument in (workdir, "--config.train.num_steps=4e0") for word in argument.split("=")]
  assert main(["train", *spaced]) == 0
  assert json.loads((tmp_path / "run" / "outcome.json").read_text())["step"] == 4
  assert json.loads((tmp_path / "run" / "config.json").read_text())["train.num_steps"] == 4
  capsys.readouterr()
  assert main(["evaluate", workdir]) == 0
  assert "official" not in capsys.readouterr().out  # one perplexity: nobody asked for the other
  assert main(["prepare", workdir]) == 0
  assert "fingerprint" in capsys.readouterr().out
  assert "names the recipe or --workdir a run" in refused(
    ["train", f"--workdir={tmp_path / 'new'}", "--config.train.num_steps=3"], capsys
  )


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("optimizer.learning_rate=3e-3x", "config.optimizer.learning_rate='3e-3x': must be float"),
    ("train.num_steps=1.5", "config.train.num_steps='1.5': must be int"),
    ("train.num_steps=1e", "config.train.num_steps='1e': must be int"),
  ],
)
def test_a_value_of_another_type_names_the_field(override, words, recipe, tmp_path, capsys):
  assert words in refused(["train", f"--config={recipe}", f"--workdir={tmp_path}", f"--config.{override}"], capsys)


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("c.train.update(batchsize=8)", "recipe.py, line 6: config.batchsize: unknown field; did you mean"),
    ("c.train.num_steps = 1e1", "recipe.py, line 6: "),
    ("import nothere", "recipe.py, line 6: No module named 'nothere'"),
    ("c = = 3", "recipe.py, line 6: "),
  ],
)
def test_an_error_of_a_recipe_names_file_and_line(line, words, tmp_path, capsys):
  text = f"from mixln_jax.config import base\n\n\ndef get_config():\n  c = base()\n  {line}\n  return c\n"
  (tmp_path / "recipe.py").write_text(text)
  assert words in refused(["prepare", f"--config={tmp_path / 'recipe.py'}"], capsys)


def test_a_file_that_grows_beyond_a_limit_ends_in_one_line(recipe, tmp_path):
  """Would catch the hundreds of lines of a library's tracebacks around the one that says what is wrong."""
  code = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
    "sys.argv = ['mixln_jax', 'train', *sys.argv[1:]];"
    "from mixln_jax.__main__ import front_door; front_door()"
  )
  command = [sys.executable, "-c", code, f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
  wide = ["--config.model.mlp_dim=2048", "--config.logging.tensorboard=false"]
  result = subprocess.run([*command, *wide], cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 1, result.stderr
  assert "Traceback" not in result.stderr
  (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  assert "File too large" in line
  assert line.endswith("and run the same command again")


def test_a_field_that_is_given_as_a_flag_is_recognised(capsys):
  """Would catch an error that leaves a reader of the paper, who types --placement=pre, without the way on."""
  assert main(["train", "--config=configs/tiny.py", "--workdir=/nowhere", "--placement=pre"]) == 2
  expected = "error: --placement: unknown flag; did you mean --config.model.placement? see --help\n"
  assert capsys.readouterr().err == expected

"""Fine-tuning: from the bits of another run, on answers alone, exact over a crash, refused where it can't be meant."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import saved_params
from model.rounding import NETWORK

from mixln_jax import config as config_lib
from mixln_jax.__main__ import main
from mixln_jax.data.corpus import is_validation
from mixln_jax.data.instructions import prompt_of
from mixln_jax.data.tokenizer_training import train_hugging_face
from mixln_jax.errors import InputError
from mixln_jax.model import Transformer
from mixln_jax.opening import set_up
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.training import loop
from mixln_jax.training import step as step_lib
from mixln_jax.training.begin import begin_from, initial_weights
from mixln_jax.training.checkpoints import open_checkpoints, restore_state, split
from mixln_jax.training.finetune import find_start, resolve

NUM_STEPS = 6
EXAMPLES = [{"instruction": f"which number? {n}", "input": "", "output": f"the answer is {n}"} for n in range(60)]


@pytest.fixture(scope="module")
def base(make_config, tmp_path_factory):
  """A run to start from; its last checkpoints are of steps 4 and 6."""
  workdir = tmp_path_factory.mktemp("base") / "run"
  loop.train(make_config(), workdir)
  return workdir


@pytest.fixture(scope="module")
def fields(base, tmp_path_factory):
  """The fields of a recipe that fine-tunes the run; it says nothing of the model or the tokenizer."""
  folder = tmp_path_factory.mktemp("recipe")
  (folder / "examples.json").write_text(json.dumps(EXAMPLES))
  return {
    "data.source": str(folder / "examples.json"),
    "data.validation_share": 0.2,
    "data.directory": str(folder / "records"),
    "data.mode": "instructions",
    "data.document_mask": True,
    "data.sequence_length": 256,
    "train.start_from": str(base),
    "train.num_steps": NUM_STEPS,
    "train.batch_size": 8,
    "optimizer.warmup_steps": 1,
    "checkpoint.every_steps": 3,
    "evaluate.every_steps": NUM_STEPS,
    "evaluate.batch_size": 8,
    "logging.tensorboard": False,
  }


@pytest.fixture(scope="module")
def recipe(fields, tmp_path_factory):
  """Its file; its records are prepared."""
  path = tmp_path_factory.mktemp("recipe") / "recipe.py"
  path.write_text(
    "from mixln_jax.config import base\n\n\ndef get_config():\n  config = base()\n"
    f"  config.update_from_flattened_dict({fields!r})\n  return config\n"
  )
  assert main(["prepare", f"--config={path}"]) == 0
  return path


@pytest.fixture(scope="module")
def tuned(recipe, tmp_path_factory):
  """The fine-tuned run, which nobody stopped."""
  workdir = tmp_path_factory.mktemp("tuned") / "run"
  assert main(["finetune", f"--config={recipe}", f"--workdir={workdir}"]) == 0
  return workdir


def params_of(workdir, step=None):
  return saved_params(workdir, step)


def state_of(workdir):
  """Every leaf of the last checkpoint, optimizer and all."""
  config = config_lib.from_json((workdir / "config.json").read_text())
  checkpoints = open_checkpoints(config, RunFolder(workdir))
  state = restore_state(config, step_lib.state_shardings(config, make_mesh(config.mesh)), checkpoints, NUM_STEPS)
  checkpoints.close()
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(split(state))}


def curve(workdir):
  lines = read_metrics(workdir / "metrics.jsonl")
  return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def answer_losses(model, params, examples):
  """Summed loss and number of the answers' tokens, each example by itself, from its text."""
  logits_of = jax.jit(Transformer(model).apply)
  total = count = 0
  for example in examples:
    prompt = (  # written out, so that another wording in the code is seen
      "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
      f"### Instruction:\n{example['instruction']}\n\n### Response:\n"
    )
    answer = [*(3 + byte for byte in example["output"].encode()), 1]
    ids = np.array([[1, *(3 + byte for byte in prompt.encode()), *answer]])
    ids_256 = np.pad(ids, ((0, 0), (0, 256 - ids.shape[1])))  # one shape: compiled once
    logits = np.asarray(logits_of({"params": params}, ids_256)[0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    begin, end = ids.shape[1] - len(answer), ids.shape[1]
    total -= sum(logs[at - 1, ids[0, at]] for at in range(begin, end))
    count += len(answer)
  return total, count


def test_it_starts_from_the_bits_of_the_other_run_and_says_so(base, tuned, capsys):
  bits = json.loads((tuned / "initial_weights.json").read_text())
  facts = Checkpoints(base / "checkpoints", read_only=True).facts(6)
  assert bits["bit_sums"] == facts["bit_sums"]["params"]
  start = json.loads((tuned / "start.json").read_text())
  assert start == {
    "run": str(base),
    "step": 6,
    "hash": bits["hash"],
    "placement": "mix:0.5",
    "data_fingerprint": facts["fingerprint"],
  }
  config, source = (config_lib.from_json((folder / "config.json").read_text()) for folder in (tuned, base))
  assert config.model == source.model
  assert config.train.start_checkpoint == "6"
  assert config.data.tokenizer == f"records:{source.data.directory}"
  setup = set_up(config)  # what `diagnose` calls the initial weights
  again = initial_weights(setup, step_lib.state_shardings(config, setup.mesh).params)
  jax.tree.map(np.testing.assert_array_equal, again, params_of(base))
  assert main(["evaluate", f"--workdir={tuned}"]) == 0  # an ordinary run
  loss = json.loads((tuned / "outcome.json").read_text())["validation"]["loss"]
  assert f'"loss": {loss:.4f}' in capsys.readouterr().out.replace(f"{loss}", f"{loss:.4f}")


def test_its_loss_is_that_of_the_answers_each_example_by_itself(tuned):
  """Packed rows with masks against single examples made from their text."""
  held_out = [
    example
    for example in EXAMPLES
    if is_validation(hashlib.sha256(prompt_of(example["instruction"]).encode()).hexdigest(), 0.2)
  ]
  model = config_lib.from_json((tuned / "config.json").read_text()).model
  total, count = answer_losses(model, params_of(tuned), held_out)
  last = read_metrics(tuned / "metrics.jsonl")[-1]
  assert (last["split"], last["tokens"]) == ("validation", count)
  np.testing.assert_allclose(last["loss"], total / count, rtol=NETWORK)


def test_after_a_crash_it_is_the_untouched_run_even_where_the_other_run_is_gone(
  recipe, base, tuned, tmp_path, monkeypatch
):
  copy = tmp_path / "base"
  shutil.copytree(base, copy)
  command = ["finetune", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", f"--config.train.start_from={copy}"]
  calls = []
  real = loop.global_batch

  def crash(*arguments):
    calls.append(None)
    if len(calls) == 6:
      raise RuntimeError("out of the blue")
    return real(*arguments)

  monkeypatch.setattr(loop, "global_batch", crash)
  with pytest.raises(RuntimeError, match="out of the blue"):
    main(command)
  monkeypatch.undo()
  assert curve(tmp_path / "run")[-1]["step"] == 4  # behind the checkpoint of step 3
  shutil.rmtree(copy)
  assert main(command) == 0
  assert curve(tmp_path / "run") == curve(tuned)
  expected, found = state_of(tuned), state_of(tmp_path / "run")
  assert expected.keys() == found.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--config.train.start_from="], "config.train.start_from is required"),
    (["--config.train.start_from=/no/run"], "config.train.start_from='/no/run': no run there"),
    (["--config.train.start_checkpoint=5"], "has no checkpoint of that step; it has 4, 6"),
    (["--config.train.start_checkpoint=bestt"], "config.train.start_checkpoint='bestt': must be newest, best, or"),
    (
      ["--config.model.num_layers=12", "--config.model.placement=pre"],
      "is another: config.model.num_layers=12, there 2; config.model.placement='pre', there 'mix:0.5'",
    ),
    (["--config.data.tokenizer=OTHER"], "is not the tokenizer of config.train.start_from="),
    (["--config.data.document_mask=false"], "needs config.data.document_mask=True"),
    (["--config.data.directory=/no/records"], "no records in /no/records"),
  ],
)
def test_what_can_not_be_meant_is_refused_and_nothing_is_made(arguments, words, recipe, tmp_path, capsys):
  other = tmp_path / "other.json"
  other.write_bytes(train_hugging_face(["the cat sat " * 50], 262).content)
  arguments = [argument.replace("OTHER", str(other)) for argument in arguments]
  assert main(["finetune", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *arguments]) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_training_itself_checks_model_tokenizer_and_start(base, tuned, make_config, tmp_path):
  config = config_lib.from_json((tuned / "config.json").read_text())
  wrong = config.copy_and_resolve_references()
  wrong.model.placement = "pre"
  with pytest.raises(InputError, match=r"config.model.placement='pre', there 'mix:0.5'"):
    loop.train(wrong, tmp_path / "run")
  facts = json.loads((base / "data.json").read_text())
  other = shutil.copytree(base, tmp_path / "other")
  (other / "data.json").write_text(json.dumps(facts | {"tokenizer_sha256": "0" * 64}))
  wrong = config.copy_and_resolve_references()
  wrong.train.start_from = str(other)
  with pytest.raises(InputError, match=r"is not the tokenizer of config.train.start_from"):
    loop.train(wrong, tmp_path / "run")
  empty = RunFolder(tmp_path / "empty")
  empty.create(config_lib.to_json(make_config()))
  wrong.train.update(start_from=empty.address, start_checkpoint="newest")
  with pytest.raises(InputError, match="the run has no checkpoint yet"):
    loop.train(wrong, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_an_imported_checkpoint_and_the_best_one_can_be_started_from(fields, recipe, base, make_config, tmp_path):
  imported = begin_from(make_config(), jax.tree.map(np.asarray, params_of(base)), tmp_path / "imported")
  own = RunFolder(tmp_path / "run")

  def pinned(folder, checkpoint):
    config = config_lib.base()
    config.update_from_flattened_dict(fields)
    config.train.update(start_from=str(folder), start_checkpoint=checkpoint)
    return resolve(config, {}, own)

  with pytest.raises(InputError, match=r"none of its checkpoints was evaluated"):
    pinned(imported.address, "best")
  config = pinned(imported.address, "newest")
  assert config.train.start_checkpoint == "0"
  assert find_start(set_up(config)).identity()["data_fingerprint"] is None
  assert pinned(base, "best").train.start_checkpoint == "6"  # the only one of the two that was evaluated

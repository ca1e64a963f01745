"""`mixln_jax.open_run`: the one door to a run, from any working directory, also where its records are gone."""

import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixln_jax
from mixln_jax.__main__ import main
from mixln_jax.errors import InputError
from mixln_jax.model import next_token_loss
from mixln_jax.runs import checkpoint as checkpoint_lib
from mixln_jax.runs.checkpoint import DamagedError, RemovedError
from mixln_jax.training import loop


@pytest.fixture(scope="module")
def workdir(make_config, tmp_path_factory):
  """A run of six steps with checkpoints at 4 and 6."""
  workdir = tmp_path_factory.mktemp("open") / "run"
  loop.train(make_config(**{"train.num_steps": 6}), workdir)
  return workdir


def test_a_notebook_gets_logits_hidden_states_and_gradients_by_layer(workdir):
  """The ten lines that the documentation shows."""
  with mixln_jax.open_run(workdir) as run:
    tokens_BT = jnp.array([run.tokenizer.encode("the quick brown fox")])
    logits_BTV = run.logits(tokens_BT)
    hidden_BTD, taps = run.hidden(tokens_BT)

    def loss(params):
      hidden_BTD, _ = run.model.apply({"params": params}, tokens_BT[:, :-1], method="hidden")
      total, count = next_token_loss(
        hidden_BTD, params["head"], tokens_BT[:, 1:], jnp.ones_like(tokens_BT[:, 1:], float)
      )
      return total / count

    gradient = jax.grad(loss)(run.params)
    by_layer = jnp.linalg.norm(gradient["layers"]["query"].reshape(run.config.model.num_layers, -1), axis=1)

  assert logits_BTV.shape == (1, 19, 259)
  np.testing.assert_allclose(hidden_BTD @ run.params["head"], logits_BTV, rtol=1e-5, atol=1e-6)
  assert taps["stream_LBTD"].shape == (2, 1, 19, 16)
  assert by_layer.shape == (2,)
  assert (by_layer > 0).all()
  # The loss of the logits, by hand, is the loss that was differentiated.
  log_probabilities = jax.nn.log_softmax(logits_BTV[0, :-1])
  expected = -log_probabilities[jnp.arange(18), tokens_BT[0, 1:]].mean()
  assert loss(run.params) == pytest.approx(float(expected), rel=1e-5)
  assert [line["step"] for line in run.metrics() if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_is_chosen_by_step_or_name(workdir):
  with mixln_jax.open_run(workdir) as newest, mixln_jax.open_run(workdir, step=4) as fourth:
    assert (newest.step, fourth.step) == (6, 4)
    assert not np.array_equal(newest.params["head"], fourth.params["head"])
  with mixln_jax.open_run(str(workdir), step="best") as best:
    losses = {line["step"]: line["loss"] for line in best.metrics() if line["split"] == "validation"}
    assert best.step == min(losses, key=losses.get)
  with (
    pytest.raises(InputError, match=r"step=5: .* has no checkpoint of that step; it has 4, 6"),
    mixln_jax.open_run(workdir, 5),
  ):
    pass
  with pytest.raises(InputError, match="/no/such/run: no run there"), mixln_jax.open_run("/no/such/run"):
    pass
  with mixln_jax.open_run(workdir) as run, pytest.raises(InputError, match="tokens: have shape"):
    run.logits([])


def test_a_copied_run_generates_from_anywhere_without_its_records(make_config, tmp_path, monkeypatch, capsys):
  """A run's folder holds what generation needs: paths relative to where training ran lead nowhere."""
  (tmp_path / "train").mkdir()
  monkeypatch.chdir(tmp_path / "train")
  config = make_config()
  shutil.copytree(config.data.directory, "records")
  config.data.directory = "records"
  loop.train(config, "run")
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  assert main(["evaluate", f"--workdir={tmp_path / 'train' / 'run'}"]) == 0  # the records are found where they lay
  before = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
  shutil.move(tmp_path / "train" / "run", "renamed")
  shutil.rmtree(tmp_path / "train")
  assert main(["generate", "--workdir=renamed", "--prompt=the", "--num_tokens=4", "--temperature=0", "--json"]) == 0
  assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 4
  assert main(["evaluate", "--workdir=renamed"]) == 2  # it needs the validation records
  error = capsys.readouterr().err
  assert "records" in error
  shutil.copytree(make_config().data.directory, "records")
  assert main(["evaluate", "--workdir=renamed"]) == 0
  assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == before


def test_another_tokenizer_or_other_records_are_refused(make_config, tmp_path, capsys):
  """Text would be encoded with other ids, and a loss measured on other documents."""
  config = make_config()
  loop.train(config, tmp_path / "run")
  (tmp_path / "run" / "tokenizer" / "tokenizer.bytes").unlink()
  data = tmp_path / "run" / "data.json"
  facts = json.loads(data.read_text())
  data.write_text(json.dumps(facts | {"fingerprint": "0" * 64}))
  assert main(["evaluate", f"--workdir={tmp_path / 'run'}"]) == 2
  assert "was trained on data 000000000000" in capsys.readouterr().err


def test_a_run_that_trains_on_is_read_at_what_it_has_by_then(workdir, tmp_path):
  """The checkpoint that was chosen is removed before it is read: no damage, and the newer one is there."""
  shutil.copytree(workdir, tmp_path / "run")
  checkpoints = tmp_path / "run" / "checkpoints"
  with mixln_jax.open_run(tmp_path / "run") as run:
    (checkpoints / "6").rename(checkpoints / "8")
    assert run.params["head"].shape == (16, 259)
    assert run.step == 8
  with mixln_jax.open_run(tmp_path / "run", step=4) as run:
    shutil.rmtree(checkpoints / "4")
    with pytest.raises(RemovedError, match="was removed while it was read"):
      _ = run.params


def test_a_checkpoint_that_is_removed_file_by_file_is_not_called_damaged(workdir, tmp_path, monkeypatch):
  """A reader that comes while files are being removed finds some of them; damage is what stays."""
  shutil.copytree(workdir, tmp_path / "run")
  checkpoint = tmp_path / "run" / "checkpoints" / "6"
  shutil.rmtree(checkpoint / "params")
  removal = threading.Timer(0.5, shutil.rmtree, [checkpoint])
  with mixln_jax.open_run(tmp_path / "run") as run:
    removal.start()
    assert run.params["head"].shape == (16, 259)
    assert run.step == 4
  removal.join()
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4" / "params")
  monkeypatch.setattr(checkpoint_lib, "REMOVAL_SECONDS", 0.2)
  with mixln_jax.open_run(tmp_path / "run") as run, pytest.raises(DamagedError, match="the checkpoint is damaged"):
    _ = run.params


@pytest.mark.parametrize("place", ["copied", "renamed", "linked"])
def test_a_run_generates_without_writing_to_its_folder(workdir, tmp_path, monkeypatch, place):
  """An archive is read-only, a shared disk belongs to somebody else: reading a run must leave its folder alone."""
  run = tmp_path / f"{place} run"
  shutil.copytree(workdir, tmp_path / "copy")
  if place == "linked":
    run.symlink_to(tmp_path / "copy")
  elif place == "renamed":
    (tmp_path / "copy").rename(run)
  else:
    shutil.copytree(tmp_path / "copy", run)
  before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
  monkeypatch.chdir("/")
  assert main(["generate", f"--workdir={run}", "--prompt=the", "--num_tokens=3", "--temperature=0"]) == 0
  with mixln_jax.open_run(run, step=4) as opened:
    assert opened.tokenizer.encode("the")
    assert opened.logits([[1, 2, 3]]).shape == (1, 3, 259)
  assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before

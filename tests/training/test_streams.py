"""Runs of several residual streams, and of a placement that depends on the step, through the whole loop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import saved_params

import mixln_jax
from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.interop import check
from mixln_jax.opening import make_loader, set_up
from mixln_jax.placement import at_step, parse
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.sweeps.joint import train_together
from mixln_jax.sweeps.sequence import open_study
from mixln_jax.sweeps.study import make_study, parse_axes
from mixln_jax.training import loop
from mixln_jax.training.evaluation import Evaluator
from mixln_jax.training.finetune import resolve
from mixln_jax.training.program import SingleProgram
from mixln_jax.training.step import init_state, make_train_step

RAMP = "pre+prores:linear:4"


def losses(workdir, split="train"):
  return {line["step"]: line["loss"] for line in read_metrics(workdir / "metrics.jsonl") if line["split"] == split}


@pytest.mark.parametrize(
  "placement",
  [
    "attnres:3",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mhc:2*1,dhc:2*1", "siamese", "attnres")),
  ],
)
def test_stopped_and_resumed_is_the_untouched_run(make_config, tmp_path, placement):
  """Would catch what a wiring learns being left out of a checkpoint, or restored into another place."""
  config = make_config(**{"model.placement": placement, "train.num_steps": 4, "optimizer.schedule": "constant"})
  config.optimizer.warmup_steps = 0
  loop.train(config, tmp_path / "whole")
  config.train.num_steps = 2
  loop.train(config, tmp_path / "run")
  config.train.num_steps = 4
  loop.train(config, tmp_path / "run")
  assert losses(tmp_path / "run") == losses(tmp_path / "whole")
  jax.tree.map(np.testing.assert_array_equal, saved_params(tmp_path / "run"), saved_params(tmp_path / "whole"))
  with mixln_jax.open_run(tmp_path / "run") as run:
    assert run.logits([1, 2, 3]).shape == (1, 3, 259)
    with pytest.raises(InputError, match=r"residual streams .* can't express"):
      check.check_export(run.params, run.config.model, {}, {})


def test_families_of_one_tree_train_together_as_apart(make_config, tmp_path):
  """Would catch a run of one stream that reads or writes the streams of its neighbours, and a decay that depends
  on which run is the first."""
  config = make_config(
    **{
      "train.num_steps": 3,
      "optimizer.warmup_steps": 1,
      "optimizer.weight_decay": 0.5,
      "optimizer.learning_rate": 1e-2,
    }
  )
  study = make_study(config, [parse_axes(["placement=pre dhc:2 hc:2*1,mhc:2*1", "learning_rate=1e-3 3e-3"])])
  runs = open_study(study, tmp_path / "study")
  train_together(study, runs)
  for index in (0, 2, 5):
    run = runs[index]
    loop.train(run.config, tmp_path / str(index))
    for split in ("train", "validation"):
      alone = losses(tmp_path / str(index), split)
      np.testing.assert_allclose(list(losses(run.folder.path, split).values()), list(alone.values()), rtol=2e-5)


def test_families_of_other_streams_do_not_train_together(make_config, tmp_path):
  study = make_study(make_config(), [parse_axes(["placement=hc:2 siamese"])])
  with pytest.raises(InputError, match="different residual streams"):
    train_together(study, open_study(study, tmp_path / "study"))


def test_a_ramp_is_data_of_the_step(make_config):
  """The step after t updates is that of the placement frozen there: catches a ramp that is one update early or late."""
  config = make_config(**{"model.placement": RAMP, "train.num_steps": 6})
  batch = next(iter(make_loader(set_up(config), 8).train()))
  state = jax.jit(lambda: init_state(config))()
  step = jax.jit(make_train_step(config))
  for done in range(5):
    frozen = config.copy_and_resolve_references()
    frozen.model.placement = at_step(RAMP, 2, done)
    expected = jax.jit(make_train_step(frozen))(state, batch)[1]["loss"]
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
  assert parse(at_step(RAMP, 2, 4), 2).column("mlp", "c_out").tolist() == [1.0, 1.0]


def test_evaluation_and_opening_use_the_checkpoints_step(make_config, tmp_path):
  """Catches a run in its ramp that is evaluated, or opened, as if it were after it."""
  config = make_config(**{"model.placement": RAMP, "train.num_steps": 4, "evaluate.every_steps": 2})
  loop.train(config, tmp_path / "run")
  for step in (2, 4):
    with mixln_jax.open_run(tmp_path / "run", step) as run:
      assert run.config.model.placement == f"{RAMP}@{step}"
      [evaluation] = Evaluator(SingleProgram(run.config, run.setup.mesh), run.setup)(run.params, step)
    assert evaluation.loss == pytest.approx(losses(tmp_path / "run", "validation")[step], rel=1e-6)
  with pytest.raises(ValueError, match="depends on the step"):
    mixln_jax.model.Transformer(config.model).apply({"params": run.params}, jnp.ones((1, 3), jnp.int32))
  # A run that starts from the checkpoint goes on with the factors that it had there.
  config.train.update(start_from=str(tmp_path / "run"), start_checkpoint="2")
  config.model.placement = config_lib.base().model.placement
  assert resolve(config, {}, RunFolder(tmp_path / "tuned")).model.placement == f"{RAMP}@2"


def test_a_table_with_a_ramp_is_read_back_from_json():
  table = parse("hc:4*1,pre*1+prores:sqrt:8", 2)
  assert type(table).from_json(json.loads(json.dumps(table.to_json()))) == table

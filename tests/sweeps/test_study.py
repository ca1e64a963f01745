"""What runs a study has, and what it refuses."""

import json

import pytest

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import parameters
from mixln_jax.sweeps.sequence import OPEN, open_study, state_of
from mixln_jax.sweeps.study import check_initial_weights, load_study, make_study, parse_axes


def study_of(config, *axes):
  return make_study(config, [parse_axes(axes)])


def test_axes_make_the_product_and_every_other_field_is_the_base(make_config, tmp_path):
  config = make_config()
  axes = (
    "placement=pre post*1,pre*1+scaled_init",
    "optimizer.learning_rate=1e-3 3e-4",
    "model.tied_embeddings=true false",
  )
  runs = study_of(config, *axes).runs(tmp_path)
  assert len({run.name for run in runs}) == len(runs) == 8
  values = {(r.config.model.placement, r.config.optimizer.learning_rate, r.config.model.tied_embeddings) for r in runs}
  assert ("post*1,pre*1+scaled_init", 3e-4, False) in values
  assert len(values) == 8
  for run in runs:
    different = {field for field, _, _ in config_lib.differences(config, run.config)} - {"mesh.run", "mesh.dcn_run"}
    assert different <= set(run.values)


def test_grids_are_united_and_a_run_of_two_grids_is_one(make_config, tmp_path):
  grids = [
    {"model.placement": ("pre", "post"), "seed": (0, 1)},
    {"model.placement": ("pre",), "seed": (0,), "optimizer.learning_rate": (1e-3, 5e-4)},
  ]
  config = make_config(**{"optimizer.learning_rate": 1e-3})
  names = [run.name for run in make_study(config, grids).runs(tmp_path)]
  assert names == [
    "pre-learning_rate0.001-seed0",
    "pre-learning_rate0.001-seed1",
    "post-learning_rate0.001-seed0",
    "post-learning_rate0.001-seed1",
    "pre-learning_rate0.0005-seed0",
  ]


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    (("placemant=pre",), r"config\.placemant: unknown field"),
    (("placement",), "write FIELD=VALUE"),
    (("placement=",), "no values"),
    (("placement=pre pre",), "twice"),
    (("placement=pre", "model.placement=post"), "axis already"),
    (("placement=pre mixx",), "unknown placement 'mixx'"),
    (("train.num_steps=few",), "must be int"),
    (("train.num_steps=0",), "must be int"),
    (("tied_embeddings=maybe",), "true or false"),
    (("warmup_steps=3 700",), "leaves no step"),
  ],
)
def test_axes_that_cannot_be_meant_are_refused(make_config, tmp_path, axes, message):
  with pytest.raises(InputError, match=message):
    study_of(make_config(), *axes).runs(tmp_path)


def test_a_seed_without_its_section_is_that_of_the_weights(make_config, tmp_path):
  assert [run.config.seed for run in study_of(make_config(), "seed=3 4").runs(tmp_path)] == [3, 4]


def test_a_run_there_that_differs_outside_the_axes_is_refused_by_field(make_config, tmp_path):
  study = study_of(make_config(), "placement=pre post")
  run = open_study(study, tmp_path / "study")[1]
  other = make_config(**{"model.placement": "post", "optimizer.clip_norm": 0.5, "model.remat": "full"})
  run.folder.create(config_lib.to_json(other))
  with pytest.raises(InputError, match=r"post: config\.optimizer\.clip_norm is 0\.5, the study has 1\.0") as caught:
    open_study(study, tmp_path / "study")
  assert "remat" not in str(caught.value)  # it computes the same thing


def test_a_folder_is_one_study(make_config, tmp_path):
  folder = tmp_path / "study"
  runs = open_study(study_of(make_config(), "placement=pre"), folder)
  assert [state_of(run).state for run in runs] == [OPEN]
  assert len(open_study(study_of(make_config(), "placement=pre post"), folder)) == 2  # runs may be added
  with pytest.raises(InputError, match=r"config\.train\.batch_size: 8 there, 4 now"):
    open_study(study_of(make_config(**{"train.batch_size": 4}), "placement=pre post"), folder)
  with pytest.raises(InputError, match="lacks: post"):
    open_study(study_of(make_config(), "placement=pre"), folder)
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "thesis.txt").write_text("mine")
  with pytest.raises(InputError, match="holds no study"):
    open_study(study_of(make_config(), "placement=pre"), tmp_path / "other")


def test_runs_that_should_start_from_the_same_numbers_are_compared(make_config, tmp_path):
  runs = study_of(make_config(), "placement=pre pre+scaled_init", "seed=0 1").runs(tmp_path)
  sums = dict.fromkeys(("embedding", "head", *(f"layers/{n}" for n in ("query", "key", "value", "gate", "up"))), 7)
  for number, run in enumerate(runs):
    run.folder.create(config_lib.to_json(run.config))
    own = {"layers/output": 100 + number, "layers/down": 200 + number}  # scaled, so their own
    facts = {"hash": f"h{number}", "bit_sums": sums | own | {"embedding": 7 + run.config.seed}}
    run.folder.write_json("initial_weights.json", facts)
  assert len(check_initial_weights(runs)) == 4
  facts["bit_sums"]["layers/query"] = 8
  runs[-1].folder.write_json("initial_weights.json", facts)
  with pytest.raises(InputError, match="should start from the same layers/query"):
    check_initial_weights(runs)


def test_runs_of_other_shapes_share_nothing_of_those_shapes(make_config, tmp_path):
  runs = study_of(make_config(), "num_kv_heads=1 2").runs(tmp_path)
  for number, run in enumerate(runs):
    run.folder.create(config_lib.to_json(run.config))
    sums = dict.fromkeys(parameters(run.config.model), 7) | {"layers/key": number, "layers/value": number}
    run.folder.write_json("initial_weights.json", {"hash": str(number), "bit_sums": sums})
  assert len(check_initial_weights(runs)) == 2


def test_every_study_of_the_repository_can_be_meant():
  import runpy
  from pathlib import Path

  recipes = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.py"))
  assert recipes
  for recipe in recipes:
    base = runpy.run_path(str(recipe))["get_config"]()
    study = load_study(str(recipe), base)
    assert len(study.runs("anywhere")) > 1
    assert study.title
    assert all({"id", "claim", "judged_by"} == set(claim) for claim in study.claims)
    assert json.loads(study.to_json(study.runs("anywhere")))["axes"]

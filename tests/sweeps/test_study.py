"""What runs a study has, and what it refuses."""

import json

import pytest

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import count_params, parameters
from mixln_jax.sweeps.sequence import OPEN, open_study, state_of
from mixln_jax.sweeps.study import check_initial_weights, load_study, make_study, parse_axes, run_name


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
    (("train.num_steps=-1",), "must be int"),
    (("train.num_steps=0",), "the run has no length"),
    (("tied_embeddings=maybe",), "true or false"),
    (("warmup_steps=3 700",), "leaves no step"),
  ],
)
def test_axes_that_cannot_be_meant_are_refused(make_config, tmp_path, axes, message):
  with pytest.raises(InputError, match=message):
    study_of(make_config(), *axes).runs(tmp_path)


def test_fields_that_move_together(make_config, tmp_path):
  """A ladder whose shapes are a product: widths of one depth with the heads of another."""
  config = make_config()
  shapes = "num_layers;embed_dim;model.mlp_dim=2;16;32 4;12;24"
  runs = study_of(config, shapes, "placement;learning_rate=pre;1e-3 lns;1e-2", "seed=0 1").runs(tmp_path)[:4]
  assert {(run.config.model.num_layers, run.config.model.embed_dim, run.config.model.mlp_dim) for run in runs} == {
    (2, 16, 32)
  }
  in_recipe = {
    ("model.num_layers", "model.embed_dim", "model.mlp_dim"): ((2, 16, 32), (4, 12, 24)),
    "model.placement": ("pre",),
  }
  study = make_study(config, [in_recipe])
  names = [run.name for run in study.runs(tmp_path)]
  assert names == ["embed_dim16-mlp_dim32-num_layers2-pre", "embed_dim12-mlp_dim24-num_layers4-pre"]
  assert json.loads(study.to_json([]))["axes"]["model.embed_dim"] == [16, 12]


@pytest.mark.parametrize(
  ("axis", "message"),
  [
    ("num_layers;embed_dim=2;16 4", "'4' must have a value for each of the 2 fields"),
    ("num_layers;num_layers=2;2", "a field stands there twice"),
    ("num_layers;seed=2;0 2;0", r"\(2, 0\) stands there twice"),
    ("num_layers;embed=2;16", "embed: unknown field"),
    ("num_layers;embed_dim=2;0", "axis model.embed_dim: 0 must be"),
  ],
)
def test_fields_that_do_not_move_together(make_config, axis, message):
  """A value that is dropped, or given to another field, in silence."""
  with pytest.raises(InputError, match=message):
    study_of(make_config(), axis)


def test_the_second_stage_is_the_best_of_the_first(make_config, tmp_path):
  """Seeds at a rate that was not the best, or that diverged; a stage that begins before the first one is done."""
  study = make_study(
    make_config(),
    [{"model.placement": ("pre", "post"), "optimizer.learning_rate": (1e-3, 3e-3)}],
    then={"best": "optimizer.learning_rate", "grid": {"seed": (0, 1)}},
  )
  runs = study.runs(tmp_path)
  losses = dict(zip([run.name for run in runs], (3.0, 2.0, 4.0, float("nan")), strict=True))
  assert study.with_stages(dict(list(losses.items())[:3])) == study
  added = [run.name for run in study.with_stages(losses).runs(tmp_path)[4:]]
  assert added == ["pre-learning_rate0.003-seed1", "post-learning_rate0.001-seed1"]
  with pytest.raises(InputError, match=r"then\.best='optimizer\.learning_rate' must be an axis of the grids"):
    make_study(make_config(), [{"seed": (0,)}], then={"best": "optimizer.learning_rate", "grid": {"data.seed": (1,)}})


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


def test_a_study_of_an_earlier_version_goes_on(make_config, tmp_path):
  """A study whose folder was written before a field existed: would catch a new field that makes it another study."""
  study, folder = study_of(make_config(), "placement=pre post"), tmp_path / "study"
  open_study(study, folder)
  written = json.loads((folder / "study.json").read_text())
  del written["base"]["optimizer.name"]
  (folder / "study.json").write_text(json.dumps(written))
  assert len(open_study(study, folder)) == 2
  del written["base"]["train.batch_size"]  # the default is another than this study's
  (folder / "study.json").write_text(json.dumps(written))
  with pytest.raises(InputError, match=r"config\.train\.batch_size: \d+ there, 8 now"):
    open_study(study, folder)
  written["base"]["optimizer.colour"] = "red"
  (folder / "study.json").write_text(json.dumps(written))
  with pytest.raises(InputError, match=r"optimizer\.colour"):
    open_study(study, folder)


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

  configs = Path(__file__).parents[2] / "configs"
  recipes = sorted([*(configs / "studies").glob("*.py"), *(configs / "depth").glob("*.py")])
  assert {"depth_ladder", "depthbench"} <= {recipe.stem for recipe in recipes}
  for recipe in recipes:
    base = runpy.run_path(str(recipe))["get_config"]()
    study = load_study(str(recipe), base)
    assert len(study.runs("anywhere")) > 1
    assert study.title
    assert all({"id", "claim", "judged_by"} == set(claim) for claim in study.claims)
    assert json.loads(study.to_json(study.runs("anywhere")))["axes"]


def test_ladders_keep_parameters_equal():
  """A shape that is wrong by a digit: depth would be compared with size."""
  from configs.depth import depthbench
  from configs.studies import depth_ladder, depth_ladder_4m
  from mixln_jax.training.derived import with_derived

  for recipe, size in ((depth_ladder, 0.55e6), (depth_ladder_4m, 3.95e6)):
    model = recipe.get_config().model
    model.placement = "pre"
    for shape in recipe.SHAPES:
      model.update(
        {field.removeprefix("model."): value for field, value in zip(depth_ladder.SHAPE, shape, strict=True)}
      )
      assert count_params(model) == pytest.approx(size, rel=0.005)
  for layers in depthbench.SHAPES:
    config = with_derived(depthbench.get_config(str(layers)))
    config.model.placement = "pre"
    assert count_params(config.model) == pytest.approx(405e6, rel=0.03)  # as DepthBench says of them
    tokens = config.train.num_steps * config.train.batch_size * config.data.sequence_length
    assert tokens == pytest.approx(20 * count_params(config.model), rel=2e-4)


def test_a_long_placement_makes_a_name_that_a_disk_takes():
  """Placements of deep models, spelled layer by layer, are longer than a file's name may be; they must stay apart."""
  layers = ["post", "lns"] * 40
  values = {"model.placement": ",".join(layers), "optimizer.learning_rate": 0.001, "seed": 1}
  name = run_name(values)
  assert len(name) <= 200
  assert name.endswith("-learning_rate0.001-seed1")
  assert name != run_name(values | {"model.placement": ",".join(layers[::-1])})

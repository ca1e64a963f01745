"""The config: recipes, what is refused, and what survives a round trip."""

import importlib.util
import math
from pathlib import Path

import pytest

from mixln_jax import config as config_lib
from mixln_jax.data import records
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import count_params, parameters
from mixln_jax.model.transformer import REMAT_POLICIES
from mixln_jax.parallel.mesh import AXES

CONFIGS = Path(__file__).parents[1] / "configs"
# Millions of parameters: embedding and head V D each, a layer 4 D² + 3 D F + 2 D, the final norm D.
MILLIONS = {
  "llama_9m": 9.00, "llama_20m": 19.55, "llama_35m": 35.20, "llama_40m": 42.39, "llama_60m": 58.07, "llama_71m": 70.58,
  "llama_100m": 100.12, "llama_130m": 134.11, "llama_250m": 247.37, "llama_350m": 367.97, "llama_1b": 1339.08,
  "llama_3b": 2685.83, "llama_7b": 6738.42,
}  # fmt: skip


def load(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_recipe_is_counted():
  assert {path.stem for path in CONFIGS.glob("*.py")} == {*MILLIONS, "tiny"}
  assert {path.stem for path in CONFIGS.glob("finetune/*.py")} == {"commonsense_170k", "smollm2", "tiny"}


@pytest.mark.parametrize("name", [*MILLIONS, "tiny", "finetune/commonsense_170k", "finetune/smollm2", "finetune/tiny"])
def test_recipes_are_valid_short_and_documented(name):
  module = load(name)
  config_lib.validate(module.get_config())
  assert f"--config=configs/{name}.py" in module.__doc__
  for word in ("Command:", "Hardware:", "Result:", "Source:"):
    assert word in module.__doc__
  assert len((CONFIGS / f"{name}.py").read_text().splitlines()) < 30


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts(name):
  model = load(name).get_config().model
  assert f"{count_params(model) / 1e6:.2f}" == f"{MILLIONS[name]:.2f}"
  d, f, v = model.embed_dim, model.mlp_dim, model.vocab_size
  assert count_params(model) == 2 * v * d + model.num_layers * (4 * d * d + 3 * d * f + 2 * d) + d
  assert parameters(model)["layers/query"].axes == ("layers", "embed", "heads", "head_dim")


def test_the_papers_recipe():
  steps = {"71m": 10_000, "130m": 20_000, "250m": 40_000, "350m": 60_000, "1b": 50_000, "7b": 13_000}
  for size, num_steps in steps.items():
    config = load(f"llama_{size}").get_config()
    assert config.train.num_steps == num_steps
    assert config_lib.warmup_steps(config) == num_steps // 10
    assert config.optimizer.learning_rate == (5e-4 if size in ("1b", "7b") else 1e-3)
    assert (config.train.batch_size, config.data.sequence_length) == (512, 256)
    assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.weight_decay) == (0.9, 0.999, 0.0)
    assert (config.optimizer.clip_norm, config.optimizer.final_fraction) == (1.0, 0.1)
    assert config.data.mode == "pad"


def test_the_official_variant():
  module = load("llama_130m")
  changed = config_lib.differences(module.get_config(), module.get_config("official"))
  assert {name: new for name, _, new in changed} == {
    "model.param_dtype": "bfloat16",
    "model.embedding_deviation": math.sqrt(0.4),
    "optimizer.clip_norm": 0.0,
    "optimizer.moment_dtype": "bfloat16",
  }
  with pytest.raises(ValueError, match="unknown variant 'offical'"):
    module.get_config("offical")


def bad_value(field):
  """A value of the right type that the field must refuse, or None where it takes all."""
  if field.choices:
    return "nonsense"
  if field.minimum is not None:
    return type(field.default)(field.minimum - 1)
  if field.above is not None:
    return field.above
  return None


@pytest.mark.parametrize("name", config_lib.FIELDS)
def test_every_field_refuses_wrong_types_and_values(name):
  field = config_lib.FIELDS[name]
  wrong_type = 3 if isinstance(field.default, str) else "three"
  candidates = [wrong_type, *([bad_value(field)] if bad_value(field) is not None else [])]
  candidates += [math.nan, math.inf] if isinstance(field.default, float) else []
  candidates += [field.below] if field.below is not None else []
  candidates += [type(field.default)(field.maximum + 1)] if field.maximum is not None else []
  for value in candidates:
    with pytest.raises(InputError) as error:
      config_lib.from_flat(config_lib.flatten(config_lib.base()) | {name: value})
    assert f"config.{name}={value!r}" in str(error.value)
    assert field.allowed() in str(error.value)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.num_heads": 7}, "config.model.num_heads=7 does not divide config.model.embed_dim=512"),
    ({"model.num_kv_heads": 3}, "config.model.num_kv_heads=3 does not divide config.model.num_heads=8"),
    ({"model.head_dim": 15}, "the width of a head is 15"),
    ({"model.placement": "post*3,pre*8"}, "11 layers"),
    ({"train.micro_batches": 3}, "config.train.micro_batches=3 does not divide config.train.batch_size=512"),
    ({"optimizer.warmup_steps": 10_000}, "config.optimizer.warmup_steps=10000 leaves no step"),
    ({"optimizer.schedule": "wsd", "optimizer.decay_steps": 9500}, "don't fit"),
    ({"optimizer.schedule": "trapezoid", "optimizer.decay_fraction": 0.95}, "don't fit"),
    ({"optimizer.warmup_steps": 5, "optimizer.warmup_fraction": 0.2}, "say the same thing twice"),
    ({"train.num_steps": 0}, "the run has no length"),
    ({"data.document_mask": True, "data.mode": "pad"}, "needs config.data.mode=pack"),
    ({"data.mode": "instructions"}, "needs config.data.document_mask=True"),
    ({"train.start_checkpoint": "-3"}, "config.train.start_checkpoint='-3': must be newest, best, or the step"),
    ({"profile.start_step": 9999, "profile.num_steps": 3}, "config.profile.start_step=9999 and num_steps=3 end after"),
    ({"mesh.fsdp": -1}, "config.mesh.data and config.mesh.fsdp are all -1"),
    ({"mesh.tensor": 0}, "config.mesh.tensor=0"),
  ],
)
def test_contradictions_are_named(changes, words):
  config = config_lib.base()
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError) as error:
    config_lib.validate(config)
  assert words in str(error.value)


def test_unknown_and_missing_fields():
  flat = config_lib.flatten(config_lib.base())
  with pytest.raises(InputError, match=r"config.model.placment: unknown field; did you mean config.model.placement"):
    config_lib.from_flat(flat | {"model.placment": "pre"})
  with pytest.raises(InputError, match=r"config.model.placment='pre': this version .* was written by 0.1.0"):
    config_lib.from_flat(flat | {"model.placment": "pre"}, "0.1.0")
  changed = flat | {"seed": 7, "data.num_workers": 3}
  older = config_lib.from_flat({name: value for name, value in changed.items() if name != "data.num_workers"})
  assert (older.seed, older.data.num_workers) == (7, config_lib.FIELDS["data.num_workers"].default)
  with pytest.raises(AttributeError, match="placment"):
    config_lib.base().model.placment = "pre"


def test_json_round_trip_and_differences():
  config = load("llama_1b").get_config()
  again = config_lib.from_json(config_lib.to_json(config))
  assert again == config
  assert config_lib.differences(config, again) == []
  again.seed = 5
  again.model.placement = "pre"
  assert config_lib.differences(config, again) == [("seed", 0, 5), ("model.placement", "mix:0.25", "pre")]


def test_what_the_config_lists_is_what_the_code_has():
  assert set(config_lib.REMAT_POLICIES) == {"none", *REMAT_POLICIES}
  assert set(config_lib.RECORD_MODES) == set(records.PACKERS)
  assert {name for name in config_lib.FIELDS if name.startswith("mesh.")} == {
    f"mesh.{prefix}{axis}" for prefix in ("", "dcn_") for axis in AXES
  }

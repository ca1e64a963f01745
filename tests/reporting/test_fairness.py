"""What makes a comparison unfair is said, and what does not is not."""

import json

import pytest

from mixln_jax import config as config_lib
from mixln_jax.model.parameters import parameters
from mixln_jax.reporting.analysis import analyze
from mixln_jax.reporting.fairness import DRAWN, find
from mixln_jax.reporting.groups import make_groups
from mixln_jax.reporting.loading import load
from mixln_jax.training.derived import with_derived
from reporting.making import config_of, make_run, make_study


def found(root, *changes):
  """The findings on runs with these changes, as (level, text)."""
  folders = [make_run(root / f"run{index}", **change) for index, change in enumerate(changes)]
  material = load([str(folder) for folder in folders])
  return [(finding.level, finding.text) for finding in find(material, make_groups(material))]


PRE = {"model__placement": "pre"}
POST = {"model__placement": "post"}
MLP_DIM = config_of()["model.mlp_dim"]


def test_a_fair_comparison_has_nothing_to_say(tmp_path):
  assert found(tmp_path, PRE, POST, {**PRE, "seed": 1}, {**POST, "seed": 1}) == []


@pytest.mark.parametrize(
  ("one", "other", "words"),
  [
    ({"train__batch_size": 8}, {"train__batch_size": 16}, "train.batch_size differs and is not an axis"),
    ({"optimizer__clip_norm": 0.0}, {"optimizer__clip_norm": 1.0}, "optimizer.clip_norm differs"),
    ({"fingerprint": "a" * 16}, {"fingerprint": "b" * 16}, "different data (fingerprints): aaaaaaaaaaaa in run0"),
    ({}, {"weights": {"layers/query": 7}}, "same seed but start from different numbers in layers/query"),
    ({}, {"weights": {"embedding": 7, "final_norm": 8}}, "start from different numbers in embedding"),
    ({}, {"diagnosis": {"step": 10}}, "(last step, an unknown number of tokens in run0; step 10, an unknown number"),
    (
      {"diagnosis": {"tokens": 4096}},
      {"diagnosis": {"tokens": 1024}},
      "on one sample (last step, 4,096 tokens in run0; last step, 1,024 tokens in run1); diagnose all",
    ),
  ],
)
def test_what_is_not_fair_is_said(one, other, words, tmp_path):
  findings = found(tmp_path, PRE | one, POST | other)
  assert findings[0][0] == "unfair"
  assert words in findings[0][1]


def test_weights_that_a_placement_draws_differently_are_no_fault_but_the_embedding_is(tmp_path):
  scaled = {"model__placement": "pre+scaled_init"}
  findings = found(tmp_path / "a", PRE, scaled | {"weights": {"layers/output": 7, "layers/down": 8}})
  assert [level for level, _ in findings] == ["note"]
  findings = found(tmp_path / "b", PRE, scaled | {"weights": {"layers/output": 7, "embedding": 8}})
  assert [level for level, _ in findings] == ["unfair", "note"]


def test_fields_that_compute_the_same_are_only_noted(tmp_path):
  findings = found(tmp_path, PRE, POST | {"model__remat": "full", "checkpoint__every_steps": 5})
  assert findings == [
    ("note", "fields that do not change what is computed differ: model.remat, checkpoint.every_steps")
  ]


def test_diagnoses_of_each_runs_last_step_are_comparable_and_old_ones_are_a_caution(tmp_path):
  longer = {"train__num_steps": 40, "diagnosis": {"step": 40}}
  assert not any("diagnosed" in text for _, text in found(tmp_path / "a", PRE, POST | longer))
  early = {"diagnosis": {"step": 10}}
  findings = found(tmp_path / "b", PRE | early, POST | early)
  assert findings == [
    ("caution", "diagnosed before their last step: run0 (step 10, trained to 20), run1 (step 10, trained to 20)")
  ]


def test_seeds_are_compared_by_group(tmp_path):
  rates = [{"optimizer__learning_rate": 3e-3, "seed": seed} for seed in range(2)] + [{"optimizer__learning_rate": 1e-3}]
  findings = found(tmp_path / "a", *(name | rate for name in (PRE, POST) for rate in rates))
  assert findings == [
    (
      "caution",
      "seed does not have the same values in each group (0 in pre, lr 0.001 and in post, lr "
      "0.001; 0, 1 in pre, lr 0.003 and in post, lr 0.003); "
      "means are over different seeds, differences only over equal ones",
    )
  ]
  crossed = [PRE | {"seed": 0}, PRE | {"seed": 1, "data__seed": 1}, POST | {"seed": 1}, POST | {"data__seed": 1}]
  ((_, text),) = found(tmp_path / "b", *crossed)
  assert text.startswith(
    "seed / data.seed does not have the same values in each group (0/0, 1/1 in pre; 0/1, 1/0 in post)"
  )


def test_a_rate_that_lost_may_have_fewer_seeds(tmp_path):
  """Catches a warning on every study that tunes on one seed, and none where the best rates have different seeds."""
  folders = []
  for placement in ("pre", "post"):
    for rate, seed, loss in ((3e-3, 0, 3.0), (3e-3, 1, 3.1), (1e-3, 0, 4.0)):
      tuned = {"model__placement": placement, "optimizer__learning_rate": rate, "seed": seed, "loss": loss}
      folders.append(str(make_run(tmp_path / f"run{len(folders)}", **tuned)))
  assert analyze(load(folders)).findings == []
  (finding,) = analyze(load([*folders[:4], folders[5]])).findings
  assert finding.text.startswith(
    "seed does not have the same values in each group (0, 1 in pre, lr 0.003; 0 in post, lr"
  )


def test_runs_tuned_each_from_its_placements_own_run_are_compared_and_that_is_said(tmp_path):
  """Catches fine-tuned runs that no report compares, and one that hides that a placement started elsewhere."""
  tuned = []
  for placement, loss in ((PRE, 5.0), (POST, 4.0)):
    start = {"train__start_from": f"work/runs/{placement['model__placement']}", "loss": loss}
    tuned += [placement | start, placement | start | {"seed": 1, "loss": loss + 0.1}]
  folders = [str(make_run(tmp_path / f"run{index}", **change)) for index, change in enumerate(tuned)]
  analysis = analyze(load(folders))
  assert analysis.answer.startswith("post and pre differ by −1.0000 nats a token in all 2 pairs of seeds")
  (finding,) = analysis.findings
  assert finding.level == "caution"
  assert "train.start_from: work/runs/pre in run0, run1; work/runs/post in run2, run3" in finding.text
  tuned[1]["seed"], tuned[1]["train__start_from"] = 0, "work/runs/other"
  findings = found(tmp_path / "b", *tuned)
  assert findings[0][0] == "unfair"
  assert findings[0][1].startswith("train.start_from differs and is not an axis of the comparison")
  from_scratch = found(tmp_path / "c", PRE, POST | {"train__start_from": "work/runs/post"})
  assert from_scratch[0][0] == "unfair"


def test_what_weakens_a_comparison_is_a_caution(tmp_path):
  findings = found(
    tmp_path,
    PRE | {"optimizer__learning_rate": 1e-3},
    PRE | {"optimizer__learning_rate": 3e-3},
    POST | {"optimizer__learning_rate": 3e-3},
    POST | {"optimizer__learning_rate": 3e-3},
    POST | {"optimizer__learning_rate": 3e-3, "seed": 1, "loss": None, "ended": False, "fingerprint": None},
  )
  assert {level for level, _ in findings} == {"caution"}
  text = "\n".join(text for _, text in findings)
  for words in (
    "run2, run3 repeat one run",
    "optimizer.learning_rate does not have the same values for each placement (pre: 0.001, 0.003; post: 0.003); each "
    "stands at its best of them",
    "seed does not have the same values in each group (0 in pre, lr 0.001 and in pre, lr 0.003;",
    "no finite loss at their last step: run4 (running or killed, step 0 of 20)",
    "the training data of run4 is not known yet",
  ):
    assert words in text


def test_runs_of_two_studies_that_overlap_are_one_caution_and_miss_no_loss(tmp_path):
  """Would catch repeated runs that are said to have no final loss, and a caution for each of their seeds."""
  for study in ("a", "b"):
    for seed in range(6):
      make_run(tmp_path / study / f"pre{seed}", model__placement="pre", seed=seed)
  analysis = analyze(load([str(tmp_path / "a"), str(tmp_path / "b")]))
  (text,) = [finding.text for finding in analysis.findings if "repeat" in finding.text]
  assert text.startswith("a/pre0, b/pre0; a/pre1, b/pre1; ")
  assert "; and 2 more repeat one run each" in text
  assert analysis.rows[0].planned == analysis.rows[0].counted == 6
  assert analysis.headline.cautions == []


def test_hundreds_of_waiting_runs_are_not_all_named(tmp_path):
  """Would catch a caution of several screens."""
  changes = [PRE | {"seed": seed, "loss": None, "ended": False} for seed in range(20)]
  (text,) = [text for _, text in found(tmp_path, *changes) if text.startswith("not counted")]
  assert text.count("step 0 of 20") == 12
  assert text.endswith(" and 8 more")


def test_a_study_holds_its_runs_to_its_plan(tmp_path):
  losses = {name: ({"model.placement": name, "seed": 0}, 5.0) for name in ("pre", "post")}
  folder = make_study(tmp_path / "study", losses)
  material = load([str(folder)])
  assert find(material, make_groups(material)) == []
  (folder / "runs" / "post").rename(folder / "runs" / "gone")
  make_run(folder / "runs" / "post", model__placement="post", seed=3, train__batch_size=4)
  material = load([str(folder)])
  findings = [finding.text for finding in find(material, make_groups(material))]
  assert any(text.startswith("train.batch_size differs and is not an axis") for text in findings)
  assert any(text.startswith("post is not the run that the study planned: seed=3, planned 0, ") for text in findings)


CONDITIONS = {
  "base": {},
  "decay": {"optimizer.weight_decay": 0.1},
  "completep": {"optimizer.parameterization": "completep", "optimizer.base_depth": 2},
  "longer": {"data.sequence_length": 32},
}


@pytest.fixture
def conditions(tmp_path):
  """A study of two placements that changes its base one thing at a time, as its runs were trained."""
  usual = {"optimizer.weight_decay": 0.0, "optimizer.parameterization": "standard", "optimizer.base_depth": 0}
  usual["data.sequence_length"] = config_of()["data.sequence_length"]
  losses = {}
  for name, changes in CONDITIONS.items():
    for number, placement in enumerate(("pre", "post")):
      losses[f"{name}-{placement}"] = ({"model.placement": placement} | usual | changes, 5.0 - 0.1 * number)
  folder = make_study(tmp_path / "study", losses, base=config_of() | usual)
  for placement in ("pre", "post"):
    completep = folder / "runs" / f"completep-{placement}"
    change_config(completep, {"model.branch_multiplier": 0.5})  # as `train` fills it in
    data = folder / "runs" / f"longer-{placement}" / "data.json"
    data.write_text(json.dumps({"fingerprint": "e" * 16}))
  return folder


def change_config(run, changes):
  config = json.loads((run / "config.json").read_text())
  (run / "config.json").write_text(json.dumps(config | changes))


def unfair(folder):
  material = load([str(folder)])
  return [finding.text for finding in find(material, make_groups(material)) if finding.level == "unfair"]


def test_what_other_fields_decide_and_data_that_is_varied_are_no_fault(conditions):
  """A study of parameterizations, or of contexts, would be called not comparable for what its own axes change."""
  assert unfair(conditions) == []
  change_config(conditions / "runs" / "decay-post", {"model.branch_multiplier": 0.5})  # which nothing there decides
  texts = unfair(conditions)
  assert any(text.startswith("model.branch_multiplier differs and is not an axis") for text in texts)
  assert any(text.startswith("decay-post is not the run that the study planned: model.branch") for text in texts)
  change_config(conditions / "runs" / "decay-post", {"model.branch_multiplier": 1.0})
  change_config(conditions / "runs" / "completep-post", {"model.branch_multiplier": 0.25})  # the same fields decide it
  assert any(text.startswith("model.branch_multiplier differs and is not an axis") for text in unfair(conditions))
  change_config(conditions / "runs" / "completep-post", {"model.branch_multiplier": 0.5})
  (conditions / "runs" / "longer-post" / "data.json").write_text(json.dumps({"fingerprint": "d" * 16}))
  assert any(text.startswith("the runs were trained on different data (fingerprints)") for text in unfair(conditions))


def test_lengths_that_follow_are_those_of_equal_models(tmp_path):
  """A length that nothing decides would pass, or one that the size of the model decides be called a fault."""
  short, long = ({"train__tokens_per_parameter": 20.0, "train__num_steps": steps} for steps in (20, 40))

  def named_lengths(root, *runs):
    return [text for level, text in found(root, *runs) if level == "unfair" and text.startswith("train.num_steps")]

  assert len(named_lengths(tmp_path / "equal", PRE | short, POST | long)) == 1
  assert named_lengths(tmp_path / "sizes", PRE | short, POST | long | {"model__mlp_dim": 2 * MLP_DIM}) == []


def test_a_folder_of_data_that_is_varied_excuses_no_other_data(tmp_path):
  """Fields that say how data is read are in no setting: other data at one of them would be averaged in."""
  losses = {}
  for number, workers in enumerate((0, 2)):
    for placement in ("pre", "post"):
      losses[f"{placement}{workers}"] = ({"model.placement": placement, "data.num_workers": workers}, 5.0 + number)
  folder = make_study(tmp_path / "study", losses)
  assert unfair(folder) == []
  (folder / "runs" / "post2" / "data.json").write_text(json.dumps({"fingerprint": "d" * 16}))
  assert any(text.startswith("the runs were trained on different data") for text in unfair(folder))


def test_a_condition_is_named_by_what_it_changes(conditions):
  """Six conditions would each be named by all that any of them changes, which no line has room for."""
  labels = [group.label for group in make_groups(load([str(conditions)]))]
  of_pre = {label.removeprefix("pre").removeprefix(", ") for label in labels if label.startswith("pre")}
  assert of_pre == {"", "weight_decay 0.1", "parameterization completep, base_depth 2", "sequence_length 32"}
  lines = analyze(load([str(conditions)])).headline.lines
  assert [line.startswith("as the base: ") for line in lines] == [True, False, False, False]


def test_runs_without_a_study_have_no_base(tmp_path):
  """Settings that only the learning rate tells apart would both be called the base's."""
  folders = []
  for number, (rate, decay) in enumerate(((1e-3, 0.0), (3e-3, 0.1))):
    for placement in ("pre", "post"):
      fields = {"model__placement": placement, "optimizer__learning_rate": rate, "optimizer__weight_decay": decay}
      folders.append(str(make_run(tmp_path / f"{placement}{number}", 5.0, **fields)))
  assert not any("base:" in line for line in analyze(load(folders)).headline.lines)


def test_the_derived_fields_are_those_that_are_filled_in(make_config):
  """A field that is filled in and not listed would be called a run that the study did not plan."""
  changes = {"optimizer.parameterization": "completep", "optimizer.base_depth": 1, "optimizer.base_width": 8}
  changes |= {"optimizer.base_head_dim": 2, "train.num_steps": 0, "train.tokens_per_parameter": 1}
  config = make_config(**changes)
  before, after = config_lib.flatten(config), config_lib.flatten(with_derived(config))
  assert {field for field in before if before[field] != after[field]} == set(config_lib.DERIVED)
  assert all(before[field] == derived.left_out for field, derived in config_lib.DERIVED.items())


def test_runs_of_different_code_are_named(tmp_path):
  """Would catch a comparison of runs whose code changed in between that does not say so, or not which runs."""
  old, new = {"environment": {"code": "c0ffee"}}, {"environment": {"code": "decade"}}
  findings = found(tmp_path / "a", PRE | old, POST | new, {"model__placement": "lns"} | new)
  assert findings == [
    (
      "caution",
      "the runs were trained by different code (environment.json): code c0ffee in run0; code decade in run1, run2. "
      "They are comparable only if what changed in between does not change the numbers",
    )
  ]
  # A run of a version without the hash has its revision; whether the code is the same can't be known.
  findings = found(tmp_path / "b", PRE, POST | new)
  assert "revision abc in run0; code decade in run1" in findings[0][1]


def test_another_revision_of_the_same_code_is_no_finding(tmp_path):
  """Would catch a caution about a commit that changed no line of the package."""
  one, other = ({"environment": {"code": "c0ffee", "git": git}} for git in ("abc", "def-dirty"))
  assert found(tmp_path, PRE | one, POST | other) == []


def test_runs_of_one_group_with_different_programs_are_named(tmp_path):
  """Would catch a spread over seeds that is one of programs; placements are different programs by design."""
  programs = [{"environment": {"train_step": name}} for name in ("one", "two")]
  assert found(tmp_path / "a", PRE | programs[0], POST | programs[1]) == []
  ((level, text),) = found(tmp_path / "b", PRE | programs[0], PRE | programs[1] | {"seed": 1})
  assert level == "note"
  assert text.startswith(
    "the training steps of pre are different programs (environment.json): one in run0; two in run1"
  )


def test_machines_and_versions_that_differ_are_named(tmp_path):
  """Would catch a finding that says that machines differ but not whose."""
  other = {"environment": {"devices": ["gpu:H100"], "packages": {"jax": "0.11.0"}}}
  texts = [text for _, text in found(tmp_path, PRE, POST | other)]
  assert texts == [
    "not all runs had the same JAX version: 0.10.2 in run0; 0.11.0 in run1",
    "not all runs had the same kind of device: cpu:cpu in run0; gpu:H100 in run1",
  ]


def test_the_drawn_parameters_are_those_of_the_model():
  """Would catch a new matrix in the model whose initial numbers a report would not compare."""
  config = config_lib.base()
  config.model.placement = "pre+gpas,layerscale*11+qk_norm"
  drawn = {param.name for param in parameters(config.model).values() if param.drawn}
  config.model.update(learned_positions=8, token_types=2, activation="gelu", head_transform=True)
  drawn |= {param.name for param in parameters(config.model).values() if param.drawn}
  assert set(DRAWN) == drawn

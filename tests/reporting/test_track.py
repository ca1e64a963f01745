"""Whether entries keep a track's rules, and what its board says of them: folders made by hand, some of which cheat."""

import csv
import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from mixln_jax import placement as placement_lib
from mixln_jax.config import base
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import parameters
from mixln_jax.reporting.analysis import analyze
from mixln_jax.reporting.board import make_board, tried_losses
from mixln_jax.reporting.board_page import write_board
from mixln_jax.reporting.claims import HOLDS, NOT_RUN, OPEN, REFUTED
from mixln_jax.reporting.comparison import HIGHER, LOWER, ONE_SEED, POWER, paired_difference, seeds_needed
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.noise import noise_of, stored_noise
from mixln_jax.reporting.speed import speed_of
from mixln_jax.reporting.track_check import GAIN
from mixln_jax.sweeps.study import make_study
from mixln_jax.track import Track
from reporting.making import NUM_STEPS, config_of, make_run

RATE = "optimizer__learning_rate"
RATES = (1e-3, 2e-3, 4e-3)
PARAMETERS = """name  shape  dtype  sharding  on a device  size
embedding             (8, 4)  float32  whole on every device  (8, 4)  32,000
layers/attention_norm  (4, 4)  float32  whole on every device  (4, 4)  16
layers/query          (4, 4)  float32  whole on every device  (4, 4)  68,000
{more}stored 100,016, of which a device holds 100,016
parameters 100,016
"""


def track_of(**changes):
  fixed = config_of(model__placement="pre")
  made = Track("small", "A small track", fixed, RATES, RATES, ("pre", "mix:0.5", "post"), fingerprint="f" * 16)
  return dataclasses.replace(made, **{"baseline_seeds": 4, "close_seeds": 4, "validation_tokens": 1000} | changes)


def make_entry(folder, losses, tuned=RATES, *, more="", **changes):
  """A study's folder: `losses` has {placement: final losses by seed} at the middle rate; the others are worse."""
  planned = []
  for placement, by_seed in losses.items():
    cases = [(rate, seed, loss) for seed, loss in enumerate(by_seed) for rate in (RATES[1],)]
    cases += [(rate, 0, by_seed[0] + 1) for rate in tuned if rate != RATES[1]]
    for rate, seed, loss in cases:
      values = {"model.placement": placement, "optimizer.learning_rate": rate, "seed": seed}
      name = f"{placement.replace(':', '_')}-{rate}-{seed}"
      planned.append({"name": name, "values": values})
      if loss is not None:
        whole = {field.replace(".", "__"): value for field, value in values.items()}
        finish(make_run(folder / "runs" / name, loss, **whole, **changes), more)
  content = {"question": "", "base": config_of(), "axes": {}, "runs": planned, "claims": []}
  (folder / "study.json").write_text(json.dumps(content))
  return folder


def finish(run, more=""):
  """Adds what the runs of the other tests lack: counted tokens and the table of parameters."""
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  tokens = [line | ({"tokens": 1000} if line["split"] == "validation" else {}) for line in lines]
  write_lines(run, tokens)
  (run / "parameters.txt").write_text(PARAMETERS.format(more=more))
  return run


def write_lines(run, lines):
  (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit(run, name, **changes):
  """Changes some fields of a JSON file of a run."""
  content = json.loads((run / name).read_text())
  (run / name).write_text(json.dumps(content | {field.replace("__", "."): value for field, value in changes.items()}))


def board_of(*folders, **changes):
  return make_board(track_of(**changes), load([str(folder) for folder in folders]))


PRE = [5.00, 5.02, 4.98, 5.01]


def more_steps(run):
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  write_lines(
    run, [*lines, {"step": NUM_STEPS + 9, "split": "train", "loss": 1.0, "tokens": 100.0, "learning_rate": 1e-3}]
  )


def higher_rate(run):
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  write_lines(run, [line | ({"learning_rate": 4e-3} if line["split"] == "train" else {}) for line in lines])


def lower_rate(run):
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  write_lines(run, [line | ({"learning_rate": 1e-3} if line["split"] == "train" else {}) for line in lines])


def non_finite(run):
  """Ends a run before its last step."""
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  write_lines(run, [line for line in lines if line["step"] < NUM_STEPS])
  edit(run, "outcome.json", status="non_finite", diverged=True)


def other_validation(run):
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  write_lines(run, [line | ({"tokens": 900} if line["split"] == "validation" else {}) for line in lines])


def resumed(run):
  change = {
    "step": 10,
    "time": "now",
    "changes": ["config.train.num_steps: 10 -> 20", "config.model.remat: 'none' -> 'full'"],
  }
  (run / "changes.jsonl").write_text(json.dumps(change) + "\n")


def wider(run):
  (run / "parameters.txt").write_text(PARAMETERS.format(more="").replace("68,000", "90,000"))


CHEATS = {
  "data order": (lambda run: edit(run, "config.json", data__seed=1), "config.data.seed=1, the track has 0"),
  "more steps": (
    lambda run: edit(run, "config.json", train__num_steps=40),
    "config.train.num_steps=40, the track has 20",
  ),
  "more steps than it says": (more_steps, "its metrics go to step 29, its config to 20"),
  "wider": (
    lambda run: edit(run, "config.json", model__embed_dim=1024),
    "config.model.embed_dim=1024, the track has 512",
  ),
  "wider than it says": (
    wider,
    "layers/query (parameters.txt): 90,000 numbers in layers/query, the baseline has 68,000",
  ),
  "rate": (
    lambda run: edit(run, "config.json", optimizer__learning_rate=3e-3),
    "learning_rate=0.003, the track has one of",
  ),
  "rate than it says": (higher_rate, "its metrics reach a learning rate of 0.004, its config says 0.002"),
  "lower rate than it says": (lower_rate, "its metrics reach a learning rate of 0.001, its config says 0.002"),
  "rate that is none": (
    lambda run: edit(run, "config.json", optimizer__learning_rate="0.002"),
    "config.optimizer.learning_rate='0.002', which must be float",
  ),
  "batch that is none": (
    lambda run: edit(run, "config.json", train__batch_size=[16]),
    "config.train.batch_size=[16], which must be int",
  ),
  "initial values that are none": (
    lambda run: edit(run, "config.json", model__init_deviation="small"),
    "config.model.init_deviation='small', which must be float",
  ),
  "no clipping": (
    lambda run: edit(run, "config.json", optimizer__clip_norm=0.0),
    "config.optimizer.clip_norm=0.0, the track",
  ),
  "tokenizer": (
    lambda run: edit(run, "config.json", data__tokenizer="bytes"),
    "config.data.tokenizer='bytes', the track",
  ),
  "records": (
    lambda run: edit(run, "diagnose/20/diagnose.json", data_fingerprint="e" * 16),
    "fingerprint is eeeeeeeeeeee…",
  ),
  "validation share": (
    lambda run: edit(run, "config.json", data__validation_share=0.5),
    "config.data.validation_share=0.5",
  ),
  "validation set": (other_validation, "its last validation counts 900 tokens, the track 1,000"),
  "another part": (resumed, "resumed at step 10 as another run (config.train.num_steps: 10 -> 20)"),
}


@pytest.mark.parametrize(("cheat", "message"), CHEATS.values(), ids=CHEATS)
def test_a_run_that_cheats_is_named_and_not_counted(tmp_path, cheat, message):
  """Would catch an entry that wins by more than its placement, also where its config was written anew."""
  study = make_entry(tmp_path / "study", {"pre": PRE[:2], "mix:0.5": [4.5, 4.6]})
  cheat(study / "runs" / f"mix_0.5-{RATES[1]}-1")
  board = board_of(study)
  (rejected,) = board.rejected
  assert rejected.run.name == f"mix_0.5-{RATES[1]}-1"
  assert any(message in violation for violation in rejected.violations), rejected.violations
  entry = next(one for one in board.entries if one.placement == "mix:0.5")
  assert len(entry.scores) == 1
  assert entry.comparison.verdict == ONE_SEED


def test_a_seed_that_was_dropped_is_named_and_costs_the_rank(tmp_path):
  """Would catch an entry that leaves out its worst seed, from its folder and also from its plan."""
  study = make_entry(tmp_path / "study", {"pre": PRE, "mix:0.5": [4.5, None, 4.6, 4.7]})
  entry = board_of(study).entries[1]
  assert entry.faults == [
    "seeds 1 are not there, and later ones are: dropped, or not done yet",
    f"planned or begun, and not done or not counted: mix_0.5-{RATES[1]}-1",
  ]
  assert "Ranked" not in board_of(study).answer


def without(run):
  shutil.rmtree(run)


def unfinished(run):
  """As one that was stopped, since its loss was high."""
  non_finite(run)
  edit(run, "outcome.json", status="stopped", diverged=False)


@pytest.mark.parametrize(
  ("spoil", "fault"),
  [
    (without, "planned or begun, and not done or not counted: mix_0.5-0.002-3"),
    (unfinished, "planned or begun, and not done or not counted: mix_0.5-0.002-3"),
    (more_steps, "planned or begun, and not done or not counted: mix_0.5-0.002-3"),
    (non_finite, "seeds 3 diverged and have no final loss: its mean is that of the others"),
  ],
)
def test_the_last_seed_is_one_too(tmp_path, spoil, fault):
  """Would catch an entry ranked by the mean of the seeds that went well: no gap shows where the last is gone."""
  study = make_entry(tmp_path / "study", {"pre": PRE, "mix:0.5": [4.5, 4.55, 4.6, 6.0]})
  spoil(study / "runs" / f"mix_0.5-{RATES[1]}-3")
  entry = next(one for one in board_of(study).entries if one.placement == "mix:0.5")
  assert len(entry.scores) == 3
  assert entry.faults == [fault]


def test_one_run_of_the_baseline_that_cheats_rejects_no_other(tmp_path):
  """Would catch a board whose rules are those of whichever folder comes first."""
  study = make_entry(tmp_path / "study", {"pre": PRE, "mix:0.5": [4.5, 4.55, 4.6, 4.65]})
  wider(study / "runs" / f"pre-{RATES[1]}-0")
  board = board_of(study)
  (rejected,) = board.rejected
  assert rejected.run.name == f"pre-{RATES[1]}-0"
  assert "90,000 numbers in layers/query, the baseline has 68,000" in rejected.violations[0]


def test_the_baseline_has_the_tracks_initial_values(tmp_path):
  """Would catch differences that are shown as those from `pre` where no `pre` of the track is there."""
  board = board_of(make_entry(tmp_path / "study", {"pre": PRE, "mix:0.5": PRE}, model__init_deviation=0.05))
  assert board.baseline is None
  page = write_board(board, tmp_path / "board").read_text()
  assert ">baseline<" not in page


def test_a_study_that_varies_initial_values_has_an_entry_for_each(tmp_path):
  """Would catch an entry that loses its rank by the runs of another one."""
  study = make_entry(tmp_path / "study", {"pre": PRE, "mix:0.5": [4.5, 4.55, 4.6, 4.65]})
  plan = json.loads((study / "study.json").read_text())
  for name, values in {run["name"]: run["values"] for run in plan["runs"] if "mix" in run["name"]}.items():
    values = values | {"model.init_deviation": 0.05}
    whole = {field.replace(".", "__"): value for field, value in values.items()}
    finish(make_run(study / "runs" / f"{name}-wide", 4.0 + values["seed"], **whole))
    plan["runs"].append({"name": f"{name}-wide", "values": values})
  (study / "study.json").write_text(json.dumps(plan))
  board = board_of(study)
  assert [(entry.label, entry.faults) for entry in board.entries] == [
    ("pre", []),
    ("mix:0.5, init deviation 0.05", []),
    ("mix:0.5", []),
  ]


def test_an_entry_that_keeps_the_rules_has_a_rank(tmp_path):
  """Would catch a checker that names what an honest entry has, or a difference that is not the paired one."""
  mix = [4.90, 4.93, 4.87, 4.92]
  board = board_of(make_entry(tmp_path / "study", {"pre": PRE, "mix:0.5": mix}))
  assert board.rejected == []
  pre, entry = board.entries
  assert (pre.placement, pre.comparison, pre.remarks) == ("pre", None, [])
  assert (entry.faults, entry.remarks) == ([], [])
  expected = stats.ttest_rel(mix, PRE).confidence_interval(0.95)
  assert entry.comparison.difference.interval == pytest.approx((expected.low, expected.high))
  assert entry.comparison.verdict == LOWER
  assert board.answer.startswith("Ranked entries: 1. By intervals that exclude 0, 1 is lower than pre and 0 are higher")
  assert tried_losses(board.track, entry) == {1e-3: "5.9000", 2e-3: "4.9000", 4e-3: "5.9000"}


def test_what_an_entry_lacks_is_said(tmp_path):
  """Would catch an entry of one seed and one rate that looks like a whole one."""
  board = board_of(make_entry(tmp_path / "study", {"pre": PRE, "mix:0.5": [4.98]}, tuned=()))
  entry = board.entries[1]
  assert "1 of the 3 seeds that the track asks for" in entry.remarks
  assert "tuned on 1 of the 3 learning rates that the track asks for" in entry.remarks
  assert "1 pair of seeds; within 0.05 nats of pre the track asks for 4" in entry.remarks
  # One pair shows no spread: the seeds that are needed come from the baseline's.
  assert entry.comparison.needed == seeds_needed(0.02, math.sqrt(2) * np.std(PRE, ddof=1))


def test_a_best_rate_at_the_edge_is_said(tmp_path):
  board = board_of(make_entry(tmp_path / "study", {"pre": PRE, "mix:0.5": PRE}, tuned=RATES[1:]))
  assert "its best rate 0.002 is the lower edge of those that it was tried at" in board.entries[1].remarks


def test_a_placement_that_learns_much_has_no_rank(tmp_path):
  """Would catch streams whose maps are a fifth of the model beside placements that only move norms."""
  more = "layers/attention_hc_phi  (4, 4)  float32  whole on every device  (4, 4)  22,000\n"
  pre = make_entry(tmp_path / "a", {"pre": PRE})
  board = board_of(pre, make_entry(tmp_path / "b", {"mix:0.5": [4.5] * 4}, more=more))
  entry = board.entries[1]
  assert entry.faults == [
    "over the budget: what it learns besides gains of norms is 22.00% of the model, and the track allows 0.10%"
  ]
  assert entry.comparison is not None


def test_the_names_of_gains_are_those_of_the_model():
  """Would catch a parameter of a new placement that is taken for a gain, or a gain that is counted as learned."""
  config = base()
  config.model.update(vocab_size=64, embed_dim=16, mlp_dim=24, num_layers=4, num_heads=2)
  for name in placement_lib.ROWS:
    for placement in (name, f"{name}:4"):
      try:
        placement_lib.parse(placement, 4)
      except InputError:
        continue
      config.model.placement = placement
      for path, param in parameters(config.model).items():
        if not param.drawn:
          assert bool(GAIN.search(path)) == (param.group in ("gains", "final_norm")), (placement, path)
      break


def test_an_entry_of_another_folder_is_held_against_the_boards_baseline(tmp_path):
  """Would catch two studies of one placement that are pooled, or one that hides the other's refutation."""
  first = make_entry(tmp_path / "paper", {"pre": PRE, "mix:0.5": [loss - 0.1 + 0.01 * n for n, loss in enumerate(PRE)]})
  second = make_entry(tmp_path / "again", {"mix:0.5": [loss + 0.1 + 0.01 * n for n, loss in enumerate(PRE)]})
  claim = {"id": "mix<pre", "claim": "lower", "lower": "mix:0.5", "than": "pre"}
  board = board_of(first, second, claims=(claim,))
  labels = {entry.label: entry.comparison.verdict for entry in board.entries if entry.comparison}
  assert labels == {"mix:0.5 (paper)": LOWER, "mix:0.5 (again)": HIGHER}
  assert {one.study: one.judged.verdict for one in board.claims} == {"paper": HOLDS, "again": REFUTED}
  assert any("its study has no pre: compared with that of paper" in one for one in board.entries[2].remarks)


def test_studies_whose_folders_have_one_name_are_two(tmp_path):
  """Would catch two people's `work/cpu` that are compared with one baseline, and judge a claim as one."""
  mine = make_entry(tmp_path / "mine" / "cpu", {"pre": PRE, "mix:0.5": [4.90, 4.93, 4.87, 4.92]})
  yours = make_entry(tmp_path / "yours" / "cpu", {"pre": [4.0, 4.1, 4.2, 4.3], "mix:0.5": [4.5, 4.61, 4.7, 4.82]})
  claim = {"id": "mix<pre", "claim": "lower", "lower": "mix:0.5", "than": "pre"}
  board = board_of(mine, yours, claims=(claim,))
  means = {entry.label: entry.comparison.difference.mean for entry in board.entries if entry.comparison}
  assert means == pytest.approx({"mix:0.5 (mine/cpu)": -0.0975, "mix:0.5 (yours/cpu)": 0.5075})
  assert {one.study: one.judged.verdict for one in board.claims} == {"mine/cpu": HOLDS, "yours/cpu": REFUTED}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"by": "much"}, "claim 'c': by='much' must be a number of nats"),
    ({"by": -0.1}, r"by=-0\.1 must be a number of nats, at least 0"),
    ({"by": math.nan}, "by=nan must be"),
    ({"than": 5}, "than=5 must be a placement, or a list of them"),
    ({"than": []}, r"than=\[\] must be a placement"),
    ({"than": ["pre", 3]}, "must be a placement, or a list"),
    ({"than": "mix:0.5"}, "'mix:0.5' can't be lower than itself"),
    ({"lower": ["mix:0.5"]}, "needs id and lower, both text"),
    ({"id": None}, "needs id and lower, both text"),
  ],
)
def test_claims_that_mean_nothing_are_refused(tmp_path, changes, message):
  """Would catch a claim that nobody judges, or that holds whatever the runs say, because of how it was written."""
  study = make_entry(tmp_path / "study", {"pre": PRE[:1]})
  plan = json.loads((study / "study.json").read_text())
  claim = {"id": "c", "claim": "lower", "lower": "mix:0.5", "than": ["pre"], "judged_by": "pairs"} | changes
  (study / "study.json").write_text(json.dumps(plan | {"claims": [claim]}))
  with pytest.raises(InputError, match=f"study.json: .*{message}"):
    board_of(study)
  with pytest.raises(InputError, match=f"STUDY: .*{message}"):  # before anything is trained
    make_study(base(), [{"model.placement": ("pre",)}], claims=[claim])


@pytest.mark.parametrize(
  ("losses", "by", "verdict"),
  [
    ({"pre": PRE, "mix:0.5": [4.90, 4.93, 4.87, 4.92]}, 0.0, HOLDS),
    ({"pre": PRE, "mix:0.5": [4.90, 4.93, 4.87, 4.92]}, 0.3, REFUTED),  # lower, and not by so much
    ({"pre": PRE, "mix:0.5": [5.10, 5.13, 5.07, 5.12]}, 0.0, REFUTED),
    ({"pre": PRE, "mix:0.5": [5.10, 4.93, 5.07, 4.92]}, 0.0, OPEN),
    ({"pre": PRE, "mix:0.5": [4.90]}, 0.0, OPEN),
    ({"mix:0.5": [4.90, 4.93]}, 0.0, NOT_RUN),
  ],
)
def test_claims_are_judged_by_intervals(tmp_path, losses, by, verdict):
  """Would catch a claim that holds by its means alone, or one that is called refuted where the seeds leave it open."""
  claim = {"id": "c", "claim": "lower", "lower": "mix:0.5", "than": ["pre"], "by": by}
  board = board_of(make_entry(tmp_path / "study", losses), claims=(claim,))
  assert [one.judged.verdict for one in board.claims] == [verdict]


def test_a_slope_is_that_of_each_seed(tmp_path):
  """Would catch a slope over means, an interval that is not paired, or a shape whose rate is that of another."""
  shapes = ({"model.num_layers": 2}, {"model.num_layers": 8})
  losses = {
    ("pre", 2): [5.0, 5.1, 5.05],
    ("pre", 8): [5.2, 5.3, 5.3],
    ("mix:0.5", 2): [5.0, 5.1, 5.1],
    ("mix:0.5", 8): [5.0, 5.15, 5.05],
  }
  for (placement, layers), by_seed in losses.items():
    for seed, loss in enumerate(by_seed):
      for rate in RATES[:2] if seed == 0 else RATES[:1]:
        values = {"model__placement": placement, "model__num_layers": layers, RATE: rate, "seed": seed}
        finish(make_run(tmp_path / f"{placement}{layers}{rate}{seed}", loss + 100 * (rate - 1e-3), **values))
  fixed = config_of(model__placement="pre", model__num_layers=2)
  track = track_of(fixed=fixed, shapes=shapes, score="slope", baseline_seeds=3, close_seeds=3)
  board = make_board(track, load([str(path) for path in sorted(tmp_path.iterdir())]))
  assert board.rejected == []
  entry = board.entries[1]
  slopes = {p: (np.array(losses[p, 8]) - np.array(losses[p, 2])) / 2 for p in ("pre", "mix:0.5")}
  assert entry.scores.tolist() == pytest.approx(slopes["mix:0.5"])
  expected = stats.ttest_rel(slopes["mix:0.5"], slopes["pre"]).confidence_interval(0.95)
  assert entry.comparison.difference.interval == pytest.approx((expected.low, expected.high))
  assert entry.speed is None
  page = write_board(board, tmp_path / "board").read_text()
  assert "nats for each doubling of depth" in page
  assert "Loss against depth" in page


def on_corpora(run, **bits):
  """Writes what `evaluate --corpus` writes: the loss of each corpus is twice its bits a byte."""
  for step, shift in ((10, 1.0), (20, 0.0)):  # the newer one counts
    found = {
      name.replace("_", ":"): {"loss": 2 * (value + shift), "bits_per_byte": value + shift}
      for name, value in bits.items()
    }
    (run / "corpora" / str(step)).mkdir(parents=True)
    (run / "corpora" / str(step) / "corpora.json").write_text(json.dumps({"step": step, "corpora": found}))


def test_other_corpora_are_in_the_report_and_on_the_board(tmp_path):
  """Would catch an evaluation out of distribution that nobody sees, an older one that is shown, or seeds unpaired."""
  study = make_entry(tmp_path / "study", {"pre": [5.0, 5.1, 5.2], "mix:0.5": [4.9, 5.02, 5.1]}, tuned=())
  values = {"pre": [2.0, 2.1, 2.2], "mix_0.5": [2.05, 2.17, 2.26]}
  for name, by_seed in values.items():
    for seed, value in enumerate(by_seed):
      on_corpora(study / "runs" / f"{name}-{RATES[1]}-{seed}", sotu=1.0, text_botocore=value)
  table = next(one for one in analyze(load([str(study)])).tables if one.name == "corpora")
  ours = next(row for row in table.data if (row["placement"], row["corpus"]) == ("mix:0.5", "text:botocore"))
  expected = stats.ttest_rel(2 * np.array(values["mix_0.5"]), 2 * np.array(values["pre"])).confidence_interval(0.95)
  assert (ours["loss_low"], ours["loss_high"]) == pytest.approx((expected.low, expected.high))
  assert ours["bits_per_byte_mean"] == pytest.approx(np.mean(values["mix_0.5"]))
  assert [row[:2] for row in table.rows[:2]] == [("pre", "sotu (trained on it)"), ("mix:0.5", "sotu (trained on it)")]
  page = write_board(board_of(study), tmp_path / "board").read_text()
  assert "text:botocore (not trained on it)" in page


def test_another_version_of_a_corpus_is_another_corpus(tmp_path):
  """Would catch a difference between placements that is one between the texts that they were evaluated on."""
  study = make_entry(tmp_path / "study", {"pre": [5.0, 5.1], "mix:0.5": [4.9, 5.0]}, tuned=())
  for name, fingerprint in (("pre", "a" * 16), ("mix_0.5", "b" * 16)):
    for seed in (0, 1):
      found = {"book": {"loss": 3.0, "bits_per_byte": 1.5, "fingerprint": fingerprint, "tokens": 100}}
      folder = study / "runs" / f"{name}-{RATES[1]}-{seed}" / "corpora" / "20"
      folder.mkdir(parents=True)
      (folder / "corpora.json").write_text(json.dumps({"step": 20, "corpora": found}))
      (folder.parent / "25").mkdir()  # of an evaluation that was killed before it wrote anything
  table = next(one for one in analyze(load([str(study)])).tables if one.name == "corpora")
  assert [row["loss_difference"] for row in table.data] == [None, None]
  assert "book, fingerprint bbbbbbbbbbbb, 100 tokens (not trained on it)" in [row[1] for row in table.rows]


def test_the_board_is_one_file_that_needs_no_other(tmp_path):
  """Would catch a page that loads something, runs a name that is out to harm, or leaves out an entry or a verdict."""
  evil = "<img src=x onerror=pwned()>"
  claim = {"id": "c", "claim": evil, "lower": "mix:0.5", "than": "pre", "judged_by": "pairs"}
  study = make_entry(
    tmp_path / "study", {"pre": PRE, "mix:0.5": [4.90, 4.93, 4.87, 4.92], "post": [5.4, 5.5, None, 5.6]}
  )
  edit(study / "runs" / f"post-{RATES[1]}-1", "config.json", optimizer__clip_norm=0.0)
  page = write_board(board_of(study, claims=(claim,)), tmp_path / "board")
  text = page.read_text()
  assert evil not in text
  assert "&lt;img src=x" in text
  for word in ("mix:0.5", "lower", "holds", "dropped, or not done yet", "config.optimizer.clip_norm=0.0"):
    assert word in text
  assert not re.search(r"(src|href)=[\"'](?!#|data:)", text)
  rows = list(csv.DictReader((page.parent / "board.csv").read_text().splitlines()))
  assert [row["entry"] for row in rows] == ["pre", "mix:0.5", "post"]
  assert float(rows[1]["difference"]) == pytest.approx(-0.0975)
  noise = json.loads((page.parent / "noise.json").read_text())
  assert noise["std"] == pytest.approx(np.std(PRE, ddof=1))
  assert write_board(board_of(study), tmp_path / "board") == page  # again into the same folder
  (tmp_path / "board" / "thesis.txt").write_text("mine")
  with pytest.raises(InputError, match=r"holds something else than a board \('thesis\.txt'\)"):
    write_board(board_of(study), tmp_path / "board")


def curve(run, losses, seconds):
  """Rewrites a run's curve: validation every 5 steps, and steps of so many seconds."""
  lines = [
    {"step": n, "split": "train", "loss": 5.0, "tokens": 100.0, "tokens_per_second": 100 / seconds}
    for n in range(1, 31)
  ]
  lines += [{"step": 5 * n, "split": "validation", "loss": loss, "tokens": 1000} for n, loss in enumerate(losses, 1)]
  write_lines(run, lines)


def test_speed_by_hand(tmp_path):
  """Would catch steps that are not interpolated, a ratio the wrong way round, or a cost that is not taken off."""
  folders = {"pre": [], "mix:0.5": []}
  for placement, losses, seconds in (("pre", [8.0, 7.0, 6.0, 5.0], 1.0), ("mix:0.5", [7.0, 6.0, 4.0, 3.0], 1.5)):
    for seed in (0, 1):
      run = make_run(tmp_path / f"{placement}{seed}", 5.0, model__placement=placement, seed=seed)
      curve(run, losses, seconds)
      folders[placement].append(str(run))
  pre, mix = load(folders["pre"]).runs, load(folders["mix:0.5"]).runs
  speed = speed_of(mix, pre)
  # mix has 6 at step 10 and 4 at 15, so pre's final 5 at 12.5 of 20 steps.
  assert speed.steps.value == pytest.approx(20 / 12.5)
  assert speed.steps_to_baseline == pytest.approx(12.5)
  assert speed.step_time.value == pytest.approx(1.5)
  assert speed.effective.value == pytest.approx(20 / 12.5 / 1.5)
  # The other way round: pre is at its end where mix was at 12.5.
  back = speed_of(pre, mix)
  assert back.steps.value == pytest.approx(12.5 / 20)
  assert back.steps_to_baseline is None


def test_speed_beside_a_baseline_that_was_evaluated_before_its_first_step(tmp_path):
  """Would catch a run that ends above the loss of untrained weights, whose ratio would be that of no steps at all."""
  pre, bad = (make_run(tmp_path / name, loss, seed=0) for name, loss in (("pre", 5.0), ("bad", 9.0)))
  curve(pre, [6.0, 5.5, 5.2, 5.0], 1.0)
  lines = [json.loads(line) for line in (pre / "metrics.jsonl").read_text().splitlines()]
  write_lines(pre, [{"step": 0, "split": "validation", "loss": 7.0, "tokens": 1000}, *lines])
  speed = speed_of(load([str(bad)]).runs, load([str(pre)]).runs)
  assert speed.steps.value == pytest.approx(5 / 20)  # its first evaluation


def test_a_report_says_what_a_step_costs(tmp_path):
  """Would catch a cost that is that of other runs, the wrong way round, or shown where devices differ."""
  folders = []
  for placement, seconds in (("pre", 1.0), ("mix:0.5", 1.5)):
    for seed in (0, 1):
      run = make_run(tmp_path / f"{placement}{seed}", 5.0, model__placement=placement, seed=seed)
      curve(run, [8.0, 7.0, 6.0, 5.0], seconds)
      folders.append(run)
  summary = analyze(load([str(run) for run in folders])).tables[0]
  column = list(summary.headers).index("step time")
  assert {row[0]: row[column] for row in summary.rows} == {"pre": "1.00 ×", "mix:0.5": "1.50 ×"}
  assert [row["step_time_ratio"] for row in summary.data] == pytest.approx([1.0, 1.5])
  for run in folders[2:]:
    edit(run, "environment.json", devices=["tpu:v5e"])
  assert "step time" not in analyze(load([str(run) for run in folders])).tables[0].headers


def test_the_noise_of_twenty_seeds():
  """Would catch a std that divides by n, an interval of another level, or seeds of unpaired groups."""
  losses = np.random.default_rng(0).normal(3.0, 0.02, 20)
  noise = noise_of("pre", losses.tolist())
  assert noise.std == pytest.approx(losses.std(ddof=1))
  low, high = noise.std_interval
  assert stats.chi2.cdf(19 * noise.std**2 / low**2, 19) == pytest.approx(0.975)
  assert stats.chi2.cdf(19 * noise.std**2 / high**2, 19) == pytest.approx(0.025)
  assert noise.seeds_needed()[0.02] == seeds_needed(0.02, math.sqrt(2) * noise.std)
  assert stored_noise(json.loads(json.dumps(noise.to_json())), "cpu.json") == noise
  assert noise_of("pre", [3.0]) is None
  with pytest.raises(InputError, match=r"cpu\.json: .*std"):
    stored_noise(noise.to_json() | {"std": "small"}, "cpu.json")


SIMULATIONS = 2000


@pytest.mark.parametrize("pairs", [3, 8])
def test_the_interval_covers_a_known_difference(pairs):
  """Would catch an interval that claims more than its seeds know: 2,000 studies whose true difference is 0.02 nats.

  Seeds move both placements (std 0.03) and each on its own (0.01), as runs with equal initial numbers do.
  """
  random = np.random.default_rng(pairs)
  of_seed = random.normal(3.0, 0.03, (SIMULATIONS, pairs))
  pre = of_seed + random.normal(0, 0.01, of_seed.shape)
  mix = of_seed + random.normal(-0.02, 0.01, of_seed.shape)
  intervals = [paired_difference(*study).interval for study in zip(mix, pre, strict=True)]
  covered = np.mean([low <= -0.02 <= high for low, high in intervals])
  assert 0.93 < covered < 0.97


def test_the_stated_seeds_have_the_stated_power():
  """Would catch a number of seeds with which such a difference would not be shown: as many studies as above."""
  difference, std = 0.02, 0.02
  pairs = seeds_needed(difference, std)
  random = np.random.default_rng(1)
  differences = random.normal(-difference, std, (SIMULATIONS, pairs))
  shown = stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05
  assert shown.mean() == pytest.approx(POWER, abs=0.05)
  fewer = stats.ttest_1samp(differences[:, :-2], 0, axis=1).pvalue < 0.05
  assert fewer.mean() < POWER

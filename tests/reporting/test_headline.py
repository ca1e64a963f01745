"""The answer of a report, held against cases made by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from mixln_jax.reporting.analysis import analyze
from mixln_jax.reporting.comparison import EQUAL, HIGHER, LOWER, NOT_SHOWN, ONE_SEED, seeds_needed
from mixln_jax.reporting.headline import make_headline
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.tables import latex
from reporting.making import make_run

DEAD = {"status": "non_finite"}


def analysis_of(root, losses, **changes):
  """Of runs {placement: {rate: losses by seed}} (None: it diverged without a loss), or {placement: losses by seed}."""
  folders = []
  for number, (name, by_rate) in enumerate(losses.items()):
    for rate, by_seed in (by_rate if isinstance(by_rate, dict) else {1e-3: by_rate}).items():
      for seed, loss in enumerate(by_seed):
        fields = {"model__placement": name, "seed": seed, "optimizer__learning_rate": rate}
        end = DEAD if loss is None else {}
        folders.append(str(make_run(root / f"{number}_{rate}_{seed}", loss, **fields, **end, **changes)))
  return analyze(load(folders))


def headline_of(root, losses, **changes):
  return analysis_of(root, losses, **changes).headline


def test_a_clear_win(tmp_path):
  """Would catch a headline that gives another difference, interval or number of seeds than the paired t-test."""
  pre, mix = [5.00, 5.10, 5.20], [4.90, 5.01, 5.09]
  headline = headline_of(tmp_path, {"pre": pre, "mix:0.5": mix})
  interval = stats.ttest_rel(mix, pre).confidence_interval(0.95)
  (match,) = headline.matchups
  assert match.verdict == LOWER
  assert match.loss.interval == pytest.approx((interval.low, interval.high))
  (line,) = headline.lines
  assert line.startswith("mix:0.5 is lower than pre by 0.1000 nats a token (95% interval ")
  assert f"interval {-interval.high:.4f} to {-interval.low:.4f}, 3 seeds)" in line
  # nats first, then bits a byte, then perplexity.
  perplexity = np.mean(np.exp(mix) - np.exp(pre))
  assert line.endswith(f"; −0.0144 bits a byte, −{-perplexity:.2f} of perplexity.")
  assert headline.cautions == []


def test_a_clear_loss_says_what_the_baseline_beats(tmp_path):
  """Would catch the answer "it is the baseline", which says nothing."""
  headline = headline_of(tmp_path, {"pre": [5.0, 5.1, 5.2], "mix:0.5": [5.1, 5.21, 5.29], "post": [6.0, 6.13, 6.2]})
  assert [match.verdict for match in headline.matchups] == [HIGHER, HIGHER]
  (line,) = headline.lines
  assert line.startswith("pre, the baseline, is lower in nats a token than mix:0.5 by 0.1000 (95% interval ")
  assert ", post by 1.0100 (" in line
  assert headline.cautions == ["2 placements are compared; their intervals are not corrected for that."]


def test_no_difference_names_the_seeds_that_would_be_needed(tmp_path):
  """Would catch a difference that is claimed though its interval contains 0."""
  pre, mix = [5.00, 5.10, 5.20, 5.05], [4.95, 5.12, 5.13, 5.06]
  headline = headline_of(tmp_path, {"pre": pre, "mix:0.5": mix})
  (match,) = headline.matchups
  assert match.verdict == NOT_SHOWN
  differences = np.subtract(mix, pre)
  assert match.needed == seeds_needed(differences.mean(), differences.std(ddof=1))
  (line,) = headline.lines
  assert line.startswith("No difference shown between mix:0.5 and pre: −0.0225 nats a token (95% interval −")
  assert line.endswith(f", 4 seeds; about {match.needed} would be needed to show such a difference).")


def test_one_seed_says_nothing_and_how_to_get_another(tmp_path):
  """Would catch "mix is better" of one seed."""
  headline = headline_of(tmp_path, {"pre": [5.0], "mix:0.5": [4.8]})
  assert headline.matchups[0].verdict == ONE_SEED
  (line,) = headline.lines
  assert line.startswith("One seed: nothing can be said yet. mix:0.5 − pre is −0.2000 nats a token")
  assert line.endswith("; train each again with --config.seed=1.")


def test_unequal_seeds_are_compared_on_those_that_both_have(tmp_path):
  """Would catch a difference of means over other seeds: 5.0 against 5.1 here, though each pair differs by −0.1."""
  headline = headline_of(tmp_path, {"pre": [5.00, 5.10, 5.20], "mix:0.5": [4.9, 5.01, 5.09, 6.0, 7.0]})
  (match,) = headline.matchups
  assert (match.loss.n, match.loss.mean) == (3, pytest.approx(-0.1))
  assert "mix:0.5 has 5 seeds and pre 3; they are compared on the 3 that both have." in headline.cautions


def test_each_at_its_best_rate_and_an_edge_is_said(tmp_path):
  """Would catch placements that are compared at one rate, and a best rate beyond which a better one may lie."""
  losses = {
    "pre": {1e-3: [5.3, 5.4], 3e-3: [5.0, 5.1], 1e-2: [5.5, 5.6]},
    "mix:0.5": {1e-3: [5.2, 5.3], 3e-3: [5.1, 5.2], 1e-2: [4.9, 5.001]},
  }
  headline = headline_of(tmp_path, losses)
  (line,) = headline.lines
  assert line.startswith("mix:0.5 is lower than pre by 0.0995 nats a token (95% interval ")
  assert ", each at its best learning rate (0.01; 0.003 for pre);" in line
  (caution,) = headline.cautions
  assert caution.startswith("The best rate of mix:0.5, 0.01, is the upper edge of its grid")


def test_a_baseline_that_beats_several_does_not_give_all_the_rate_of_one(tmp_path):
  """Would catch "(0.001; 0.003 for pre)" above a placement whose best rate is 0.01."""
  low, middle, high = [5.0, 5.1], [5.2, 5.301], [5.3, 5.402]
  losses = {
    "pre": {1e-3: high, 3e-3: low, 1e-2: high},
    "mix:0.5": {1e-3: middle, 3e-3: high, 1e-2: high},
    "post": {1e-3: high, 3e-3: high, 1e-2: middle},
  }
  (line,) = headline_of(tmp_path / "two", losses).lines
  assert line.startswith(
    "pre, the baseline, is lower in nats a token, each at its best learning rate, than mix:0.5 by "
  )
  del losses["post"]
  (line,) = headline_of(tmp_path / "one", losses).lines
  assert ", each at its best learning rate (0.001; 0.003 for pre), than mix:0.5 by " in line


def test_many_edges_are_one_caution(tmp_path):
  """Would catch a page that begins with the same sentence ten times."""
  rates = {1e-3: [5.3], 3e-3: [5.0]}
  headline = headline_of(tmp_path, {"pre": rates, "post": {1e-3: [4.0], 3e-3: [5.0]}})
  (caution,) = headline.cautions
  assert caution.endswith("may lie beyond: pre (0.003, upper edge), post (0.001, lower edge).")


def test_a_winner_that_diverged_on_one_seed_says_so(tmp_path):
  """Would catch a win over the seeds that survived, told as if none had died."""
  headline = headline_of(tmp_path, {"pre": [5.0, 5.1, 5.2], "mix:0.5": [4.9, 5.01, None]})
  assert headline.matchups[0].loss.n == 2
  assert "1 of 3 runs of mix:0.5 at" not in headline.text  # there is one rate alone
  assert "1 of 3 runs of mix:0.5 diverged; 2 counted." in headline.cautions
  assert "mix:0.5 has 2 seeds and pre 3; they are compared on the 2 that both have." in headline.cautions


def test_a_placement_that_died_everywhere_is_named(tmp_path):
  headline = headline_of(tmp_path, {"pre": [5.0, 5.1], "mix:0.5": [4.9, 5.01], "post": [None, None]})
  assert "post: 2 runs diverged, and none can be compared." in headline.cautions


def test_a_placement_without_a_final_loss_is_named(tmp_path):
  """Would catch a placement that was tried and is missing from the answer without a word."""
  headline = headline_of(tmp_path, {"pre": [5.0, 5.1], "mix:0.5": [4.9, 5.01], "post": [math.nan, math.nan]})
  assert "Not compared, since no run of theirs has a final loss: post." in headline.cautions
  runs = next(table for table in analysis_of(tmp_path / "again", {"post": [math.nan]}).tables if table.name == "runs")
  assert not any("nan" in cell for cell in runs.rows[0])
  rates = headline_of(tmp_path / "rates", {"pre": {1e-3: [5.0, 5.1]}, "post": {1e-3: [4.0, None], 3e-3: [None, 4.0]}})
  assert "post: its learning rates share no seed, so none is the best and it is not compared." in rates.cautions


def test_the_perplexity_of_the_answer_is_that_of_the_table(tmp_path):
  """Would catch exp(mean loss) above a table that has the mean of exp(loss)."""
  analysis = analysis_of(tmp_path, {"pre": [4.0, 6.0]})
  assert f"(perplexity {np.exp([4.0, 6.0]).mean():.2f})" in analysis.headline.lines[0]
  assert analysis.tables[0].rows[0][-3] == f"{np.exp([4.0, 6.0]).mean():.2f}"


def test_equal_pairs_have_no_interval(tmp_path):
  """Would catch an interval of width 0, which claims what no seeds have shown."""
  headline = headline_of(tmp_path, {"pre": [5.0, 5.1], "mix:0.5": [4.5, 4.6]})
  assert headline.matchups[0].verdict == EQUAL
  assert "differ by −0.5000 nats a token in all 2 pairs of seeds" in headline.lines[0]


def test_other_rates_alone_are_not_compared(tmp_path):
  """Would catch a difference of learning rates that is told as one of placements."""
  headline = headline_of(tmp_path, {"pre": {1e-3: [5.0]}, "mix:0.5": {3e-3: [4.0]}})
  assert headline.matchups == []
  assert "no learning rate with it, so they are not compared" in headline.lines[0]


def test_a_ladder_has_an_answer_for_each_depth(tmp_path):
  """Would catch depths that are thrown together, or of which one alone is answered."""
  folders = []
  for depth, gain in ((2, 0.0), (4, -0.5)):
    for name in ("pre", "post"):
      for seed, noise in enumerate((0.0, 0.01, -0.01)):
        loss = 5.0 - depth + (gain + noise if name == "post" else 0)
        fields = {"model__placement": name, "seed": seed, "model__num_layers": depth}
        folders.append(str(make_run(tmp_path / f"{name}{depth}{seed}", loss, **fields)))
  analysis = analyze(load(folders))
  first, second = analysis.headline.lines
  assert first.startswith("layers 2: No difference shown between post and pre: ")
  assert second.startswith("layers 4: post is lower than pre by 0.5000 nats")
  assert analysis.difference is not None
  assert [row.label for row in analysis.difference.panels[0].estimates] == [
    "pre, layers 2",
    "post, layers 2",
    "pre, layers 4",
    "post, layers 4",
  ]


def test_without_a_baseline_the_first_placement_is_one(tmp_path):
  analysis = analysis_of(tmp_path, {"mix:0.5": [4.8, 4.9], "post": [5.0, 5.2]})
  assert analysis.baseline == "mix:0.5"
  assert analysis.headline.matchups[0].verdict == NOT_SHOWN


def test_runs_that_are_not_comparable_are_not_answered_as_if_they_were(tmp_path):
  """Would catch a printed answer that is read without the findings above it."""
  for name, seed in (("pre", 0), ("pre", 1), ("post", 0), ("post", 1)):
    fields = {"model__placement": name, "seed": seed, "fingerprint": name * 4}
    make_run(tmp_path / f"{name}{seed}", 5.0 + seed / 10 + (0.1 if name == "post" else 0) * (1 + seed), **fields)
  analysis = analyze(load([str(tmp_path)]))
  assert analysis.answer.startswith("NOT COMPARABLE, see why: ")


@pytest.mark.parametrize(("effect", "expected"), [(0.5, 34), (1.0, 10), (2.0, 5)])
def test_the_seeds_needed_are_those_of_the_tables(effect, expected):
  """n of a paired t-test, two-sided, α 0.05, power 0.8, by effect size (Cohen's d; G*Power gives 34, 10 and 5)."""
  assert seeds_needed(effect, 1.0) == expected
  assert seeds_needed(-effect * 3, 3.0) == expected


def test_a_hopeless_number_of_seeds_is_not_counted():
  assert seeds_needed(0.001, 1.0) is None
  assert seeds_needed(0.0, 1.0) is None


def test_the_summary_has_its_numbers_in_columns_of_their_own(tmp_path):
  """Would catch numbers in words, rounded ones, and a LaTeX table that does not compile for its characters."""
  analysis = analysis_of(tmp_path, {"pre": [math.log(10), math.log(12)], "mix:0.5": [math.log(8), math.log(6)]})
  summary = analysis.tables[0]
  row = summary.data[1]
  assert row["placement"] == "mix:0.5"
  losses = np.log([[8, 6], [10, 12]])
  assert row["loss_difference"] == pytest.approx((losses[0] - losses[1]).mean(), abs=1e-15)
  low, high = stats.ttest_rel(*losses).confidence_interval(0.95)
  assert (row["loss_low"], row["loss_high"]) == pytest.approx((low, high), rel=1e-12)
  assert (row["loss_mean"], row["loss_std"]) == pytest.approx((losses[0].mean(), losses[0].std(ddof=1)), rel=1e-12)
  assert (row["seeds"], row["pairs"], row["diverged"]) == (2, 2, 0)
  rates = analysis_of(tmp_path / "rates", {"pre": {1 / 3000: [5.0], 1e-2: [5.1]}, "post": {1e-2: [math.nan]}})
  best, without = rates.tables[0].data
  assert best["optimizer.learning_rate"] == 1 / 3000
  assert (without["planned"], without["seeds"]) == (1, 0)
  text = latex(summary)
  assert r"\toprule" in text
  assert r"95 \% interval" in text
  assert "$-$0.4581" in text
  assert text.isascii()
  assert make_headline(analysis.rows, "pre").text == analysis.headline.text


PAIRS = {"chosen_reward": 0.5, "rejected_reward": -0.25, "margin": 0.75, "pairs": 400.0, "tokens": 4000.0}


def pairs_of(root, accuracies):
  """Of runs on pairs of answers, {placement: accuracies by seed}; their losses fall with the accuracy."""
  folders = []
  for placement, by_seed in accuracies.items():
    for seed, accuracy in enumerate(by_seed):
      fields = {"model__placement": placement, "seed": seed}
      folder = root / f"{placement.replace(':', '')}_{seed}"
      folders.append(str(make_run(folder, 1.5 - accuracy, pairs=PAIRS | {"accuracy": accuracy}, **fields)))
  return folders


def test_runs_on_pairs_are_told_by_accuracy_and_rewards(tmp_path):
  """Would catch a loss over pairs that is called nats a token, or whose exponential is called a perplexity."""
  analysis = analyze(load(pairs_of(tmp_path, {"pre": [0.8, 0.82, 0.79], "mix:0.5": [0.9, 0.93, 0.88]})))
  (line,) = analysis.headline.lines
  assert line.startswith("mix:0.5 is lower than pre by 0.1000 nats a pair (95% interval ")
  assert line.endswith("; +10.0 points of accuracy.")
  made = {table.name: table for table in analysis.tables}
  rows = dict(zip(("pre", "mix"), made["preferences"].rows, strict=True))
  assert rows["mix"][:4] == ("mix:0.5", "90.3 ± 2.5 %", "0.7500 ± 0.0000", "0.5000 ± 0.0000")
  for table in made.values():
    assert "perplexity" not in table.headers
    assert not any(row.get("perplexity") or row.get("perplexity_mean") for row in table.data)
    assert "nats a token" not in table.note
  assert any(figure.name == "preferences" for figure in analysis.figures)
  (loss,) = [figure for figure in analysis.figures if figure.name == "loss"]
  assert loss.caption.startswith("Loss over pairs of answers")
  assert not any("token" in panel.x_label + panel.y_label for figure in analysis.figures for panel in figure.panels)


def test_one_run_on_pairs_and_runs_on_text_in_one_report(tmp_path):
  """Would catch a report that takes all runs for those of its first, or compares a loss over pairs with one of text."""
  folders = pairs_of(tmp_path / "pairs", {"pre": [0.8]})
  for placement, loss in (("post", 4.0), ("pre", 5.0)):
    folders.append(str(make_run(tmp_path / placement, loss, model__placement=placement)))
  analysis = analyze(load(folders))
  text = " ".join(analysis.headline.lines)
  assert "nats a pair (accuracy 80.0%); there is nothing to compare it with" in text
  assert "post − pre is −1.0000 nats a token" in text
  summary = analysis.tables[0]
  by_loss = {round(row["loss_mean"], 4): row for row in summary.data}
  assert by_loss[0.7]["perplexity_mean"] is None
  assert by_loss[5.0]["perplexity_mean"] == pytest.approx(math.exp(5.0))

"""Means, paired differences and studies against numbers worked out by hand or by scipy's own tests."""

import itertools
import math

import pytest

from mixln_jax.reporting.comparison import best_by_learning_rate, featured, paired_difference, spread, standings
from mixln_jax.reporting.groups import make_groups, named_fields, post_fraction
from mixln_jax.reporting.loading import ReportedRun, load
from mixln_jax.reporting.source import Source
from mixln_jax.reporting.studies import alpha_ablation, learning_rate_study
from mixln_jax.reporting.tables import perplexity_table
from reporting.making import config_of, make_run


def load_runs(root, runs):
  """Makes and loads runs: (name, loss, changes of the config, or of how it is made)."""
  return load([str(make_run(root / name, loss, **changes)) for name, loss, changes in runs])


def test_mean_and_std_by_hand():
  value = spread([1.0, 2.0, 4.0])
  assert (value.n, value.mean) == (3, pytest.approx(7 / 3))
  assert value.std == pytest.approx(math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2))
  assert spread([3.0]).std is None


def test_the_interval_of_paired_differences_by_hand():
  """Would catch an interval of unpaired samples, of another level, or with n instead of n − 1 degrees of freedom."""
  result = paired_difference([5.1, 4.9, 5.3], [5.4, 5.5, 5.5])
  # Mean -11/30, s² = 0.13/3, t(2; 0.975) = 4.302653.
  half_width = 4.302653 * math.sqrt(0.13 / 3 / 3)
  assert result.n == 3
  assert result.mean == pytest.approx(-11 / 30)
  assert result.interval == pytest.approx((-11 / 30 - half_width, -11 / 30 + half_width), rel=1e-6)


@pytest.mark.parametrize(
  ("ours", "baseline"),
  [([5.5], [5.0]), ([5.5, 6.5], [5.0, 6.0]), ([5.3, 4.2], [5.2, 4.1])],
  ids=["one_pair", "equal", "equal_but_for_rounding"],
)
def test_there_is_no_interval_where_no_seed_shows_a_spread(ours, baseline):
  """Would catch an interval of width 0, or one of rounding alone (5.3 − 5.2 is not 4.2 − 4.1 in binary)."""
  assert paired_difference(ours, baseline).interval is None


def test_the_table_pairs_equal_seeds_and_counts_only_whole_runs(tmp_path):
  log = math.log
  runs = [
    ("pre0", log(10), {"model__placement": "pre"}),
    ("pre1", log(12), {"model__placement": "pre", "seed": 1}),
    ("mix0", log(8), {"model__placement": "mix:0.5"}),
    ("mix1", log(6), {"model__placement": "mix:0.5", "seed": 1}),
    ("mix2", log(4), {"model__placement": "mix:0.5", "seed": 2}),  # has no partner
    ("mix3", None, {"model__placement": "mix:0.5", "seed": 3}),  # has not started to write
    ("post0", log(9), {"model__placement": "post"}),
  ]
  material = load_runs(tmp_path, runs)
  rows = standings(material.runs, make_groups(material), "pre")
  table = perplexity_table(rows, "pre")
  cells = {row[0]: row[1:] for row in table.rows}
  assert list(cells) == ["pre", "mix:0.5", "post"]
  assert cells["pre"][:3] == ("–", "–", "–")
  assert cells["pre"][4] == "11.00 ± 1.41"
  assert cells["mix:0.5"][4] == "6.00 ± 2.00"
  assert cells["mix:0.5"][2::3] == ("2", "3 of 4")
  assert cells["post"][1:3] == ("one seed", "1")
  # Pairs: 8 - 10 = -2 and 6 - 12 = -6; mean -4, s = 2√2, t(1; 0.975) = 12.7062, half-width 12.7062 · 2.
  data = {row["group"]: row for row in table.data}
  ends = [data["mix:0.5"][f"perplexity_{name}"] for name in ("difference", "low", "high")]
  assert ends == pytest.approx([-4, -4 - 2 * 12.7062, -4 + 2 * 12.7062], rel=1e-5)
  assert (data["post"]["perplexity_difference"], data["post"]["perplexity_low"]) == (pytest.approx(-1), None)


def test_groups_are_compared_only_at_equal_settings(tmp_path):
  runs = [
    ("pre", 5.0, {"model__placement": "pre", "optimizer__learning_rate": 1e-3}),
    ("mix", 4.0, {"model__placement": "mix:0.5", "optimizer__learning_rate": 3e-3}),
  ]
  material = load_runs(tmp_path, runs)
  rows = standings(material.runs, make_groups(material), "pre")
  assert [row.loss_difference for row in rows] == [None, None]


def test_the_best_learning_rate_and_an_edge_of_the_grid_are_marked(tmp_path):
  losses = {"pre": {1e-3: 5.0, 3e-3: 4.0, 1e-2: 6.0}, "post": {1e-3: 4.5, 3e-3: 5.0, 1e-2: 7.0}}
  runs = [
    (f"{name}{rate}", loss, {"model__placement": name, "optimizer__learning_rate": rate})
    for name, by_rate in losses.items()
    for rate, loss in by_rate.items()
  ]
  material = load_runs(tmp_path, runs)
  groups = make_groups(material)
  rows = standings(material.runs, groups, "pre")
  best = [(one.row.group.label, one.place) for one in best_by_learning_rate(rows)]
  assert best == [("pre, lr 0.003", "inside"), ("post, lr 0.001", "lower edge")]
  figure = learning_rate_study(Source(material.runs, groups, rows, groups))
  pre, post = figure.panels[0].series
  assert (list(pre.x), list(pre.y)) == ([1e-3, 3e-3, 1e-2], [5.0, 4.0, 6.0])
  assert (pre.marked, post.marked) == ([1], [0])
  assert post.notes[0].endswith("best, lower edge of the grid")


def rates_of(root, losses, **changes):
  """The best rates of runs of `pre`: {rate: losses by seed}, where None is a run that `changes` says the end of."""
  runs = [
    (f"{rate}_{seed}", loss, {"model__placement": "pre", "optimizer__learning_rate": rate, "seed": seed})
    for rate, by_seed in losses.items()
    for seed, loss in enumerate(by_seed)
  ]
  material = load_runs(root, [(name, loss, own | (changes if loss is None else {})) for name, loss, own in runs])
  rows = standings(material.runs, make_groups(material), "pre")
  return [
    (one.row.group.setting["optimizer.learning_rate"], one.place, one.seeds) for one in best_by_learning_rate(rows)
  ]


@pytest.mark.parametrize(
  ("end", "place"),
  [({"status": "non_finite"}, "inside"), ({"ended": False}, "upper edge")],
  ids=["diverged", "still_training"],
)
def test_a_rate_that_diverged_was_tried_and_one_that_still_trains_was_not(end, place, tmp_path):
  assert rates_of(tmp_path, {1e-3: [5.0], 3e-3: [4.0], 1e-2: [None]}, **end) == [(3e-3, place, 1)]


def test_rates_are_compared_on_the_seeds_that_they_share(tmp_path):
  # Over all its seeds 3e-3 has the mean 5.0, above 4.5; on seed 0, the only one that both have, it is the better one.
  assert rates_of(tmp_path / "a", {1e-3: [4.5], 3e-3: [4.0, 5.0, 6.0]}) == [(3e-3, "upper edge", 1)]
  # A dead seed is not shared either; where no seed is shared there is no best rate.
  losses = {1e-3: [4.5, 4.6], 3e-3: [None, 4.7]}
  assert rates_of(tmp_path / "b", losses, status="non_finite") == [(1e-3, "lower edge", 1)]
  losses = {1e-3: [4.5], 3e-3: [None, 4.0]}
  assert rates_of(tmp_path / "c", losses, status="non_finite") == []


def test_labels_name_as_few_fields_as_tell_groups_apart():
  """Would catch "vocab_size 2048, source sotu, tokenizer …, batch_size 16" where the corpus alone says which."""
  fields = ["model.vocab_size", "optimizer.learning_rate", "data.source", "data.tokenizer"]
  settings = [(2048, rate, "sotu", "a") for rate in (1e-3, 3e-3)] + [(4096, 1e-3, "own", "b")]
  assert named_fields(fields, settings) == ["optimizer.learning_rate", "data.source"]
  assert named_fields(fields, settings, axes=["model.vocab_size"]) == ["model.vocab_size", "optimizer.learning_rate"]
  assert named_fields([], [()]) == []


def test_alpha_ablation_has_pre_at_0_and_post_at_1(tmp_path):
  losses = {"mix:0.25": 3.0, "pre": 4.0, "post": 5.0, "mix:0.5": 3.5, "lns": 1.0, "post*1,pre*3": 3.1}
  runs = [(name.replace(":", ""), loss, {"model__placement": name}) for name, loss in losses.items()]
  material = load_runs(tmp_path, runs)
  groups = make_groups(material)
  rows = standings(material.runs, groups, "pre")
  figure = alpha_ablation(Source(material.runs, groups, rows, groups))
  (line,) = figure.panels[0].series
  assert sorted(zip(line.x, line.y, strict=True)) == [(0.0, 4.0), (0.25, 3.0), (0.25, 3.1), (0.5, 3.5), (1.0, 5.0)]
  assert [line.y[index] for index in line.marked] == [3.0]


@pytest.mark.parametrize(
  ("placement", "expected"),
  [
    ("pre", (0.0, "")),
    ("post", (1.0, "")),
    ("mix:0.25+scaled_init", (0.25, "scaled_init")),
    ("post*1,pre*3", (0.25, "")),
    ("pre*3,post*1", None),
    ("post*1,pre*3+gpas", None),
    ("lns", None),
    ("not a placement", None),
  ],
)
def test_fraction_of_post_layers(placement, expected, tmp_path):
  assert post_fraction(ReportedRun("run", tmp_path, config_of(model__placement=placement))) == expected


def test_sixty_runs_stay_legible(tmp_path):
  placements, rates = ["pre", "post", "lns", "mix:0.25", "mix:0.5"], (0.1, 0.2, 0.3, 0.4)
  runs = []
  for number, (name, seed, rate) in enumerate(itertools.product(placements, range(3), rates)):
    changes = {"model__placement": name, "seed": seed, "optimizer__learning_rate": rate}
    runs.append((f"run{number}", 4.0 + rate, changes))
  material = load_runs(tmp_path, runs)
  groups = make_groups(material)
  rows = standings(material.runs, groups, "pre")
  assert len(groups) == 20
  assert len({(group.style.kind % 8, group.style.variant % 4) for group in groups}) == 20  # all look different
  best = [f"{name}, lr 0.1" for name in ("pre", "mix:0.25", "mix:0.5", "post", "lns")]
  assert [group.label for group in featured(groups, rows)] == best

"""What a study runs after its first runs, decided by losses that are chosen here."""

import pytest

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.runs.outcome import FINISHED, Outcome, write_outcome
from mixln_jax.sweeps import sequence
from mixln_jax.sweeps.study import make_study

RATE = "optimizer.learning_rate"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
GRID = {"seed": (0,), "model.placement": ("pre", "post"), RATE: RATES[1:4]}
NAN = float("nan")


def follow(study, loss_of):
  """(placement, rate, seed) of the runs that each stage adds, until nothing is added."""
  losses, added = {}, []
  while True:
    planned = study.with_stages(losses).planned()
    new = {
      name: (run["model.placement"], run[RATE], run["seed"]) for name, run in planned.items() if name not in losses
    }
    if not new:
      return added
    added.append(list(new.values()))
    losses |= {name: loss_of(*values) for name, values in new.items()}


def loss_of(placement, rate, seed):
  """The best rate of pre is 8e-3, beyond the first three; that of post is 2e-3, and it is 0.3 above pre."""
  if placement == "pre":
    return 3.0 - 10 * rate + 0.01 * seed
  return 3.25 + abs(rate - 2e-3) + 0.02 * seed


def test_a_best_rate_at_an_edge_is_followed_outwards(make_config):
  """Would catch a rate that is called the best though its better neighbour was never tried."""
  study = make_study(make_config(), [GRID], then=[{"best": RATE, "widen": RATES}])
  first, second = follow(study, loss_of)
  assert len(first) == 6
  assert second == [("pre", 8e-3, 0)]


def test_a_placement_that_diverges_everywhere_is_tried_lower(make_config):
  """Would catch a placement that is given up though the lowest rate of the grid was never tried."""
  study = make_study(make_config(), [GRID], then=[{"best": RATE, "widen": RATES}])
  added = follow(study, lambda *values: NAN if values[0] == "post" else loss_of(*values))
  assert added[1] == [("pre", 8e-3, 0), ("post", 5e-4, 0)]
  assert len(added) == 2


def test_more_seeds_only_where_the_difference_is_small_and_for_the_baseline(make_config):
  """Would catch hours of seeds for a difference that three of them show, or too few where they don't."""
  near = {"field": "model.placement", "value": "pre", "within": 0.05}
  grid = GRID | {"model.placement": ("pre", "post", "lns")}
  stages = [
    {"best": RATE, "grid": {"seed": (0, 1)}},
    {"best": RATE, "grid": {"seed": (0, 1, 2, 3)}, "near": near},
    {"best": RATE, "grid": {"seed": range(5)}, "only": {"model.placement": ("pre",)}},
  ]
  study = make_study(make_config(), [grid], then=stages)

  def with_lns(placement, rate, seed):
    return loss_of("pre", rate, seed) + 0.04 if placement == "lns" else loss_of(placement, rate, seed)

  _, seeds, more, last = follow(study, with_lns)
  assert seeds == [("pre", 4e-3, 1), ("post", 2e-3, 1), ("lns", 4e-3, 1)]
  assert more == [("pre", 4e-3, 2), ("pre", 4e-3, 3), ("lns", 4e-3, 2), ("lns", 4e-3, 3)]
  assert last == [("pre", 4e-3, 4)]


def test_a_stage_that_another_process_opens_meanwhile_is_no_other_study(make_config, tmp_path, monkeypatch):
  """Of two processes in one folder the slower one would end with "holds another study" between two stages."""
  study = make_study(make_config(), [{"seed": (0,), RATE: (1e-3, 2e-3)}], then=[{"best": RATE, "grid": {"seed": (1,)}}])
  later = study.with_stages(dict.fromkeys(study.planned(), 3.0))
  sequence.open_study(later, tmp_path / "study")
  looks = [study, later]
  monkeypatch.setattr(sequence, "with_stages", lambda first, workdir: looks.pop(0))
  assert len(sequence.open_with_stages(study, tmp_path / "study")) == 3
  looks += [study, study]
  with pytest.raises(InputError, match="holds another study: it has runs that this one lacks"):
    sequence.open_with_stages(study, tmp_path / "study")


def test_a_lock_that_a_killed_machine_left_hides_no_finished_run(make_config, tmp_path):
  """From another machine the study could not be opened again: its next stage seemed to lack a run before it."""
  study = make_study(make_config(), [{"seed": (0,), RATE: (1e-3, 2e-3)}], then=[{"best": RATE, "grid": {"seed": (1,)}}])
  runs = sequence.open_study(study, tmp_path / "study")
  for run in runs:
    run.folder.create(config_lib.to_json(run.config))
    write_outcome(run.folder, Outcome(FINISHED, run.config.train.num_steps, validation={"step": 2, "loss": 3.0}))
  assert len(sequence.open_with_stages(study, tmp_path / "study")) == 3
  (runs[0].folder / ".lock").write_text('{"host": "another"}')
  assert len(sequence.open_with_stages(study, tmp_path / "study")) == 3


def test_seeds_that_a_stage_adds_do_not_move_the_best_rate(make_config):
  """Would catch a study whose later stages jump to another rate because the best one's further seeds were worse."""
  stages = [{"best": RATE, "grid": {"seed": (0, 1)}}, {"best": RATE, "grid": {"seed": (0, 1, 2)}}]
  study = make_study(make_config(), [GRID | {"model.placement": ("pre",)}], then=stages)
  added = follow(study, lambda _, rate, seed: 3.0 - rate + 9.0 * (seed > 0))
  assert added[1:] == [[("pre", 4e-3, 1)], [("pre", 4e-3, 2)]]


@pytest.mark.parametrize(
  ("stage", "message"),
  [
    ({"best": RATE}, "either grid or widen"),
    ({"best": RATE, "widen": (1e-3, 2e-3)}, r"then\.widen lacks optimizer\.learning_rate=0\.004"),
    ({"best": RATE, "grid": {"seed": (1,)}, "only": {"data.seed": (0,)}}, "'data.seed' is none"),
    ({"best": RATE, "grid": {"seed": (1,)}, "near": {"within": 1}}, r"then\.near has field, value, within, not within"),
    ({"best": RATE, "grids": {}}, "a stage of 'then' has best, grid, widen, only, near, not grids"),
  ],
)
def test_a_stage_that_could_not_be_run_is_rejected(make_config, stage, message):
  with pytest.raises(InputError, match=message):
    make_study(make_config(), [GRID], then=[stage])

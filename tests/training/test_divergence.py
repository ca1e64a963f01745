"""What is said of a run beside the unigram entropy of its data: not below it yet, back at it, or stuck."""

import pytest

from mixln_jax import config as config_lib
from mixln_jax.training.divergence import BACK, BELOW, NOT_YET, STUCK, Divergence

ENTROPY = 6.0


def lines(validation, train=()):
  """Lines of metrics.jsonl; validation: step -> loss."""
  found = [{"step": step, "split": "train", "loss": loss} for step, loss in enumerate(train, start=1)]
  for step, loss in validation.items():
    found.append({"step": step, "split": "validation", "loss": loss, "unigram_entropy": ENTROPY})
  return sorted(found, key=lambda line: line["step"])


def followed(validation, train=(), step=1000):
  config = config_lib.base()
  config.train.num_steps, config.optimizer.warmup_steps = 1000, 50
  return Divergence(config, lines(validation, train), step)


@pytest.mark.parametrize(
  ("validation", "state", "consecutive"),
  [
    ({100: 9.0, 200: 8.0, 300: 7.0, 400: 6.3}, NOT_YET, 0),  # falls towards it: not learned yet, and not diverged
    ({100: 6.5, 200: 5.0, 300: 4.0}, BELOW, 0),
    ({100: 5.0, 200: 4.0, 300: 5.99, 400: 5.98}, BACK, 2),
    ({100: 5.0, 200: 7.0, 300: 6.5, 400: 6.2}, BACK, 3),  # it falls again, but it was below
    ({100: 7.0, 200: 6.01, 300: 6.0, 400: 6.005}, STUCK, 2),
    ({100: 9.0, 200: 9.0, 300: 9.5}, STUCK, 2),
    ({100: 5.99, 200: 5.5}, BELOW, 0),  # it came loose
    ({10: 6.0, 30: 6.0}, NOT_YET, 0),  # within the warm-up nothing is said
    ({100: 6.3, 110: 6.295, 120: 6.29}, NOT_YET, 0),  # so soon after one another a loss can't have fallen much
    ({100: 7.0, 200: float("nan")}, NOT_YET, 0),
    ({}, None, 0),
  ],
)
def test_where_a_run_stands(validation, state, consecutive):
  """ "Diverged" of a run that has not learned yet sends people to lower a rate that is right."""
  found = followed(validation)
  assert (found.state, found.consecutive, found.diverged) == (state, consecutive, consecutive > 0)


def test_one_evaluation_is_judged_by_the_training_loss():
  """Where only the end is evaluated, a collapsed run must be told from one of a few steps."""
  falling = [9.0 - 0.005 * step for step in range(600)]
  assert followed({600: 6.1}, falling).state == NOT_YET
  level = [6.0 + 0.01 * (step % 2) for step in range(600)]
  assert followed({600: 6.005}, level).state == STUCK
  assert followed({5: 6.4}, [6.22, 6.12, 6.07, 5.97, 5.91]).state == NOT_YET


def test_a_resumed_run_stands_where_it_stood():
  """The file may hold lines of later steps than the checkpoint; what is followed live is what is read."""
  validation = {100: 5.0, 200: 4.0, 300: 6.0, 400: 6.0}
  assert followed(validation, step=200).state == BELOW
  live = followed(validation, step=300)
  live.evaluated(400, 6.0, ENTROPY)
  assert live.consecutive == followed(validation).consecutive == 2

"""Schedules, against their formulas."""

import math

import numpy as np
import pytest

from mixln_jax import config as config_lib
from mixln_jax.training.optimizer import learning_rate_schedule


def rates(**fields):
  config = config_lib.base()
  config.train.num_steps = 100
  config.optimizer.update(learning_rate=2.0, **fields)
  config_lib.validate(config)
  schedule = learning_rate_schedule(config)
  return np.array([float(schedule(step)) for step in range(100)])


def test_cosine_is_the_official_codes():
  # Linear from 0 over the warm-up, then floor + (1 - floor) (1 + cos(pi t)) / 2.
  expected = []
  for step in range(100):
    t = (step - 10) / (100 - 10)
    expected.append(2 * (step / 10 if step < 10 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t))))
  np.testing.assert_allclose(rates(), expected, rtol=1e-5)


def test_linear():
  expected = [step / 10 * 2 if step < 10 else 2 + (0.5 - 2) * (step - 10) / 90 for step in range(100)]
  np.testing.assert_allclose(rates(schedule="linear", final_fraction=0.25), expected, rtol=1e-5)


def test_warmup_stable_decay():
  expected = [2 * min(1, step / 5) - max(0, step - 80) / 20 * 1.8 for step in range(100)]
  np.testing.assert_allclose(rates(schedule="wsd", warmup_steps=5, decay_steps=20), expected, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_constant_with_any_warm_up(warmup):
  expected = [2 * min(1, step / warmup) if warmup else 2 for step in range(100)]
  np.testing.assert_allclose(rates(schedule="constant", warmup_steps=warmup), expected, rtol=1e-6)

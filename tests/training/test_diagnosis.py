"""Diagnostics while training: the same update, the same program on all other steps, numbers that are what they say."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, random_params
from model.rounding import NETWORK

from mixln_jax.diagnostics.spikes import FEWEST, WINDOW, LossWindow
from mixln_jax.model import Transformer
from mixln_jax.model.attention import attention_statistics
from mixln_jax.opening import set_up
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.training import loop
from mixln_jax.training import step as step_lib
from mixln_jax.training.program import lower_train_step
from training.test_loop import assert_same_run
from training.test_step import state_of, unequal_batch


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / "diagnostics.jsonl").read_text().splitlines()]


def run_step(config, *, diagnose):
  params, batch = random_params(config.model), unequal_batch(config)
  step = jax.jit(step_lib.make_train_step(config, diagnose=diagnose), compiler_options=EXACT)
  return step(state_of(config, params), batch)


def assert_bit_equal(a, b):
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


# A statistic is a quotient of two roots of sums, of a branch or an update that is smaller than what it was taken from:
# ten times the rounding of the network.
STATISTIC = 10 * NETWORK
PLACEMENT = "post*1,sandwich*1"


@pytest.fixture(scope="module")
def whole(make_config):
  """A config, and the state and metrics of its ordinary and of its diagnostic step."""
  config = make_config(**{"model.placement": PLACEMENT, "model.num_kv_heads": 1, "optimizer.clip_norm": 0.01})
  return config, run_step(config, diagnose=False), run_step(config, diagnose=True)


def test_the_update_is_that_of_an_ordinary_step_bit_for_bit(whole):
  _, (ordinary, expected), (diagnostic, metrics) = whole
  assert_bit_equal(diagnostic, ordinary)
  assert_bit_equal({name: metrics[name] for name in expected}, expected)


@pytest.mark.parametrize("bits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_micro_batches_and_recomputation_change_neither_the_update_nor_the_statistics(whole, bits):
  config = whole[0].copy_and_resolve_references()
  config.train.micro_batches, config.model.remat = 4, "full"
  diagnostic, metrics = run_step(config, diagnose=True)
  if bits:
    assert_bit_equal(diagnostic, run_step(config, diagnose=False)[0])
  expected = whole[2][1]["diagnostics"]
  assert metrics["diagnostics"].keys() == expected.keys()
  for name, value in metrics["diagnostics"].items():
    np.testing.assert_allclose(value, expected[name], rtol=STATISTIC, err_msg=name)


def test_the_statistics_are_what_they_say(whole):
  """Against plain float64 arithmetic on the unreduced taps, on the counted tokens of rows of unequal length."""
  config, (ordinary, _), (_, metrics) = whole
  params, batch = random_params(config.model), unequal_batch(config)
  actual = metrics["diagnostics"]
  _, taps = jax.jit(lambda p, t: Transformer(config.model).apply({"params": p}, t, method="hidden"))(
    params, batch["tokens_BT"]
  )
  counted = np.asarray(batch["weights_BT"]) > 0
  taps = {name: np.asarray(tap, np.float64)[..., counted, :] for name, tap in taps.items()}
  stream, before = taps["stream_LBTD"], np.stack([taps["embedded_BTD"], *taps["stream_LBTD"][:-1]])

  def rms(x):
    return np.sqrt((x**2).mean((-2, -1)))

  cosines = (stream * before).sum(-1) / np.linalg.norm(stream, axis=-1) / np.linalg.norm(before, axis=-1)
  expected = {
    "stream_rms": rms(stream),
    "stream_variance": stream.var(-1).mean(-1),
    "cosine": cosines.mean(-1),
    "embedded_rms": rms(taps["embedded_BTD"]),
    "attention/branch_ratio": rms(taps["attention_branch_LBTD"]) / rms(taps["attention_residual_LBTD"]),
    "mlp/branch_ratio": rms(taps["mlp_branch_LBTD"]) / rms(taps["mlp_residual_LBTD"]),
  }
  for sublayer, names in (("attention", ("query", "key", "value", "output")), ("mlp", ("gate", "up", "down"))):
    squares = [
      sum(np.square(np.asarray(params["layers"][name][layer], np.float64)).sum() for name in names) for layer in (0, 1)
    ]
    changes = [
      sum(
        np.square(np.asarray(ordinary.params["layers"][name][layer] - params["layers"][name][layer], np.float64)).sum()
        for name in names
      )
      for layer in (0, 1)
    ]
    expected[f"{sublayer}/update_ratio"] = np.sqrt(changes) / np.sqrt(squares)
    for which in ("", "_2"):
      expected[f"{sublayer}/norm_gain_rms{which}"] = rms(
        np.asarray(params["layers"][f"{sublayer}_norm{which}"], np.float64)[:, None]
      )
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, rtol=STATISTIC, err_msg=name)
  # Before clipping: all parts together are the norm that the step reports.
  norms = [np.asarray(value, np.float64) for name, value in actual.items() if name.endswith("gradient_norm")]
  np.testing.assert_allclose(np.sqrt(sum((norm**2).sum() for norm in norms)), metrics["gradient_norm"], rtol=NETWORK)
  assert metrics["gradient_norm"] > 10 * config.optimizer.clip_norm
  assert {"attention/largest_logit", "attention/entropy"} == {
    name for name in actual.keys() - expected.keys() if not name.endswith("gradient_norm")
  }


@pytest.mark.parametrize("masked", [False, True])
def test_attention_statistics_against_a_softmax_by_hand(masked):
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 5, 4, 6)), rng.normal(size=(2, 5, 2, 6))
  mask = np.tril(np.ones((2, 5, 5), bool))
  if masked:
    mask[:, 3:, :2] = False
  statistics = attention_statistics(
    jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), jnp.asarray(mask) if masked else None
  )
  for row in range(2):
    for at in range(5):
      entropies, largest = [], -np.inf
      for head in range(4):
        logits = np.array([q[row, at, head] @ k[row, s, head // 2] for s in range(5) if mask[row, at, s]]) / np.sqrt(6)
        shares = np.exp(logits) / np.exp(logits).sum()
        entropies.append(-(shares * np.log(shares)).sum())
        largest = max(largest, logits.max())
      # An entropy is 0 where one key is seen.
      np.testing.assert_allclose(statistics["entropy_BT"][row, at], np.mean(entropies), rtol=NETWORK, atol=1e-6)
      np.testing.assert_allclose(statistics["largest_logit_BT"][row, at], largest, rtol=NETWORK)


def test_with_diagnostics_the_ordinary_program_is_the_same(make_config):
  def text(every):
    setup = set_up(make_config(**{"diagnostics.every_steps": every}))
    shardings = step_lib.state_shardings(setup.config, setup.mesh)
    return hashlib.sha256(lower_train_step(setup.config, setup.mesh, shardings).as_text().encode()).hexdigest()

  assert text(0) == text(3)


@pytest.fixture(scope="module", autouse=True)
def exact():
  """Programs that are compiled before they run, as the loop's steps are, are compiled exactly."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.stages.Lowered, "compile", functools.partialmethod(jax.stages.Lowered.compile, EXACT))
    yield


@pytest.fixture(scope="module")
def plain(make_config, tmp_path_factory):
  """A run without diagnostics."""
  workdir = tmp_path_factory.mktemp("plain") / "run"
  loop.train(make_config(**{"model.placement": PLACEMENT}), workdir)
  assert not (workdir / "diagnostics.jsonl").exists()
  return workdir


def test_a_run_with_diagnostics_is_the_same_run_with_a_line_on_its_steps(plain, make_config, tmp_path):
  assert (
    loop.train(make_config(**{"diagnostics.every_steps": 3, "model.placement": PLACEMENT}), tmp_path / "run").status
    == "finished"
  )
  assert_same_run(tmp_path / "run", plain)
  lines = lines_of(tmp_path / "run")
  assert [line["step"] for line in lines] == [1, 3, 6]
  train = [line for line in read_metrics(plain / "metrics.jsonl") if line["split"] == "train"]
  assert [line["loss"] for line in lines] == [train[step - 1]["loss"] for step in (1, 3, 6)]
  first = lines[0]
  assert first["loss_spike_score"] is None
  assert first["attention/update_ratio"] == [0, 0]  # the first update of a warm-up
  assert lines[1]["mlp/update_ratio"][0] > 0
  assert {len(value) for value in first.values() if isinstance(value, list)} == {2}
  assert {"embedding/gradient_norm", "head/gradient_norm", "final_norm/gradient_norm"} <= first.keys()


def test_a_crash_loses_no_line_and_doubles_none(make_config, tmp_path, monkeypatch):
  """An exception in step 4 leaves a line of step 3 behind the checkpoint of step 2."""
  config = make_config(**{"diagnostics.every_steps": 1, "model.placement": PLACEMENT})
  real, calls = loop.global_batch, []

  def crash(*arguments):
    calls.append(None)
    if len(calls) == 4:
      raise RuntimeError("out of the blue")
    return real(*arguments)

  monkeypatch.setattr(loop, "global_batch", crash)
  with pytest.raises(RuntimeError, match="out of the blue"):
    loop.train(config, tmp_path / "run")
  monkeypatch.undo()
  before = lines_of(tmp_path / "run")
  assert [line["step"] for line in before][-1] > 2
  assert loop.train(config, tmp_path / "run").status == "finished"
  lines = lines_of(tmp_path / "run")
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert lines[: len(before)] == before
  assert [line["attention/norm_gain_rms_2"][0] for line in lines] == [None] * 6  # a Post-LN layer has one norm
  assert lines[-1]["attention/norm_gain_rms_2"][1] != 1


def test_the_spike_score_of_a_loss():
  window = LossWindow([1.0, 3.0] * (FEWEST // 2))
  assert window.score(5.0) == 3.0  # mean 2, deviation 1
  window.add(float("nan"))
  assert window.score(5.0) == 3.0
  assert LossWindow([1.0] * (FEWEST - 1)).score(9.0) is None
  assert LossWindow([1.0] * FEWEST).score(9.0) is None  # no deviation
  assert LossWindow([100.0] * 50 + [1.0, 3.0] * (WINDOW // 2)).score(1.0) == -1.0

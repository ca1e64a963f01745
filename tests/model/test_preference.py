"""Losses over pairs: TRL's numbers and gradients, on rows that hold several pairs; nothing where there is nothing."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_params, small_model

from mixln_jax import config as config_lib
from mixln_jax.data.loader import example
from mixln_jax.data.records import Answered, PairPacker
from mixln_jax.model import Transformer
from mixln_jax.model.loss import next_token_losses
from mixln_jax.model.preference import pair_sums, preference_loss, sequence_log_probabilities
from mixln_jax.model.tuned.loss import chunked_losses

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "preferences" / "trl.npz")
LENGTH = 40  # of a row: none holds all pairs, and some hold two
# As tests/data/make_preferences_golden.py has them.
FIELDS = {
  "dpo": {"loss": "dpo", "dpo_beta": 0.1},
  "dpo_strong": {"loss": "dpo", "dpo_beta": 0.5},
  "dpo_smoothed": {"loss": "dpo", "dpo_beta": 0.3, "label_smoothing": 0.1},
  "simpo": {"loss": "simpo"},
  "simpo_smoothed": {"loss": "simpo", "simpo_beta": 2.5, "simpo_gamma": 0.3, "label_smoothing": 0.2},
  "orpo": {"loss": "orpo"},
}


def preference_of(**fields):
  config = config_lib.base()
  config.preference.update(fields)
  return config.preference


def batch_of(rows):
  return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def packed(name):
  """The golden pairs as the loader gives packed records, and where the logits of each sequence lie: [(row, begin)]."""
  tokens, answers = GOLDEN[f"{name}/tokens"], GOLDEN[f"{name}/answers"]
  num_pairs = len(tokens) // 2
  packer, records = PairPacker(LENGTH, 0), []
  for pair in range(num_pairs):
    documents = []
    for index in (pair, num_pairs + pair):
      length = int(np.flatnonzero(answers[index])[-1]) + 1
      documents.append(Answered(tokens[index, :length].tolist(), int(answers[index].sum())))
    records += packer.add(*documents)
  records += packer.finish()
  rows, places, found = [], {}, 0
  for number, record in enumerate(records):
    begins = np.flatnonzero(record.starts)
    order = [found + index // 2 + num_pairs * (index % 2) for index in range(len(begins))]
    references = GOLDEN["references"][order]
    rows.append(example(record._replace(references=references), LENGTH, document_mask=True))
    places |= {index: (number, begin) for index, begin in zip(order, begins, strict=True)}
    found += len(begins) // 2
  assert 1 < len(rows) < num_pairs
  return batch_of(rows), [places[index] for index in range(2 * num_pairs)]


def lengths_of(name):
  return [int(np.flatnonzero(answers)[-1]) + 1 for answers in GOLDEN[f"{name}/answers"]]


@pytest.mark.parametrize("name", FIELDS)
def test_losses_rewards_and_gradients_are_trls(name):
  """A wrong sign, a mean for a sum, a token of the prompt that counts, an answer's end that does not, or a sum over
  another pair's sequence would show: the pairs differ in all lengths and lie packed in rows."""
  batch, places = packed(name)
  preference = preference_of(**FIELDS[name])
  logits_BTV = np.random.default_rng(2).normal(size=(*batch["tokens_BT"].shape, GOLDEN["logits"].shape[2]))
  logits_BTV = logits_BTV.astype(np.float32)  # padding has logits too
  for logits, length, (row, begin) in zip(GOLDEN["logits"], lengths_of(name), places, strict=True):
    logits_BTV[row, begin : begin + length] = logits[:length]

  def loss(logits_BTV):
    # The head is the identity: its hidden states are the logits.
    losses_BT = next_token_losses(logits_BTV, jnp.eye(logits_BTV.shape[2]), batch["labels_BT"])
    sums = pair_sums(preference, -losses_BT, batch)
    return sums.loss / sums.pairs, sums

  (mean, sums), gradient_BTV = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits_BTV)
  num_pairs = len(places) // 2
  rewards = GOLDEN[f"{name}/rewards"]
  chosen, rejected = rewards[:num_pairs], rewards[num_pairs:]
  np.testing.assert_allclose(mean, GOLDEN[f"{name}/loss"], rtol=2e-6)
  assert sums.pairs == num_pairs
  assert sums.tokens == GOLDEN[f"{name}/answers"].sum()
  np.testing.assert_allclose(sums.chosen_reward, chosen.sum(), rtol=2e-6)
  np.testing.assert_allclose(sums.rejected_reward, rejected.sum(), rtol=2e-6)
  assert sums.accuracy == (chosen > rejected).sum()
  if f"{name}/rewards/accuracies" in GOLDEN:  # as the trainer itself reports them
    np.testing.assert_allclose(sums.accuracy / num_pairs, GOLDEN[f"{name}/rewards/accuracies"], rtol=1e-6)
    np.testing.assert_allclose(sums.chosen_reward / num_pairs, GOLDEN[f"{name}/rewards/chosen"], rtol=2e-6)
    margin = (sums.chosen_reward - sums.rejected_reward) / num_pairs
    np.testing.assert_allclose(margin, GOLDEN[f"{name}/rewards/margins"], rtol=4e-6)
  expected_BTV = np.zeros_like(logits_BTV)
  for gradient, length, (row, begin) in zip(GOLDEN[f"{name}/gradient"], lengths_of(name), places, strict=True):
    expected_BTV[row, begin : begin + length] = gradient[:length]
  assert np.abs(expected_BTV).max() > 1e-3
  np.testing.assert_allclose(gradient_BTV, expected_BTV, atol=1e-7, rtol=1e-5)


def test_the_loss_of_each_position_and_its_gradient_are_the_plain_ones():
  """Chunks that were put together in another order, or padding that came along, would show."""
  rng = np.random.default_rng(0)
  hidden_BTD = jnp.asarray(rng.normal(size=(3, 11, 8)), jnp.float32)
  head_DV = jnp.asarray(rng.normal(size=(8, 13)), jnp.float32)
  labels_BT = jnp.asarray(rng.integers(0, 13, (3, 11)))
  factors_BT = jnp.asarray(rng.normal(size=(3, 11)), jnp.float32)

  def plain(hidden_BTD, head_DV, labels_BT):
    return optax.softmax_cross_entropy_with_integer_labels(hidden_BTD @ head_DV, labels_BT)

  def chunked(hidden_BTD, head_DV, labels_BT):
    return chunked_losses(hidden_BTD, head_DV, labels_BT, chunk=4)

  @jax.jit
  def both(hidden_BTD, head_DV):
    results = []
    for losses in (plain, chunked):
      losses_BT, pull = jax.vjp(lambda h, w, losses=losses: losses(h, w, labels_BT), hidden_BTD, head_DV)
      results.append((losses_BT, pull(factors_BT)))
    return results

  expected, found = both(hidden_BTD, head_DV)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), found, expected)


def identical_pairs(rng, vocab_size):
  """A row of two pairs, each of one sequence twice."""
  packer = PairPacker(32, 0)
  for length in (6, 9):
    document = Answered(rng.integers(1, vocab_size, length).tolist(), 3)
    assert not list(packer.add(document, document))
  (record,) = packer.finish()
  return record


def test_an_identical_pair_gives_no_gradient_by_dpo_at_the_start():
  """References of other sequences, or of another model, would leave a gradient: both sides pull with equal force."""
  model = small_model(placement="mix:0.5", num_layers=2)
  params = random_params(model)
  record = identical_pairs(np.random.default_rng(0), model.vocab_size)
  transformer = Transformer(model)
  batch = batch_of([example(record, 32, document_mask=True)])

  @jax.jit
  def norms(params):
    references_BS = sequence_log_probabilities(transformer, params, batch)
    referred = example(record._replace(references=np.zeros(4, np.float32)), 32, document_mask=True)
    begins = np.flatnonzero(record.starts)
    references_BT = jnp.asarray(referred["references_BT"])[None].at[0, begins].set(references_BS[0, :4])
    whole = batch | {"references_BT": references_BT}

    def loss(params):
      return preference_loss(preference_of(loss="dpo"), transformer, params, whole)[0].loss

    def one_side(params):
      return jnp.sum(sequence_log_probabilities(transformer, params, batch)[:, 0::2])

    value, gradient = jax.value_and_grad(loss)(params)
    return value, optax.tree.norm(gradient), 0.05 * optax.tree.norm(jax.grad(one_side)(params))

  value, norm, norm_of_a_side = norms(params)
  np.testing.assert_allclose(value, 2 * np.log(2), rtol=1e-5)
  assert norm_of_a_side > 0.1
  assert norm < 1e-5 * norm_of_a_side


def test_rows_without_a_pair_and_certain_answers_give_finite_gradients():
  """The odds of a certain answer are infinite, and an empty place has no mean: neither may become nan."""
  batch, _ = packed("orpo")
  empty = jax.tree.map(lambda rows: jnp.concatenate([rows, jnp.zeros_like(rows[:1])]), batch)

  def loss(log_probabilities_BT, preference):
    return pair_sums(preference, log_probabilities_BT, empty).loss

  for name in ("dpo", "simpo", "orpo"):
    value, gradient = jax.value_and_grad(loss)(jnp.zeros(empty["tokens_BT"].shape), preference_of(loss=name))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert not gradient[-1].any()

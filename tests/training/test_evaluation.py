"""Evaluation: every token weighs the same, whatever the batch; and the official evaluator's bias beside it."""

import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import random_params
from model.rounding import NETWORK

from mixln_jax.data.loader import Loader
from mixln_jax.data.records import open_corpus
from mixln_jax.model import Transformer
from mixln_jax.opening import set_up
from mixln_jax.training.evaluation import Evaluator
from mixln_jax.training.program import SingleProgram


@pytest.mark.parametrize("mode", ["pack", "pad"])
@pytest.mark.parametrize("max_tokens", [0, 100])
def test_independent_of_the_batch_size_and_equal_to_a_plain_count(make_config, mode, max_tokens):
  config = make_config(**{"data.mode": mode, "evaluate.max_tokens": max_tokens})
  params = random_params(config.model)
  results = []
  for batch_size in (1, 3, 8, 64):
    config.evaluate.batch_size = batch_size
    results.append(Evaluator(SingleProgram(config, set_up(config).mesh), set_up(config))(params, 0)[0])

  # A plain count, row by row, from the records' own tokens.
  corpus = open_corpus(Path(config.data.directory))
  nats, tokens, num_bytes = 0.0, 0, 0
  for batch in Loader(corpus, sequence_length=32, batch_size=1).validation():
    if 0 < max_tokens <= tokens:
      break
    logits = Transformer(config.model).apply({"params": params}, batch["tokens_BT"])
    losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels_BT"]))
    for label, weight, loss in zip(batch["labels_BT"][0], batch["weights_BT"][0], losses[0], strict=True):
      if weight:
        nats, tokens = nats + loss, tokens + 1
        num_bytes += 1 if label >= 3 else 0  # bytes are ids from 3 on; the end of a document has none
  for result in results:
    assert result.tokens == tokens
    np.testing.assert_allclose(result.loss, nats / tokens, rtol=NETWORK)
    np.testing.assert_allclose(result.bits_per_byte, nats / math.log(2) / num_bytes, rtol=NETWORK)
    np.testing.assert_allclose(result.perplexity, math.exp(nats / tokens), rtol=10 * NETWORK)  # of some 5 nats


def test_the_official_evaluators_number_is_biased_and_depends_on_the_batch(make_config):
  config = make_config(**{"data.mode": "pad"})
  params = random_params(config.model)
  seen = {}
  for batch_size in (2, 8):
    config.evaluate.batch_size = batch_size
    setup = set_up(config)
    corpus = setup.corpus
    means = []
    for batch in Loader(corpus, sequence_length=32, batch_size=batch_size).validation():
      logits = jax.jit(Transformer(config.model).apply)({"params": params}, batch["tokens_BT"])
      losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels_BT"]))
      means.append(losses[batch["weights_BT"] > 0].mean())
    result = Evaluator(SingleProgram(config, setup.mesh), setup)(params, 0)[0]
    np.testing.assert_allclose(result.official_loss, sum(means) / (len(means) + 1), rtol=NETWORK)
    assert result.official_loss < result.loss
    seen[batch_size] = result.official_loss
  assert abs(seen[2] - seen[8]) > 0.1

"""Sampling with a cache equals recomputing without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, small_model

from mixln_jax.data.tokenizer import ByteTokenizer
from mixln_jax.inference.generate import generate, generate_text
from mixln_jax.model import Transformer


@pytest.mark.parametrize("name", ["pre", "post", "mix:0.5"])
def test_greedy_prompts_of_different_lengths_equal_recomputing(name):
  model = small_model(placement=name, num_kv_heads=1)
  params = random_params(model)
  prompts = [[5, 9, 2, 44, 17], [8], [30, 31, 32]]
  added = generate(model, params, prompts, 6)
  assert added.shape == (3, 6)
  for prompt, ids in zip(prompts, added, strict=True):
    tokens = list(prompt)
    for token in ids:
      logits = Transformer(model).apply({"params": params}, jnp.asarray([tokens + [0] * (11 - len(tokens))]))
      assert int(token) == int(jnp.argmax(logits[0, len(tokens) - 1]))
      tokens.append(int(token))


def test_temperature_and_seed():
  model = small_model()
  params = random_params(model)
  greedy = generate(model, params, [[3]], 20)
  np.testing.assert_array_equal(generate(model, params, [[3]], 20, temperature=1e-4, seed=5), greedy)
  hot = generate(model, params, [[3]] * 2, 20, temperature=2.0, seed=5)
  np.testing.assert_array_equal(generate(model, params, [[3]] * 2, 20, temperature=2.0, seed=5), hot)
  assert not np.array_equal(hot[0], hot[1])
  assert not np.array_equal(generate(model, params, [[3]] * 2, 20, temperature=2.0, seed=6), hot)
  assert generate(model, params, [[3]] * 8, 30, temperature=5.0, num_ids=7).max() == 6
  with pytest.raises(ValueError, match="a prompt is empty"):
    generate(model, params, [[3], []], 2)


def test_text_ends_with_the_document():
  """A model that always says e, and one that ends the document at once."""
  model = small_model(vocab_size=259, placement="pre")
  tokenizer = ByteTokenizer()
  params = random_params(model)
  for token, text in ((tokenizer.encode("e")[0], "eeeee"), (tokenizer.eos_id, "")):
    # All rows of the embedding and all layers lead to one hidden state, and the head knows what it means.
    zeros = jax.tree.map(jnp.zeros_like, params)
    one_hot = jnp.zeros_like(params["head"]).at[:, token].set(1.0)
    sure = zeros | {
      "embedding": jnp.ones_like(params["embedding"]),
      "final_norm": params["final_norm"],
      "head": one_hot,
    }
    assert generate_text(model, sure, tokenizer, "a", 5, temperature=0.0) == text

"""Generation with a cache equals recomputing without one; rows end at their stop tokens; sampling is what it says."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, small_model, tokenizer_with_dummy_prefix
from ml_collections import FrozenConfigDict

from mixln_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from mixln_jax.data.tokenizer_training import train_hugging_face
from mixln_jax.errors import InputError
from mixln_jax.inference import batching
from mixln_jax.inference.generate import (
  added_text,
  check_context,
  continue_rows,
  generate,
  generate_batch,
  generate_text,
  generate_texts,
)
from mixln_jax.inference.sampling import Sampling, choose, keep_likeliest
from mixln_jax.model import Transformer
from mixln_jax.placement import ROWS

# Every kind of row, four to a model: the cache does not know what a layer's norms are.
MODELS = (
  "pre*1,post*1,sandwich*1,lns*1",
  "hybrid_first*2,hybrid*1,peri*1+qk_norm",
  "deepnorm*1,keel*2,admin*1",
  "layerscale*1+gpas,skipinit*1,reordered*1+qk_norm_full,deepnorm_as_published*1",
  "attnres:3*3,pre/attnres:3*1",
  "parallel*1,b2t*1+value_residual,spannorm*1,pre*1",
  "hc:2*1,dhc:2*1,dhc_layernorm:2*1,mhc:2*1",
  "ihc:2*2,mhc_zero_bias:2*1,pre*1",
  "dhc_identity:2",
  "ihc_v4:2",
  "mhc_v4:2",
  "residual*2,post*2",
  "post*2+x0,pre*2+value_residual:2",
  "siamese*2,post/pre*2",
)
QUICK = MODELS[0], MODELS[4]

PROMPTS = [[5, 9, 2, 44, 17], [8], [30, 31, 32]]


def test_the_models_below_have_every_placement():
  named = set(re.findall(r"\w+", " ".join(MODELS)))
  assert named.issuperset(ROWS)


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_greedy_prompts_of_different_lengths_equal_recomputing(name):
  """All rows are read at once without a cache: each added token is the likeliest one after those before it."""
  model = small_model(placement=name, num_kv_heads=1)
  params = random_params(model)
  added = generate(model, params, PROMPTS, 6)
  rows = [prompt + ids for prompt, ids in zip(PROMPTS, added, strict=True)]
  tokens_BT, lengths_B = batching.pad(rows, 3, 11)
  likeliest_BT = jnp.argmax(jax.jit(Transformer(model).apply)({"params": params}, tokens_BT), axis=-1)
  for prompt, ids, likeliest, length in zip(PROMPTS, added, likeliest_BT, lengths_B, strict=True):
    assert ids == likeliest[len(prompt) - 1 : length - 1].tolist()
  assert len({tuple(ids) for ids in added}) > 1


class Small:
  """A small model whose calls below have one shape, and so share two programs (with and without narrowing)."""

  def __init__(self):
    self.model = small_model()
    self.params = random_params(self.model)

  def __call__(self, prompts, num_tokens, **options):
    return generate(self.model, self.params, prompts, num_tokens, num_ids=50, **options)


@pytest.fixture(scope="module")
def small():
  return Small()


def test_a_row_ends_with_its_stop_token_and_the_loop_with_the_last_row(small):
  free = small(PROMPTS, 20)
  stops = [free[0][2], free[1][5], free[2][3]]
  rows = small(PROMPTS, 20, stop_ids=stops)
  ends = [min(ids.index(stop) for stop in stops if stop in ids) for ids in free]
  assert rows == [ids[: end + 1] for ids, end in zip(free, ends, strict=True)]
  tokens_BT, lengths_B = batching.pad(PROMPTS, 4, 16)
  greedy = (np.float32(0), None, np.uint32(0))
  stop_N = np.array([*stops, -1], np.int32)
  model = FrozenConfigDict(small.model)
  arguments = (small.params, tokens_BT, lengths_B, np.arange(4), np.int32(20), stop_N, greedy)
  tokens, steps = generate_batch(model, 32, 50, *arguments)
  assert steps == max(ends) + 1 < 20
  for row, prompt, end in zip(tokens, PROMPTS, ends, strict=False):
    assert not row[len(prompt) + end + 1 :].any()  # padding


def test_temperature_and_seed(small):
  greedy = small([[3]] * 3, 20)
  assert max(map(max, greedy)) < 50
  assert small([[3]] * 3, 20, sampling=Sampling(1e-4, seed=5)) == greedy
  hot = small([[3]] * 3, 20, sampling=Sampling(2.0, seed=5))
  assert small([[3]] * 3, 20, sampling=Sampling(2.0, seed=5)) == hot
  assert hot[0] != hot[1]
  assert small([[3]] * 3, 20, sampling=Sampling(2.0, seed=6)) != hot
  assert small([[3], [4, 5], [3], [7, 8, 9]], 20, sampling=Sampling(2.0, seed=5))[::2] == hot[::2]
  assert small([[3]] * 3, 20, sampling=Sampling(2.0, top_k=1, seed=5)) == greedy
  assert small([[3]] * 3, 20, sampling=Sampling(2.0, top_p=1e-6, seed=5)) == greedy
  with pytest.raises(ValueError, match="a prompt is empty"):
    small([[3], []], 2)


def test_lengths_and_rows_of_one_bucket_are_one_program(small):
  small([[3]] * 4, 28)
  before = generate_batch._cache_size()
  small([[3, 4, 5], [6] * 11, [7]], 9, sampling=Sampling(0.5, seed=1), stop_ids=[3, 4])
  assert generate_batch._cache_size() == before


@pytest.mark.parametrize(
  ("top_k", "top_p", "kept"), [(0, 1.0, 5), (2, 1.0, 2), (0, 0.69, 2), (0, 0.71, 3), (3, 0.8, 2), (0, 1e-6, 1)]
)
def test_top_k_then_top_p_of_what_it_left(top_k, top_p, kept):
  """Probabilities .4 .3 .15 .1 .05; of the three likeliest alone .47 .35 .18."""
  logits = jnp.log(jnp.array([[0.4, 0.3, 0.15, 0.1, 0.05]]))
  np.testing.assert_array_equal(jnp.isfinite(keep_likeliest(logits, top_k, top_p))[0], np.arange(5) < kept)


def test_draws_have_the_models_probabilities():
  probabilities = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
  logits = jnp.tile(jnp.log(probabilities), (4000, 1))
  keys = jax.random.split(jax.random.key(0), 4000)
  for narrowing, allowed in ((None, np.ones(5)), ((3, 1.0), np.array([0, 1, 0, 1, 1]))):
    drawn = np.bincount(choose(logits, keys, jnp.float32(1.0), narrowing), minlength=5) / 4000
    expected = probabilities * allowed / (probabilities * allowed).sum()
    np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(0.25 / 4000))
    assert (drawn[allowed == 0] == 0).all()


@pytest.mark.parametrize(
  ("sampling", "words"),
  [
    (Sampling(-1.0), "^temperature=-1.0"),
    (Sampling(1.0, top_k=-1), "^top_k=-1"),
    (Sampling(1.0, top_p=0.0), r"^top_p=0\.0.*above 0"),
    (Sampling(0.0, top_k=3), "no meaning with temperature=0"),
  ],
)
def test_invalid_sampling_is_rejected(sampling, words):
  with pytest.raises(InputError, match=words):
    sampling.check()


def test_the_length_that_a_run_was_trained_at():
  check_context(10, 22, 32)
  with pytest.raises(InputError, match=r"^num_tokens=23: .* 10 tokens.* is 33, more than the 32 .*lower it to 22"):
    check_context(10, 23, 32)
  with pytest.raises(InputError, match=r"40 tokens.*the 32 .*shorten the prompt"):
    check_context(40, 1, 32)


def test_buckets_waste_little_and_are_few():
  buckets = [batching.bucket(length) for length in range(1, 2049)]
  assert all(length <= size for length, size in enumerate(buckets, 1))
  assert all(size <= max(16, 1.5 * length) for length, size in enumerate(buckets, 1))
  assert len(set(buckets)) == 15
  assert [batching.bucket_rows(rows) for rows in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


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


def test_draws_are_those_of_a_prompts_number_in_the_request():
  """Would catch batches that repeat one another, and a text that changes with the batch's size or its neighbours."""
  model = small_model(vocab_size=259, placement="pre")
  arguments = (model, random_params(model), ByteTokenizer())
  options = {"sampling": Sampling(1.0, seed=7), "stop_ids": []}
  same = generate_texts(*arguments, ["tea"] * 64, 8, **options)
  assert len({text.text for text in same}) == 64
  assert generate_texts(*arguments, ["tea"] * 64, 8, batch_size=5, **options) == same
  assert generate_texts(*arguments, ["tea"], 8, **options) == same[:1]
  assert generate_texts(*arguments, ["tea", "a much longer prompt than that", "tea"], 8, **options)[::2] == same[:3:2]


WORDS = "the people of this country, and the people of that. \n" * 30
PREFIXED = tokenizer_with_dummy_prefix(WORDS, 320)
BYTE_LEVEL = train_hugging_face([WORDS], 286)


def as_llama_2():
  """A tokenizer.json as LLaMA 2's: it prepends a blank, and strips one when it decodes."""
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

  made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
  made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  made.decoder = decoders.Sequence(steps)
  words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=words, show_progress=False)
  made.train_from_iterator([WORDS], trainer)
  described = json.loads(made.to_str())
  for token in described["added_tokens"]:
    token["special"] = token["id"] < 3
  described["added_tokens"] = described["added_tokens"][:3]
  return HuggingFaceTokenizer(json.dumps(described).encode(), "as LLaMA 2's")


TOKENIZERS = pytest.mark.parametrize(
  "tokenizer",
  [PREFIXED, as_llama_2(), BYTE_LEVEL, ByteTokenizer()],
  ids=["sentencepiece", "llama 2", "byte-level", "bytes"],
)


@TOKENIZERS
def test_the_text_that_ids_add_keeps_its_blank(tokenizer):
  """Would catch "the people of thisand": a tokenizer with a dummy prefix drops the blank of the first id it decodes."""
  for before, added in (("the people of this", " and that"), ("", "the people"), ("the peo", "ple"), ("a", " é!")):
    row, ids = tokenizer.encode(before), tokenizer.encode(before + added)
    if ids[: len(row)] == row:
      assert added_text(tokenizer, [tokenizer.eos_id, *row], ids[len(row) :]) == added
  assert added_text(tokenizer, tokenizer.encode("the"), tokenizer.encode("people")).strip() == "people"


class Parrot:
  """A model that says one text whatever it reads: `generate` in its place gives the ids of that text."""

  def __init__(self, ids):
    self.ids, self.ends = ids, []

  def __call__(self, _config, _params, prompts, num_tokens, *, stop_ids, **_):
    self.ends = list(stop_ids)
    length = next((index + 1 for index, one in enumerate(self.ids) if one in stop_ids), num_tokens)
    return [self.ids[: min(length, num_tokens)] for _ in prompts]


@TOKENIZERS
@pytest.mark.parametrize("stop", [".", ",", " and", "ry, a", "people of t", "this"])
def test_a_row_ends_before_its_first_stop_text(tokenizer, stop, monkeypatch):
  """Would catch a stop text that must be one token, one that ends a row without being there, and one left in the text.

  "ry, a" lies across tokens, and "." and "," are two tokens of a tokenizer with a dummy prefix when encoded alone.
  """
  row = [tokenizer.eos_id, *tokenizer.encode("the people of")]
  said = " this country, and the people of that."
  ids = tokenizer.encode("the people of" + said)[len(row) - 1 :]
  parrot = Parrot(ids)
  monkeypatch.setattr("mixln_jax.inference.generate.generate", parrot)
  options = {"sampling": Sampling(), "stop_ids": [tokenizer.eos_id], "stop_texts": ["zebra", stop]}
  (text,) = continue_rows(None, None, tokenizer, [row], len(ids), **options)
  assert text.text == said[: said.index(stop)]
  assert text.stopped
  assert stop in added_text(tokenizer, row, text.ids)
  assert stop not in added_text(tokenizer, row, text.ids[:-1])
  if stop in (".", ","):
    assert len(parrot.ends) > 1  # the loop itself ends there
  (whole,) = continue_rows(None, None, tokenizer, [row], len(ids), **{**options, "stop_texts": ["zebra"]})
  assert whole == (said, ids, False)

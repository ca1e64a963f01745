"""Generation with a key-value cache: one compiled loop for a batch of prompts of any lengths."""

import bisect
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from mixln_jax.config import ModelConfig
from mixln_jax.data.tokenizer import PAD, Tokenizer
from mixln_jax.errors import InputError
from mixln_jax.inference import batching
from mixln_jax.inference.sampling import Sampling, choose
from mixln_jax.model import Transformer
from mixln_jax.model.transformer import Cache, empty_cache, project_to_logits
from mixln_jax.parallel.rules import constrain

CACHE = ("layers", "batch", "key_length", "kv_heads", "head_dim")  # logical axes of the cache
BATCH_SIZE = 32  # prompts at a time


class Text(NamedTuple):
  """The continuation of a prompt."""

  text: str  # without the stop token or stop text
  ids: list[int]  # with the stop token or the tokens of the stop text, if any
  stopped: bool  # whether a stop token or stop text ended it; if not, the maximum number of tokens did


class _State(NamedTuple):
  """The state of the loop. Row b's newest token is at position lengths_B[b] + step - 1."""

  step: jax.Array  # tokens added so far
  token_B: jax.Array  # the newest token
  active_B: jax.Array  # False for rows that have stopped
  tokens_BS: jax.Array  # prompts and added tokens
  cache: Cache


def generate(
  config: ModelConfig,
  params: Any,
  prompts: Sequence[Sequence[int]],
  num_tokens: int,
  *,
  sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
  stop_ids: Sequence[int] = (),
  num_ids: int | None = None,
  numbers: Sequence[int] | None = None,
) -> list[list[int]]:
  """Continues prompts of any lengths, as one batch.

  On a mesh (`parallel.rules.on_mesh`) the rows are sharded like those of a training batch. Lengths and rows are padded
  to a few sizes, so that few shapes are compiled.

  Args:
    config: config.model.
    params: the parameters.
    prompts: the ids of each prompt, at least one.
    num_tokens: the most tokens to add to each prompt.
    sampling: how the next token is chosen; by default the likeliest one.
    stop_ids: a row ends with the first of these; the loop ends when all rows have ended.
    num_ids: only ids below this are sampled; by default all rows of the head (a tokenizer may have fewer ids).
    numbers: each prompt's number in the whole request; with the seed it determines the prompt's draws. By default it is
      the number in this batch. A caller that splits a request into batches must pass numbers, or all batches would have
      the same draws.

  Returns:
    The added ids of each prompt, including its stop token.

  Raises:
    ValueError: a prompt is empty.
    InputError: `sampling` is invalid, or the model is an encoder.
  """
  check_decoder(config, max(map(len, prompts), default=0) + num_tokens)
  sampling.check()
  if not all(map(len, prompts)):
    raise ValueError("a prompt is empty; give it at least one id, such as the end-of-document id")
  longest = max(map(len, prompts))
  num_rows = batching.bucket_rows(len(prompts))
  tokens_BT, lengths_B = batching.pad(prompts, num_rows, batching.bucket(longest))
  numbers_B = np.zeros(num_rows, np.uint32)
  numbers_B[: len(prompts)] = range(len(prompts)) if numbers is None else numbers
  num_slots = max(tokens_BT.shape[1], batching.bucket(longest + num_tokens))
  stop_N = np.full(batching.bucket(max(1, len(stop_ids)), smallest=4), -1, np.int32)
  stop_N[: len(stop_ids)] = stop_ids
  narrowing = (np.int32(sampling.top_k), np.float32(sampling.top_p)) if sampling.narrows else None
  tokens_BS, steps = generate_batch(
    cast(ModelConfig, FrozenConfigDict(config)),
    num_slots,
    num_ids or config.vocab_size,
    params,
    tokens_BT,
    lengths_B,
    numbers_B,
    np.int32(num_tokens),
    stop_N,
    (np.float32(sampling.temperature), narrowing, np.uint32(sampling.seed)),
  )
  added = []
  for row, length in zip(np.asarray(tokens_BS)[: len(prompts)], lengths_B[: len(prompts)], strict=True):
    added.append(_through_stop(row[length : length + int(steps)].tolist(), stop_ids))
  return added


def check_decoder(model: ModelConfig, length: int = 0) -> None:
  """Rejects an encoder, whose tokens attend to later ones, and rows that are longer than a learned position embedding.

  Args:
    model: config.model.
    length: tokens of the longest row, including those to be added.

  Raises:
    InputError: the model can't read such rows from left to right.
  """
  if 0 < model.learned_positions < length:
    raise InputError(
      f"{length} tokens: the model has embeddings only for config.model.learned_positions={model.learned_positions} "
      "positions; shorten the text, or add fewer tokens"
    )
  if model.bidirectional:
    raise InputError(
      "config.model.bidirectional=True: the run is an encoder, which predicts masked tokens; it can't generate text or "
      "score it from left to right; evaluate its masked-token loss, or diagnose it"
    )


def _through_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
  end = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
  return ids[: end + 1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def generate_batch(
  config: ModelConfig,
  num_slots: int,
  num_ids: int,
  params: Any,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  numbers_B: jax.Array,
  num_tokens: jax.Array,
  stop_N: jax.Array,
  sampling: tuple[jax.Array, Any, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Reads the prompts in one pass, then adds one token to each row per iteration.

  Args:
    config: config.model, frozen.
    num_slots: S, the positions for prompt and added tokens, and the size of the cache.
    num_ids: only ids below this are chosen.
    params: the parameters.
    tokens_BT: the prompts, padded at their ends.
    lengths_B: the lengths of the prompts; 0 for a row that only pads the batch.
    numbers_B: the prompts' numbers in the whole request; a row's random key is derived from its number.
    num_tokens: the most tokens to add.
    stop_N: ids that end a row; -1 matches none.
    sampling: temperature, narrowing (as in `choose`), seed.

  Returns:
    The tokens [B, S] (prompts, added tokens, and PAD after a row stopped), and the number of iterations.
  """
  model = Transformer(config)
  temperature, narrowing, seed = sampling
  batch, prompt_length = tokens_BT.shape
  # The padding of shorter prompts writes keys after their ends; each is overwritten before a query can read it.
  positions_BT = jnp.broadcast_to(jnp.arange(prompt_length), tokens_BT.shape)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers_B)
  last_B = jnp.maximum(lengths_B, 1) - 1  # position of the prompt's last token

  def next_logits(tokens_BT: Any, positions_BT: Any, cache: Cache, index_B: Any) -> tuple[jax.Array, Cache]:
    logits_BV, cache = nn.apply(_next_logits, model)({"params": params}, tokens_BT, positions_BT, cache, index_B)
    return logits_BV[:, :num_ids], {name: constrain(part, *CACHE) for name, part in cache.items()}

  def add(state: _State, logits_BV: jax.Array, cache: Cache) -> _State:
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.step)
    token_B = jnp.where(state.active_B, choose(logits_BV, step_keys_B, temperature, narrowing), PAD)
    tokens_BS = state.tokens_BS.at[jnp.arange(batch), last_B + 1 + state.step].set(token_B)
    active_B = state.active_B & ~jnp.isin(token_B, stop_N)
    return _State(state.step + 1, token_B, active_B, tokens_BS, cache)

  def advance(state: _State) -> _State:
    positions_B1 = (last_B + state.step)[:, None]
    first_B = jnp.zeros(batch, jnp.int32)
    return add(state, *next_logits(state.token_B[:, None], positions_B1, state.cache, first_B))

  tokens_BS = jnp.pad(tokens_BT, ((0, 0), (0, num_slots - prompt_length)), constant_values=PAD)
  start = _State(jnp.int32(0), tokens_BT[:, 0], lengths_B > 0, constrain(tokens_BS, "batch", "key_length"), {})
  cache = empty_cache(config, batch, num_slots)
  state = add(start, *next_logits(tokens_BT, positions_BT, cache, last_B))
  state = jax.lax.while_loop(lambda state: (state.step < num_tokens) & state.active_B.any(), advance, state)
  return nn.with_logical_constraint(state.tokens_BS, (None, None)), state.step  # replicated: every process has all rows


def _next_logits(
  model: Transformer, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache, index_B: jax.Array
) -> tuple[jax.Array, Cache]:
  """Logits [B, V] after each row's token at index_B, and the cache with all tokens of the rows."""
  hidden_BTD, taps = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
  hidden_B1D = jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)
  return project_to_logits(hidden_B1D, model.head_weights())[:, 0], taps["cache"]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """The ids of a prompt that starts a document, after an end-of-document token as in training."""
  return [tokenizer.eos_id, *tokenizer.encode(prompt)]


def check_context(longest: int, num_tokens: int, context: int) -> None:
  """Rejects positions beyond the run's training length, where RoPE's angles are new to the model.

  Args:
    longest: tokens of the longest prompt.
    num_tokens: tokens to add.
    context: config.data.sequence_length of the run.

  Raises:
    InputError: prompt and added tokens exceed the context.
  """
  if longest + num_tokens > context:
    room = context - longest
    hint = f"lower it to {room}" if room > 0 else "shorten the prompt"
    raise InputError(
      f"num_tokens={num_tokens}: with the {longest} tokens of the longest prompt that is {longest + num_tokens}, "
      f"more than the {context} that the run was trained on (config.data.sequence_length); "
      f"{hint}, or go beyond it on purpose (beyond_context)"
    )


def generate_texts(
  config: ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  num_tokens: int,
  *,
  sampling: Sampling,
  stop_ids: Sequence[int],
  stop_texts: Sequence[str] = (),
  batch_size: int = BATCH_SIZE,
) -> list[Text]:
  """The continuation of each prompt, which starts a document; arguments as in `continue_rows`."""
  rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
  return continue_rows(
    config,
    params,
    tokenizer,
    rows,
    num_tokens,
    sampling=sampling,
    stop_ids=stop_ids,
    stop_texts=stop_texts,
    batch_size=batch_size,
  )


def continue_rows(
  config: ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  rows: Sequence[Sequence[int]],
  num_tokens: int,
  *,
  sampling: Sampling,
  stop_ids: Sequence[int],
  stop_texts: Sequence[str] = (),
  batch_size: int = BATCH_SIZE,
  numbers: Sequence[int] | None = None,
) -> list[Text]:
  """The continuation of each row of ids, in the order of the rows.

  Args:
    config: config.model.
    params: the parameters.
    tokenizer: the tokenizer of the ids.
    rows: the ids of each row, at least one.
    num_tokens: the most tokens to add to each row.
    sampling: how the next token is chosen.
    stop_ids: a row ends with the first of these.
    stop_texts: a row ends before the first of these in its added text, however the text is tokenized.
    batch_size: rows at a time; the draws do not depend on it.
    numbers: each row's number in the whole request (see `generate`); by default its number here.
  """
  numbers = range(len(rows)) if numbers is None else numbers
  # Ids that contain a stop text end the loop early. A stop text that spans several ids is found only on the host.
  ends = [*stop_ids, *ids_that_contain(tokenizer, stop_texts)]
  results: dict[int, Text] = {}
  for indices in batching.by_length([len(row) for row in rows], batch_size):
    added = generate(
      config,
      params,
      [rows[index] for index in indices],
      num_tokens,
      sampling=sampling,
      stop_ids=ends,
      num_ids=tokenizer.vocab_size,
      numbers=[numbers[index] for index in indices],
    )
    for index, ids in zip(indices, added, strict=True):
      results[index] = _text_of(tokenizer, rows[index], ids, stop_ids, stop_texts)
  return [results[index] for index in range(len(rows))]


def _text_of(
  tokenizer: Tokenizer, row: Sequence[int], ids: list[int], stop_ids: Sequence[int], stop_texts: Sequence[str]
) -> Text:
  """The continuation of a row, up to its first stop text or its stop token."""
  stopped = ids[-1] in stop_ids
  text = added_text(tokenizer, row, ids[:-1] if stopped else ids)
  end = _first_of(text, stop_texts)
  if end is None:
    return Text(text, ids, stopped)

  def has_stop(length: int) -> bool:
    return _first_of(added_text(tokenizer, row, ids[:length]), stop_texts) is not None

  length = bisect.bisect_left(range(len(ids)), True, key=has_stop)  # a longer text has the stop too
  return Text(text[:end], ids[:length], True)


def _first_of(text: str, stops: Sequence[str]) -> int | None:
  """The index of the earliest of several texts; None if there is none."""
  places = [text.find(stop) for stop in stops]
  return min((place for place in places if place >= 0), default=None)


def added_text(tokenizer: Tokenizer, before: Sequence[int], added: Sequence[int]) -> str:
  """The text that ids add after the ids before them.

  Both are decoded together. Tokenizers that put a space before a text (T5's, LLaMA 2's) drop the space of the first
  token that they decode, and for added ids decoded alone that is the space between two words.
  """
  text = tokenizer.decode(before)
  whole = tokenizer.decode([*before, *added])
  if whole.startswith(text):
    return whole[len(text) :]
  # `text` ended in a partial character, decoded as U+FFFD, which the added ids completed.
  pairs = zip(text, whole, strict=False)
  same = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(text), len(whole)))
  return whole[same:]


def ids_that_contain(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
  """The ids whose own text, other than at the start of a document, contains one of `texts`."""
  if not texts:
    return []
  anchor = tokenizer.encode("a")
  ids = []
  for index in range(tokenizer.vocab_size):
    text = added_text(tokenizer, anchor, [index])
    # Skip partial characters, which are U+FFFD alone and part of a character with other ids.
    if "\ufffd" not in text and any(stop in text for stop in texts):
      ids.append(index)
  return ids


def generate_text(
  config: ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  prompt: str,
  num_tokens: int,
  *,
  temperature: float = 0.8,
  seed: int = 0,
) -> str:
  """The continuation of `prompt` up to the end of the document; an empty prompt starts a document."""
  sampling = Sampling(temperature, seed=seed)
  stop_ids = (tokenizer.eos_id,)
  return generate_texts(config, params, tokenizer, [prompt], num_tokens, sampling=sampling, stop_ids=stop_ids)[0].text

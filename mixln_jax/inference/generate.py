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

CACHE = ("layers", "batch", "key_length", "kv_heads", "head_dim")  # its logical axes
BATCH_SIZE = 32  # prompts at a time


class Text(NamedTuple):
  """What was added to a prompt."""

  text: str  # up to where it stopped
  ids: list[int]  # with the tokens that stopped it, where there are some
  stopped: bool  # at a stop token or a stop text; else the number of tokens was reached


class _State(NamedTuple):
  """Where the loop is. Row b's newest token stands at position lengths_B[b] + step - 1."""

  step: jax.Array  # tokens added so far
  token_B: jax.Array  # the newest
  active_B: jax.Array  # False for rows that have stopped
  tokens_BS: jax.Array  # prompts and what was added
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

  On a mesh (`parallel.rules.on_mesh`) its rows are sharded as those of a training batch. Lengths and rows are padded to
  few sizes, so that few shapes are compiled.

  Args:
    config: config.model.
    params: the parameters.
    prompts: ids, at least one each.
    num_tokens: the most to add to each.
    sampling: how the next token is chosen; by default the likeliest.
    stop_ids: a row ends with the first of these; the loop ends when all rows have ended.
    num_ids: only ids below it are sampled; by default all rows of the head (a tokenizer may have fewer ids).
    numbers: each prompt's number in the whole request, which decides its draws together with the seed; by default its
      number in this batch. A caller that cuts a request into batches gives them, or the batches repeat one another.

  Returns:
    The added ids of each prompt, up to and with its stop token.

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
  """Rejects an encoder, whose tokens read those after them, and rows beyond a table of positions.

  Args:
    model: config.model.
    length: tokens of the longest row, those that are to be added among them.

  Raises:
    InputError: the model can't read such rows from left to right.
  """
  if 0 < model.learned_positions < length:
    raise InputError(
      f"{length} tokens: there is no vector for a position beyond config.model.learned_positions="
      f"{model.learned_positions}; shorten the text, or add fewer tokens"
    )
  if model.bidirectional:
    raise InputError(
      "config.model.bidirectional=True: the run is an encoder, which predicts masked tokens; it can't generate, or "
      "score a text from left to right; evaluate its masked-token loss, or diagnose it"
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
  """Reads the prompts in one pass, then adds a token to all rows at a time.

  Args:
    config: config.model, frozen.
    num_slots: S, positions that prompt and added tokens have; a cache of that size is made.
    num_ids: only ids below it are chosen.
    params: the parameters.
    tokens_BT: the prompts, padded behind their ends.
    lengths_B: of the prompts; 0 for a row that only pads the batch.
    numbers_B: of the prompts in the whole request; a row's random key is that of its number.
    num_tokens: the most to add.
    stop_N: ids that end a row; -1 matches none.
    sampling: temperature, narrowing (as `choose` takes them), seed.

  Returns:
    The tokens [B, S] (prompts, what was added, and PAD from where a row stopped), and how many tokens were added to
    the longest row.
  """
  model = Transformer(config)
  temperature, narrowing, seed = sampling
  batch, prompt_length = tokens_BT.shape
  # Padding of shorter prompts writes keys behind their ends; each is overwritten before a query can reach it.
  positions_BT = jnp.broadcast_to(jnp.arange(prompt_length), tokens_BT.shape)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers_B)
  last_B = jnp.maximum(lengths_B, 1) - 1  # of the prompt

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
  return nn.with_logical_constraint(state.tokens_BS, (None, None)), state.step  # whole on every process


def _next_logits(
  model: Transformer, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache, index_B: jax.Array
) -> tuple[jax.Array, Cache]:
  """Logits [B, V] after each row's token at index_B, and the cache with all tokens of the rows."""
  hidden_BTD, taps = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
  hidden_B1D = jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)
  return project_to_logits(hidden_B1D, model.head_weights())[:, 0], taps["cache"]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """Ids of a prompt, which starts a document: they follow the end-of-document token of another."""
  return [tokenizer.eos_id, *tokenizer.encode(prompt)]


def check_context(longest: int, num_tokens: int, context: int) -> None:
  """Rejects positions beyond those that a run was trained at, where RoPE's angles are new to the model.

  Args:
    longest: tokens of the longest prompt.
    num_tokens: tokens to add.
    context: config.data.sequence_length of the run.

  Raises:
    InputError: they don't fit.
  """
  if longest + num_tokens > context:
    room = context - longest
    hint = f"lower it to {room}" if room > 0 else "shorten the prompt"
    raise InputError(
      f"num_tokens={num_tokens}: with the {longest} tokens of the longest prompt that is {longest + num_tokens}, "
      f"more than the {context} that the run was trained at (config.data.sequence_length); "
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
  """The text after each prompt, which starts a document; arguments as `continue_rows`."""
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
  """The text after each row of ids, in their order.

  Args:
    config: config.model.
    params: the parameters.
    tokenizer: that of the ids.
    rows: at least one id each.
    num_tokens: the most to add to each.
    sampling: how the next token is chosen.
    stop_ids: a row ends with the first of these.
    stop_texts: a row ends before the first of these in its added text, however it is cut into tokens.
    batch_size: rows at a time; what is drawn does not depend on it.
    numbers: each row's number in the whole request (see `generate`); by default its number here.
  """
  numbers = range(len(rows)) if numbers is None else numbers
  # A text may also stop between two tokens, which only the host sees; the loop ends early in the usual case.
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
  """What was added to a row, up to its first stop text or its stop token."""
  stopped = ids[-1] in stop_ids
  text = added_text(tokenizer, row, ids[:-1] if stopped else ids)
  end = _first_of(text, stop_texts)
  if end is None:
    return Text(text, ids, stopped)

  def has_stop(length: int) -> bool:
    return _first_of(added_text(tokenizer, row, ids[:length]), stop_texts) is not None

  length = bisect.bisect_left(range(len(ids)), True, key=has_stop)  # a text that has the stop keeps it as it grows
  return Text(text[:end], ids[:length], True)


def _first_of(text: str, stops: Sequence[str]) -> int | None:
  """Where the first of several texts begins; None where there is none of them."""
  places = [text.find(stop) for stop in stops]
  return min((place for place in places if place >= 0), default=None)


def added_text(tokenizer: Tokenizer, before: Sequence[int], added: Sequence[int]) -> str:
  """The text that ids add to those before them.

  Both are decoded together: tokenizers that put a blank before a text (T5's, LLaMA 2's) drop it from the first token
  that they decode, which is the blank between two words where the added ids are decoded alone.
  """
  text = tokenizer.decode(before)
  whole = tokenizer.decode([*before, *added])
  if whole.startswith(text):
    return whole[len(text) :]
  # The end of `text` was half a character, U+FFFD until the added ids completed it.
  pairs = zip(text, whole, strict=False)
  same = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(text), len(whole)))
  return whole[same:]


def ids_that_contain(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
  """The ids whose own text contains one of `texts`, in any place but a document's first."""
  if not texts:
    return []
  anchor = tokenizer.encode("a")
  found = []
  for index in range(tokenizer.vocab_size):
    text = added_text(tokenizer, anchor, [index])
    # A byte of a longer character is U+FFFD alone and something else beside the others.
    if "\ufffd" not in text and any(stop in text for stop in texts):
      found.append(index)
  return found


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
  """The text after `prompt`, up to the end of a document; with an empty prompt, from the start of a document."""
  sampling = Sampling(temperature, seed=seed)
  stop_ids = (tokenizer.eos_id,)
  return generate_texts(config, params, tokenizer, [prompt], num_tokens, sampling=sampling, stop_ids=stop_ids)[0].text

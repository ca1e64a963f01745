"""Preference data: pairs of answers to one prompt, of which the first is preferred.

A pair is an object with `chosen` and `rejected`, and perhaps a `prompt`; other fields are ignored. It is read from JSON
(a list, or lines), Parquet, or a data set that is addressed by number. Its three forms are those in which
`ultrafeedback_binarized` and its like are published:

    explicit         prompt, chosen and rejected are texts; each answer follows the prompt as it stands
    implicit         there is no prompt: it is the longest beginning that both texts share, as TRL takes it
    conversational   chosen and rejected are lists of messages {role, content}; the prompt is a list of messages, or
                     those that both lists begin with; a text beside two conversations repeats them and is not read

The messages of a prompt take the wording of instructions, turn by turn: a model that was tuned on instructions here has
read the same.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from mixln_jax.data import addressed
from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data.addressed import Address
from mixln_jax.data.corpus import BAD_UNICODE, JSON_LINES, PARQUET, SOURCE, TOO_LONG, Bad, Part
from mixln_jax.data.files import LONGEST_DOCUMENT
from mixln_jax.data.finding import has_suffix
from mixln_jax.data.instructions import ANSWER_TOO_LONG, NO_OBJECT, conversation_prompt
from mixln_jax.data.records import Answered
from mixln_jax.data.tokenizer import Tokenizer

MODE = "preferences"  # the mode of its records
JSON = "json_pairs"  # the kind of a part that is a file of JSON
FIELDS = ("prompt", "chosen", "rejected")
# Why a pair can't be used.
NO_ANSWER, NO_PROMPT, NO_COMMON_PROMPT = "no chosen or rejected answer", "no prompt", "no common prompt"
EQUAL_ANSWERS, NO_CONVERSATION = "equal answers", "not a conversation"
PAIR_TOO_LONG = "both answers together too long"
ROLES = ("system", "user", "assistant")


class Pair(NamedTuple):
  """Two answers to a prompt, as text."""

  name: str  # hash of the prompt: two pairs of a question are never on both sides of the split
  prompt: str
  chosen: str
  rejected: str


class PairTokens(NamedTuple):
  """A pair as a model sees it, twice the end-of-document id, prompt, answer, the end-of-document id.

  The two sequences have the same ids up to their answers, of which the end counts.
  """

  chosen: Answered
  rejected: Answered
  num_cut: int  # ids of the prompt that had no room, in each of them


class _Unusable(Exception):
  """A pair that can't be used; its text is the reason."""


def parts_of(source: str, field: str = SOURCE, left_out: Counter[str] | None = None) -> list[Part]:
  """The parts of a source of pairs, in an order that never changes.

  Args:
    source: what config.data.source or config.data.validation_source says.
    field: the one of them that a message names.
    left_out: counts, by reason, the files that lie there and are not read.

  Raises:
    InputError: there are no files, or one is of another kind.
  """
  if addressed.address_of(source, field):
    return corpus_lib.parts_of(source, field, left_out)
  parts = []
  for path, size in corpus_lib.files_of(source, (*JSON_LINES, *PARQUET), field, left_out, mode=MODE):
    if has_suffix(path, PARQUET):
      parts += corpus_lib.parquet_parts(path)
    else:  # whole: what begins like a list can only be read from its beginning
      parts.append(Part(JSON, (path,), size=size))
  return parts


def read(part: Part) -> Iterator[Pair | Bad]:
  """The pairs of a part, and those that can't be used.

  Raises:
    InputError: a file can't be read, is damaged, or begins like a JSON list and is not one.
  """
  with corpus_lib.reading(part.paths[0]):
    for where, value in _objects_of(part):
      yield value if isinstance(value, Bad) else _pair_or_bad(value, where)


def _objects_of(part: Part) -> Iterator[tuple[str, Any]]:
  if part.kind == JSON:
    return corpus_lib.json_list_or_lines(part.paths[0])
  if part.kind == "parquet":
    return corpus_lib.parquet_objects(part, FIELDS)
  address = Address(part.kind, *part.paths)
  examples = addressed.open_examples(address)
  numbers = range(part.begin, part.end)
  return ((f"{address}, example {number}", examples[number]) for number in numbers)


def _pair_or_bad(value: Any, where: str) -> Pair | Bad:
  try:
    return pair_of(value)
  except _Unusable as error:
    return Bad(str(error), where)
  except UnicodeEncodeError:  # a lone surrogate
    return Bad(BAD_UNICODE, where)


def pair_of(value: Any) -> Pair:
  """The pair that an object states; the top of this file has its forms."""
  if not isinstance(value, dict):
    raise _Unusable(NO_OBJECT)
  prompt, chosen, rejected = (_as_text(value.get(name)) for name in FIELDS)
  if isinstance(chosen, str) and isinstance(rejected, str):
    prompt, chosen, rejected = _of_texts(prompt, chosen, rejected)
  elif _is_list(chosen) and _is_list(rejected):
    prompt, chosen, rejected = _of_conversations(prompt, chosen, rejected)
  else:
    raise _Unusable(NO_ANSWER)
  if not prompt.strip():
    raise _Unusable(NO_PROMPT)
  if not (chosen.strip() and rejected.strip()):
    raise _Unusable(NO_ANSWER)
  if chosen == rejected:
    raise _Unusable(EQUAL_ANSWERS)
  encoded = [text.encode() for text in (prompt, chosen, rejected)]
  if sum(map(len, encoded)) > LONGEST_DOCUMENT:
    raise _Unusable(TOO_LONG)
  return Pair(hashlib.sha256(encoded[0]).hexdigest(), prompt, chosen, rejected)


def _as_text(value: Any) -> Any:
  """A field as it is; bytes, as a data set may hold texts, decoded."""
  if not isinstance(value, bytes):
    return value
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise _Unusable(BAD_UNICODE) from error


def _is_list(value: Any) -> bool:
  return isinstance(value, list | tuple)


def _of_texts(prompt: Any, chosen: str, rejected: str) -> tuple[str, str, str]:
  if prompt is None:
    return _without_common_prompt(chosen, rejected)
  if not isinstance(prompt, str):
    raise _Unusable(NO_PROMPT)
  return prompt, chosen, rejected


def _without_common_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
  """The longest beginning that two texts share, and what follows it; a blank at its end belongs to the answers."""
  if chosen == rejected:
    raise _Unusable(EQUAL_ANSWERS)
  length = _common_length(chosen, rejected)
  if length and chosen[length - 1] == " ":
    length -= 1
  if not chosen[:length].strip():
    raise _Unusable(NO_COMMON_PROMPT)
  return chosen[:length], chosen[length:], rejected[length:]


def _common_length(one: Any, other: Any) -> int:
  """How many of the first elements of two sequences are equal."""
  length = 0
  for mine, theirs in zip(one, other, strict=False):
    if mine != theirs:
      break
    length += 1
  return length


def _of_conversations(prompt: Any, chosen: Any, rejected: Any) -> tuple[str, str, str]:
  chosen, rejected = _messages(chosen), _messages(rejected)
  if _is_list(prompt):
    asked = _messages(prompt)
  elif prompt is None or isinstance(prompt, str):
    length = _common_length(chosen, rejected)
    asked, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if not (chosen or rejected):
      raise _Unusable(EQUAL_ANSWERS)
    if not asked:
      raise _Unusable(NO_COMMON_PROMPT)
  else:
    raise _Unusable(NO_PROMPT)
  if asked and asked[-1][0] != "user":
    raise _Unusable(NO_CONVERSATION)
  return conversation_prompt(asked), _answer(chosen), _answer(rejected)


def _messages(values: Any) -> list[tuple[str, str]]:
  """(role, content) of each message, without the white space around it."""
  messages = []
  for value in values:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if role not in ROLES or not isinstance(content, str):
      raise _Unusable(NO_CONVERSATION)
    messages.append((role, content.strip()))
  return messages


def _answer(messages: list[tuple[str, str]]) -> str:
  """What the assistant says after the prompt, which is one message."""
  if not messages:
    raise _Unusable(NO_ANSWER)
  if len(messages) > 1 or messages[0][0] != "assistant":
    raise _Unusable(NO_CONVERSATION)
  return messages[0][1]


def tokenize(pair: Pair, tokenizer: Tokenizer, sequence_length: int) -> PairTokens | str:
  """The tokens of a pair, together at most `sequence_length`; or the reason why they can't be.

  Prompt and answers are encoded separately, so that no token spans both and the prompt is the same in both sequences.
  A prompt that is too long loses its beginning in both; an answer never loses a token.
  """
  prompt, chosen, rejected = (tokenizer.encode(text) for text in (pair.prompt, pair.chosen, pair.rejected))
  if chosen == rejected:
    return EQUAL_ANSWERS
  if max(len(chosen), len(rejected)) + 3 > sequence_length:
    return ANSWER_TOO_LONG
  room = (sequence_length - len(chosen) - len(rejected) - 4) // 2  # for each prompt, between end-of-document ids
  if room < 1:
    return PAIR_TOO_LONG
  end, asked = tokenizer.eos_id, prompt[-room:]
  sequences = [Answered([end, *asked, *answer, end], len(answer) + 1) for answer in (chosen, rejected)]
  return PairTokens(*sequences, num_cut=max(0, len(prompt) - room))

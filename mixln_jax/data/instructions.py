"""Instruction data: files of examples, the prompt of an example, and its tokens.

A file is a JSON list, as Commonsense170K (Hu et al. 2023, arXiv 2304.01933) is published, or JSON lines, of objects
with `instruction`, `output` and optionally `input`; other fields are ignored. The model learns to answer the prompt
with the output: nothing else counts in the loss.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data.corpus import BAD_UNICODE, JSON_LINES, SOURCE, Bad, Part
from mixln_jax.data.tokenizer import Tokenizer

KIND = "instructions"  # the kind of a part, and the mode of its records
NO_OBJECT, NO_INSTRUCTION, NO_OUTPUT, NO_TEXT = "not an object", "no instruction", "no output", "input is no text"
ANSWER_TOO_LONG = "answer too long"

# Alpaca's wording, which the code of Commonsense170K took over (and indents there).
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""


class Example(NamedTuple):
  """An instruction and its answer, as text."""

  name: str  # hash of the prompt: two copies of a question are never on both sides of the split
  prompt: str
  answer: str


class Tokens(NamedTuple):
  """An example as a model sees it: the end-of-document id, the prompt, the answer, the end-of-document id."""

  ids: list[int]
  num_answer: int  # how many of them, the last ones, are the answer and its end
  num_cut: int  # ids of the prompt that had no room


def prompt_of(instruction: str, text: str = "") -> str:
  """The prompt, up to where the answer begins; `text` is the example's input, if it has one."""
  template = WITH_INPUT if text else WITHOUT_INPUT
  return template.format(instruction=instruction, input=text)


def conversation_prompt(messages: Sequence[tuple[str, str]]) -> str:
  """The prompt that (role, content) messages are, up to where the next answer begins.

  One message of a user is `prompt_of` of it. Further turns follow in the same words, and a system's message takes the
  place of the line above the first instruction.
  """
  preamble, heading = WITHOUT_INPUT.split("\n\n", 1)
  turns = []
  for role, content in messages:
    if role == "system":
      preamble = content
    elif role == "user":
      turns.append(heading.format(instruction=content))
    else:
      turns.append(f"{content}\n\n")
  return f"{preamble}\n\n{''.join(turns)}"


def parts_of(source: str, field: str = SOURCE, left_out: Counter[str] | None = None) -> list[Part]:
  """The files of a path, folder or glob, one part each, in an order that never changes.

  Args:
    source: what config.data.source or config.data.validation_source says.
    field: the one of them that a message names.
    left_out: counts, by reason, the files that lie there and are not read.

  Raises:
    InputError: there are no files, or one is of another kind.
  """
  # A whole file each: what begins like a list can only be read from its beginning.
  sizes = corpus_lib.files_of(source, JSON_LINES, field, left_out, mode=KIND)
  return [Part(KIND, (path,), size=size) for path, size in sizes]


def read(part: Part) -> Iterator[Example | Bad]:
  """The examples of a file, and those that can't be used.

  Raises:
    InputError: the file can't be read, is damaged, or begins like a JSON list and is not one.
  """
  (path,) = part.paths
  with corpus_lib.reading(path):
    for where, value in corpus_lib.json_list_or_lines(path):
      yield value if isinstance(value, Bad) else _example_of(value, where)


def _example_of(value: Any, where: str) -> Example | Bad:
  if not isinstance(value, dict):
    return Bad(NO_OBJECT, where)
  instruction, text, output = (value.get(name) for name in ("instruction", "input", "output"))
  if not isinstance(instruction, str) or not instruction.strip():
    return Bad(NO_INSTRUCTION, where)
  if not isinstance(output, str) or not output.strip():
    return Bad(NO_OUTPUT, where)
  if not isinstance(text, str | None):
    return Bad(NO_TEXT, where)
  prompt, answer = prompt_of(instruction.strip(), (text or "").strip()), output.strip()
  try:
    answer.encode()
    return Example(hashlib.sha256(prompt.encode()).hexdigest(), prompt, answer)
  except UnicodeEncodeError:  # a lone surrogate
    return Bad(BAD_UNICODE, where)


def tokenize(example: Example, tokenizer: Tokenizer, sequence_length: int) -> Tokens | None:
  """The tokens of an example, at most `sequence_length`; None if its answer is too long for that.

  Prompt and answer are encoded separately, so that no token spans both. A prompt that is too long loses its beginning:
  the answer stays whole, right behind the words that ask for it.
  """
  prompt, answer = tokenizer.encode(example.prompt), tokenizer.encode(example.answer)
  room = sequence_length - len(answer) - 2  # for the prompt, between the two end-of-document ids
  if room < 1:
    return None
  end = tokenizer.eos_id
  ids = [end, *prompt[-room:], *answer, end]
  return Tokens(ids, num_answer=len(answer) + 1, num_cut=max(0, len(prompt) - room))

"""Files of prompts."""

import json

from mixln_jax.errors import InputError
from mixln_jax.files import local_path, read_regular

LARGEST = 1 << 28  # bytes


def read_prompts(path: str) -> list[str]:
  """The prompts of a .txt file, one per line without empty lines, or of a .jsonl file, one `{"prompt": …}` per line.

  Raises:
    InputError: the file can't be read, has no prompts, or has a JSON line without a prompt.
  """
  file = local_path(path)
  if file.suffix not in (".txt", ".jsonl"):
    raise InputError(f"prompts={path}: must end in .txt (one prompt per line) or .jsonl (objects with `prompt`)")
  try:
    text = read_regular(file, LARGEST).decode("utf-8-sig")  # -sig drops a byte order mark
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"prompts={path}: can't be read ({error})") from error
  # Not `splitlines`, which also splits at U+2028 and form feeds: those are part of a prompt.
  lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
  if not lines:
    raise InputError(f"prompts={path}: holds no prompt")
  if file.suffix == ".txt":
    return lines
  return [_prompt_of(line, path) for line in lines]


def _prompt_of(line: str, path: str) -> str:
  try:
    prompt = json.loads(line)["prompt"]
    prompt.encode()
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise InputError(f'prompts={path}: the line {line[:60]!r} is not a JSON object with a text "prompt"') from error
  return prompt

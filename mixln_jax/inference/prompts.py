"""Files of prompts."""

import json

from mixln_jax.errors import InputError
from mixln_jax.places import local_path


def read_prompts(path: str) -> list[str]:
  """The prompts of a .txt file, one a line (empty lines are left out), or of a .jsonl file, `{"prompt": …}` a line.

  Raises:
    InputError: the file can't be read, holds no prompt, or has a line without one.
  """
  file = local_path(path, "prompts", "copy the file to this machine")
  if file.suffix not in (".txt", ".jsonl"):
    raise InputError(f"prompts={path}: must end in .txt (a prompt a line) or .jsonl (objects with `prompt`)")
  try:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"prompts={path}: can't be read ({error})") from error
  if not lines:
    raise InputError(f"prompts={path}: holds no prompt")
  if file.suffix == ".txt":
    return lines
  return [_prompt_of(line, path) for line in lines]


def _prompt_of(line: str, path: str) -> str:
  try:
    prompt = json.loads(line)["prompt"]
  except (ValueError, TypeError, KeyError):
    prompt = None
  if not isinstance(prompt, str):
    raise InputError(f'prompts={path}: the line {line[:60]!r} is not a JSON object with a text "prompt"')
  return prompt

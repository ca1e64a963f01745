"""Files of prompts: a prompt a line, whatever else is in it."""

import json
import os

import pytest

from mixln_jax.errors import InputError
from mixln_jax.inference.prompts import read_prompts

ODD = ["a\u2028b", "page\x0cbreak", "next\x85line", "group\x1dmark", "\ufeffmark inside is text", "  blanks  ", "茶"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_only_a_newline_ends_a_prompt(tmp_path, end, mark):
  """Would catch a prompt that is cut at U+2028 or a form feed, and a byte order mark that becomes part of the first."""
  path = tmp_path / "prompts.txt"
  path.write_bytes((mark + end.join(["tea", *ODD, "", "end"])).encode())
  assert read_prompts(str(path)) == ["tea", *ODD, "end"]
  path = tmp_path / "prompts.jsonl"
  lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in ODD]
  path.write_bytes((mark + end.join(lines)).encode())
  assert read_prompts(str(path)) == ODD


@pytest.mark.parametrize(
  "line", ["[" * 100_000, '{"prompt": "\\ud800"}', '{"prompt": 3}', "[]", "3", '{"text": "tea"}']
)
def test_a_line_without_a_prompt_is_named(tmp_path, line):
  """Would catch a traceback for what is no object, is nested too deep, or is half of a character."""
  (tmp_path / "prompts.jsonl").write_text(line)
  with pytest.raises(InputError, match=r"^prompts=.*is not a JSON object with a text"):
    read_prompts(str(tmp_path / "prompts.jsonl"))


def test_a_file_that_is_no_text_is_named(tmp_path):
  """Would catch a wait for a pipe, and bytes of another encoding that are read as something."""
  os.mkfifo(tmp_path / "pipe.txt")
  (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
  for name, words in (("pipe", "a pipe"), ("latin", "can't be read"), ("gone", "can't be read")):
    with pytest.raises(InputError, match=words):
      read_prompts(str(tmp_path / f"{name}.txt"))

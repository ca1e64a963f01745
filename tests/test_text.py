"""Text that people read."""

import json
import sys

import pytest

from mixln_jax.text import for_stdout, printable


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("tea\n\tcafés ☃ 茶 \U0001f375\n", "tea\n\tcafés ☃ 茶 \U0001f375\n"),
    ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
    ("a\rb\bc\x7f\x00", r"a\rb\x08c\x7f\x00"),
    ("\x9b31m", r"\x9b31m"),
    ("\u202eabc\u2066", r"\u202eabc\u2066"),
    ("\ud800", r"\ud800"),
  ],
)
def test_control_characters_are_escaped_and_no_others(text, shown):
  """Would catch a generated text that clears the screen, sets the window's title, or turns what stands around it."""
  assert printable(text) == shown


def test_only_a_terminal_gets_escapes(monkeypatch):
  """Would catch a text that is changed on its way into a file, and one that a terminal obeys."""
  for is_terminal, expected in ((True, r"\x1b[1m"), (False, "\x1b[1m")):
    monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer, raising=False)
    assert for_stdout("\x1b[1m") == expected
  assert json.dumps("\x1b\x9b") == r'"\u001b\u009b"'  # what --json relies on

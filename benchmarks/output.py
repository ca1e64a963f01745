"""Where a benchmark writes: types of command-line flags that make the folder before anything is measured."""

import argparse
import os
from pathlib import Path


def output_file(text: str) -> Path:
  """The path of a file to write, in a folder that is there from now on.

  Raises:
    argparse.ArgumentTypeError: it is a folder, or can't be written.
  """
  path = Path(text)
  if path.is_dir():
    raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
  output_folder(str(path.parent))
  if path.exists() and not os.access(path, os.W_OK):
    raise argparse.ArgumentTypeError(f"{text} can't be written; name another file")
  return path


def output_folder(text: str) -> Path:
  """The path of a folder to write to, which is there from now on.

  Raises:
    argparse.ArgumentTypeError: it can't be made, or nothing can be written there.
  """
  path = Path(text)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise argparse.ArgumentTypeError(f"{text} can't be made a folder ({error.strerror}); name another place") from error
  if not os.access(path, os.W_OK):
    raise argparse.ArgumentTypeError(f"{text}: nothing can be written there; name another place")
  return path

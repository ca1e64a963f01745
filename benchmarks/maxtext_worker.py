"""Compiles MaxText's training step for a TPU slice and saves the program; run by a Python that has MaxText.

Its arguments are the file to write and the arguments of MaxText's `train_compile`. The file has the format in which
`benchmarks.compile_for_tpu --texts` saves this repository's step, so that the same code counts both.
"""

import gzip
import json
import re
import sys
import time
from importlib.metadata import version
from typing import Any

from maxtext.trainers.pre_train import train_compile  # pyright: ignore[reportMissingImports]

VERSIONS = ("maxtext", "jax", "jaxlib", "libtpu", "flax")


def main() -> None:
  path, *arguments = sys.argv[1:]
  jit_and_compile = train_compile.jit_and_compile
  made = []

  def keep(*args: Any, **kwargs: Any) -> Any:
    made.append(jit_and_compile(*args, **kwargs))
    return made[-1]

  train_compile.jit_and_compile = keep
  started = time.monotonic()
  train_compile.main(["train_compile", *arguments])
  compiled = made[-1]
  analysis = compiled.memory_analysis()
  memory = {
    "arguments": analysis.argument_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
    "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    "code": analysis.generated_code_size_in_bytes,
  }
  text = compiled.as_text()
  seconds = time.monotonic() - started
  step = {"program": "", "seconds": seconds, "memory": memory, "message": "", "text": text}
  versions = {name: _version(name) for name in VERSIONS}
  with gzip.open(path, "wt") as file:
    json.dump({"step": step, "versions": versions}, file)


def _version(name: str) -> str:
  try:
    return version(name)
  except ModuleNotFoundError:  # unpacked beside the environment, as where its metadata asks for another Python
    found = re.search(rf"{name}-([\d.]+)\.dist-info", " ".join(map(str, _dist_infos())))
    return found.group(1) if found else "unknown"


def _dist_infos() -> list[Any]:
  from pathlib import Path

  return [path.name for entry in sys.path for path in Path(entry or ".").glob("*.dist-info")]


if __name__ == "__main__":
  main()

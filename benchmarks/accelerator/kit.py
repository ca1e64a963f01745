"""What measurements of one accelerator stand on: slots that resume one another, and processes that do the work.

The process that runs the kit never touches the device: each piece of work is a process of its own, so that one that
fills the memory, hangs or crashes is a line of the table and not the end of the kit, and nothing holds memory that the
next one needs.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.train_speed import Worker
from mixln_jax.files import write_whole

ROOT = Path(__file__).parents[2]
Result = dict[str, Any]


class PieceError(Exception):
  """A piece of work did not end well; the text is what it said last."""


class Piece(NamedTuple):
  """One measurement.

  Attributes:
    name: its key in the results, for instance `tune/1b/full/32`.
    seconds: what it may take; it is begun only where the slot has that much left, and ended when it takes longer.
    measure: does it; what it returns is JSON.
  """

  name: str
  seconds: float
  measure: Callable[["Kit"], Result]


class Kit:
  """One machine's results, and the means to get more of them.

  Attributes:
    small: sizes for a test on a CPU.
    torch: a Python that has torch and transformers; None leaves that peer out.
    results: finished pieces by name.
  """

  def __init__(self, out: Path, *, small: bool, torch: str | None):
    self.out, self.small, self.torch = out, small, torch
    self.document: Result = json.loads(out.read_text()) if out.is_file() else {"machine": {}, "pieces": {}}
    self.results: dict[str, Result] = self.document["pieces"]
    self._deadline = float("inf")

  def run(self, piece: Piece) -> Result:
    """Measures a piece and writes its result, which is `{"error": …}` where it did not end well."""
    started = time.monotonic()
    self._deadline = started + piece.seconds
    result: Result
    try:
      result = piece.measure(self)
    except PieceError as error:
      result = {"error": str(error)}
    result["took"] = round(time.monotonic() - started, 1)
    result["measured"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self.results[piece.name] = result
    self.write()
    return result

  def write(self) -> None:
    self.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(self.out, json.dumps(self.document, indent=1) + "\n")

  def best(self, prefix: str) -> tuple[str, Result] | None:
    """The finished piece of most tokens a second among those whose names begin so."""
    found = {
      name: result for name, result in self.results.items() if name.startswith(prefix) and "tokens_per_second" in result
    }
    if not found:
      return None
    name = max(found, key=lambda one: found[one]["tokens_per_second"])
    return name, found[name]

  def module(self, name: str, request: Result, environment: dict[str, str] | None = None) -> Result:
    """What `python -m benchmarks.accelerator.NAME REQUEST` prints as its last line."""
    command = [sys.executable, "-m", f"benchmarks.accelerator.{name}", json.dumps(request)]
    return json.loads(self.command(command, environment).strip().splitlines()[-1])

  def command(
    self, command: Sequence[str], environment: dict[str, str] | None = None, statuses: Sequence[int] = (0,)
  ) -> str:
    """What a command prints; it has the time that is left to the piece.

    Raises:
      PieceError: it took too long or ended with another exit status.
    """
    process = subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env=own_environment() | (environment or {}),
      start_new_session=True,
    )
    try:
      printed, complaints = process.communicate(timeout=self._left())
    except subprocess.TimeoutExpired:
      end(process)
      process.communicate()
      raise PieceError("it took longer than a piece of its kind may") from None
    if process.returncode not in statuses:
      raise PieceError(f"exit status {process.returncode}: {last_words(complaints or printed)}")
    return printed

  @contextmanager
  def worker(self, command: list[str], request: Result) -> Iterator[Worker]:
    """A trainer that takes steps when it is asked (benchmarks/speed_worker.py), killed when the piece's time is over.

    Raises:
      PieceError: it ended by itself, most often because the device has too little memory.
    """
    with tempfile.TemporaryFile("w+") as complaints:
      worker = None
      try:
        worker = Worker(command, request, own_environment(), stderr=complaints, seconds=self._left())
        yield worker
        worker.close()
      except (SystemExit, BrokenPipeError) as error:
        complaints.seek(0)
        raise PieceError(last_words(complaints.read()) or str(error)) from error
      finally:
        if worker is not None:
          worker.process.kill()
          worker.process.wait()

  def _left(self) -> float:
    return max(self._deadline - time.monotonic(), 1.0)


def own_environment() -> dict[str, str]:
  """The environment of a process that has the device to itself, and compiles anew."""
  return os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "JAX_ENABLE_COMPILATION_CACHE": "0"}


def end(process: subprocess.Popen[str]) -> None:
  """Kills a process and what it has started."""
  with suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)


def last_words(text: str) -> str:
  """The last line that names an error, or simply the last one, at most 300 characters."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  named = [line for line in lines if "Error" in line or "error:" in line or "RESOURCE_EXHAUSTED" in line]
  chosen = named or lines or ["it said nothing"]
  return chosen[-1][:300]

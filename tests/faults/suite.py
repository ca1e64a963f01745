"""The fault suite: real processes, real faults, and what was observed. The table in docs/faults.md is made by

PYTHONPATH=.:tests .venv/bin/python -m faults.suite > docs/faults.md
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax.data.prepare import prepare
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.metrics import read_metrics
from mixln_jax.training import step as step_lib
from mixln_jax.training.checkpoints import restore_state, split

ROOT = Path(__file__).parents[2]
KILLED = -9


class Case(NamedTuple):
  fault: str  # a key of victim.FAULTS
  number: int = 1
  status: int = KILLED  # of the process with the fault
  says: str = ""  # what stands in its stderr
  damage: Callable[[Path], Any] | None = None  # done between the two processes; what it returns undoes it
  promise: str = "bit-equal"  # what running again gives: "bit-equal", or the text of a refusal

  @property
  def name(self) -> str:
    what = self.fault if self.damage is None else (self.damage.__doc__ or "").rstrip(".")
    return f"{what} ({self.number})" if self.number > 1 and self.damage is None else what


def newest(workdir: Path) -> Path:
  return max((path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))


def largest_file(folder: Path) -> Path:
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(workdir: Path) -> None:
  """Newest checkpoint truncated."""
  for path in (newest(workdir) / "params").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(workdir: Path) -> None:
  """A bit flipped in the newest checkpoint."""
  path = largest_file(newest(workdir) / "params")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(bytes(data))


def flip_optimizer(workdir: Path) -> None:
  """A bit flipped in the newest checkpoint's optimizer state."""
  path = largest_file(newest(workdir) / "rest")
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 1
  path.write_bytes(bytes(data))


def delete_file(workdir: Path) -> None:
  """A file of the newest checkpoint deleted."""
  largest_file(newest(workdir) / "rest").unlink()


def delete_newest(workdir: Path) -> None:
  """Newest checkpoint deleted."""
  import shutil

  shutil.rmtree(newest(workdir))


def foreign(workdir: Path) -> None:
  """Newest checkpoint of another model."""
  path = newest(workdir)
  facts = next(file for file in (path / "facts").iterdir() if '"post"' in file.read_text())
  facts.write_text(facts.read_text().replace('"post"', '"lns"'))


def damage_all(workdir: Path) -> None:
  """Every checkpoint damaged."""
  for path in (workdir / "checkpoints").iterdir():
    if path.name.isdigit():
      largest_file(path / "params").write_bytes(b"")


def tear_metrics(workdir: Path) -> None:
  """A torn last line of metrics."""
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "split": "tr')


def corrupt_shard(workdir: Path) -> Callable[[], object]:
  """A data shard of the same size with other bytes."""
  config = config_lib.from_json((workdir / "config.json").read_text())
  shard = next(Path(config.data.directory).glob("train-*"))
  original = shard.read_bytes()
  data = bytearray(original)
  for position in range(2000, len(data) // 4):
    data[position] ^= 0x5A
  shard.write_bytes(bytes(data))
  return lambda: shard.write_bytes(original)


def second_writer(workdir: Path) -> Callable[[], object]:
  """Another process that trains in the same folder."""
  stack = contextlib.ExitStack()
  stack.enter_context(RunFolder(workdir).lock())
  return stack.close


FAST = (
  Case("kill before a step", 4),
  Case("kill at a rename of a checkpoint", 1),
  Case("SIGTERM", 3, status=75, damage=flip),
  Case("NaN in a gradient", 4, status=0),
)
CASES = (
  *FAST,
  Case("kill during compile"),
  Case("kill while facts are written"),
  Case("kill before a step", 1),
  Case("kill before a step", 6),
  Case("kill while metrics are written", 3),
  Case("kill during evaluation", 1),
  Case("kill during evaluation", 2),
  Case("kill as a checkpoint begins", 1),
  Case("kill as a checkpoint begins", 2),
  *(Case("kill at an open of a checkpoint's file", number) for number in (1, 3, 6)),
  *(Case("kill at a rename of a checkpoint", number) for number in (2, 4)),
  Case("kill while old checkpoints are removed"),
  Case("kill while the outcome is written"),
  Case("SIGTERM", 1, status=75),
  Case("SIGTERM", 5, status=75),
  Case("SIGTERM twice", 3, status=130),
  Case("disk full for a checkpoint", status=1, says="No space left"),
  Case("disk full for metrics", 4, status=1, says="No space left"),
  Case("tracker that fails", status=0, says="no quota left"),
  Case("clock that jumps", status=0),
  *(Case("SIGTERM", 5, status=75, damage=damage) for damage in (truncate, flip_optimizer, delete_file, delete_newest)),
  Case("SIGTERM", 5, status=75, damage=foreign),
  Case("SIGTERM", 5, status=75, damage=tear_metrics),
  Case("SIGTERM", 5, status=75, damage=damage_all, promise="no checkpoint of the run is whole"),
  Case("SIGTERM", 3, status=75, damage=corrupt_shard, promise="a record can't be read"),
  Case("SIGTERM", 3, status=75, damage=second_writer, promise="another process trains there"),
)


class Suite:
  """A small run with two micro-batches and an epoch that ends within it, and the same run without any fault."""

  def __init__(self, folder: Path):
    self.folder = folder
    (folder / "text").mkdir()
    for index in range(40):
      (folder / "text" / f"{index:02d}.txt").write_text(f"some text of document {index} " * (2 + index % 3))
    config = config_lib.base()
    config.model.update(vocab_size=259, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=2, placement="mix:0.5")
    config.data.update(source=str(folder / "text"), tokenizer="bytes", sequence_length=32, validation_share=0.2)
    config.data.directory = str(folder / "records")
    config.train.update(num_steps=6, batch_size=32, micro_batches=2)
    config.optimizer.warmup_steps = 1
    config.checkpoint.update(every_steps=2, keep_last=2)
    config.evaluate.update(every_steps=3, batch_size=8)
    records = prepare(config, progress=False).manifest.splits["train"].records
    assert 32 < records < 6 * 32  # an epoch ends in the middle of the run
    self.config = config
    (folder / "config.json").write_text(config_lib.to_json(config))
    self.run(folder / "untouched", "none", 1)

  def run(self, workdir: Path, fault: str, number: int) -> subprocess.CompletedProcess[str]:
    command = [
      sys.executable,
      "-m",
      "faults.victim",
      str(self.folder / "config.json"),
      str(workdir),
      fault,
      str(number),
    ]
    environment = os.environ | {
      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
      "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

  def result(self, workdir: Path) -> dict[str, np.ndarray]:
    """The whole state of the last step, and what metrics.jsonl says, less speeds."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    shardings = step_lib.state_shardings(self.config, make_mesh(self.config.mesh))
    state = restore_state(self.config, shardings, checkpoints, 6)
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(split(state))
    values = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    lines = read_metrics(workdir / "metrics.jsonl")
    slow = ("tokens_per_second",)
    text = [json.dumps({name: line[name] for name in sorted(line) if name not in slow}) for line in lines]
    return values | {"metrics": np.array(text)}

  def observe(self, case: Case, workdir: Path) -> str:
    """Runs a case; says what was observed, or raises AssertionError where the promise is not kept."""
    first = self.run(workdir, case.fault, case.number)
    assert first.returncode == case.status, (case.name, first.returncode, first.stderr[-2000:])
    assert case.says in first.stderr, first.stderr[-2000:]
    undo = case.damage(workdir) if case.damage is not None else None
    what = "killed" if case.status == KILLED else f"exit {case.status}"
    kept = list((workdir / "checkpoints").glob("[0-9]*")) if (workdir / "checkpoints").exists() else []
    again = self.run(workdir, "none", 1)
    if undo is not None:
      undo()
    if case.promise != "bit-equal":
      assert again.returncode == 2, again.stderr[-2000:]
      assert case.promise in again.stderr
      assert all(path.exists() for path in kept)  # nothing is lost
      return f"{what}; run again: refused, “{case.promise}”, nothing lost"
    assert again.returncode == 0, again.stderr[-2000:]
    reference = self.folder / "untouched"
    if case.fault == "NaN in a gradient":
      skipped = json.loads((workdir / "outcome.json").read_text())["skipped_updates"]
      assert skipped == 1
      return f"{what}; the update was skipped and counted, the run finished"
    expected, actual = self.result(reference), self.result(workdir)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(actual[name], value, err_msg=f"{case.name}: {name}")
    loud = "a warning, and " if "warning" in again.stderr else ""
    return f"{what}; run again: {loud}parameters, optimizer state and metrics bit-equal"


HEAD = """# Faults and what was observed

Made by `PYTHONPATH=.:tests .venv/bin/python -m faults.suite > docs/faults.md`: each row is a real training process (two
micro-batches, an epoch that ends within the run) with one real fault, and the same command run again. Numbers say at
which occurrence the fault comes.

| fault | observed |
|---|---|"""


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    suite = Suite(Path(folder))
    print(HEAD)
    for index, case in enumerate(CASES):
      print(f"| {case.name} | {suite.observe(case, Path(folder) / str(index))} |", flush=True)


if __name__ == "__main__":
  main()

"""A real training process with one real fault in it; run as a script by the fault suite.

    python -m faults.victim CONFIG.json WORKDIR FAULT [NUMBER]

Faults that kill are a SIGKILL of the process itself at a point of its own code; the point is found by an audit hook or
by wrapping the function that is about to run, and nothing of the run is replaced by a stand-in.
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.parallel import processes
from mixln_jax.runs.checkpoint import Checkpoints
from mixln_jax.training import evaluation, loop, member, program


def die():
  os.kill(os.getpid(), signal.SIGKILL)
  time.sleep(60)  # a signal may be a moment on its way


def before_call(owner, name, number, act=die):
  """Acts when owner.name is called for the number-th time."""
  real = getattr(owner, name)
  calls = []

  def wrapped(*arguments, **options):
    calls.append(None)
    if len(calls) == number:
      act()
    return real(*arguments, **options)

  setattr(owner, name, wrapped)


def at_event(event, part, number, act=die):
  """Acts at the number-th audit event (open, os.rename, …) on a path that has `part` in it."""
  seen = []

  def hook(name, arguments):
    if name == event and any(part in str(argument) for argument in arguments):
      seen.append(None)
      if len(seen) == number:
        act()

  sys.addaudithook(hook)


def full():
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_checkpoint():
  """The disk is full as seen by the code that writes the files of a checkpoint."""
  import orbax.checkpoint as ocp

  before_call(ocp.JsonCheckpointHandler, "async_save", 2, full)


def nan_in_a_gradient(number):
  import numpy as np

  real = loop.global_batch
  calls = []

  def poisoned(batch, mesh):
    calls.append(None)
    if len(calls) == number:
      batch = batch | {"weights_BT": batch["weights_BT"] * np.float32("nan")}
    return real(batch, mesh)

  loop.global_batch = poisoned


def clock_that_jumps():
  real, start = time.time, time.time()
  time.time = lambda: start + (real() - start) * -1000.0


def broken_tracker():
  def broken(*_, **__):
    raise OSError("no quota left")

  member.TensorBoardMirror.write = broken


FAULTS = {
  "none": lambda number: None,
  "kill during compile": lambda number: before_call(program.step_lib, "abstract_state", 2),
  "kill before a step": lambda number: before_call(loop, "global_batch", number),
  "kill while metrics are written": lambda number: before_call(member.Metrics, "write", number),
  "kill during evaluation": lambda number: before_call(evaluation, "add_up", number),
  "kill as a checkpoint begins": lambda number: before_call(Checkpoints, "save", number),
  "kill at an open of a checkpoint's file": lambda number: at_event("open", "orbax-checkpoint-tmp", number),
  "kill at a rename of a checkpoint": lambda number: at_event("os.rename", "checkpoints/", number),
  "kill while old checkpoints are removed": lambda number: at_event("shutil.rmtree", "checkpoints/", number),
  "kill while facts are written": lambda number: at_event("open", "parameters.txt", 1),
  "kill while the outcome is written": lambda number: at_event("open", "outcome.json", 1),
  "disk full for a checkpoint": lambda number: full_checkpoint(),
  "disk full for metrics": lambda number: before_call(member.Metrics, "write", number, full),
  "NaN in a gradient": nan_in_a_gradient,
  "tracker that fails": lambda number: broken_tracker(),
  "clock that jumps": lambda number: clock_that_jumps(),
  "SIGTERM": lambda number: before_call(loop, "global_batch", number, lambda: os.kill(os.getpid(), signal.SIGTERM)),
  "SIGTERM twice": lambda number: [
    before_call(loop, "global_batch", number, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    before_call(Checkpoints, "save", 2 + number // 9, lambda: os.kill(os.getpid(), signal.SIGTERM)),
  ],
}


def main(config_path, workdir, fault, number="1"):
  config = config_lib.from_json(Path(config_path).read_text())
  processes.join(config.parallel)
  FAULTS[fault](int(number))
  try:
    outcome = loop.train(config, workdir)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  from mixln_jax.training.session import STATUSES

  return STATUSES[outcome.status]


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))

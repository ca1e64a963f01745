"""Several processes as one run: joining them, waiting for one another, and stopping together."""

import os

import jax
from jax.experimental import multihost_utils

from mixln_jax.errors import InputError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
  """Joins the processes that VARIABLES name; does nothing where none is set. Call it before any device is touched.

  Raises:
    InputError: only some of them are set, or the others did not come in time.
  """
  given = [name for name in VARIABLES if os.environ.get(name)]
  if not given:
    return
  missing = [name for name in VARIABLES if name not in given]
  if missing:
    raise InputError(f"{', '.join(given)} set, but not {', '.join(missing)}: set all three, or none")
  address, count, index = (os.environ[name] for name in VARIABLES)
  if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
    raise InputError(f"JAX_PROCESS_ID={index} must be a whole number below JAX_NUM_PROCESSES={count}")
  try:
    jax.distributed.initialize(address, int(count), int(index), initialization_timeout=120)
  except RuntimeError as error:
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"JAX_COORDINATOR_ADDRESS={address}: the {count} processes did not all come ({reason})") from error


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def wait_for_all(what: str) -> None:
  """Returns once every process has come to this point; `what` names it, the same on all."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def all_stop_at(step: int) -> bool:
  """Whether a SIGTERM that reached any process ends all of them after this step. Every process asks after every step.

  With several processes JAX handles the signal itself, and agrees on a step that none has passed.
  """
  return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)

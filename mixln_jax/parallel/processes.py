"""Several processes as one run: joining them, waiting for one another, agreeing, failing and stopping together.

What is said here goes through JAX's coordination service, which process 0 runs: no device takes part, so that a process
that is missing is an error after a time, and not a collective that hangs.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from mixln_jax.config import Config
from mixln_jax.errors import InputError, OtherProcessError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
POLL_SECONDS = 0.1

_meetings = itertools.count()
_seconds_to_wait = 300  # config.parallel.join_timeout of the process that joined


def join(parallel: Config) -> None:
  """Joins the processes of a run. Call it before any device is touched.

  They are those that VARIABLES name; else those of the cluster that JAX detects: a TPU VM, GKE, Slurm (inside srun),
  Open MPI, or a Kubernetes job (with the package `kubernetes`). JAX_COORDINATOR_PORT sets the port of a detected one.
  Where there is neither, the process is alone and nothing is done. Where the others don't come in
  `parallel.join_timeout` seconds, the process ends with an error and status 1.

  Args:
    parallel: config.parallel.

  Raises:
    InputError: the variables contradict one another, or the cluster does not say who is in it.
  """
  if jax.distributed.is_initialized():
    return
  by_hand, cluster = _by_hand(), _cluster()
  if not by_hand and cluster is None:
    return
  missing = [name for name in VARIABLES if name not in by_hand]
  if missing and cluster is None:
    raise InputError(f"{', '.join(by_hand)} set, but not {', '.join(missing)}: set all three, or none")
  count, index = by_hand.get("JAX_NUM_PROCESSES"), by_hand.get("JAX_PROCESS_ID")
  if count and index and not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
    raise InputError(f"JAX_PROCESS_ID={index} must be a whole number below JAX_NUM_PROCESSES={count}")
  global _seconds_to_wait
  _seconds_to_wait = parallel.join_timeout
  where = by_hand.get("JAX_COORDINATOR_ADDRESS") or f"the coordinator that JAX finds ({cluster})"
  too_late = (
    f"error: the processes of the run did not all come to {where} in config.parallel.join_timeout={_seconds_to_wait} "
    "seconds; start it on all hosts, look at each log (the first error there is the cause), and see that they can "
    "reach that address (on TPU VMs a firewall may want JAX_COORDINATOR_PORT=8476)"
  )
  try:
    with _ends_after(_seconds_to_wait, too_late):
      jax.distributed.initialize(
        by_hand.get("JAX_COORDINATOR_ADDRESS"),
        None if count is None else int(count),
        None if index is None else int(index),
        initialization_timeout=_seconds_to_wait + 60,  # JAX aborts the process then; ours says why before
        heartbeat_timeout_seconds=parallel.heartbeat_timeout,
        shutdown_timeout_seconds=parallel.heartbeat_timeout,
      )
  except (RuntimeError, ValueError, OSError, KeyError) as error:
    raise InputError(f"the processes of the run can't be joined at {where}: {_one_line(error)}") from error


def _by_hand() -> dict[str, str]:
  return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def _cluster() -> str | None:
  """The kind of cluster that JAX's own detectors see around this process; None where it is alone."""
  from jax._src.clusters import ClusterEnv  # JAX has no public way to ask before joining

  kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and kind.is_env_present())
  return next((kind.__name__ for kind in kinds), None)


@contextlib.contextmanager
def _ends_after(seconds: float, message: str) -> Iterator[None]:
  """Ends the process with a message, status 1, where the context is still open after so long."""

  def end() -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def check_devices(parallel: Config) -> None:
  """Refuses other devices than `config.parallel` expects: JAX itself would fall back to the CPU with a warning.

  Raises:
    InputError: the platform or the number of devices (of all processes together) is another, or there is no device.
  """
  try:
    devices = jax.devices()
  except RuntimeError as error:
    raise InputError(f"JAX finds no device: {_one_line(error)}") from error
  found = (
    f"JAX found {len(devices)} × {devices[0].device_kind} ({devices[0].platform}) in {jax.process_count()} processes"
  )
  if parallel.expect_platform not in ("", devices[0].platform):
    raise InputError(
      f"config.parallel.expect_platform={parallel.expect_platform!r}: {found}; install requirements-tpu.txt or "
      "requirements-gpu.txt, see that no other process holds the chips (`sudo lsof -w /dev/accel* /dev/vfio/*`), or "
      "leave the field empty"
    )
  if parallel.expect_devices not in (0, len(devices)):
    raise InputError(
      f"config.parallel.expect_devices={parallel.expect_devices}: {found}; start the run on all hosts, or set it to 0"
    )


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def wait_for_all(what: str) -> None:
  """Returns once every process has come to this point; `what` names it, the same on all.

  Raises:
    OtherProcessError, InputError: another process failed, was refused, or did not come in time.
  """
  _meet(what, "", lambda _: "")


def agree(what: str, facts: Mapping[str, Any]) -> None:
  """Returns once every process has come with the same facts (JSON values).

  Raises:
    InputError: one differs; every process names it, the fact, and both values.
    OtherProcessError: another process failed or did not come in time.
  """
  _meet(what, json.dumps(dict(facts)), lambda said: _first_difference([json.loads(text) for text in said]))


def _first_difference(facts: list[dict[str, Any]]) -> str:
  """The first process that says something else than process 0, in words; empty where all agree."""
  for process, other in enumerate(facts):
    names = [name for name in {**facts[0], **other} if facts[0].get(name) != other.get(name)]
    if names:
      values = "; ".join(
        f"{name} is {other.get(name)!r} in process {process}, {facts[0].get(name)!r} in process 0" for name in names[:5]
      )
      more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
      return f"the processes of the run disagree: {values}{more}; start all with the same command, code and data"
  return ""


def _meet(what: str, value: str, judge: Callable[[list[str]], str]) -> None:
  """Every process gives a value; process 0 judges all of them, and all raise its verdict where it is not empty."""
  # Who we are is asked of the service: the first touch of a device would wait for the devices of the others.
  client, count, index = _client(), _service().num_processes, _service().process_id
  if client is None or count == 1:
    return
  place = f"mixln_jax/meeting/{next(_meetings)}"
  client.key_value_set(f"{place}/values/{index}", value)
  if index == 0:
    said = _wait_until(what, lambda: _said(client, place, count))
    client.key_value_set(f"{place}/verdict/0", judge(said))
  verdict = _wait_until(what, lambda: dict(client.key_value_dir_get(f"{place}/verdict/")).get(f"{place}/verdict/0"))
  if verdict:
    raise InputError(verdict)


def _said(client: Any, place: str, count: int) -> list[str] | None:
  """The values of all processes, in their order; None while one is missing."""
  values = dict(client.key_value_dir_get(f"{place}/values/"))
  return [values[f"{place}/values/{process}"] for process in range(count)] if len(values) == count else None


def _wait_until(what: str, ready: Callable[[], Any]) -> Any:
  """The first result of `ready` that is not None."""
  deadline = time.monotonic() + _seconds_to_wait
  while (result := ready()) is None:
    _raise_failures_of_others()
    if time.monotonic() > deadline:
      raise OtherProcessError(
        f"waited {_seconds_to_wait} seconds (config.parallel.join_timeout) for the other processes at {what!r}: one of "
        "them hangs or is gone; look at each log (the first error there is the cause)",
        gone=True,
      )
    time.sleep(POLL_SECONDS)
  return result


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Tells the other processes of an error that leaves the context, so that they need not wait to the end of their time.

  (They hear of it where they wait in `wait_for_all` or `agree`; in a collective they wait for JAX's heartbeat.)
  """
  try:
    yield
  except OtherProcessError:
    raise
  except Exception as error:
    client = _client()
    if client is not None:
      refused = isinstance(error, InputError)
      text = str(error) if refused else f"{type(error).__name__}: {_one_line(error)}"
      with contextlib.suppress(Exception):  # the service may be what failed
        client.key_value_set(f"mixln_jax/failed/{_service().process_id}", json.dumps([refused, text]))
    raise


def _raise_failures_of_others() -> None:
  for key, value in _client().key_value_dir_get("mixln_jax/failed/"):
    refused, text = json.loads(value)
    process = key.rsplit("/", 1)[-1]
    if refused:
      raise InputError(f"process {process} refused to start: {text}")
    raise OtherProcessError(f"process {process} failed: {text}")


def _client() -> Any:
  """JAX's client of its coordination service; None where the process is alone."""
  return _service().client


def _service() -> Any:
  from jax._src import distributed  # where orbax and jax.experimental.multihost_utils have it from

  return distributed.global_state


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]


def all_stop_at(step: int) -> bool:
  """Whether a SIGTERM that reached any process ends all of them after this step. Every process asks after every step.

  With several processes JAX handles the signal itself, and agrees on a step that none has passed.
  """
  return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)

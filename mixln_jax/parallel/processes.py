"""Several processes as one run: joining them, waiting for one another, agreeing, failing and stopping together.

All messages go through JAX's coordination service, which process 0 runs. No device is involved, so a missing process
causes a timeout error instead of a hung collective.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from mixln_jax.config import ParallelConfig
from mixln_jax.errors import InputError, OtherProcessError, one_line

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
POLL_SECONDS = 0.1
MOST_DIFFERENCES = 5  # that a message names

_meetings = itertools.count()
_seconds_to_wait = 300  # config.parallel.join_timeout of the process that joined


class _Named(NamedTuple):
  """The run that VARIABLES name; None where they don't."""

  address: str | None
  num_processes: int | None
  process_id: int | None


def join(parallel: ParallelConfig) -> None:
  """Joins the processes of a run. Call it before any device is touched.

  They are those that VARIABLES name; else those of the cluster that JAX detects: a TPU VM, GKE, Slurm (inside srun),
  Open MPI, or a Kubernetes job (with the package `kubernetes`). JAX_COORDINATOR_PORT sets the port of a detected one.
  Without either, the process is alone and nothing is done. Where the others don't join within `parallel.join_timeout`
  seconds, the process ends with an error and status 1.

  Args:
    parallel: config.parallel.

  Raises:
    InputError: the variables contradict one another, or the cluster does not say who is in it.
  """
  if jax.distributed.is_initialized():
    return
  cluster = _cluster()
  named = _named(complete=cluster is None)
  if named == _Named(None, None, None) and cluster is None:
    return
  global _seconds_to_wait
  _seconds_to_wait = parallel.join_timeout
  where = named.address or f"the coordinator that JAX finds ({cluster})"
  too_late = (
    f"error: the processes of the run did not all come to {where} in config.parallel.join_timeout={_seconds_to_wait} "
    "seconds; start it on all hosts, look at each log (the first error there is the cause), and see that they can "
    "reach that address (on TPU VMs a firewall may want JAX_COORDINATOR_PORT=8476)"
  )
  try:
    with _ends_after(_seconds_to_wait, too_late):
      jax.distributed.initialize(
        named.address,
        named.num_processes,
        named.process_id,
        initialization_timeout=_seconds_to_wait + 60,  # JAX aborts the process then; ours says why before
        heartbeat_timeout_seconds=parallel.heartbeat_timeout,
        shutdown_timeout_seconds=parallel.heartbeat_timeout,
      )
  except (RuntimeError, ValueError, OSError, KeyError) as error:
    raise InputError(f"the processes of the run can't be joined at {where}: {one_line(error)}") from error


def _named(*, complete: bool) -> _Named:
  """What VARIABLES say of the run.

  Args:
    complete: whether all of them are needed where one is set: no cluster says the rest.

  Raises:
    InputError: they are incomplete, or contradict one another.
  """
  values = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
  missing = [name for name in VARIABLES if name not in values]
  if values and missing and complete:
    raise InputError(f"{', '.join(values)} set, but not {', '.join(missing)}: set all three, or none")
  address, count, index = (values.get(name) for name in VARIABLES)
  if count is not None and index is not None:
    numbers = count.isdecimal() and index.isdecimal()
    if not numbers or int(index) >= int(count):
      raise InputError(f"JAX_PROCESS_ID={index} must be a whole number below JAX_NUM_PROCESSES={count}")
  return _Named(address, _whole("JAX_NUM_PROCESSES", count), _whole("JAX_PROCESS_ID", index))


def _whole(name: str, text: str | None) -> int | None:
  if text is None:
    return None
  if not text.isdecimal():
    raise InputError(f"{name}={text} must be a whole number")
  return int(text)


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


def check_devices(parallel: ParallelConfig) -> None:
  """Rejects other devices than `config.parallel` expects: JAX itself would fall back to the CPU with a warning.

  Raises:
    InputError: the platform or the number of devices (of all processes together) is another, or there is no device.
  """
  try:
    devices = jax.devices()
  except RuntimeError as error:
    raise InputError(f"JAX finds no device: {one_line(error)}") from error
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
  """Waits until every process has reached this point; `what` names it, the same on all.

  Raises:
    InputError: another process rejected its input.
    OtherProcessError: another process failed, or timed out.
  """
  _meet(what, "", lambda _: "")


def agree(what: str, facts: Mapping[str, Any]) -> None:
  """Waits until every process has given its facts (JSON values), and compares them.

  Raises:
    InputError: one differs; every process names it, the fact, and both values.
    OtherProcessError: another process failed, or timed out.
  """
  _meet(what, json.dumps(dict(facts)), lambda said: _first_difference([json.loads(text) for text in said]))


def _first_difference(facts: list[dict[str, Any]]) -> str:
  """The first process that says something else than process 0, in words; empty where all agree."""
  first = facts[0]
  for process, other in enumerate(facts):
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    if not names:
      continue
    values = [
      f"{name} is {other.get(name)!r} in process {process}, {first.get(name)!r} in process 0"
      for name in names[:MOST_DIFFERENCES]
    ]
    more = f" (and {len(names) - len(values)} more)" if len(names) > len(values) else ""
    return (
      f"the processes of the run disagree: {'; '.join(values)}{more}; start all with the same command, code and data"
    )
  return ""


def _meet(what: str, value: str, judge: Callable[[list[str]], str]) -> None:
  """Every process gives a value; process 0 judges all of them, and all raise its verdict where it is not empty."""
  # The service says which process this is: touching a device would wait for the devices of the others.
  client, count, index = _client(), _service().num_processes, _service().process_id
  if client is None or count == 1:
    return
  place = f"mixln_jax/meeting/{next(_meetings)}"

  def said() -> list[str] | None:
    values = dict(client.key_value_dir_get(f"{place}/values/"))
    if len(values) < count:
      return None
    return [values[f"{place}/values/{process}"] for process in range(count)]

  def verdict() -> str | None:
    return dict(client.key_value_dir_get(f"{place}/verdict/")).get(f"{place}/verdict/0")

  client.key_value_set(f"{place}/values/{index}", value)
  if index == 0:
    client.key_value_set(f"{place}/verdict/0", judge(_wait_until(what, said)))
  if problem := _wait_until(what, verdict):
    raise InputError(problem)


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
  """Tells the other processes of an error that leaves the context, so that they need not wait until they time out.

  (They notice it while they wait in `wait_for_all` or `agree`; in a collective they wait for JAX's heartbeat.)
  """
  try:
    yield
  except OtherProcessError:
    raise
  except Exception as error:
    client = _client()
    if client is not None:
      refused = isinstance(error, InputError)
      text = str(error) if refused else f"{type(error).__name__}: {one_line(error)}"
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


def all_stop_at(step: int) -> bool:
  """Whether all processes stop after this step, since a SIGTERM reached one of them. All ask after every step.

  With several processes JAX handles the signal itself, and agrees on a step that none has passed.
  """
  return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)

"""Several processes as one run: joining them, waiting for one another, agreeing, failing and stopping together.

All messages go through JAX's coordination service, which process 0 runs. No device is involved, so a missing process
causes a timeout error instead of a hung collective.
"""

import atexit
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from mixln_jax import signals
from mixln_jax.config import ParallelConfig
from mixln_jax.errors import InputError, OtherProcessError, one_line
from mixln_jax.text import whole_number

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
POLL_SECONDS, STOP_POLL_SECONDS = 0.1, 0.5
SILENT_SECONDS = 15.0  # of waiting for others, before a line says so
MOST_PROCESSES = 100_000
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
    InputError: the variables contradict one another, the cluster does not say who is in it, or there is no device.
    Stopped: a signal came while it waited.
  """
  global _stop_together
  if not jax.distributed.is_initialized():
    _initialize(parallel)
  service = _service()
  if service.client is not None and service.num_processes > 1 and _stop_together is None:
    signals.stop_with_others()
    _stop_together = _StopTogether(service.client, service.num_processes, service.process_id)
    atexit.register(_stop_together.close)  # before JAX's own end, which takes the service away
  if _stop_together is None:  # several processes would wait here for one another's devices
    _devices()  # whoever asks next would get JAX's own traceback


def _initialize(parallel: ParallelConfig) -> None:
  """Joins the processes that the environment names, where it names any."""
  cluster = _cluster()
  named = _named(complete=cluster is None)
  if named == _Named(None, None, None) and cluster is None:
    return
  if named.address is not None:
    _check_address(named.address, serves=named.process_id == 0)
  global _seconds_to_wait
  _seconds_to_wait = parallel.join_timeout
  where = named.address or f"the coordinator that JAX finds ({cluster})"
  too_late = (
    f"error: the processes of the run did not all come to {where} in config.parallel.join_timeout={_seconds_to_wait} "
    "seconds; start it on all hosts, look at each log (the first error there is the cause), and see that they can "
    "reach that address (on TPU VMs a firewall may want JAX_COORDINATOR_PORT=8476)"
  )
  count = "" if named.num_processes is None else f" ({named.num_processes} altogether)"
  waiting = f"waiting    for the other processes of the run{count} at {where}, {_seconds_to_wait} seconds at most"
  jax.config.update("jax_enable_preemption_service", False)  # see _StopTogether

  def initialize() -> bool:
    jax.distributed.initialize(
      named.address,
      named.num_processes,
      named.process_id,
      initialization_timeout=_seconds_to_wait + 60,  # JAX aborts the process then; ours says why before
      heartbeat_timeout_seconds=parallel.heartbeat_timeout,
      shutdown_timeout_seconds=parallel.heartbeat_timeout,
    )
    return True

  try:
    with _after(SILENT_SECONDS, waiting), _after(_seconds_to_wait, too_late, end=True):
      signals.run_interruptibly(initialize)
  except (RuntimeError, ValueError, OSError, KeyError) as error:
    raise InputError(f"the processes of the run can't be joined at {where}: {one_line(error)}") from error


def _check_address(address: str, *, serves: bool) -> None:
  """Rejects an address that no process can come to; JAX would wait for it without a word, or crash.

  Args:
    address: JAX_COORDINATOR_ADDRESS.
    serves: whether this process is the one that listens there.

  Raises:
    InputError: it is not HOST:PORT, or this process can't listen there.
  """
  host, _, port = address.rpartition(":")
  if not whole_number(port, 2**16 - 1) or not host or host != "".join(host.split()):
    raise InputError(f"JAX_COORDINATOR_ADDRESS={address}: write HOST:PORT with a port from 1 to 65535, of process 0")
  if not serves:
    return
  try:
    socket.getaddrinfo(host.strip("[]"), int(port))
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", int(port)), family=family, dualstack_ipv6=family == socket.AF_INET6):
      pass
  except (OSError, UnicodeError) as error:
    raise InputError(
      f"JAX_COORDINATOR_ADDRESS={address}: process 0 can't listen there ({one_line(error)}); give a name of its host "
      "and a port that nobody uses"
    ) from error


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
  count = _whole("JAX_NUM_PROCESSES", values.get("JAX_NUM_PROCESSES"), MOST_PROCESSES)
  index = _whole("JAX_PROCESS_ID", values.get("JAX_PROCESS_ID"), MOST_PROCESSES)
  if count is not None and index is not None and index >= count:
    raise InputError(f"JAX_PROCESS_ID={index} must be a whole number below JAX_NUM_PROCESSES={count}")
  return _Named(values.get("JAX_COORDINATOR_ADDRESS"), count, index)


def _whole(name: str, text: str | None, maximum: int) -> int | None:
  if text is None:
    return None
  value = whole_number(text, maximum)
  if value is None:
    raise InputError(f"{name}={one_line(text, 40)} must be a whole number, at most {maximum:,}")
  return value


def _cluster() -> str | None:
  """The kind of cluster that JAX's own detectors see around this process; None where it is alone."""
  from jax._src.clusters import ClusterEnv  # JAX has no public way to ask before joining

  kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and kind.is_env_present())
  return next((kind.__name__ for kind in kinds), None)


@contextlib.contextmanager
def _after(seconds: float, message: str, *, end: bool = False) -> Iterator[None]:
  """Prints a message where the context is still open after so long; `end` = and ends the process, with status 1."""

  def act() -> None:
    print(message, file=sys.stderr, flush=True)
    if end:
      os._exit(1)

  timer = threading.Timer(seconds, act)
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
  devices = _devices()
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


def _devices() -> list[Any]:
  """All devices of the run; raises InputError where JAX finds none."""
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # of one platform JAX asserts, where it finds nothing
    platforms = os.environ.get("JAX_PLATFORMS", "")
    set_to = f" with JAX_PLATFORMS={platforms}" if platforms else ""
    raise InputError(
      f"JAX finds no device{set_to} ({one_line(error) or 'that platform has none here'}); install "
      "requirements-gpu.txt or requirements-tpu.txt, look at the driver, or unset JAX_PLATFORMS"
    ) from error


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
  """Every process gives a value; process 0 judges all of them, and all raise its verdict where it is not empty.

  Where one was asked to stop and nothing has to be saved yet, all raise Stopped.
  """
  # The service says which process this is: touching a device would wait for the devices of the others.
  client, count, index = _client(), _service().num_processes, _service().process_id
  if client is None or count == 1:
    return
  place = f"mixln_jax/meeting/{next(_meetings)}"

  def said() -> list[dict[str, Any]] | None:
    values = dict(client.key_value_dir_get(f"{place}/values/"))
    if len(values) < count:
      return None
    return [json.loads(values[f"{place}/values/{process}"]) for process in range(count)]

  def verdict() -> dict[str, Any] | None:
    text = dict(client.key_value_dir_get(f"{place}/verdict/")).get(f"{place}/verdict/0")
    return None if text is None else json.loads(text)

  client.key_value_set(f"{place}/values/{index}", json.dumps({"value": value, "stop": signals.to_stop_now()}))
  if index == 0:
    values = _wait_until(what, said)
    stops = [one["stop"] for one in values if one["stop"] is not None]
    problem = judge([one["value"] for one in values])
    client.key_value_set(f"{place}/verdict/0", json.dumps({"problem": problem, "stop": stops[0] if stops else None}))
  judged = _wait_until(what, verdict)
  if judged["problem"]:
    raise InputError(judged["problem"])
  if judged["stop"] is not None:
    signals.note(judged["stop"])
    raise signals.Stopped(judged["stop"])


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


# Stopping together. JAX has a service for it, which hears SIGTERM only and takes that signal from the program, even
# where the process is alone and nobody asks the service (`join` turns it off).


class _StopTogether:
  """Tells all processes that one was asked to stop, and agrees with them on the step after which all do.

  A thread speaks with the others, so that a process which waits in a collective is no obstacle: it says how far the
  loop is, and holds the loop there until all have said so. The last step of the one that is furthest, plus one, is
  ahead of all of them.
  """

  def __init__(self, client: Any, count: int, index: int):
    self._client, self._count, self._index = client, count, index
    self._held = threading.Lock()
    self._step: int | None = None  # the last one that was begun; None before the loop
    self._last: int | None = None  # after which all stop
    self._loops = 0
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()

  def begin(self, step: int) -> None:
    """A loop begins on all processes after `step`."""
    with self._held:
      self._loops += 1
      self._step, self._last = step, None

  def stops_at(self, step: int) -> bool:
    """Whether all stop after this step; to be asked after each one."""
    with self._held:
      self._step = step
      return self._last is not None and step >= self._last

  def close(self) -> None:
    self._ended.set()
    self._thread.join()

  def _listen(self) -> None:
    told = False
    with contextlib.suppress(Exception):  # the service is gone, and with it the run: its other users say so
      while not self._ended.wait(STOP_POLL_SECONDS):
        own = signals.requested_by()
        if own is not None and not told:
          self._client.key_value_set(f"mixln_jax/stop/asked/{self._index}", own)
          told = True
        for _, name in self._client.key_value_dir_get("mixln_jax/stop/asked/"):
          signals.note(name)
        with self._held:
          if signals.requested_by() is not None and self._step is not None and self._last is None:
            self._last = self._agreed(self._step)

  def _agreed(self, step: int) -> int | None:
    """One more than the furthest step of all; None where the program ends before all have said theirs."""
    place = f"mixln_jax/stop/loop_{self._loops}/"
    self._client.key_value_set(f"{place}{self._index}", str(step))
    while len(said := self._client.key_value_dir_get(place)) < self._count:
      if self._ended.wait(POLL_SECONDS):
        return None
    return 1 + max(int(text) for _, text in said)


_stop_together: _StopTogether | None = None


def begin_loop(step: int) -> None:
  """To be called on all processes when a loop begins that has done `step` steps."""
  if _stop_together is not None:
    _stop_together.begin(step)


def all_stop_at(step: int) -> str | None:
  """The signal for which all processes stop after this step; None where they don't. All ask after every step."""
  if _stop_together is not None and _stop_together.stops_at(step):
    return signals.requested_by()
  return None


def leave() -> None:
  """Leaves the processes of the run in an orderly way, which waits for them, where there are others."""
  global _stop_together
  if _stop_together is not None:
    _stop_together.close()
    _stop_together = None
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()

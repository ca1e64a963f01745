"""Several processes as one run: they join, wait for each other, agree, fail and stop together.

All messages go through JAX's coordination service, which runs in process 0. No device is involved, so a missing process
causes a timeout error instead of a hanging collective.
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
SILENT_SECONDS = 15.0  # of waiting for other processes before a message is printed
MOST_PROCESSES = 100_000
MOST_DIFFERENCES = 5  # named in a message

_meetings = itertools.count()
_seconds_to_wait = 300  # config.parallel.join_timeout of the process that joined


class _Named(NamedTuple):
  """The values of VARIABLES; None for those that are not set."""

  address: str | None
  num_processes: int | None
  process_id: int | None


def join(parallel: ParallelConfig) -> None:
  """Joins the processes of a run. Call it before any device is touched.

  VARIABLES define the processes; without them, the cluster that JAX detects does: a TPU VM, GKE, Slurm (inside srun),
  Open MPI, or a Kubernetes job (with the package `kubernetes`). JAX_COORDINATOR_PORT sets the port of a detected
  cluster. Without either, the process is alone and nothing is done. If the others don't join within
  `parallel.join_timeout` seconds, the process exits with an error and status 1.

  Args:
    parallel: config.parallel.

  Raises:
    InputError: the variables contradict each other, the cluster does not describe its processes, or there is no device.
    Stopped: a signal arrived while waiting.
  """
  global _stop_together
  if not jax.distributed.is_initialized():
    _initialize(parallel)
  service = _service()
  if service.client is not None and service.num_processes > 1 and _stop_together is None:
    signals.stop_with_others()
    _stop_together = _StopTogether(service.client, service.num_processes, service.process_id)
    atexit.register(_stop_together.close)  # runs before JAX's own exit handler, which ends the service
  if _stop_together is None:  # several processes would wait here for each other's devices
    _devices()  # fails here with a clear message if there is no device


def _initialize(parallel: ParallelConfig) -> None:
  """Joins the processes that the environment defines, if it defines any."""
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
    f"error: not all processes of the run joined at {where} within config.parallel.join_timeout={_seconds_to_wait} "
    "seconds; start the run on all hosts, look at each log (the first error there is the cause), and check that the "
    "hosts can reach that address (on TPU VMs a firewall may require JAX_COORDINATOR_PORT=8476)"
  )
  count = "" if named.num_processes is None else f" ({named.num_processes} altogether)"
  waiting = f"waiting    for the other processes of the run{count} at {where}, {_seconds_to_wait} seconds at most"
  jax.config.update("jax_enable_preemption_service", False)  # see _StopTogether

  def initialize() -> bool:
    jax.distributed.initialize(
      named.address,
      named.num_processes,
      named.process_id,
      initialization_timeout=_seconds_to_wait + 60,  # after our own timeout: JAX aborts without a clear message
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
  """Rejects an address that no process can reach; JAX would wait silently, or crash.

  Args:
    address: JAX_COORDINATOR_ADDRESS.
    serves: whether this process listens at the address.

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
      f"JAX_COORDINATOR_ADDRESS={address}: process 0 can't listen there ({one_line(error)}); use the name of its host "
      "and a free port"
    ) from error


def _named(*, complete: bool) -> _Named:
  """The values of VARIABLES.

  Args:
    complete: whether all of them are required if one is set, because no cluster provides the rest.

  Raises:
    InputError: they are incomplete, or contradict each other.
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
  """The kind of cluster that JAX detects around this process; None if there is none."""
  from jax._src.clusters import ClusterEnv  # JAX has no public way to ask before joining

  kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and kind.is_env_present())
  return next((kind.__name__ for kind in kinds), None)


@contextlib.contextmanager
def _after(seconds: float, message: str, *, end: bool = False) -> Iterator[None]:
  """Prints a message if the context is still open after `seconds`; with `end`, also exits with status 1."""

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
  """Rejects devices that `config.parallel` does not expect; JAX itself would fall back to the CPU with a warning.

  Raises:
    InputError: the platform or the total number of devices of all processes differs, or there is no device.
  """
  devices = _devices()
  found = (
    f"JAX found {len(devices)} × {devices[0].device_kind} ({devices[0].platform}) in {jax.process_count()} processes"
  )
  if parallel.expect_platform not in ("", devices[0].platform):
    raise InputError(
      f"config.parallel.expect_platform={parallel.expect_platform!r}: {found}; install requirements-tpu.txt or "
      "requirements-gpu.txt, check that no other process holds the chips (`sudo lsof -w /dev/accel* /dev/vfio/*`), or "
      "leave the field empty"
    )
  if parallel.expect_devices not in (0, len(devices)):
    raise InputError(
      f"config.parallel.expect_devices={parallel.expect_devices}: {found}; start the run on all hosts, or set it to 0"
    )


def _devices() -> list[Any]:
  """All devices of the run; raises InputError if JAX finds none."""
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # JAX asserts if JAX_PLATFORMS names a platform without one
    platforms = os.environ.get("JAX_PLATFORMS", "")
    set_to = f" with JAX_PLATFORMS={platforms}" if platforms else ""
    raise InputError(
      f"JAX finds no device{set_to} ({one_line(error) or 'that platform has none here'}); install "
      "requirements-gpu.txt or requirements-tpu.txt, look at the driver, or unset JAX_PLATFORMS"
    ) from error


def is_first() -> bool:
  """Whether this process is process 0, which writes what a run writes only once."""
  return jax.process_index() == 0


def wait_for_all(what: str) -> None:
  """Waits until every process has reached this point; `what` is its name, the same in all processes.

  Raises:
    InputError: another process rejected its input.
    OtherProcessError: another process failed, or timed out.
  """
  _meet(what, "", lambda _: "")


def agree(what: str, facts: Mapping[str, Any]) -> None:
  """Waits until every process has given its facts (JSON values), and compares them.

  Raises:
    InputError: a fact differs; in every process the message names the process, the fact, and both values.
    OtherProcessError: another process failed, or timed out.
  """
  _meet(what, json.dumps(dict(facts)), lambda texts: _first_difference([json.loads(text) for text in texts]))


def _first_difference(facts: list[dict[str, Any]]) -> str:
  """A description of the first process whose facts differ from those of process 0; "" if all agree."""
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
  """Every process contributes a value; process 0 judges all values, and if its verdict is not "", all raise InputError.

  If a process was asked to stop before there is anything to save, all raise Stopped.
  """
  # The process index comes from the service, because asking a device would wait for the devices of the others.
  client, count, index = _client(), _service().num_processes, _service().process_id
  if client is None or count == 1:
    return
  place = f"mixln_jax/meeting/{next(_meetings)}"

  def all_values() -> list[dict[str, Any]] | None:
    values = dict(client.key_value_dir_get(f"{place}/values/"))
    if len(values) < count:
      return None
    return [json.loads(values[f"{place}/values/{process}"]) for process in range(count)]

  def verdict() -> dict[str, Any] | None:
    text = dict(client.key_value_dir_get(f"{place}/verdict/")).get(f"{place}/verdict/0")
    return None if text is None else json.loads(text)

  client.key_value_set(f"{place}/values/{index}", json.dumps({"value": value, "stop": signals.to_stop_now()}))
  if index == 0:
    messages = _wait_until(what, all_values)
    stops = [message["stop"] for message in messages if message["stop"] is not None]
    problem = judge([message["value"] for message in messages])
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
        "them hangs or has ended; look at each log (the first error there is the cause)",
        gone=True,
      )
    time.sleep(POLL_SECONDS)
  return result


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Reports an error that leaves the context to the other processes, so that they don't wait until they time out.

  (They notice it while they wait in `wait_for_all` or `agree`; in a collective they depend on JAX's heartbeat.)
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
      with contextlib.suppress(Exception):  # the service itself may have failed
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
  """JAX's client of its coordination service; None if the process is alone."""
  return _service().client


def _service() -> Any:
  from jax._src import distributed  # private, but orbax and jax.experimental.multihost_utils use it too

  return distributed.global_state


# Stopping together. JAX's own preemption service handles only SIGTERM, and takes that signal from the program even if
# the process is alone or the service is not used; `join` turns it off.


class _StopTogether:
  """Tells all processes that one of them was asked to stop, and agrees with them on the step after which all stop.

  A thread communicates with the others, so that it works even while a process waits in a collective. The thread reports
  the loop's current step, and holds the loop at that step until all processes have reported theirs. One step after the
  largest of these steps, no process has gone past it, so all stop there.
  """

  def __init__(self, client: Any, count: int, index: int):
    self._client, self._count, self._index = client, count, index
    self._held = threading.Lock()
    self._step: int | None = None  # the loop's current step; None before the loop
    self._last: int | None = None  # the agreed last step
    self._loops = 0
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()

  def begin(self, step: int) -> None:
    """A loop begins in all processes, after `step` finished steps."""
    with self._held:
      self._loops += 1
      self._step, self._last = step, None

  def stops_at(self, step: int) -> bool:
    """Whether all processes stop after this step; call it after each step."""
    with self._held:
      self._step = step
      return self._last is not None and step >= self._last

  def close(self) -> None:
    self._ended.set()
    self._thread.join()

  def _listen(self) -> None:
    reported = False
    with contextlib.suppress(Exception):  # the service ended, and the run with it, which its other users report
      while not self._ended.wait(STOP_POLL_SECONDS):
        own = signals.requested_by()
        if own is not None and not reported:
          self._client.key_value_set(f"mixln_jax/stop/asked/{self._index}", own)
          reported = True
        for _, name in self._client.key_value_dir_get("mixln_jax/stop/asked/"):
          signals.note(name)
        with self._held:
          if signals.requested_by() is not None and self._step is not None and self._last is None:
            self._last = self._agreed(self._step)

  def _agreed(self, step: int) -> int | None:
    """One more than the largest step of all processes; None if this process ends before all have reported."""
    place = f"mixln_jax/stop/loop_{self._loops}/"
    self._client.key_value_set(f"{place}{self._index}", str(step))
    while len(reports := self._client.key_value_dir_get(place)) < self._count:
      if self._ended.wait(POLL_SECONDS):
        return None
    return 1 + max(int(text) for _, text in reports)


_stop_together: _StopTogether | None = None


def begin_loop(step: int) -> None:
  """Call it in all processes when a loop begins, after `step` finished steps."""
  if _stop_together is not None:
    _stop_together.begin(step)


def all_stop_at(step: int) -> str | None:
  """The signal for which all processes stop after this step, else None; call it in all of them after every step."""
  if _stop_together is not None and _stop_together.stops_at(step):
    return signals.requested_by()
  return None


def leave() -> None:
  """Disconnects from the other processes of the run, if there are any, after waiting for them."""
  global _stop_together
  if _stop_together is not None:
    _stop_together.close()
    _stop_together = None
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()

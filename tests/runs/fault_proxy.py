"""A proxy in front of a bucket: it counts requests by kind, makes faults, and enforces preconditions.

fake-gcs-server ignores most preconditions (`ifGenerationMatch=0` of an object that exists overwrites it). Cloud Storage
answers 412 there, and a lock is built on that. So the proxy compares the generations itself, one request of an object
at a time; all else is the server's own.
"""

import collections
import contextlib
import dataclasses
import email
import http.client
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}
STATUSES = {
  "401": "Invalid Credentials",
  "403": "The account does not have storage.objects access to the Google Cloud Storage object.",
  "429": "The rate of requests is exceeded.",
  "500": "Backend error.",
  "503": "Backend is not available.",
}
FAULTS = (*STATUSES, "drop", "delay", "lost")


@dataclasses.dataclass
class Request:
  """One request to the store.

  Attributes:
    kind: upload, list, stat (metadata), read (content), delete, copy, batch, other.
    name: of the object, or the prefix that is listed.
    status: of the answer; 0 where the connection was dropped.
  """

  kind: str
  name: str
  method: str
  query: dict[str, str]
  at: float
  status: int = 0
  fault: str = ""


@dataclasses.dataclass
class _Rule:
  fault: str
  matches: Callable[[Request], bool]
  times: float
  seconds: float


class FaultProxy:
  """Serves `url`, and forwards to `backend`, a port of this machine.

  Attributes:
    requests: all so far, oldest first.
  """

  def __init__(self, backend: int, port: int = 0):
    self.requests: list[Request] = []
    self._rules: list[_Rule] = []
    self._mutex = threading.Lock()
    self._object_locks: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
    self._uploads: dict[str, Request] = {}  # id of a resumable upload -> the request that began it
    self._backend = backend
    proxy = self

    class Handler(_Handler):
      owner = proxy

    self._server = _Server(("127.0.0.1", port), Handler)
    self.port = self._server.server_address[1]
    self.url = f"http://127.0.0.1:{self.port}"
    threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()

  @contextlib.contextmanager
  def fault(
    self,
    fault: str,
    matches: Callable[[Request], bool] = lambda _: True,
    times: float = float("inf"),
    seconds: float = 1.0,
  ) -> Iterator[None]:
    """While the context is open the requests that match, at most `times` of them, meet a fault.

    Args:
      fault: a status, 401 to 503; drop, the connection is closed and nothing is done; lost, it is done and the
        connection is closed without an answer; delay, it is done after so many `seconds`.
    """
    if fault not in FAULTS:
      raise ValueError(f"fault={fault!r}: must be one of {', '.join(FAULTS)}")
    rule = _Rule(fault, matches, times, seconds)
    with self._mutex:
      self._rules.append(rule)
    try:
      yield
    finally:
      with self._mutex:
        self._rules.remove(rule)

  def counts(self, since: int = 0) -> collections.Counter[str]:
    """How many requests there were of each kind, and of them `missing` that were answered with 404."""
    requests = self.requests[since:]
    counts = collections.Counter(request.kind for request in requests)
    counts["missing"] = sum(request.status == 404 for request in requests)
    counts["all"] = len(requests)
    return counts

  def _begin(self, request: Request) -> None:
    """Counts a request, and decides which fault it meets."""
    with self._mutex:
      self.requests.append(request)
      for rule in self._rules:
        if rule.times > 0 and rule.matches(request):
          rule.times -= 1
          request.fault = rule.fault
          break
    if request.fault == "delay":
      time.sleep(rule.seconds)

  def _forward(
    self, request: Request, path: str, headers: dict[str, str], body: bytes
  ) -> tuple[int, list[tuple[str, str]], bytes]:
    """What the store answers, or 412 where a precondition does not hold."""
    conditional, conditions = request, request.query
    if upload := request.query.get("upload_id"):
      conditional = self._uploads.get(upload, request)
      conditions = conditional.query
    writes = request.kind in ("upload", "delete", "copy")
    with self._object_locks[conditional.name] if writes else contextlib.nullcontext():
      if writes and not self._holds(conditional, conditions):
        return 412, [("Content-Type", "application/json")], _error(412, "conditionNotMet")
      answer = self._ask(request.method, path, headers, body)
    if request.query.get("uploadType") == "resumable" and not upload:
      location = next((value for name, value in answer[1] if name.lower() == "location"), "")
      if match := re.search(r"upload_id=([^&]+)", location):
        name = request.name or json.loads(body or b"{}").get("name", "")
        self._uploads[match.group(1)] = dataclasses.replace(request, name=name)
    return answer

  def _holds(self, request: Request, conditions: dict[str, str]) -> bool:
    wanted = [(request.name, conditions.get("ifGenerationMatch"))]
    if request.kind == "copy":
      source, _, target = request.name.partition(" -> ")
      wanted = [(source, conditions.get("ifSourceGenerationMatch")), (target, conditions.get("ifGenerationMatch"))]
    return all(value is None or self.generation(name) == int(value) for name, value in wanted)

  def generation(self, name: str) -> int:
    """The generation of an object; 0 where there is none."""
    status, _, body = self._ask("GET", f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}", {}, b"")
    return int(json.loads(body)["generation"]) if status == 200 else 0

  def _ask(
    self, method: str, path: str, headers: dict[str, str], body: bytes
  ) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", self._backend, timeout=60)
    with contextlib.closing(connection):
      connection.request(method, path, body, headers)
      answer = connection.getresponse()
      return answer.status, answer.getheaders(), answer.read()


class _Server(ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request: object, client_address: object) -> None:
    """Clients that are killed break their connections off: nothing to say."""


class _Handler(BaseHTTPRequestHandler):
  owner: FaultProxy
  protocol_version = "HTTP/1.1"

  def log_message(self, format: str, *args: object) -> None:
    """It says nothing."""

  def setup(self) -> None:
    self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an answer is two small packets
    super().setup()

  def _handle(self) -> None:
    body = self._body()
    request = _parsed(self.command, self.path)
    if request.kind == "upload" and not request.name and "upload_id" not in request.query:
      request.name = _name_in(body)
    self.owner._begin(request)
    if request.fault in STATUSES:
      request.status = int(request.fault)
      self._answer(request.status, [("Content-Type", "application/json")], _error(request.status, "fault"))
      return
    if request.fault == "drop":
      self._drop()
      return
    headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
    headers["Host"] = self.headers.get("Host", "127.0.0.1")
    try:
      if request.kind == "batch":
        status, answer_headers, answer = self._batch(body)
      else:
        status, answer_headers, answer = self.owner._forward(request, self.path, headers, body)
    except OSError:  # the server is gone: so is the store
      self._drop()
      return
    if request.fault == "lost":
      self._drop()
      return
    request.status = status
    self._answer(status, answer_headers, answer)

  def _batch(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """The answers to the requests in a batch, which fake-gcs-server does not take apart as Google does."""
    message = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\n\n".encode() + body)
    answers = []
    for part in message.walk():
      if part.get_content_type() != "application/http":
        continue
      method, path = str(part.get_payload()).split()[:2]
      single = _parsed(method, urllib.parse.urlsplit(path)._replace(scheme="", netloc="").geturl())
      status, _, content = self.owner._forward(single, path.removeprefix(self.owner.url), {}, b"")
      head = f"Content-Type: application/http\r\n\r\nHTTP/1.1 {status} .\r\nContent-Type: application/json\r\n\r\n"
      answers.append(b"--batch\r\n" + head.encode() + (content if status >= 300 else b"") + b"\r\n")
    return 200, [("Content-Type", "multipart/mixed; boundary=batch")], b"".join(answers) + b"--batch--\r\n"

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

  def _body(self) -> bytes:
    if "chunked" not in self.headers.get("Transfer-Encoding", ""):
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    body = b""
    while size := int(self.rfile.readline().split(b";")[0], 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
    with contextlib.suppress(OSError):  # of a client that was killed
      self.send_response_only(status)
      for name, value in headers:
        if name.lower() not in HOP_BY_HOP:
          self.send_header(name, value)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      if self.command != "HEAD":
        self.wfile.write(body)

  def _drop(self) -> None:
    with contextlib.suppress(OSError):
      self.connection.shutdown(socket.SHUT_RDWR)
    self.close_connection = True


def _error(status: int, reason: str) -> bytes:
  message = STATUSES.get(str(status), reason)
  return json.dumps({"error": {"code": status, "message": message, "errors": [{"reason": reason}]}}).encode()


def _name_in(body: bytes) -> str:
  """The object that a multipart upload writes: its name stands in the first part."""
  match = re.search(rb'"name":\s*("(?:[^"\\]|\\.)*")', body[:4096])
  return json.loads(match.group(1)) if match else ""


def _parsed(method: str, path: str) -> Request:
  parts = urllib.parse.urlsplit(path)
  query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
  kind, name = "other", ""
  if parts.path.startswith("/batch"):
    kind = "batch"
  elif "/upload/" in parts.path or "upload_id" in query:
    kind, name = "upload", query.get("name", "")
  elif match := re.search(r"/b/[^/]+/o/([^/]+)/(?:rewriteTo|copyTo)/b/[^/]+/o/([^/]+)$", parts.path):
    source, target = map(urllib.parse.unquote, match.groups())
    kind, name = "copy", f"{source} -> {target}"
  elif match := re.search(r"/b/[^/]+/o/(.+)$", parts.path):
    name = urllib.parse.unquote(match.group(1))
    kind = {"GET": "read" if query.get("alt") == "media" else "stat", "DELETE": "delete"}.get(method, "other")
  elif re.search(r"/b/[^/]+/o/?$", parts.path):
    kind, name = "list", query.get("prefix", "")
  return Request(kind, name, method, query, time.monotonic())

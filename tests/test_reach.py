"""Which errors say that a store was not reached, and which that something is wrong with what it holds."""

import errno
import socket
import ssl

import aiohttp
import pytest
import requests
from gcsfs.retry import HttpError
from google.api_core import exceptions
from google.auth.exceptions import RefreshError, TransportError

from mixln_jax.reach import why_unreachable

REQUEST = aiohttp.RequestInfo("http://bucket", "GET", None, "http://bucket")
TENSORSTORE = "Error opening \"zarr\" driver: Error reading gs://bucket/run/manifest.ocdbt: {} [spec='{{…}}'] {}"


def raised_from(error):
  try:
    try:
      raise error
    except Exception as cause:
      raise RuntimeError("orbax could not do it") from cause
  except RuntimeError as outer:
    return outer


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (HttpError({"code": 503, "message": "busy"}), "503"),
    (HttpError({"code": 401, "message": "Invalid Credentials"}), "401"),
    (OSError("Forbidden: https://storage.googleapis.com/b/bucket"), "403"),
    (exceptions.Forbidden("no rights"), "403"),
    (exceptions.RetryError("Timeout of 90 s exceeded", exceptions.InternalServerError("backend")), "500"),
    (exceptions.RetryError("Timeout of 90 s exceeded", ConnectionRefusedError("Connection refused")), "refused"),
    (aiohttp.ClientResponseError(REQUEST, (), status=429), "429"),
    (aiohttp.ServerDisconnectedError(), "Server disconnected"),
    (aiohttp.ClientPayloadError("Response payload is not completed"), "payload"),
    (requests.exceptions.ChunkedEncodingError("Connection broken"), "broken"),
    (requests.exceptions.ProxyError(), "ProxyError"),  # gcsfs, of a status 502
    (RefreshError("the metadata server is away"), "RefreshError"),
    (TransportError("no route"), "TransportError"),
    (ssl.SSLError("bad record"), "SSL"),
    (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), "name resolution"),
    (OSError(errno.ENETUNREACH, "Network is unreachable"), "unreachable"),
    (ValueError("UNAVAILABLE: " + TENSORSTORE.format("CURL error", "")), "UNAVAILABLE: Error reading gs://bucket"),
    (ValueError("PERMISSION_DENIED: " + TENSORSTORE.format("no", "[http_response_code='401']")), "401 PERMISSION"),
  ],
)
def test_an_outage_is_named(error, words):
  """An error that is missing here makes a whole checkpoint pass for a damaged one."""
  for one in (error, raised_from(error), ExceptionGroup("several", [error])):
    assert words in (why_unreachable(one) or "")


@pytest.mark.parametrize(
  "error",
  [
    FileNotFoundError("bucket/run/_METADATA"),
    exceptions.NotFound("no such object"),
    HttpError({"code": 404, "message": "no such object"}),
    aiohttp.ClientResponseError(REQUEST, (), status=404),
    exceptions.PreconditionFailed("another generation"),
    ValueError("NOT_FOUND: " + TENSORSTORE.format("missing", "[http_response_code='404']")),
    ValueError("DATA_LOSS: Error decoding chunk"),
    KeyError("params"),
    OSError(errno.ENOSPC, "No space left on device"),
  ],
)
def test_what_is_wrong_or_missing_is_no_outage(error):
  """One too many here makes a damaged checkpoint be tried for ever."""
  for one in (error, raised_from(error), ExceptionGroup("several", [error])):
    assert why_unreachable(one) is None

"""Whether an error says that a store could not be reached: by its type, its code, and what it was raised from.

Libraries report the same outage in many ways: Google's client, gcsfs and aiohttp by exceptions with a code, tensorstore
by a text that begins with the name of a status, orbax by any of them inside another.
"""

import errno
import http.client
import re
import socket
import ssl
from collections.abc import Iterator

from mixln_jax.errors import one_line

# Statuses of HTTP that say nothing about what is stored: no rights, too late, too many, the server's own trouble.
CODES = frozenset({401, 403, 407, 408, 425, 429, *range(500, 600)})
# What these libraries raise without a code is about the connection, the credentials or the answer.
NETWORK_LIBRARIES = frozenset({"aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3"})
ERRNOS = frozenset(
  {
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
  }
)
CONNECTION_ERRORS = (
  ConnectionError,
  TimeoutError,
  PermissionError,
  http.client.HTTPException,
  socket.gaierror,
  ssl.SSLError,
)
# tensorstore's errors are ValueErrors and the like, told apart by their text alone.
TENSORSTORE = re.compile(
  r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED)\b|"
  r"CURL error|Connection (reset|refused|timed out)|Could not resolve host"
)
TENSORSTORE_CODE = re.compile(r"http_response_code='(\d{3})'|HTTP response code: (\d{3})")


def why_unreachable(error: BaseException) -> str | None:
  """What an error, or one that it was raised from, says of a store that was not reached or did not let us in.

  Returns:
    One line; None where the error says something else, for instance that what was read is damaged.
  """
  reasons = [reason for reason in map(_reason, chain(error)) if reason is not None]
  with_code = [reason for reason in reasons if reason[:3].isdecimal()]
  if with_code:
    return with_code[0]
  return reasons[-1] if reasons else None  # the innermost: those around it say that they tried again


def chain(error: BaseException) -> Iterator[BaseException]:
  """An error and all that it was raised from."""
  waiting, seen = [error], set()
  while waiting:
    one = waiting.pop()
    if id(one) in seen:
      continue
    seen.add(id(one))
    yield one
    waiting += [other for other in (one.__context__, one.__cause__) if other is not None]
    waiting += getattr(one, "exceptions", ())  # of a group


def code_of(error: BaseException) -> int | None:
  """The status of HTTP that an error carries."""
  for holder in (error, getattr(error, "response", None)):
    for name in ("status", "status_code", "code"):  # in this order: aiohttp warns of its `code`
      value = str(getattr(holder, name, None))
      if value.isdecimal():
        return int(value)
  return None


def _reason(error: BaseException) -> str | None:
  text = f"{type(error).__name__}: {one_line(error, 160)}" if str(error).strip() else type(error).__name__
  code = code_of(error)
  if code is not None:
    return f"{code} {text}" if code in CODES else None
  if isinstance(error, CONNECTION_ERRORS):
    return text
  if isinstance(error, OSError) and error.errno in ERRNOS:
    return text
  if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs, of a status 403
    return f"403 {text}"
  if isinstance(error, (FileNotFoundError, FileExistsError)):
    return None
  if type(error).__module__.partition(".")[0] in NETWORK_LIBRARIES:
    return text
  if match := TENSORSTORE_CODE.search(str(error)):
    code = int(match.group(1) or match.group(2))
    return f"{code} {_of_tensorstore(str(error))}" if code in CODES else None
  return _of_tensorstore(str(error)) if TENSORSTORE.search(str(error)) else None


def _of_tensorstore(text: str) -> str:
  """What tensorstore says of an object, without the drivers around it and the pages of specification behind it."""
  words = one_line(text.split(" [")[0], 2000)
  status, innermost = words.partition(":")[0], max(0, words.rfind("Error "))
  return one_line(words if innermost == 0 else f"{status}: {words[innermost:]}", 200)

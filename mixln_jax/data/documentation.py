"""Corpora of technical English from the reference documentation inside two Python packages, usable without a network.

    text:botocore     Amazon's services, from botocore: 220,270 documents, 31.9 M characters
    text:google-api   Google's services, from google-api-python-client: 144,425 documents, 18.2 M characters
    text:technical    both

Each distinct documentation string is one document, although several services may contain it. Its name is the first
service that contains it, so that a service is held out for validation as a whole: validation text is then written by
other people about another subject. Documents are ordered by the hashes of their texts; in alphabetical order a record
would contain many variants of one sentence, and the next document could be guessed. The packages' files are read, but
the packages are never imported. A corpus belongs to one version of a package, and its content is checked. Both packages
are licensed under Apache-2.0.
"""

import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax.errors import InputError

REQUIREMENTS = "requirements-text.txt"
_TAG = re.compile(r"</?([a-zA-Z][\w-]*)[^<>]*>")
# Tags that end a word.
_BREAKING_TAGS = frozenset(
  ("p", "br", "li", "ul", "ol", "dl", "dt", "dd", "tr", "td", "th", "div", "note", "important")
)


class Package(NamedTuple):
  """A package whose files describe services.

  Attributes:
    distribution: its name on PyPI.
    version: the version that the corpus is made from.
    module: the folder that it installs.
    files: a glob of the files that describe services, in that folder.
    key: the key of documentation strings in their JSON.
    marked_up: whether the strings are HTML.
    service_of: a function from a file to the service that it describes.
    sha256: a hash of the corpus: name and text of each document in order.
  """

  distribution: str
  version: str
  module: str
  files: str
  key: str
  marked_up: bool
  service_of: Callable[[Path], str]
  sha256: str


BOTOCORE = Package(
  "botocore",
  "1.44.8",
  "botocore",
  "data/*/*/service-2.json.gz",
  "documentation",
  True,
  lambda path: f"botocore/{path.parts[-3]}",  # of any version: data/ec2/2016-11-15/service-2.json.gz
  "95eef4322e9ff5ef44140cbac11e41fd7e759633d920e4a9ad7dec2bd8b0a6dd",
)
GOOGLE_API = Package(
  "google-api-python-client",
  "2.202.0",
  "googleapiclient",
  "discovery_cache/documents/*.json",
  "description",
  False,
  lambda path: f"google-api/{path.name.split('.')[0]}",  # of any version: compute.v1.json
  "b45a1951d23482eba49acd0fef52c5162684aee143db7e53ace35614812f3344",
)
PACKAGES = {package.distribution: package for package in (BOTOCORE, GOOGLE_API)}
SOURCES = {
  "text:botocore": (BOTOCORE,),
  "text:google-api": (GOOGLE_API,),
  "text:technical": (BOTOCORE, GOOGLE_API),
}


def folder_of(package: Package, source: str) -> Path:
  """Where the package's files lie.

  Raises:
    InputError: it is not installed, or in another version.
  """
  install = f"run `pip install --no-deps -r {REQUIREMENTS}`"
  spec = importlib.util.find_spec(package.module)  # finds it without importing it
  if spec is None or not spec.submodule_search_locations:
    raise InputError(f"config.data.source={source!r}: the package {package.distribution} is not installed; {install}")
  installed = importlib.metadata.version(package.distribution)
  if installed != package.version:
    raise InputError(
      f"config.data.source={source!r}: the corpus is made of {package.distribution} {package.version}, and {installed} "
      f"is installed; {install}"
    )
  return Path(spec.submodule_search_locations[0])


def documents(package: Package, folder: Path) -> Iterator[tuple[str, str]]:
  """(service, text) of each string of a package's documentation, once, in the order of the texts' hashes.

  Raises:
    InputError: the folder's content is not what the corpus is made of.
  """
  named = unique_strings(package, folder)
  digest = hashlib.sha256()
  for name, text in named:
    digest.update(f"{name}\0{text}\0".encode())
  if digest.hexdigest() != package.sha256:
    raise InputError(
      f"config.data.source: {folder} does not hold what {package.distribution} {package.version} was published with; "
      f"run `pip install --no-deps --force-reinstall -r {REQUIREMENTS}`"
    )
  yield from named


def unique_strings(package: Package, folder: Path) -> list[tuple[str, str]]:
  """(service, text) of each string once, under the first service in the order of names that says it."""
  raw: dict[str, str] = {}  # as it stands in the file -> service
  for path in sorted(folder.glob(package.files)):
    for text in _strings(_read(path), package.key):
      raw.setdefault(text, package.service_of(path))
  named: dict[str, str] = {}
  for text, service in raw.items():
    plain = _without_tags(text) if package.marked_up else text
    plain = " ".join(plain.split())
    if plain:
      named.setdefault(plain, service)
  by_hash = sorted(named, key=lambda text: hashlib.sha256(text.encode()).digest())
  return [(named[text], text) for text in by_hash]


def _read(path: Path) -> Any:
  content = path.read_bytes()
  return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)


def _strings(value: Any, key: str) -> Iterator[str]:
  """The strings under a key, at any depth, in the order of the file."""
  if isinstance(value, dict):
    for name, inner in value.items():
      if name == key and isinstance(inner, str):
        yield inner
      else:
        yield from _strings(inner, key)
  elif isinstance(value, list):
    for inner in value:
      yield from _strings(inner, key)


def _without_tags(text: str) -> str:
  """The text of a piece of HTML.

  By a pattern: what Python's own parser makes of odd markup changes with its security fixes, and the corpus must not.
  """
  return html.unescape(_TAG.sub(_instead_of, text))


def _instead_of(tag: re.Match[str]) -> str:
  return " " if tag.group(1).lower() in _BREAKING_TAGS else ""

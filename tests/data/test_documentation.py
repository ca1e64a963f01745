"""The corpora that are made of what packages document."""

import gzip
import hashlib
import importlib.metadata
import json
import re
import sys

import pytest

from mixln_jax import config as config_lib
from mixln_jax.data import corpus, documentation
from mixln_jax.data.prepare import prepare
from mixln_jax.errors import InputError

PACKAGES = (documentation.BOTOCORE, documentation.GOOGLE_API)


@pytest.fixture
def installed(tmp_path, monkeypatch):
  """`installed(package, version)`: a small package of that name that can be found, and would fail to be imported."""
  monkeypatch.syspath_prepend(str(tmp_path))

  def install(package, version=None):
    folder = tmp_path / package.module
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    metadata = tmp_path / f"{package.distribution.replace('-', '_')}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
      f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: {version or package.version}\n"
    )
    return folder

  return install


def write_botocore(folder, services):
  for name, strings in services.items():
    file = folder / "data" / name / "2026-01-01" / "service-2.json.gz"
    file.parent.mkdir(parents=True)
    shapes = {f"S{index}": {"type": "string", "documentation": text} for index, text in enumerate(strings)}
    file.write_bytes(
      gzip.compress(json.dumps({"operations": {"documentation": {"type": "x"}}, "shapes": shapes}).encode())
    )


def known_as(package, folder):
  """The package with the content of this folder for its own."""
  digest = hashlib.sha256()
  for name, text in documentation.unique_strings(package, folder):
    digest.update(f"{name}\0{text}\0".encode())
  return package._replace(sha256=digest.hexdigest())


def test_markup_goes_and_a_string_is_one_document_of_the_first_service_that_says_it(installed):
  """Would catch tags in the text, words grown together, a string twice, and one held out with the wrong service."""
  folder = installed(documentation.BOTOCORE)
  same = "<p>The  <code>name</code>.</p><p>At most 5 &lt; 6.</p>"
  write_botocore(folder, {"b": [same, "<ul><li>One</li><li>two</li></ul>"], "a": [same, "<p> </p>", "plain"]})
  found = documentation.unique_strings(documentation.BOTOCORE, folder)
  assert sorted(found) == [
    ("botocore/a", "The name. At most 5 < 6."),
    ("botocore/a", "plain"),
    ("botocore/b", "One two"),
  ]
  assert [text for _, text in found] == sorted(
    (text for _, text in found), key=lambda text: hashlib.sha256(text.encode()).digest()
  )


def test_it_is_a_corpus_of_named_parts_and_nothing_is_imported(installed, monkeypatch):
  """Would catch a source that the corpus reader does not know, or one that imports what it reads."""
  folder = installed(documentation.GOOGLE_API)
  files = folder / "discovery_cache" / "documents"
  files.mkdir(parents=True)
  (files / "maps.v1.json").write_text(
    json.dumps({"description": "Shows a\n map.", "methods": [{"description": "Zooms."}]})
  )
  package = known_as(documentation.GOOGLE_API, folder)
  monkeypatch.setitem(documentation.PACKAGES, package.distribution, package)
  [part] = corpus.parts_of("text:google-api")
  assert set(corpus.read(part)) == {
    corpus.Document("google-api/maps", "Shows a map."),
    corpus.Document("google-api/maps", "Zooms."),
  }
  assert package.module not in sys.modules


def test_records_are_made_of_it(installed, monkeypatch, tmp_path):
  """Would catch a corpus that can be read and not prepared: what names a package was taken for a file."""
  folder = installed(documentation.GOOGLE_API)
  files = folder / "discovery_cache" / "documents"
  files.mkdir(parents=True)
  for name in "abcdefgh":
    text = [{"description": f"The {name} of {number} words."} for number in range(9)]
    (files / f"{name}.v1.json").write_text(json.dumps({"methods": text}))
  package = known_as(documentation.GOOGLE_API, folder)
  monkeypatch.setitem(documentation.PACKAGES, package.distribution, package)
  config = config_lib.base()
  config.model.vocab_size = 259
  config.data.update(
    source="text:google-api", tokenizer="bytes", sequence_length=16, directory=str(tmp_path / "records")
  )
  config.data.validation_share = 0.5
  made = prepare(config, progress=False, workers=1)
  assert sum(split.documents for split in made.manifest.splits.values()) == 72
  assert prepare(config, progress=False, workers=1).manifest == made.manifest


def test_another_content_version_or_nothing_is_refused(installed):
  """Would catch numbers of another text under this corpus's name."""
  package = documentation.BOTOCORE
  if importlib.util.find_spec(package.module) is None:
    with pytest.raises(InputError, match=re.escape("'text:botocore': the package botocore is not installed; run `pip")):
      corpus.parts_of("text:botocore")
  folder = installed(package)
  write_botocore(folder, {"a": ["text"]})
  [part] = corpus.parts_of("text:botocore")
  with pytest.raises(InputError, match=re.escape("does not hold what botocore 1.44.8 was published with")):
    list(corpus.read(part))


def test_another_version_is_named(installed):
  """Would catch a corpus that changes with an upgrade."""
  installed(documentation.BOTOCORE, "1.0.0")
  with pytest.raises(InputError, match=re.escape("is made of botocore 1.44.8, and 1.0.0 is installed")):
    corpus.parts_of("text:technical")


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.distribution)
def test_the_published_package_is_the_corpus(package):
  """Would catch a reader that makes another text of it than the one that was measured on."""
  try:
    folder = documentation.folder_of(package, "text:technical")
  except InputError as error:
    pytest.skip(str(error))
  found = list(documentation.documents(package, folder))
  assert len(found) == {"botocore": 220_270, "google-api-python-client": 144_425}[package.distribution]

"""Opening data: a run finds its records from any working directory, and never others than its config names."""

import shutil
from pathlib import Path

import pytest

from mixln_jax.data.opening import open_data
from mixln_jax.data.prepare import prepare
from mixln_jax.errors import InputError


@pytest.fixture
def home(make_config, tmp_path, monkeypatch):
  """A working directory with records in its folder `records`."""
  home = tmp_path / "home"
  home.mkdir()
  shutil.copytree(make_config().data.directory, home / "records")
  monkeypatch.chdir(home)
  return home


@pytest.fixture
def elsewhere(tmp_path):
  folder = tmp_path / "elsewhere"
  folder.mkdir()
  return folder


def test_the_folder_of_opened_records_is_absolute(make_config, home):
  """Would catch a run that writes a folder which means nothing in another working directory."""
  config = make_config(**{"data.directory": "records"})
  assert open_data(config).folder == home / "records"
  assert prepare(config, progress=False).folder == home / "records"
  mixture = open_data(make_config(**{"data.mixture": "records:1,records:2"}))
  assert mixture.folder == home
  assert mixture.manifest.source == f"{home / 'records'},{home / 'records'}"


def test_from_another_working_directory_the_fallback_is_opened(make_config, home, elsewhere, monkeypatch):
  """Would catch a copied run that can only be evaluated where it was trained."""
  config = make_config(**{"data.directory": "records"})
  expected = open_data(config)
  monkeypatch.chdir(elsewhere)
  found = open_data(config, fallback=home / "records")
  assert found.folder == home / "records"
  assert found.manifest == expected.manifest
  record = next(iter(found.rows("train")))
  assert list(record.tokens) == list(next(iter(expected.rows("train"))).tokens)


def test_the_folder_that_the_config_names_comes_first(make_config, home, elsewhere):
  """Would catch a fallback that hides the records in the config's own folder."""
  shutil.copytree(home / "records", elsewhere / "records")
  config = make_config(**{"data.directory": "records"})
  assert open_data(config, fallback=elsewhere / "records").folder == home / "records"


def test_a_fallback_must_fit_the_config_too(make_config, home, elsewhere, monkeypatch):
  """Would catch other records that are opened because they lie where the run's own lay."""
  config = make_config(**{"data.directory": "records", "data.validation_share": 0.5})
  monkeypatch.chdir(elsewhere)
  with pytest.raises(InputError, match=r"config.data.validation_share=0.5, but the records in .*home/records"):
    open_data(config, fallback=home / "records")


def test_records_that_are_in_neither_place_are_missed_in_both(make_config, home, elsewhere, monkeypatch):
  """Would catch an error that sends a person to only one of the two places."""
  config = make_config(**{"data.directory": "records"})
  monkeypatch.chdir(elsewhere)
  shutil.rmtree(home / "records")
  with pytest.raises(InputError) as error:
    open_data(config, fallback=home / "records")
  assert f"no records in {elsewhere / 'records'} or in {home / 'records'}" in str(error.value)


def test_an_absolute_folder_has_no_fallback(make_config, home):
  """Would catch records that are opened although the config names other ones, which are gone."""
  gone = Path("/no/such/records")
  config = make_config(**{"data.directory": str(gone)})
  with pytest.raises(InputError, match=rf"no records in {gone};"):
    open_data(config, fallback=home / "records")

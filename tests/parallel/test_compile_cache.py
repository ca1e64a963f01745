"""The compile cache lies in the user's own folder, and nobody else can write there."""

import os

import jax
import pytest

from mixln_jax.parallel.compile_cache import use_compile_cache


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  yield tmp_path
  jax.config.update("jax_compilation_cache_dir", before)


def test_it_is_made_for_its_owner_alone(no_cache):
  folder = use_compile_cache()
  assert folder == no_cache / "mixln_jax" / "compiled"
  assert folder.stat().st_mode & 0o777 == 0o700
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert use_compile_cache() is None  # what is chosen already stays


def test_a_folder_that_somebody_else_made_is_not_used(no_cache, monkeypatch, capsys):
  (no_cache / "mixln_jax" / "compiled").mkdir(parents=True)
  monkeypatch.setattr(os, "getuid", lambda: 12345)
  assert use_compile_cache() is None
  assert not jax.config.jax_compilation_cache_dir
  assert "belongs to another user" in capsys.readouterr().err


def test_a_user_without_a_home_trains_without_a_cache(no_cache, monkeypatch, capsys):
  """A container's `--user 12345` has no HOME and no passwd entry: a warning, and no traceback."""
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
  assert use_compile_cache() is None
  assert "there is no home folder; set HOME" in capsys.readouterr().err

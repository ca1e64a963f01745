"""Files as every room reads them."""

import os

import pytest

from mixln_jax.errors import InputError
from mixln_jax.files import check_regular, local_path, read_regular


def test_what_a_path_is(monkeypatch):
  """Would catch a traceback for a user that is not there, and a `~` that is read as a folder's name."""
  monkeypatch.setenv("HOME", "/home/me")
  assert str(local_path("~/data")) == "/home/me/data"
  assert str(local_path("data/~x")) == "data/~x"
  with pytest.raises(InputError, match=r"^path '~nouser/data': .*write the folder out"):
    local_path("~nouser/data")
  with pytest.raises(InputError, match="contains a NUL"):
    local_path("a\0b")


def test_pipes_and_devices_are_not_read(tmp_path):
  """Would catch a wait for a writer that never comes, and a read without an end."""
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "link").symlink_to("/dev/zero")
  for name, kind in (("pipe", "a pipe"), ("link", "a device")):
    with pytest.raises(InputError, match=f"{name}: is {kind}, not a regular file"):
      read_regular(tmp_path / name, 10)
  check_regular(tmp_path)
  (tmp_path / "file").write_bytes(b"0123456789")
  assert read_regular(tmp_path / "file", 10) == b"0123456789"
  with pytest.raises(InputError, match="has more than 9 bytes"):
    read_regular(tmp_path / "file", 9)

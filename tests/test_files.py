"""Files as every room reads them."""

import os
from pathlib import Path

import pytest

from mixln_jax.errors import InputError
from mixln_jax.files import check_regular, local_path, occupants, read_regular, settle, work_folder


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


@pytest.mark.parametrize("place", ["new", "empty", "linked"])
def test_a_folder_appears_whole_wherever_it_is_to_be(tmp_path, place):
  """A mount or a linked empty folder can't be renamed to: all the work was done, and refused, again and again."""
  folder = tmp_path / "folder"
  if place == "empty":
    folder.mkdir()
  elif place == "linked":
    (tmp_path / "mount").mkdir()
    folder.symlink_to(tmp_path / "mount")
  work = work_folder(folder)
  (work / "inner").mkdir(parents=True)
  (work / "manifest.json").write_text("{}")
  assert occupants(folder) == []
  settle(work, folder, last="manifest.json")
  assert sorted(path.name for path in folder.iterdir()) == ["inner", "manifest.json"]
  assert folder.is_symlink() == (place == "linked")


def test_what_was_cut_off_while_it_was_moved_is_moved_by_the_next_one(tmp_path, monkeypatch):
  """A half-moved folder must be neither refused for ever nor taken for whole."""
  folder = tmp_path / "folder"
  folder.mkdir()
  work = work_folder(folder)
  work.mkdir()
  for name in ("a", "manifest.json", "z"):
    (work / name).write_text(name)
  moved = []

  def cut_off(path, target, real=Path.replace):
    moved.append(path.name)
    if len(moved) == 3:
      raise KeyboardInterrupt
    return real(path, target)

  with monkeypatch.context() as patch:
    patch.setattr(Path, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
      settle(work, folder, last="manifest.json")
  assert not (folder / "manifest.json").exists()
  work_folder(folder)
  assert occupants(folder) == ["a", "manifest.json", "z"]
  assert len(list(folder.iterdir())) == 3


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
  """Found out only when all the work is done, else."""
  (tmp_path / "link").symlink_to(tmp_path / "gone")
  with pytest.raises(InputError, match="is a link that leads nowhere"):
    work_folder(tmp_path / "link")

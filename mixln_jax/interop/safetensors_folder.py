"""Folders of safetensors files with a config.json, one file or many with an index, read a tensor at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mixln_jax.errors import InputError
from mixln_jax.files import partial_of
from mixln_jax.places import local_path

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


class SafetensorsFolder(Mapping[str, np.ndarray]):
  """The tensors of a folder by name; each is read when it is asked for."""

  def __init__(self, path: str | Path):
    """Opens the folder and compares its files with its index.

    Raises:
      InputError: there is no such folder, it holds no safetensors, or a file of its index is missing or damaged.
    """
    self.path = local_path(path, "path")
    if (self.path / INDEX).is_file():
      files: Any = self._json(INDEX).get("weight_map")
      if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"path={self.path}: {INDEX} has no weight_map from names to files; download it again")
      self._file_of: dict[str, str] = files
    elif (self.path / SINGLE).is_file():
      self._file_of = dict.fromkeys(self._names(SINGLE), SINGLE)
    else:
      raise InputError(f"path={self.path}: has neither {SINGLE} nor {INDEX}; give a folder of a safetensors checkpoint")
    for file in sorted(set(self._file_of.values())):
      missing = {name for name, of in self._file_of.items() if of == file} - set(self._names(file))
      if missing:
        raise InputError(f"{self.path / file}: lacks {sorted(missing)[0]!r}, which {INDEX} says it has")

  def config(self) -> dict[str, Any]:
    """The folder's config.json."""
    return self._json(CONFIG)

  def _json(self, name: str) -> dict[str, Any]:
    try:
      value = json.loads((self.path / name).read_text())
    except (OSError, ValueError) as error:
      raise InputError(f"path={self.path}: {name} can't be read ({error})") from error
    if not isinstance(value, dict):
      raise InputError(f"path={self.path}: {name} is not a JSON object")
    return value

  def _open(self, file: str) -> Any:
    try:
      return safetensors.safe_open(self.path / file, "numpy")
    except (OSError, safetensors.SafetensorError) as error:
      raise InputError(f"{self.path / file}: can't be read ({error}); download it again") from error

  def _names(self, file: str) -> list[str]:
    with self._open(file) as tensors:
      return list(tensors.keys())

  def __getitem__(self, name: str) -> np.ndarray:
    with self._open(self._file_of[name]) as tensors:
      return tensors.get_tensor(name)

  def __contains__(self, name: object) -> bool:
    return name in self._file_of

  def __iter__(self) -> Iterator[str]:
    return iter(self._file_of)

  def __len__(self) -> int:
    return len(self._file_of)


def write_folder(
  path: str | Path,
  tensors: Mapping[str, np.ndarray],
  config: Mapping[str, Any],
  shard_bytes: int,
  others: Mapping[str, bytes] | None = None,
) -> int:
  """Writes a checkpoint: config.json and the tensors, in as many files as keep each within `shard_bytes`.

  Tensors are read one at a time, and those of one file are in memory together.

  Args:
    path: the folder; it must be new or empty.
    tensors: by name.
    config: what config.json holds.
    shard_bytes: most bytes of tensors in a file; a larger tensor has a file of its own.
    others: files to lie beside them, by name.

  Returns:
    The number of safetensors files.

  Raises:
    InputError: the folder is not empty, or can't be written; nothing is left there.
  """
  folder = local_path(path, "path")
  partial = partial_of(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"path={folder}: not empty; give a new folder")
  try:  # beside its place, so that the folder is there whole or not at all
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    num_files = _write_shards(partial, tensors, shard_bytes)
    (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    for name, content in (others or {}).items():
      (partial / name).write_bytes(content)
    if folder.exists():
      folder.rmdir()
    partial.rename(folder)
  except (OSError, safetensors.SafetensorError) as error:
    shutil.rmtree(partial, ignore_errors=True)
    raise InputError(f"path={folder}: can't be written ({error}); nothing was left there") from error
  return num_files


def _write_shards(folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> int:
  """Writes the tensors and, where they take several files, the index of those. Returns the number of files."""
  written: list[Path] = []  # each is named once their number is known
  names_of: list[list[str]] = []
  total_bytes = 0
  for shard in _shards(tensors, shard_bytes):
    file = folder / f"shard-{len(written)}"
    safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})  # how to read it, for transformers
    written.append(file)
    names_of.append(list(shard))
    total_bytes += sum(tensor.nbytes for tensor in shard.values())
  if len(written) == 1:
    written[0].rename(folder / SINGLE)
    return 1
  file_of = {}
  for number, (file, names) in enumerate(zip(written, names_of, strict=True), start=1):
    final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
    file.rename(folder / final)
    file_of |= dict.fromkeys(names, final)
  index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
  (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
  return len(written)


def _shards(tensors: Mapping[str, np.ndarray], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
  """The tensors in their order, cut so that each part is within `shard_bytes` (or is one larger tensor)."""
  shard: dict[str, np.ndarray] = {}
  size = 0
  for name, tensor in tensors.items():
    if shard and size + tensor.nbytes > shard_bytes:
      yield shard
      shard, size = {}, 0
    shard[name] = np.asarray(tensor, order="C")
    size += tensor.nbytes
  yield shard

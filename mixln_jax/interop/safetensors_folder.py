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

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


class SafetensorsFolder(Mapping[str, np.ndarray]):
  """The tensors of a folder by name; each is read when it is asked for."""

  def __init__(self, path: str | Path, flag: str = "--input"):
    """`flag`: what the folder was given as, for messages.

    Raises:
      InputError: there is no such folder, it holds no safetensors, or a file of its index is missing or damaged.
    """
    self.path, self._flag = Path(path).expanduser(), flag
    if (self.path / INDEX).is_file():
      files: Any = self._json(INDEX).get("weight_map")
      if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{flag}={self.path}: {INDEX} has no weight_map from names to files; download it again")
      self._file_of: dict[str, str] = files
    elif (self.path / SINGLE).is_file():
      self._file_of = dict.fromkeys(self._names(SINGLE), SINGLE)
    else:
      raise InputError(
        f"{flag}={self.path}: has neither {SINGLE} nor {INDEX}; give a folder of a safetensors checkpoint"
      )
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
      raise InputError(f"{self._flag}={self.path}: {name} can't be read ({error})") from error
    if not isinstance(value, dict):
      raise InputError(f"{self._flag}={self.path}: {name} is no JSON object")
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
  """Writes a checkpoint: config.json, and one file, or as many as keep each within `shard_bytes`. Returns how many.

  `others`: files to lie beside them, by name.

  Raises:
    InputError: the folder is not empty, or can't be written.
  """
  folder = Path(path).expanduser()
  partial = folder.with_name(f".{folder.name}.partial")
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"--output={folder}: not empty; give a new folder")
  shards = _shards(tensors, shard_bytes)
  files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
  files = [SINGLE] if len(shards) == 1 else files
  try:  # beside its place, so that the folder is there whole or not at all
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, names in zip(files, shards, strict=True):
      shard = {name: np.asarray(tensors[name], order="C") for name in names}
      safetensors.numpy.save_file(shard, partial / file, metadata={"format": "pt"})  # how to read it, for transformers
    if len(shards) > 1:
      index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
      }
      (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    for name, content in (others or {}).items():
      (partial / name).write_bytes(content)
    if folder.exists():
      folder.rmdir()
    partial.rename(folder)
  except (OSError, safetensors.SafetensorError) as error:
    shutil.rmtree(partial, ignore_errors=True)
    raise InputError(f"--output={folder}: can't be written ({error}); nothing was left there") from error
  return len(shards)


def _shards(tensors: Mapping[str, np.ndarray], shard_bytes: int) -> list[list[str]]:
  """Names in their order, cut so that each part is within `shard_bytes` (or is one larger tensor)."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += tensor.nbytes
  return shards

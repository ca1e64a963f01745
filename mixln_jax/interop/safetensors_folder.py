"""Reads and writes folders of safetensors files with a config.json: one file, or several with an index."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mixln_jax.errors import InputError
from mixln_jax.files import json_object, local_path, occupants, read_regular, settle, work_folder

LARGEST_JSON = 1 << 28  # bytes; an index of 100,000 tensors takes 10 MB
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


class SafetensorsFolder(Mapping[str, np.ndarray]):
  """The tensors of a folder by name; each is read when it is accessed."""

  def __init__(self, path: str | Path):
    """Opens the folder and compares its files with its index.

    Raises:
      InputError: there is no such folder, it holds no safetensors, a file of its index is missing or damaged, or it
        holds two checkpoints.
    """
    self.path = local_path(path)
    if (self.path / INDEX).is_file():
      files: Any = self._json(INDEX).get("weight_map")
      if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"path={self.path}: {INDEX} has no weight_map from names to files; download it again")
      self._file_of: dict[str, str] = files
    elif (self.path / SINGLE).is_file():
      self._file_of = dict.fromkeys(self._names(SINGLE), SINGLE)
    else:
      raise InputError(f"path={self.path}: has neither {SINGLE} nor {INDEX}; give a folder of a safetensors checkpoint")
    self._check_one_checkpoint()
    for file in sorted(set(self._file_of.values())):
      indexed = {name for name, file_of_name in self._file_of.items() if file_of_name == file}
      present = set(self._names(file))
      if indexed - present:
        raise InputError(f"{self.path / file}: lacks {sorted(indexed - present)[0]!r}, which {INDEX} says it has")
      if present - indexed:
        name = sorted(present - indexed)[0]
        place = f"is in {self._file_of[name]}" if name in self._file_of else "does not exist"
        raise InputError(f"{self.path / file}: has {name!r}, but {INDEX} says that it {place}; remove one of them")

  def _check_one_checkpoint(self) -> None:
    """Rejects a folder with the files of two checkpoints, which two saves into one folder would leave."""
    read = set(self._file_of.values())
    others = sorted(path.name for path in self.path.glob("model*.safetensors") if path.name not in read)
    if others:
      entry = INDEX if (self.path / INDEX).is_file() else SINGLE
      raise InputError(
        f"path={self.path}: holds two checkpoints, that of {entry} ({len(read)} files, {sorted(read)[0]}, …) and "
        f"{others[0]}; remove the one that you don't want"
      )

  def config(self) -> dict[str, Any]:
    """The folder's config.json."""
    return self._json(CONFIG)

  def _json(self, name: str) -> dict[str, Any]:
    try:
      content = read_regular(self.path / name, LARGEST_JSON)
    except OSError as error:
      raise InputError(f"path={self.path}: {name} can't be read ({error})") from error
    return json_object(content, f"path={self.path}: {name}")

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
  """Writes a checkpoint: config.json, and the tensors in files of at most `shard_bytes`.

  Tensors are read one at a time; only those of one file are in memory together.

  Args:
    path: the folder; it must be new or empty.
    tensors: by name.
    config: what config.json holds.
    shard_bytes: the most bytes of tensors in a file; a larger tensor gets a file of its own.
    others: the content of further files of the folder, by name.

  Returns:
    The number of safetensors files.

  Raises:
    InputError: the folder is not empty or can't be written; nothing is left behind.
  """
  folder = local_path(path)
  try:
    partial = work_folder(folder)
    occupied = occupants(folder)
  except OSError as error:
    raise InputError(f"path={folder}: can't be written ({error.strerror}); nothing was left there") from error
  if occupied:
    raise InputError(f"path={folder}: not empty; give a new folder")
  try:  # written elsewhere and then renamed, so that the folder appears complete or not at all
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    num_files = _write_shards(partial, tensors, shard_bytes)
    (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    for name, content in (others or {}).items():
      (partial / name).write_bytes(content)
    settle(partial, folder, last=CONFIG)
  except (OSError, safetensors.SafetensorError) as error:
    shutil.rmtree(partial, ignore_errors=True)
    raise InputError(f"path={folder}: can't be written ({error}); nothing was left there") from error
  return num_files


def _write_shards(folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> int:
  """Writes the tensors and, if there are several files, their index. Returns the number of files."""
  written: list[Path] = []  # renamed at the end, since the names contain the number of files
  names_of: list[list[str]] = []
  total_bytes = 0
  for shard in _shards(tensors, shard_bytes):
    file = folder / f"shard-{len(written)}"
    safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})  # transformers requires it
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
  """Splits the tensors, in order, into parts of at most `shard_bytes` (or of one larger tensor)."""
  shard: dict[str, np.ndarray] = {}
  size = 0
  for name, tensor in tensors.items():
    if shard and size + tensor.nbytes > shard_bytes:
      yield shard
      shard, size = {}, 0
    shard[name] = np.asarray(tensor, order="C")
    size += tensor.nbytes
  yield shard

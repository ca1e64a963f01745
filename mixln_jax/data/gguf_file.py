"""GGUF files, the format of llama.cpp: their metadata and dequantized tensors, read with the package `gguf`.

A file contains one model: facts by name (`llama.block_count`), including its tokenizer, and tensors that are stored in
blocks of a few bits. Each tensor is converted to fp32 when it is accessed.
"""

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixln_jax.errors import InputError, one_line
from mixln_jax.files import check_regular, local_path

WHOLE = ("F32", "F16", "BF16", "F64")  # types that are not quantized


class GgufFile(Mapping[str, np.ndarray]):
  """A GGUF file: its facts, and its tensors by name, which are converted to fp32 when accessed.

  Attributes:
    path: the file.
    architecture: llama.cpp's name for the kind of model, such as `llama`.
  """

  def __init__(self, path: str | Path):
    """Opens the file and reads its facts.

    Raises:
      InputError: it is not a GGUF file, is truncated, is one of several parts, or the package `gguf` is not installed.
    """
    self.path = local_path(path)
    reader = _reader_class()
    try:
      check_regular(self.path)
      self._reader = reader(self.path)
    except InputError:
      raise
    except OSError as error:
      raise InputError(f"path={self.path}: can't be read ({error.strerror or one_line(error)})") from error
    except Exception as error:  # on damaged bytes the library raises all kinds of errors
      raise InputError(
        f"path={self.path}: not a whole GGUF file ({type(error).__name__}: {one_line(error, 120)}); download it again"
      ) from error
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    self.architecture: str = self.fact("general.architecture", str)
    parts = self.fact("split.count", int, 1)
    if parts > 1:
      raise InputError(f"path={self.path}: is one of {parts} parts of a model; join them (llama-gguf-split --merge)")

  def has(self, name: str) -> bool:
    """Whether the file has a fact."""
    return name in self._reader.fields

  def fact(self, name: str, kind: type, default: Any = None) -> Any:
    """A fact by its full name.

    Args:
      name: the name, such as `llama.block_count`.
      kind: its type: int, float, bool, str, or list.
      default: the value if the file does not have the fact.

    Raises:
      InputError: the fact is missing and there is no default, or it has another type.
    """
    if name not in self._reader.fields:
      if default is not None:
        return default
      raise InputError(f"path={self.path}: lacks {name}, which a GGUF file of a model states; download it again")
    try:
      value = self._reader.fields[name].contents()
    except Exception as error:  # invalid UTF-8, or an unknown type
      raise InputError(f"path={self.path}: {name} can't be read ({one_line(error, 120)}); download it again") from error
    if type(value) is not kind:
      raise InputError(f"path={self.path}: {name} is {one_line(value, 60)!r}, not of type {kind.__name__}")
    return value

  def quantization(self) -> dict[str, int]:
    """How many tensors are stored in each type, `{"Q4_1": 210, "F32": 61}`, the commonest first."""
    return dict(collections.Counter(tensor.tensor_type.name for tensor in self._tensors.values()).most_common())

  @property
  def is_quantized(self) -> bool:
    return not set(self.quantization()) <= set(WHOLE)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it, in NumPy's order of axes."""
    return tuple(int(size) for size in reversed(self._tensors[name].shape))

  def __getitem__(self, name: str) -> np.ndarray:
    from gguf import quants

    tensor = self._tensors[name]
    try:
      array = quants.dequantize(tensor.data, tensor.tensor_type)
    except Exception as error:  # NotImplementedError for most unsupported types, other errors for damaged bytes
      raise InputError(
        f"path={self.path}: {name} is stored as {tensor.tensor_type.name}, which the package gguf can't dequantize "
        f"({one_line(error, 100)}); use a file of another quantization"
      ) from error
    return np.asarray(array, np.float32).reshape(self.shape(name))

  def __contains__(self, name: object) -> bool:
    return name in self._tensors

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)


def _reader_class() -> type:
  """The library's reader, which reads nothing beyond the end of the file."""
  try:
    from gguf import GGUFReader
  except ImportError as error:
    raise InputError(
      "GGUF files need the package gguf, which is not installed; run `pip install -r requirements-gguf.txt`"
    ) from error

  class Reader(GGUFReader):
    """Raises EOFError beyond the end of the file. Without it, the library would loop over a damaged length."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
      end = int(offset) + int(count) * np.dtype(dtype).itemsize
      if end > len(self.data):
        raise EOFError(f"it ends at {len(self.data):,} bytes, and something in it would end at {end:,}")
      return super()._get(offset, dtype, count, override_order)

  return Reader

"""Data sets with random access to examples by index.

tfds:NAME:SPLIT             a data set that TensorFlow Datasets has prepared (a name, or its folder)
hf:NAME[:CONFIG]:SPLIT      a data set of Hugging Face's `datasets`: a folder of save_to_disk, or a name

A split is the libraries' own notation: `train`, `train[:50%]`, `train[1000:2000]+test`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixln_jax.errors import InputError, one_line
from mixln_jax.files import local_path

TFDS, HUGGING_FACE = "tfds", "hf"
KINDS = (TFDS, HUGGING_FACE)
# The last colon outside of brackets separates the name from the split, because slices contain colons too.
SPLIT = re.compile(r"(?P<name>.+):(?P<split>(?:[^:\[\]]|\[[^\[\]]*\])+)")


class Address(NamedTuple):
  """A split of a data set."""

  kind: str  # one of KINDS
  name: str
  split: str

  def __str__(self) -> str:
    return f"{self.kind}:{self.name}:{self.split}"


class Examples(NamedTuple):
  """The examples at an address."""

  rows: Any  # `len(rows)`, `rows[i][field]`
  ranges: Sequence[tuple[str, int, int]]  # their index ranges: (split, first, one past the last); empty = unknown


def address_of(source: str, field: str = "config.data.source") -> Address | None:
  """The address in a source; None if the source is of another kind.

  Args:
    source: the value of config.data.source or config.data.validation_source.
    field: the name of that field, for messages.

  Raises:
    InputError: the name or the split is missing.
  """
  kind, _, rest = source.partition(":")
  if kind not in KINDS or rest.startswith("//"):  # hf://… is a file
    return None
  match = SPLIT.fullmatch(rest)
  if match is None:
    raise InputError(
      f"{field}={source!r}: must be {kind}:NAME:SPLIT, as in {kind}:c4/en:train or {kind}:c4/en:train[:10%]"
    )
  return Address(kind, match["name"], match["split"])


def open_examples(address: Address, text_field: str = "") -> Any:
  """The examples at an address: `len(x)`, `x[i][field]`.

  Args:
    address: the address.
    text_field: the only field to read, which may be dotted, so that other fields need not be read; empty = all fields.

  Raises:
    InputError: the data set does not exist, or its library or file format can't be used here.
  """
  return _open(address, text_field).rows


def overlap(one: Address, other: Address) -> str | None:
  """A description of the examples that two addresses share; None if there are none, or if it is unknown."""
  if one.kind != other.kind or _identity(one) != _identity(other):
    return None
  if one.split == other.split:
    return str(one)
  theirs = _open(other, "").ranges
  for split, first, end in _open(one, "").ranges:
    for other_split, other_first, other_end in theirs:
      shared = range(max(first, other_first), min(end, other_end))
      if split == other_split and len(shared):
        return f"examples {shared.start} to {shared.stop - 1} of {split} of {one.kind}:{one.name}"
  return None


def _identity(address: Address) -> str:
  """A key that is the same for all names of a data set."""
  folder = local_path(address.name)
  return str(folder.resolve()) if folder.is_dir() else address.name


def _open(address: Address, text_field: str) -> Examples:
  if address.kind == TFDS:
    return _open_tfds(address)
  return _open_hugging_face(address, text_field)


def _wanted(columns: Sequence[str], text_field: str) -> list[str]:
  """The column that contains a text field, which may be dotted; empty if none does (then all columns are read)."""
  return [name for name in (text_field, text_field.partition(".")[0]) if name in columns][:1]


def _open_tfds(address: Address) -> Examples:
  import tensorflow_datasets as tfds

  where = f"config.data.source='{address}'"
  folder = local_path(address.name)
  try:
    builder: Any = tfds.builder_from_directory(folder) if folder.is_dir() else tfds.builder(address.name)
    splits = {name: int(info.num_examples) for name, info in builder.info.splits.items()}
    instructions = _tfds_ranges(address.split, builder)
    examples = None
    if instructions is not None:
      examples = builder.as_data_source(
        split=address.split
      )  # whole examples, since data sources have no partial decoding
  except Exception as error:  # tfds raises anything from its own errors to bare AssertionErrors
    raise InputError(
      f"{where}: can't be opened ({type(error).__name__}: {one_line(error)}). It must be prepared, in the file format "
      "array_record or parquet (`tfds convert_format --out_file_format=array_record`); tfrecord needs TensorFlow"
    ) from error
  if instructions is None:
    names = ", ".join(splits) or "none: it was not prepared on this machine (`tfds build`)"
    raise InputError(f"{where}: no such split; it has {names}")
  return Examples(examples, _counted(instructions, splits))


def _tfds_ranges(split: str, builder: Any) -> Any:
  """A split as parsed by tfds; None if the data set has no such split."""
  from tensorflow_datasets.core import ReadInstruction

  try:
    return ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
  except ValueError:
    return None


def _counted(instructions: Sequence[Any], sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
  """The absolute instructions of either library as ranges; their None stands for a split's beginning or end."""
  ranges = []
  for instruction in instructions:
    split = instruction.splitname
    end = sizes[split] if instruction.to is None else instruction.to
    ranges.append((split, instruction.from_ or 0, end))
  return ranges


def _open_hugging_face(address: Address, text_field: str) -> Examples:
  where = f"config.data.source='{address}'"
  try:
    import datasets
  except ImportError as error:
    raise InputError(f"{where}: the package datasets is not installed; run `pip install datasets`") from error
  folder = local_path(address.name)
  try:
    if not folder.is_dir():
      return _load_hugging_face(datasets, address, text_field)
    loaded = datasets.load_from_disk(str(folder))
  except Exception as error:
    raise InputError(f"{where}: can't be opened ({type(error).__name__}: {one_line(error)})") from error
  splits: Any = loaded
  if not isinstance(loaded, datasets.DatasetDict):  # a single split was saved
    splits = {str(loaded.split or "train"): loaded}
  sizes = {name: len(split) for name, split in splits.items()}
  try:
    ranges = _counted(datasets.ReadInstruction.from_spec(address.split).to_absolute(sizes), sizes)
  except ValueError as error:
    raise InputError(f"{where}: no such split; it has {', '.join(splits)}") from error
  rows = datasets.concatenate_datasets([splits[name].select(range(first, end)) for name, first, end in ranges])
  return Examples(_with_columns(rows, text_field), ranges)


def _load_hugging_face(datasets: Any, address: Address, text_field: str) -> Examples:
  """A data set by its name, from the hub or the cache."""
  name, _, configuration = address.name.partition(":")
  rows = datasets.load_dataset(name, configuration or None, split=address.split)
  sizes = {split: info.num_examples for split, info in (rows.info.splits or {}).items()}
  try:
    ranges = _counted(datasets.ReadInstruction.from_spec(address.split).to_absolute(sizes), sizes)
  except ValueError:  # the data set does not say how large its splits are
    ranges = []
  return Examples(_with_columns(rows, text_field), ranges)


def _with_columns(rows: Any, text_field: str) -> Any:
  wanted = _wanted(rows.column_names, text_field)
  return rows.select_columns(wanted) if wanted else rows

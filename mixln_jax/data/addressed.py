"""Data sets whose examples are addressed by number.

tfds:NAME:SPLIT             a data set that TensorFlow Datasets has prepared (a name, or its folder)
hf:NAME[:CONFIG]:SPLIT      a data set of Hugging Face's `datasets`: a folder of save_to_disk, or a name
"""

from pathlib import Path
from typing import Any, NamedTuple

from mixln_jax.errors import InputError, one_line

TFDS, HUGGING_FACE = "tfds", "hf"
KINDS = (TFDS, HUGGING_FACE)


class Address(NamedTuple):
  """A split of a data set."""

  kind: str  # one of KINDS
  name: str
  split: str

  def __str__(self) -> str:
    return f"{self.kind}:{self.name}:{self.split}"


def address_of(source: str) -> Address | None:
  """The address that `config.data.source` states; None if the source is of another kind.

  Raises:
    InputError: the name or the split is missing.
  """
  kind, _, rest = source.partition(":")
  if kind not in KINDS or rest.startswith("//"):  # hf://… is a file
    return None
  name, _, split = rest.rpartition(":")
  if not name or not split:
    raise InputError(f"config.data.source={source!r}: must be {kind}:NAME:SPLIT, as in {kind}:c4/en:train")
  return Address(kind, name, split)


def open_examples(address: Address) -> Any:
  """The examples at an address: `len(x)`, `x[i][field]`.

  Raises:
    InputError: they are not there, or their library or file format is not usable here.
  """
  return _open_tfds(address) if address.kind == TFDS else _open_hugging_face(address)


def _open_tfds(address: Address) -> Any:
  import tensorflow_datasets as tfds

  where = f"config.data.source='{address}'"
  folder = Path(address.name).expanduser()
  try:
    builder: Any = tfds.builder_from_directory(folder) if folder.is_dir() else tfds.builder(address.name)
    splits = list(builder.info.splits)
    known = address.split.split("[")[0] in splits  # train[:10%] is a piece of train
    examples = builder.as_data_source(split=address.split) if known else None
  except Exception as error:  # tfds raises anything from its own errors to bare AssertionErrors
    raise InputError(
      f"{where}: can't be opened ({type(error).__name__}: {one_line(error)}). It must be prepared, in the file format "
      "array_record or parquet (`tfds convert_format --out_file_format=array_record`); tfrecord needs TensorFlow"
    ) from error
  if not known:
    names = ", ".join(splits) or "none: it was not prepared on this machine (`tfds build`)"
    raise InputError(f"{where}: no such split; it has {names}")
  return examples


def _open_hugging_face(address: Address) -> Any:
  where = f"config.data.source='{address}'"
  try:
    import datasets
  except ImportError as error:
    raise InputError(f"{where}: the package datasets is not installed; run `pip install datasets`") from error
  folder = Path(address.name).expanduser()
  try:
    if not folder.is_dir():
      dataset, _, configuration = address.name.partition(":")
      return datasets.load_dataset(dataset, configuration or None, split=address.split)
    loaded = datasets.load_from_disk(str(folder))
  except Exception as error:
    raise InputError(f"{where}: can't be opened ({type(error).__name__}: {one_line(error)})") from error
  splits: Any = loaded
  if not isinstance(loaded, datasets.DatasetDict):  # a single split was saved
    splits = {str(loaded.split or "train"): loaded}
  if address.split not in splits:
    raise InputError(f"{where}: no such split; it has {', '.join(splits)}")
  return splits[address.split]

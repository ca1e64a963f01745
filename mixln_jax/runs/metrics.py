"""metrics.jsonl, the metrics of record, and its mirrors (TensorBoard, wandb), whose failures never stop a run."""

import json
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixln_jax.errors import InputError
from mixln_jax.files import COUNT, NUMBER, TEXT, Kinds, json_number, read_json_lines, write_whole
from mixln_jax.parallel.processes import is_first

METRICS_LINE: Kinds = {"step": COUNT, "split": TEXT, "loss": NUMBER}  # and further numbers by name
STEP_LINE: Kinds = {"step": COUNT}  # in the other files of JSON lines


class Mirror(Protocol):
  """Another destination of metrics."""

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None: ...

  def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


class TensorBoardMirror:
  """TensorBoard event files."""

  def __init__(self, folder: Path, purge_step: int):
    """`purge_step`: TensorBoard hides what an earlier process wrote at this step and later."""
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(logdir=str(folder), purge_step=purge_step)

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(f"{split}/{name}", value, step)

  def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
    self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class WandbMirror:
  """Weights & Biases, if it is installed."""

  def __init__(self, project: str, folder: Path, name: str, config: Mapping[str, Any]):
    import wandb  # pyright: ignore[reportMissingImports]

    # The run's wandb id is stored in its folder, so that a moved folder is still the same run.
    path = folder / "wandb_id.txt"
    if not path.exists():
      path.write_text(uuid.uuid4().hex[:16])
    self._image = wandb.Image
    self._run = wandb.init(
      project=project,
      name=name,
      id=path.read_text(),
      resume="allow",
      config=dict(config),
      mode=None if "WANDB_MODE" in os.environ or _has_wandb_key() else "offline",
    )

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

  def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
    self._run.log({name: self._image(pixels_HWC)}, step=step)

  def flush(self) -> None:
    """Does nothing: wandb sends by itself."""

  def close(self) -> None:
    self._run.finish()


def _has_wandb_key() -> bool:
  """Whether wandb.init would find a key. Without one it would prompt for it, and the run would wait."""
  if "WANDB_API_KEY" in os.environ:
    return True
  try:
    return netrc.netrc().authenticators("api.wandb.ai") is not None
  except (OSError, netrc.NetrcParseError):
    return False


class JsonLines:
  """A file of JSON objects, one per line, each with its `step`. Only the first process writes."""

  def __init__(self, path: Path, start_step: int, kinds: Kinds = STEP_LINE):
    """Opens the file and truncates it after the lines of `start_step`, the restored step (0 = empty).

    Raises:
      InputError: a line other than the last one is not JSON, or a member has the wrong kind.
    """
    self._file = None
    if not is_first():
      return
    lines = read_json_lines(path, kinds) if start_step else []
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start_step))
    self._file = path.open("a", encoding="utf-8")

  @property
  def writes(self) -> bool:
    """Whether this process writes the file."""
    return self._file is not None

  def write(self, line: Mapping[str, Any]) -> None:
    if self._file is not None:
      self._file.write(json.dumps(line, allow_nan=False) + "\n")
      self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


class Metrics:
  """Writes metrics.jsonl and its mirrors; each (split, step) once."""

  def __init__(self, path: Path, start_step: int):
    """Opens metrics.jsonl as `JsonLines` does."""
    self._mirrors: list[Mirror] = []
    self._lines = JsonLines(path, start_step, METRICS_LINE)

  def add_mirror(self, make: Any, *args: Any) -> None:
    """Adds the mirror `make(*args)`; if it can't be created, prints a warning and goes without it."""
    if not self._lines.writes:
      return
    try:
      self._mirrors.append(make(*args))
    except Exception as error:
      print(f"warning: {make.__name__} is off: {error}", file=sys.stderr)

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    if not self._lines.writes:
      return
    self._lines.write({"step": step, "split": split} | {name: json_number(value) for name, value in values.items()})
    self._tell_mirrors(lambda mirror: mirror.write(step, split, values), f"from step {step} on")

  def picture(self, step: int, name: str, draw: Callable[[], np.ndarray | None]) -> None:
    """Sends a picture of a step, uint8 [height, width, 3], to the mirrors; it is drawn only if there are any."""
    if not self._mirrors:
      return
    try:
      pixels_HWC = draw()
    except Exception as error:  # a picture never stops a run
      print(f"warning: the picture {name} of step {step} can't be drawn: {error}", file=sys.stderr)
      return
    if pixels_HWC is not None:
      self._tell_mirrors(lambda mirror: mirror.picture(step, name, pixels_HWC), f"from step {step} on")

  def flush(self) -> None:
    """Flushes the mirrors."""
    self._tell_mirrors(lambda mirror: mirror.flush(), "from here on")

  def _tell_mirrors(self, tell: Callable[[Mirror], None], when: str) -> None:
    for mirror in list(self._mirrors):
      try:
        tell(mirror)
      except Exception as error:
        print(f"warning: {type(mirror).__name__} failed and is off {when}: {error}", file=sys.stderr)
        self._mirrors.remove(mirror)

  def close(self) -> None:
    self._lines.close()
    for mirror in self._mirrors:
      try:
        mirror.close()
      except Exception as error:
        print(f"warning: {type(mirror).__name__} did not close: {error}", file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """All complete lines of a metrics.jsonl; none if there is no such file.

  Raises:
    InputError: a line is not an object with a step, a split, and numbers.
  """
  lines = read_json_lines(path, METRICS_LINE)
  for line in lines:
    for name, value in line.items():
      if name != "split" and not NUMBER.fits(value):
        raise InputError(f"{path}: {name} of step {line['step']} is not a number; repair or remove the file")
  return lines

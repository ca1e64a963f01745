"""What a person sees of the steps, and what metrics.jsonl gets of them."""

import contextlib
import datetime
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

from mixln_jax.parallel.processes import is_first
from mixln_jax.runs.metrics import Metrics
from mixln_jax.training.diagnosis import Diagnosis


class Clock:
  """Where the time of a run goes, in seconds."""

  def __init__(self) -> None:
    self._started = time.monotonic()
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, what: str) -> Iterator[None]:
    """Counts the time in the context as `what`."""
    started = time.monotonic()
    try:
      yield
    finally:
      self._seconds[what] = self._seconds.get(what, 0.0) + time.monotonic() - started

  def seconds(self) -> dict[str, float]:
    """`total`, what was counted, and the rest as `steps`; `goodput` is the share of the steps."""
    total = time.monotonic() - self._started
    steps = total - sum(self._seconds.values())
    return {"total": total, **self._seconds, "steps": steps, "goodput": steps / total}


class NonFiniteError(FloatingPointError):
  """Too many updates in a row were skipped, since their loss or gradient was not finite, or an evaluation was not.

  Attributes:
    step: the step that it was seen at.
  """

  def __init__(self, step: int, what: str):
    super().__init__(f"step {step}: {what}")
    self.step = step


class Progress:
  """A bar in a terminal, one dense line a step in a log."""

  def __init__(self, start_step: int, num_steps: int, flops_per_step: float, peak_flops: float | None):
    """Starts to show.

    Args:
      start_step: updates done before.
      num_steps: updates of the whole run.
      flops_per_step: model FLOPs of one update, of all its positions, padding included.
      peak_flops: FLOP/s of all devices together, or None where it is not known.
    """
    self._num_steps = num_steps
    self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
    self._silent = not is_first()
    shown = sys.stderr.isatty() and not self._silent
    self._bar = tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True) if shown else None
    self._durations: deque[float] = deque(maxlen=100)  # of the last steps, for the time that is left

  def utilization(self, seconds: float) -> str:
    """Model-FLOPs utilisation (arXiv 2204.02311), or n/a on a device whose peak is not known."""
    if self._peak_flops is None:
      return "n/a"
    return f"{self._flops_per_step / seconds / self._peak_flops:.1%}"

  def step(self, step: int, values: Mapping[str, float], seconds: float) -> None:
    """One step: its metrics, and how long it took."""
    if self._silent:
      return
    shown = (
      f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  grad {values['gradient_norm']:.3f}  "
      f"tok/s {values['tokens_per_second']:,.0f}  mfu {self.utilization(seconds)}"
    )
    if self._bar is not None:
      self._bar.set_postfix_str(shown, refresh=False)
      self._bar.update()
      return
    self._durations.append(seconds)
    left = datetime.timedelta(seconds=round(statistics.fmean(self._durations) * (self._num_steps - step)))
    print(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {shown}  left {left}", flush=True)

  def say(self, line: str) -> None:
    """A line that does not break the bar."""
    if self._bar is not None:
      tqdm.write(line)
    elif not self._silent:
      print(line, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


class Reporter:
  """Reads the metrics of a step after the next one is dispatched, so that the device never waits for the host."""

  def __init__(self, metrics: Metrics, progress: Progress, diagnosis: Diagnosis, max_skipped_in_a_row: int):
    self._metrics, self._progress, self._diagnosis = metrics, progress, diagnosis
    self._max_skipped = max_skipped_in_a_row
    self._pending: tuple[int, Mapping[str, Any]] | None = None
    self._clock = time.monotonic()

  def dispatched(self, step: int, values: Mapping[str, Any]) -> None:
    """A step has been dispatched: reports the one before, and keeps this one's metrics, unread."""
    self.flush()
    self._pending = (step, values)

  def flush(self) -> None:
    """Reads what is pending, which waits for its step, and passes it on.

    Raises:
      NonFiniteError: too many updates in a row were skipped. The step has been written by then.
    """
    if self._pending is None:
      return
    step, read = self._pending[0], jax.device_get(self._pending[1])
    self._pending = None
    statistics = read.pop("diagnostics", None)
    values = {name: float(value) for name, value in read.items()}
    seconds = time.monotonic() - self._clock
    self.restart_clock()
    values["tokens_per_second"] = values["tokens"] / seconds
    self._metrics.write(step, "train", values)
    self._diagnosis.seen(step, values["loss"], statistics)
    self._progress.step(step, values, seconds)
    if in_a_row := int(values["skipped_in_a_row"]):
      what = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
      self._progress.say(f"skipped    step {step}: {what}, so nothing was updated ({in_a_row} in a row)")
      if in_a_row >= self._max_skipped:
        raise NonFiniteError(step, f"{what}, {in_a_row} updates in a row skipped")

  def restart_clock(self) -> None:
    """After a pause that is not part of a step."""
    self._clock = time.monotonic()

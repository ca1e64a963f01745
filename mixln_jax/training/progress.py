"""What a person sees of the steps, where the time goes, and the profile."""

import contextlib
import datetime
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mixln_jax.config import Config
from mixln_jax.parallel.processes import is_first
from mixln_jax.text import printable


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
    """`total`, what was counted, and the rest as `steps`; `goodput` is the fraction of the time that steps took."""
    total = time.monotonic() - self._started
    steps = total - sum(self._seconds.values())
    return {"total": total, **self._seconds, "steps": steps, "goodput": steps / total}


class Progress:
  """A bar in a terminal, one dense line a step in a log."""

  def __init__(self, start_step: int, num_steps: int, flops_per_step: float, peak_flops: float | None):
    """Starts to show.

    Args:
      start_step: updates done before.
      num_steps: updates of the whole run.
      flops_per_step: model FLOPs of one update of all members, of all its positions, padding included.
      peak_flops: FLOP/s of all devices together, or None where it is not known.
    """
    self._num_steps = num_steps
    self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
    self._silent = not is_first()
    self._bar: Any = None
    if sys.stderr.isatty() and not self._silent:
      self._bar = tqdm(total=num_steps, initial=start_step, unit="step", dynamic_ncols=True)
    self._durations: deque[float] = deque(maxlen=100)  # of the last steps, for the time that is left

  def utilization(self, seconds: float) -> str:
    """Model-FLOPs utilisation (arXiv 2204.02311), or n/a on a device whose peak is not known."""
    if self._peak_flops is None:
      return "n/a"
    return f"{self._flops_per_step / seconds / self._peak_flops:.1%}"

  def step(self, step: int, members: Sequence[Mapping[str, float]], seconds: float) -> None:
    """One step: the metrics of each member that still trains, and how long it took."""
    if self._silent or not members:
      return
    shown = f"{_describe(members)}  mfu {self.utilization(seconds)}"
    if self._bar is not None:
      self._bar.set_postfix_str(shown, refresh=False)
      self._bar.update()
      return
    self._durations.append(seconds)
    left = datetime.timedelta(seconds=round(statistics.fmean(self._durations) * (self._num_steps - step)))
    print(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {shown}  left {left}", flush=True)

  def say(self, line: str) -> None:
    """A line that does not break the bar."""
    line = printable(line)
    if self._bar is not None:
      tqdm.write(line)
    elif not self._silent:
      print(line, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def _describe(members: Sequence[Mapping[str, float]]) -> str:
  """The metrics of one run, or the range of several."""
  tokens_per_second = sum(values["tokens_per_second"] for values in members)
  if len(members) == 1:
    values = members[0]
    return (
      f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  grad {values['gradient_norm']:.3f}  "
      f"tok/s {tokens_per_second:,.0f}"
    )
  losses = [values["loss"] for values in members]
  return f"losses {min(losses):.4f} to {max(losses):.4f} of {len(members)} runs  tok/s {tokens_per_second:,.0f}"


class Profiler:
  """A JAX profile of config.profile.num_steps steps from config.profile.start_step on."""

  def __init__(self, config: Config, folder: Path):
    self._first, self._count, self._folder = config.profile.start_step, config.profile.num_steps, folder
    self._running = False

  def before(self, step: int) -> None:
    """Call it before a step is dispatched."""
    if self._count and step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, state: Any) -> None:
    """Call it with the state after a step, which may not be computed yet."""
    if self._running and step == self._first + self._count - 1:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False

"""What a person sees while a study trains: where its run stands, and the time left of the run and of the study."""

import datetime
import re
import time
from collections.abc import Callable

STEP = re.compile(r"step\s+(\d+)/(\d+)\s+(.*)")
EVERY = 30.0  # seconds between lines in a log
SHOWN = ("loss", "losses")


class StudyProgress:
  """Follows the lines that runs print, one run after another.

  The time of the steps to come is that of a step of this process's runs so far: a guess where runs differ in size.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._later_steps = 0
    self._seconds = 0.0  # of the steps that were seen
    self._steps = 0
    self._last: tuple[int, float] | None = None  # step of the run, and when
    self._said: float | None = None

  def start_run(self, later_steps: int) -> None:
    """The lines that follow are of another run.

    Args:
      later_steps: of the runs that are to be trained after it. They are counted anew for each run: a run may have
        ended before its last step, and other machines take runs away.
    """
    self._later_steps = later_steps
    self._last = None
    self._said = None

  def seen(self, line: str) -> str | None:
    """Takes note of a line that a run printed; returns how run and study stand where it is that of a step."""
    match = STEP.match(line)
    if not match:
      return None
    step, num_steps, rest = int(match.group(1)), int(match.group(2)), match.group(3)
    now = self._clock()
    if self._last is not None:  # before a run's first line it compiles
      self._seconds += now - self._last[1]
      self._steps += step - self._last[0]
    self._last = (step, now)
    words = rest.split("  ")
    loss = next((word for word in words if word.startswith(SHOWN)), "")
    of_run, of_study = self._time(num_steps - step), self._time(num_steps - step + self._later_steps)
    return f"step {step}/{num_steps}  {loss}  left {of_run}  study {of_study}"

  def is_due(self) -> bool:
    """Whether a log is to have a line now: the first of a run, then one every half a minute."""
    now = self._clock()
    if self._said is not None and now - self._said < EVERY:
      return False
    self._said = now
    return True

  def _time(self, steps: int) -> str:
    """How long so many steps take."""
    if not self._steps:
      return "?"
    return str(datetime.timedelta(seconds=round(self._seconds / self._steps * steps)))

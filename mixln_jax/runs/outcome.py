"""How a run ended: `outcome.json`, with the functions that write and read it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mixln_jax.files import COUNT, FLAG, NUMBER, NUMBERS, OBJECT, TEXT, Kinds, check_kinds, read_json
from mixln_jax.runs.folder import OUTCOME, RunFolder

FINISHED, STOPPED, NON_FINITE, DIVERGED, FAILED = "finished", "stopped", "non_finite", "diverged", "failed"
ENDED_ITSELF = (NON_FINITE, DIVERGED)  # a repeated run would end in the same way

_KINDS: Kinds = {
  "status": TEXT,
  "step": COUNT,
  "last_checkpoint": COUNT.optional(),
  "validation": OBJECT.optional(),
  "best_validation": OBJECT.optional(),
  "diverged": FLAG.optional(),
  "skipped_updates": COUNT.optional(),
  "seconds": NUMBERS.optional(),
  "message": TEXT.optional(),
}
_VALIDATION: Kinds = {"step": COUNT, "loss": NUMBER, "perplexity": NUMBER.optional()}


class Outcome(NamedTuple):
  """How a run ended.

  Attributes:
    status: finished; stopped (by a signal; the same command resumes the run); non_finite; diverged; or failed.
    step: updates done when it ended.
    last_checkpoint: step of its newest checkpoint.
    validation: the last evaluation's line of metrics.jsonl.
    best_validation: the evaluation's line of lowest loss.
    diverged: whether the loss was at the unigram entropy of the data, returned to it or never below it (at the last
      evaluation after the warm-up).
    skipped_updates: updates of the whole run that were skipped because their loss or gradient was not finite.
    seconds: the time of this process: total, compile, input, evaluation, checkpoint, steps; and the goodput.
    message: one line for the user.
  """

  status: str
  step: int
  last_checkpoint: int | None = None
  validation: dict[str, Any] | None = None
  best_validation: dict[str, Any] | None = None
  diverged: bool = False
  skipped_updates: int = 0
  seconds: Mapping[str, float] = {}
  message: str = ""


def write_outcome(folder: RunFolder, outcome: Outcome) -> None:
  """Writes outcome.json, in the first process only."""
  folder.write_json(OUTCOME, outcome._asdict())


def read_outcome(folder: RunFolder) -> Outcome | None:
  """How the run ended; None if it has not ended yet, or is training again.

  Fields that an earlier version did not write take their defaults; unknown fields of a later version are ignored.

  Raises:
    InputError: outcome.json is invalid.
  """
  try:
    content = read_json(folder / OUTCOME, _KINDS)
  except FileNotFoundError:
    return None
  for name in ("validation", "best_validation"):
    if content.get(name) is not None:
      check_kinds(content[name], f"{folder / OUTCOME}: {name}", _VALIDATION)
  return Outcome(**{name: content[name] for name in Outcome._fields if name in content})


def best_of(validations: list[dict[str, Any]]) -> dict[str, Any] | None:
  """The line of lowest loss; a loss that is not finite counts as infinite."""

  def loss_of(line: dict[str, Any]) -> float:
    loss = float(line["loss"])
    return loss if math.isfinite(loss) else math.inf

  return min(validations, key=loss_of, default=None)

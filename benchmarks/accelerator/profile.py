"""Where the time of a training step goes on this device, by kind of operation; its argument is JSON.

{"recipe": "1b", "fields": {…}, "steps": 3}
"""

import collections
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from benchmarks.parts import Step
from benchmarks.recipes import load

SHOWN = 10
# Of XLA's threads on a host: these last as long as what they hold, which is there besides.
HOLDERS = re.compile(r"ThunkExecutor|while|call|conditional")


def operations(trace: Path) -> dict[str, float]:
  """Nanoseconds of each kind of operation: of the device's streams, or where there are none of XLA's threads."""
  [file] = trace.rglob("*.xplane.pb")
  planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
  devices = [plane for plane in planes if plane.name.startswith("/device:")]
  spent: dict[str, float] = collections.defaultdict(float)
  for plane in devices or planes:
    for line in plane.lines:
      if not _holds_operations(line, bool(devices)):
        continue
      for event in line.events:
        if not devices and HOLDERS.match(event.name):
          continue
        spent[kind_of(event.name)] += event.duration_ns
  return spent


def _holds_operations(line: Any, on_device: bool) -> bool:
  """A device's lines of steps, modules and scopes repeat what its streams show; the host's hold Python as well."""
  if on_device:
    return line.name.startswith("Stream") or line.name == "XLA Ops"
  return line.name.startswith("tf_XLA")


def kind_of(name: str) -> str:
  """An operation's name without the numbers that tell its copies apart: `loop_fusion_12` is a `loop_fusion`."""
  return re.sub(r"([._]\d+)+$", "", name.split("(")[0])[:80]


def main() -> None:
  request = json.loads(sys.argv[1])
  config = load(request["recipe"])
  config.update_from_flattened_dict(request["fields"])
  step = Step(config)
  jax.block_until_ready(step())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(request["steps"]):
        jax.block_until_ready(step())
    spent = operations(Path(folder))
  total = sum(spent.values())
  if not total:
    raise SystemExit("error: the profile holds no operation")
  largest = sorted(spent, key=lambda name: -spent[name])[:SHOWN]
  fractions = {name: spent[name] / total for name in largest}
  print(json.dumps({"busy_seconds_a_step": total / 1e9 / request["steps"], "fractions": fractions}))


if __name__ == "__main__":
  main()

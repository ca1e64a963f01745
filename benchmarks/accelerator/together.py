"""Many runs as one program against the same runs one by one, on one device; its argument is JSON.

{"recipe": "9m", "fields": {…}, "runs": 8, "repeats": 5}
"""

import json
import sys

from benchmarks import together
from benchmarks.recipes import load

PLACEMENTS = ("pre", "post", "mix:0.25", "lns")


def main() -> None:
  request = json.loads(sys.argv[1])
  base = load(request["recipe"])
  base.update_from_flattened_dict(request["fields"])
  seeds = range(request["runs"] // len(PLACEMENTS))
  seconds = together.measure(base, request["repeats"], PLACEMENTS, tuple(seeds))
  print(json.dumps(seconds | {"faster": seconds["apart"] / seconds["together"]}))


if __name__ == "__main__":
  main()

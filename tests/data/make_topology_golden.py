"""Makes tests/data/golden/topology/ and optimizers/: what the tests read of golden files of the methods' own code.

    PYTHONPATH=.:tests python tests/data/make_topology_golden.py SOURCE

SOURCE is the folder of the whole files, one for each method (and variant) with the sublayers' inputs, outputs and
coefficients too. Of a file with random weights remain the batch, weights, gradients, logits, losses, streams and what
is said of them; of one with initial weights (`*_init*.npz`) what the method adds to Pre-LN; of ProRes' factors those of
12 layers, the smallest depth at which T // L · l is not T · l / L. Those of CompleteP go to optimizers/. Files of other
kinds stay where they are.
"""

import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden" / "topology"
METHODS = json.loads((Path(__file__).parent / "golden_fields.json").read_text())
RANDOM_PARTS = (
  *("meta", "input_ids", "loss_mask", "weight", "grad", "logits", "loss", "adam_losses"),
  *("hidden", "streams", "sources"),
)
FACTORS = "L12_T1000"
COMPLETEP = "completep"
COMPLETEP_PARTS = (*RANDOM_PARTS, "weight_after", "adamw_losses")


def remaining(name: str, keys: list[str], meta: dict) -> list[str]:
  """The keys that the tests read of the file `name`."""
  if meta["method"] == "prores":
    return [key for key in keys if key == "meta" or key.endswith(FACTORS)]
  if meta["method"] == COMPLETEP:
    random = "loss" in keys
    return [key for key in keys if key.split("/")[0] in COMPLETEP_PARTS] if random else keys
  if "_init" in name:
    return ["meta", *(f"weight/{added}" for added in meta["extra_parameters"])]
  return [key for key in keys if key.split("/")[0] in RANDOM_PARTS]


def main(source: Path) -> None:
  optimizers = FOLDER.parent / "optimizers"
  for folder in (FOLDER, optimizers):
    folder.mkdir(exist_ok=True)
  for path in sorted(source.glob("*.npz")):
    with np.load(path, allow_pickle=False) as data:
      meta = json.loads(bytes(data["meta"])) if "meta" in data.files else {}
      if meta.get("method") not in (*METHODS, "prores", COMPLETEP):
        print(f"{path.name}: not of a topology")
        continue
      kept = {key: data[key] for key in remaining(path.stem, data.files, meta)}
    target = (optimizers if meta["method"] == COMPLETEP else FOLDER) / path.name
    np.savez_compressed(target, **kept)
    print(f"{path.name}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
  main(Path(sys.argv[1]))

"""Whether DPO teaches: accuracy and margin on held-out pairs before and after, at the size of a laptop.

    python -m benchmarks.preferences --only_task                 # only write the pairs, work/era_pairs/*.jsonl
    python -m benchmarks.preferences --base=RUN [--base=RUN] [--out=benchmarks/results/preferences.json]

The passages are those of `benchmarks.finetuning`; here each of them has two answers, and the right date is preferred.
Each --base is a run of configs/tiny.py; it is tuned with configs/preference/tiny.py. Before, the preferred answer is
the likelier one under the start's own log-probabilities; after, that of the larger reward (before, every reward is 0).
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import jax

from benchmarks import finetuning
from benchmarks.output import output_file
from configs.preference import tiny
from mixln_jax.data import references
from mixln_jax.data.prepare import prepare
from mixln_jax.runs import folder as folder_lib
from mixln_jax.runs.folder import RunFolder
from mixln_jax.training.finetune import resolve
from mixln_jax.training.loop import train

TASK = Path("work/era_pairs")
SIZES = {"train": 2400, "validation": 400}  # 150 steps of 8 records of two pairs see each of them once
ANSWERS = {"before": f" before {finetuning.BEFORE}.", "after": f" after {finetuning.AFTER}."}


def make_task(folder: Path) -> None:
  """Writes train.jsonl and validation.jsonl, the pairs of the passages that `finetuning.make_task` chooses."""
  finetuning.make_task(finetuning.TASK)
  folder.mkdir(parents=True, exist_ok=True)
  for split, size in SIZES.items():
    lines = []
    for example in json.loads((finetuning.TASK / f"{split}.json").read_text())[:size]:
      passage = example["instruction"].removeprefix(finetuning.QUESTION).strip()
      right, wrong = example["output"], next(word for word in ANSWERS if word != example["output"])
      pair = {"prompt": f"{passage}\nThis was said", "chosen": ANSWERS[right], "rejected": ANSWERS[wrong]}
      lines.append(json.dumps(pair) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines))


def tune(base: str) -> dict[str, Any]:
  """Tunes one run, or resumes that, and measures before and after."""
  workdir = RunFolder(f"work/runs/era_pairs-{Path(base).name}")
  config = tiny.get_config()
  config.train.start_from = base
  config = resolve(config, {}, workdir)
  corpus = prepare(config)
  outcome = train(config, workdir.address)
  start = json.loads(workdir.read(folder_lib.START))
  reference = references.Reference(start["hash"], references.model_hash(config.model))
  found = references.with_stored(corpus, reference)
  assert found is not None
  assert found.references is not None
  likelihoods = found.references["validation"]
  chosen, rejected = likelihoods[:, 0::2], likelihoods[:, 1::2]
  is_pair = chosen != 0
  return {
    "placement": config.model.placement,
    "start_step": start["step"],
    "accuracy_before": float((chosen > rejected)[is_pair].mean()),
    "after": outcome.validation,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only_task", action="store_true")
  parser.add_argument("--base", action="append", default=[])
  parser.add_argument("--out", type=output_file)
  arguments = parser.parse_args()
  if not arguments.only_task and not arguments.base:
    parser.error("give --base=RUN, a run of configs/tiny.py, or --only_task")
  make_task(TASK)
  if arguments.only_task:
    print(f"wrote      {TASK}: {', '.join(f'{split}.jsonl, {size:,} pairs' for split, size in SIZES.items())}")
    return
  results = [tune(base) for base in arguments.base]
  for one in results:
    print(
      f"{one['placement']:<12} accuracy before {one['accuracy_before']:.1%}, after {one['after']['accuracy']:.1%}, "
      f"margin {one['after']['margin']:.3f}"
    )
  if arguments.out:
    facts = {"jax": jax.__version__, "machine": platform.machine(), "results": results}
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
  main()

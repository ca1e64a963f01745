"""Effect of fine-tuning: accuracy and likelihood of held-out answers before and after, at laptop size.

    python -m benchmarks.finetuning --only_task                    # only write the examples, work/eras/*.json
    python -m benchmarks.finetuning --base=RUN --base=RUN [--seeds=0,1] [--out=benchmarks/results/finetuning.json]

The task is to say whether a passage of a State of the Union message is from before 1860 or from after 1960. Passages
have no digits and are thirty words long; those for validation come from other messages, which the pre-training of
configs/tiny.py also holds out. Both answers are equally frequent, so chance is one half. Each --base is a run of
configs/tiny.py; it is fine-tuned with configs/finetune/tiny.py, once for each of --seeds (of the sample order). The
answer with the higher likelihood of its tokens, including its end token, is chosen.
"""

import argparse
import hashlib
import json
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.output import output_file
from configs.finetune import tiny
from mixln_jax.config import ModelConfig
from mixln_jax.data import corpus as corpus_lib
from mixln_jax.data import instructions
from mixln_jax.data.corpus import Document
from mixln_jax.data.instructions import Example, Tokens
from mixln_jax.data.prepare import prepare
from mixln_jax.data.records import named_tokenizer
from mixln_jax.data.tokenizer import PAD
from mixln_jax.model import Transformer
from mixln_jax.opening import open_run
from mixln_jax.runs.folder import RunFolder
from mixln_jax.training.finetune import resolve
from mixln_jax.training.loop import train

TASK = Path("work/eras")
SIZES = {"train": 4000, "validation": 400}
CHOICES = ("before", "after")
WORDS = 30
BEFORE, AFTER = 1860, 1960  # the years between are left out
QUESTION = f"Was this said before {BEFORE} or after {AFTER}?"
HELD_OUT = 0.05  # of the messages, by the hash of their names, as configs/tiny.py
BATCH = 50


def passages() -> Iterator[tuple[str, str, str]]:
  """(split, answer, passage) of every paragraph that is long enough and has no digit."""
  for part in corpus_lib.parts_of(corpus_lib.EMBEDDED_PARAGRAPHS):
    for document in corpus_lib.read(part):
      if isinstance(document, Document) and not any(sign.isdigit() for sign in document.text):
        words = document.text.split()
        split = "validation" if corpus_lib.is_validation(document.name, HELD_OUT) else "train"
        year = int(document.name[:4])
        if len(words) >= WORDS and not BEFORE <= year < AFTER:
          yield split, CHOICES[year >= AFTER], " ".join(words[:WORDS])


def make_task(folder: Path) -> None:
  """Writes train.json and validation.json in the layout of Commonsense170K; the same bytes each time."""
  found: dict[tuple[str, str], list[str]] = {}
  for split, answer, passage in passages():
    found.setdefault((split, answer), []).append(passage)
  folder.mkdir(parents=True, exist_ok=True)
  for split, size in SIZES.items():
    chosen = [
      (_digest(passage), passage, answer)
      for answer in CHOICES
      for passage in sorted(found[split, answer], key=_digest)[: size // len(CHOICES)]
    ]
    examples = [
      {"instruction": f"{QUESTION}\n\n{passage}", "input": "", "output": answer, "answer": answer}
      for _, passage, answer in sorted(chosen)
    ]
    (folder / f"{split}.json").write_text(json.dumps(examples, indent=1) + "\n")


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def log_likelihoods(model: ModelConfig, params: Any, rows: Sequence[Tokens]) -> np.ndarray:
  """Log probability in nats of the answer of each row, summed over its tokens including the end token."""
  length = max(len(row.ids) for row in rows)

  @jax.jit
  def score(params: Any, tokens_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    logits_BTV = Transformer(model).apply({"params": params}, tokens_BT)
    logs_BTV = jax.nn.log_softmax(jnp.asarray(logits_BTV, jnp.float32)[:, :-1])
    logs_BT = jnp.take_along_axis(logs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(logs_BT * weights_BT[:, 1:], axis=1)

  scores = []
  for begin in range(0, len(rows), BATCH):
    chosen = rows[begin : begin + BATCH]
    tokens_BT, weights_BT = np.full((BATCH, length), PAD, np.int32), np.zeros((BATCH, length), np.float32)
    for index, row in enumerate(chosen):
      tokens_BT[index, : len(row.ids)] = row.ids
      weights_BT[index, len(row.ids) - row.num_answer : len(row.ids)] = 1
    scores.append(np.asarray(score(params, tokens_BT, weights_BT))[: len(chosen)])
  return np.concatenate(scores)


def measure(run: RunFolder, tokenizer_name: str, sequence_length: int) -> dict[str, float]:
  """`accuracy`: by likelihood among the choices. `answer_nats`: minus the mean log likelihood of the right answer."""
  with open_run(run.address) as opened:
    config, step, params = opened.config, opened.step, opened.params
  tokenizer = named_tokenizer(tokenizer_name)
  items = json.loads((TASK / "validation.json").read_text())
  rows = []
  for item in items:
    for choice in CHOICES:
      example = Example("", instructions.prompt_of(item["instruction"], item["input"]), choice)
      tokens = instructions.tokenize(example, tokenizer, sequence_length)
      assert tokens is not None
      rows.append(tokens)
  scores_NC = log_likelihoods(config.model, params, rows).reshape(len(items), len(CHOICES))
  right_N = np.array([CHOICES.index(item["answer"]) for item in items])
  return {
    "step": step,
    "accuracy": float((scores_NC.argmax(1) == right_N).mean()),
    "answer_nats": float(-scores_NC[np.arange(len(items)), right_N].mean()),
  }


def tune(base: str, seed: int) -> dict[str, Any]:
  """Fine-tunes one run, or resumes its fine-tuning, and measures before and after."""
  workdir = RunFolder(f"work/runs/eras-{Path(base).name}-{seed}")
  config = tiny.get_config()
  config.train.start_from = base
  config.data.seed = seed
  config = resolve(config, {}, workdir)
  prepare(config)
  outcome = train(config, workdir.address)
  before, after = (
    measure(run, config.data.tokenizer, config.data.sequence_length) for run in (RunFolder(base), workdir)
  )
  validation = outcome.validation or {}
  return {
    "placement": config.model.placement,
    "data.seed": seed,
    "before": before,
    "after": after,
    "validation_loss": validation.get("loss"),
  }


def show(results: Sequence[dict[str, Any]]) -> None:
  items = SIZES["validation"]
  print(f"{items} held-out items, two choices: chance is 50 % ± {1.96 * math.sqrt(0.25 / items):.1%} (95 % interval)")
  print(f"{'placement':<12} seed  accuracy before  after   nats of the right answer before  after")
  for one in results:
    before, after = one["before"], one["after"]
    print(
      f"{one['placement']:<12} {one['data.seed']:>4}  {before['accuracy']:>15.1%}  {after['accuracy']:>5.1%}"
      f"  {before['answer_nats']:>31.2f}  {after['answer_nats']:>5.3f}"
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only_task", action="store_true")
  parser.add_argument("--base", action="append", default=[])
  parser.add_argument("--seeds", default="0,1")
  parser.add_argument("--out", type=output_file)
  arguments = parser.parse_args()
  if not arguments.only_task and not arguments.base:
    parser.error("give --base=RUN, a run of configs/tiny.py, or --only_task")
  make_task(TASK)
  if arguments.only_task:
    print(f"wrote      {TASK}: {', '.join(f'{split}.json, {size:,} examples' for split, size in SIZES.items())}")
    return
  results = [tune(base, int(seed)) for base in arguments.base for seed in arguments.seeds.split(",")]
  show(results)
  if arguments.out:
    facts = {"items": SIZES["validation"], "jax": jax.__version__, "machine": platform.machine(), "results": results}
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
  main()

"""Run folders made by hand: every number in them is chosen, so that every number of a report can be."""

import json
import math

from mixln_jax import config as config_lib
from mixln_jax import placement as placement_lib

NUM_LAYERS = 4
NUM_STEPS = 20
BITS_PER_NAT = 0.144  # a byte, in these made runs
TENSORS = ("embedding", "head", "final_norm", "layers/query", "layers/output", "layers/down")


def config_of(**changes):
  """The flat config of a small run."""
  flat = config_lib.flatten(config_lib.base())
  flat |= {"model.num_layers": NUM_LAYERS, "train.num_steps": NUM_STEPS, "evaluate.every_steps": 10}
  return flat | {name.replace("__", "."): value for name, value in changes.items()}


def metrics_lines(loss, num_steps, pairs=None, rate=1e-3):
  """Training and validation lines that end at validation loss `loss`; of a run on pairs, with the metrics `pairs`."""
  lines = []
  for step in range(1, num_steps + 1):
    train = loss + 0.1 * (num_steps - step)
    line = {"step": step, "split": "train", "loss": train, "gradient_norm": 1.0 / step, "tokens": 100.0}
    lines.append(line | {"skipped_in_a_row": 0.0, "learning_rate": rate, "tokens_per_second": 10.0})
    if step % 10 == 0:
      value = loss if step == num_steps else loss + 1
      validation = {"loss": value, "perplexity": math.exp(value), "bits_per_byte": value * BITS_PER_NAT}
      if pairs is not None:
        validation = {"loss": value, **pairs}
      lines.append({"step": step, "split": "validation", **validation})
  return lines


def make_run(
  folder,
  loss: float | None = 5.0,
  *,
  diagnosed=False,
  diagnosis=None,
  ended=True,
  status="finished",
  weights=None,
  fingerprint="f" * 16,
  environment=None,
  pairs=None,
  **changes,
):
  """Writes a run's folder and returns it.

  `weights` changes some tensors' sums of bits, `diagnosis` some of diagnose.json, `environment` some of
  environment.json, and `changes` some fields of the config. With `pairs`, the metrics of its validations besides the
  loss, it is a run on pairs of answers.
  """
  folder.mkdir(parents=True)
  if pairs is not None:
    changes = {"preference__loss": "dpo", "data__mode": "preferences", **changes}
  config = config_of(**changes)
  write = lambda name, value: (folder / name).write_text(json.dumps(value))  # noqa: E731
  write("config.json", config)
  (folder / "placement.txt").write_text(
    placement_lib.parse(config["model.placement"], config["model.num_layers"]).layer_list + "\n"
  )
  rate = config["optimizer.learning_rate"]
  lines = metrics_lines(loss, config["train.num_steps"], pairs, rate) if loss is not None else []
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  sums = {name: 1000 * config["seed"] + index for index, name in enumerate(TENSORS)} | (weights or {})
  write("initial_weights.json", {"hash": f"{sum(sums.values()):x}", "bit_sums": sums})
  facts = {"python": "3.11", "git": "abc", "devices": ["cpu:cpu"], "packages": {"jax": "0.10.2"}}
  write("environment.json", facts | (environment or {}))
  if ended:
    outcome = {
      "status": status,
      "diverged": False,
      "skipped_updates": 2,
      "seconds": {"total": 90.0},
      "message": "x",
    }
    write("outcome.json", outcome | {"best_validation": {"step": 20, "loss": loss}})
  diagnosis = (make_diagnosis(config) if diagnosed else {"step": 20, "num_layers": NUM_LAYERS}) | (diagnosis or {})
  (folder / "diagnose" / "20").mkdir(parents=True)
  write("diagnose/20/diagnose.json", diagnosis | {"data_fingerprint": fingerprint})
  if diagnosed:
    rows = [diagnostics_row(step) for step in (1, 10, 20)]
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def diagnostics_row(step):
  layers = list(range(1, NUM_LAYERS + 1))
  row = {"step": step, "loss": 5.0, "loss_spike_score": None, "stream_rms": layers, "stream_variance": layers}
  row |= {"cosine": [0.5] * NUM_LAYERS, "attention/largest_logit": layers, "attention/entropy": layers}
  for sublayer in ("attention", "mlp"):
    for name in ("gradient_norm", "gain_gradient_norm", "update_ratio", "branch_ratio", "norm_gain_rms"):
      row[f"{sublayer}/{name}"] = [step / layer for layer in layers]
  return row


def make_diagnosis(config):
  size = range(NUM_LAYERS)
  matrix = [[0.1 * n if layer + n <= NUM_LAYERS else None for n in range(1, NUM_LAYERS + 1)] for layer in size]
  norms = {"attention": [1.0, 0.5, 0.25, 0.125], "mlp": [1.0, 0.5, 0.25, 0.125]}
  return {
    "step": 20,
    "placement": config["model.placement"],
    "num_layers": NUM_LAYERS,
    "tokens": 100,
    "definitions": {"angular_distance": "a sample of 100 tokens"},
    "angular_distance": {"last": matrix, "all": matrix},
    "removal": {"loss": 5.0, "blocks": {"1": [6.0, 5.5, 5.25, 5.0], "2": [7.0, 6.5, 6.0]}},
    "gradient_norm": {"initial": norms, "checkpoint": norms},
    "effective_rank": [1.0, 2.0, 3.0, 4.0, 5.0],
    "logit_lens_perplexity": [50.0, 40.0, 30.0, 20.0, 10.0],
    "depth_suite": {"arrays": make_suite()},
  }


def make_suite(causal=0.5):
  """Arrays of the depth suite: the first layer changes all later ones by `causal`, each other one nothing."""
  later = [[causal if layer > 0 else None for layer in range(NUM_LAYERS)]]
  scores = later + [[None] * NUM_LAYERS] * (NUM_LAYERS - 1)
  tenths = [[None if score is None else score / 10 for score in row] for row in scores]
  return {
    "causal/mean_of_ratios": scores,
    "permutation/row_moves": tenths,
    "usefulness/ratio_heldout": list(range(NUM_LAYERS)),
    "jacobian/same_position_deviation": [1.0] * NUM_LAYERS,
    "lens/kl_final_to_depth": list(range(NUM_LAYERS + 1)),
    "lens/top5_overlap": [1.0] * (NUM_LAYERS + 1),
    "another/measure": [1.0, 1.0],
  }


def make_study(folder, losses, **study):
  """A study of runs: `losses` has {name: (values on the axes, final loss)}. Returns its folder."""
  planned = []
  for name, (values, loss) in losses.items():
    make_run(folder / "runs" / name, loss, **{field.replace(".", "__"): value for field, value in values.items()})
    planned.append({"name": name, "values": values})
  fields = dict.fromkeys(field for values, _ in losses.values() for field in values)
  axes = {field: list(dict.fromkeys(values[field] for values, _ in losses.values())) for field in fields}
  content = {"name": "a study", "question": "Which?", "base": config_of(), "axes": axes, "runs": planned}
  (folder / "study.json").write_text(json.dumps(content | study))
  return folder

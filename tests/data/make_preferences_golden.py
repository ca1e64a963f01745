"""Makes tests/data/preferences/trl.npz: what TRL computes of a few pairs of answers, each loss with its gradient.

    pip install torch transformers trl datasets
    python tests/data/make_preferences_golden.py

Written with TRL 1.16.0. `logits` [2N, T, V] are random, chosen answers first, as TRL stacks them; `tokens` [2N, T],
`answers` [2N, T] (1 at the tokens of an answer) and `references` [2N] belong to them. Under each name of CASES lie
`NAME/loss` (the mean over pairs), `NAME/rewards` [2N] and `NAME/gradient`, that of the loss by the logits.

dpo is `DPOTrainer._compute_loss` itself, with a stand-in for the model that returns the logits' log-probabilities.
TRL 1.16 has no label smoothing of DPO left: `dpo_smoothed` is its `CPOTrainer.cpo_loss` at the log ratios, which is the
same formula. simpo is `CPOTrainer.get_batch_logps` and `cpo_loss`; orpo `ORPOTrainer.get_batch_logps` and
`odds_ratio_loss`, and the likelihood term as its `concatenated_forward` has it: over all tokens but the first one,
which are those of the answer, because the prompts of `orpo` are cut to one token. TRL takes that mean over the tokens
of all pairs, and the paper (arXiv 2403.07691, eq. 6) over the pairs: it is called a pair at a time.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

FOLDER = Path(__file__).parent / "preferences"
PAIRS, LENGTH, VOCABULARY = 5, 12, 11
PROMPTS = [1, 3, 4, 2, 5]  # tokens of each prompt, and of the two answers
ANSWERS = [[4, 3, 7, 1, 6], [2, 5, 3, 8, 6]]
CASES = {
  "dpo": {"beta": 0.1},
  "dpo_strong": {"beta": 0.5},
  "dpo_smoothed": {"beta": 0.3, "label_smoothing": 0.1},
  "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0},
  "simpo_smoothed": {"beta": 2.5, "gamma": 0.3, "label_smoothing": 0.2},
  "orpo": {"beta": 0.1},
}
CPU = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def sequences(prompts):
  """Tokens and where the answers are, [2N, T]; padding is behind."""
  rng = np.random.default_rng(0)
  tokens, answers = rng.integers(1, VOCABULARY, (2 * PAIRS, LENGTH)), np.zeros((2 * PAIRS, LENGTH), np.int64)
  lengths = np.zeros(2 * PAIRS, np.int64)
  for side, counts in enumerate(ANSWERS):
    for pair, count in enumerate(counts):
      row = side * PAIRS + pair
      tokens[row, : prompts[pair]] = tokens[pair, : prompts[pair]]
      answers[row, prompts[pair] : prompts[pair] + count] = 1
      lengths[row] = prompts[pair] + count
  tokens[np.arange(LENGTH) >= lengths[:, None]] = 0
  return torch.tensor(tokens), torch.tensor(answers), torch.tensor(lengths)


def dpo(logits, tokens, answers, references, case):
  labels = tokens.masked_fill(answers == 0, -100)
  outputs = SimpleNamespace()
  counted = labels[:, 1:] != -100
  picked = torch.gather(logits[:, :-1].log_softmax(-1), 2, tokens[:, 1:, None])[..., 0]
  outputs.log_probs = picked * counted  # as the fused head gives them: 0 where there is no label
  outputs.entropy = outputs.mean_logits = torch.zeros_like(picked)
  outputs.is_top1 = torch.zeros_like(counted)
  trainer = SimpleNamespace(
    model=SimpleNamespace(training=False),
    accelerator=CPU,
    aux_loss_enabled=False,
    ld_alpha=None,
    precompute_ref_logps=True,
    f_divergence_type="reverse_kl",
    loss_types=["sigmoid"],
    loss_weights=[1.0],
    use_weighting=False,
    label_smoothing=0.0,
    beta=case["beta"],
    _total_train_tokens=0,
    _tp_size=1,
    _metrics={"eval": defaultdict(list)},
  )
  inputs = {
    "input_ids": tokens,
    "attention_mask": (tokens > 0).long(),
    "completion_mask": answers,
    "ref_chosen_logps": references[:PAIRS],
    "ref_rejected_logps": references[PAIRS:],
  }
  loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
  found = {name: values[0] for name, values in trainer._metrics["eval"].items() if name.startswith("rewards/")}
  log_ratios = outputs.log_probs.sum(1) - references
  return loss, case["beta"] * log_ratios.detach(), found


def cpo(logits, tokens, answers, references, case, kind):
  trainer = SimpleNamespace(
    accelerator=CPU,
    alpha=0.0,
    loss_type=kind,
    beta=case["beta"],
    simpo_gamma=case.get("gamma"),
    label_smoothing=case["label_smoothing"],
  )
  labels = tokens.masked_fill(answers == 0, -100)
  logs = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=kind == "simpo")
  if kind == "sigmoid":
    logs = logs - references
  losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, logs[:PAIRS], logs[PAIRS:])
  return losses.mean(), torch.cat((chosen, rejected)), None


def orpo(logits, tokens, answers, lengths, case):
  trainer = SimpleNamespace(accelerator=CPU, beta=case["beta"])
  labels = tokens.masked_fill(answers == 0, -100)
  total, rewards = 0, torch.zeros(2 * PAIRS)
  for pair in range(PAIRS):
    rows = [pair, PAIRS + pair]
    logs = ORPOTrainer.get_batch_logps(logits[rows], labels[rows], average_log_prob=True)
    ratio, *both, _, _ = ORPOTrainer.odds_ratio_loss(trainer, logs[:1], logs[1:])
    rewards[rows] = torch.cat(both)
    whole = torch.where(torch.arange(LENGTH) < lengths[pair], tokens[pair], -100)
    likelihood = F.cross_entropy(logits[pair, :-1], whole[1:])
    total = total + likelihood - ratio.mean()
  return total / PAIRS, rewards, None


def main():
  FOLDER.mkdir(exist_ok=True)
  rng = np.random.default_rng(1)
  arrays = {"logits": rng.normal(size=(2 * PAIRS, LENGTH, VOCABULARY)).astype(np.float32) * 1.5}
  arrays["references"] = rng.normal(size=2 * PAIRS).astype(np.float32) * 3 - 8
  references = torch.tensor(arrays["references"])
  for name, case in CASES.items():
    tokens, answers, lengths = sequences([1] * PAIRS if name == "orpo" else PROMPTS)
    logits = torch.tensor(arrays["logits"], requires_grad=True)
    if name.startswith("simpo") or name == "dpo_smoothed":
      kind = "sigmoid" if name == "dpo_smoothed" else "simpo"
      loss, rewards, reported = cpo(logits, tokens, answers, references, case, kind)
    elif name == "orpo":
      loss, rewards, reported = orpo(logits, tokens, answers, lengths, case)
    else:
      loss, rewards, reported = dpo(logits, tokens, answers, references, case)
    loss.backward()
    arrays[f"{name}/tokens"], arrays[f"{name}/answers"] = tokens.numpy(), answers.numpy()
    arrays[f"{name}/loss"], arrays[f"{name}/rewards"] = loss.detach().numpy(), rewards.numpy()
    arrays[f"{name}/gradient"] = logits.grad.numpy()
    for metric, value in (reported or {}).items():
      arrays[f"{name}/{metric}"] = np.float32(value)
    print(name, float(loss), reported)
  np.savez_compressed(FOLDER / "trl.npz", **arrays)


if __name__ == "__main__":
  main()

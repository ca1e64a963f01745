"""DPO on a laptop: prefer the right one of two dates for a passage, from a run of configs/tiny.py.

Command:  python -m benchmarks.preferences --only_task (writes work/era_pairs), then
          python -m mixln_jax prepare, then python -m mixln_jax finetune --workdir=DIR, both with
          --config=configs/preference/tiny.py --config.train.start_from=RUN
Hardware: 2 CPU cores; 2 min 17 s and 2 min 59 s on a shared machine.
Result:   after 150 steps, from runs of configs/tiny.py of 300 steps, one seed (measured): 93.0 % of 400 held-out pairs
          with mix:0.25, 90.8 % with pre; 50.0 % before. docs/preferences.md has margins and rewards.
Source:   ours; the embedded corpus.
"""

from mixln_jax.config import base


def get_config():
  config = base()
  config.data.update(source="work/era_pairs/train.jsonl", validation_source="work/era_pairs/validation.jsonl")
  config.data.update(mode="preferences", document_mask=True, sequence_length=256)
  config.preference.loss = "dpo"
  config.train.update(num_steps=150, batch_size=8)
  config.optimizer.update(learning_rate=1e-3, schedule="linear")
  config.checkpoint.every_steps = 50
  config.evaluate.update(every_steps=50, batch_size=16)
  return config

"""DPO on a laptop: prefer the right one of two dates for a passage, from a run of configs/tiny.py.

Command:  python -m benchmarks.preferences --only_task (writes work/era_pairs), then
          python -m mixln_jax prepare, then python -m mixln_jax finetune --workdir=DIR, both with
          --config=configs/preference/tiny.py --config.train.start_from=RUN
Hardware: 2 CPU cores, as configs/finetune/tiny.py: a step has as many tokens.
Result:   never run to its end. As far as it was (mix:0.25; a start of 42 steps, 23 of 60 steps, measured):
          82.5 % of 400 held-out pairs, from 50.0 % after 15.
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

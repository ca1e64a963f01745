"""DPO on UltraFeedback with Zephyr's settings, from an instruction-tuned run of configs/llama_*.py.

Command:  python -m mixln_jax prepare, then python -m mixln_jax finetune --workdir=DIR, both with
          --config=configs/preference/zephyr_dpo.py --config.train.start_from=RUN
Hardware: never run here: neither the data nor a 1B run of ours is offline. A record of 2,048 tokens holds two
          sequences of 1,024, as Zephyr cuts them, or more that are shorter. num_steps is one epoch if two pairs share a
          record: `prepare` says how many records there are; set it to records / 64.
Result:   none. The paper's Table 3 has "final reward" 0.75 (pre) and 1.32 (mix) at 1B and does not say of what.
Source:   huggingface/alignment-handbook, recipes/zephyr-7b-beta/dpo/config_full.yaml: beta 0.01, rate 5e-7, cosine (to
          0), warm-up 0.1, 1 epoch, 8 pairs × 2 × GPUs (8, its README), length 1,024, seed 42. Clipping at 1.0: TRL's
          trainer's default. A model smaller than 7B may want a larger rate.
"""

from mixln_jax.config import base


def get_config():
  config = base()
  config.data.update(source="work/ultrafeedback_binarized/train_prefs*.parquet", max_bad_share=0.1, seed=42)
  config.data.validation_source = "work/ultrafeedback_binarized/test_prefs*.parquet"
  config.data.update(mode="preferences", document_mask=True, sequence_length=2048)
  config.preference.update(loss="dpo", dpo_beta=0.01)
  config.train.update(num_steps=478, batch_size=64)
  config.optimizer.update(learning_rate=5e-7, schedule="cosine", final_fraction=0.0, warmup_fraction=0.1)
  config.checkpoint.every_steps = 100
  config.evaluate.update(every_steps=100, batch_size=64, max_tokens=0)
  return config

"""SimPO on UltraFeedback with its published settings, from an instruction-tuned run of configs/llama_*.py.

Command:  python -m mixln_jax prepare, then python -m mixln_jax finetune --workdir=DIR, both with
          --config=configs/preference/simpo.py --config.train.start_from=RUN
Hardware: never run here: neither the data nor a 1B run of ours is offline. A record of 4,096 tokens holds two
          sequences of 2,048, as SimPO cuts them, or more that are shorter. num_steps is one epoch if four pairs share a
          record (`:mistral`: two): `prepare` says how many there are; set it to records / batch_size.
Result:   none of ours.
Source:   princeton-nlp/SimPO, training_configs/llama-3-8b-base-simpo.yaml and its README: beta 2.0, gamma / beta 0.5,
          rate 6e-7, cosine, warm-up 0.1, 1 epoch, 128 pairs, length 2,048. `:mistral` has mistral-7b-base-simpo.yaml:
          gamma 1.6, rate 3e-7, length 1,024. A model smaller than 7B may want a larger rate.
"""

from mixln_jax.config import base


def get_config(variant=""):
  config = base()
  config.data.update(source="work/ultrafeedback_binarized/train_prefs*.parquet", max_bad_share=0.1, seed=42)
  config.data.validation_source = "work/ultrafeedback_binarized/test_prefs*.parquet"
  config.data.update(mode="preferences", document_mask=True, sequence_length=4096)
  config.preference.update(loss="simpo", simpo_beta=2.0, simpo_gamma=1.0)
  config.train.update(num_steps=478, batch_size=32)
  config.optimizer.update(learning_rate=6e-7, schedule="cosine", final_fraction=0.0, warmup_fraction=0.1)
  config.checkpoint.every_steps = 100
  config.evaluate.update(every_steps=100, batch_size=32, max_tokens=0)
  if variant == "mistral":
    config.data.sequence_length = 2048
    config.preference.simpo_gamma = 1.6
    config.train.batch_size = 64
    config.optimizer.learning_rate = 3e-7
  elif variant:
    raise ValueError(f"unknown variant {variant!r} of configs/preference/simpo.py; choices: mistral")
  return config

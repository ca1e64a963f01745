"""Commonsense170K, the paper's fine-tuning data, from a run of configs/llama_*.py.

Command:  python -m mixln_jax prepare, then python -m mixln_jax finetune --workdir=DIR, both with
          --config=configs/finetune/commonsense_170k.py --config.train.start_from=RUN
Hardware: never run here. num_steps is 4 epochs if two examples share a record; `prepare` says how many records there
          are: set it to 4 × records / 64.
Result:   Table 2, mean accuracy on seven tasks: 250M pre 36.93, mix 41.34; 1B pre 43.01, mix 44.66. Ours: none.
Source:   arXiv 2412.13795, which names only the data. Epochs, rate and seed: GPAS, of the same lineage, which trains
          four layers at a time (LISA); here all are. Length, schedule, warm-up: LLM-Adapters, arXiv 2304.01933.

The variant `:depthbench` has DepthBench's settings: 3 epochs, length 512, batch 128, a tenth of pre-training's rate.
"""

from mixln_jax.config import base


def get_config(variant=""):
  config = base()
  config.data.update(source="work/commonsense_170k.json", validation_share=0.001, seed=42)
  config.data.update(mode="instructions", document_mask=True, sequence_length=256)
  config.train.update(num_steps=5300, batch_size=64)
  config.optimizer.update(learning_rate=3e-4, schedule="linear", final_fraction=0.0, warmup_steps=100)
  if variant == "depthbench":
    config.data.sequence_length = 512
    config.train.update(num_steps=1000, batch_size=128)
    config.optimizer.learning_rate = 1e-4
  elif variant:
    raise ValueError(f"unknown variant {variant!r} of configs/finetune/commonsense_170k.py; choices: depthbench")
  return config

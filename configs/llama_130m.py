"""LLaMA 130M: 134.11 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_130m.py --workdir=DIR
Hardware: 8 TPU v5e chips. Compiled ahead of time for v5e:2x4 with the TPU compiler: 4.0 GB a chip (1.6 of state and
          batch, 2.4 of temporaries). 1.8e+18 model FLOPs, 47 min at 40 % utilisation: arithmetic, not measured.
Result:   Table 1: perplexity 26.07 with mix:0.25, 26.78 with pre, 26.95 with post; its evaluator reads low, a
          correct one gives about 26.51, 27.24 and 27.41. A same-config rerun of this lineage was off by 0.45.
Source:   arXiv 2412.13795; 20K steps, Table 7.

`configs/llama_130m.py:official` sets what the released code does: no clipping, embedding std sqrt(2/5), and
parameters, gradients and Adam's moments in bfloat16. It is there to compare; its bf16 second moment never decays.
"""

import math

from mixln_jax.config import C4, base


def get_config(variant=""):
  config = base()
  config.model.update(embed_dim=768, mlp_dim=2048, num_layers=12, num_heads=12, dtype="bfloat16", remat="full")
  config.data.update(C4)
  config.train.num_steps = 20_000
  if variant == "official":
    config.model.update(param_dtype="bfloat16", embedding_deviation=math.sqrt(2 / 5))
    config.optimizer.update(clip_norm=0.0, moment_dtype="bfloat16")
  elif variant:
    raise ValueError(f"unknown variant {variant!r} of configs/llama_130m.py; choices: official")
  return config

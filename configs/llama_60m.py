"""LLaMA 60M: 58.07 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_60m.py --workdir=DIR
Hardware: 4 TPU v5e chips. Compiled ahead of time for v5e:2x2 with the TPU compiler: 2.4 GB a chip (0.7 of state and
          batch, 1.7 of temporaries). 3.4e+17 model FLOPs, 18 min at 40 % utilisation: arithmetic, not measured.
Result:   not published.
Source:   arXiv 2412.13795; shape from the released configs; the paper trains none of this size, the schedule
          follows its nearest.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=512, mlp_dim=1376, num_layers=8, num_heads=8)
  config.model.update(dtype="bfloat16", remat="full")
  config.data.update(C4)
  return config

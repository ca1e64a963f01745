"""LLaMA 40M: 42.39 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_40m.py --workdir=DIR
Hardware: 4 TPU v5e chips. Compiled ahead of time for v5e:2x2 with the TPU compiler: 6.2 GB a chip (0.5 of state and
          batch, 5.7 of temporaries). 2.4e+17 model FLOPs, 12 min at 40 % utilisation: arithmetic, not measured.
Result:   not published.
Source:   arXiv 2412.13795; shape from the released configs; the paper trains none of this size, the schedule
          follows its nearest.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=416, mlp_dim=1024, num_layers=8, num_heads=8)
  config.data.update(C4)
  config.train.micro_batches = 4
  return config

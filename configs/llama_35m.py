"""LLaMA 35M: 35.20 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_35m.py --workdir=DIR
Hardware: 4 TPU v5e chips. Compiled ahead of time for v5e:2x2 with the TPU compiler: 4.9 GB a chip (0.4 of state and
          batch, 4.4 of temporaries). 1.8e+17 model FLOPs, 10 min at 40 % utilisation: arithmetic, not measured.
Result:   not published.
Source:   arXiv 2412.13795; shape from the released configs; the paper trains none of this size, the schedule
          follows its nearest.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=384, mlp_dim=1024, num_layers=6, num_heads=8)
  config.data.update(C4)
  config.train.micro_batches = 4
  return config

"""LLaMA 20M: 19.55 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_20m.py --workdir=DIR
Hardware: 4 TPU v5e chips. Compiled ahead of time for v5e:2x2 with the TPU compiler: 2.8 GB a chip (0.2 of state and
          batch, 2.6 of temporaries). 9.1e+16 model FLOPs, 5 min at 40 % utilisation: arithmetic, not measured.
Result:   not published.
Source:   arXiv 2412.13795; shape from the released configs; the paper trains none of this size, the schedule
          follows its nearest.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=256, mlp_dim=688, num_layers=4, num_heads=4)
  config.data.update(C4)
  config.train.micro_batches = 4
  return config

"""LLaMA 100M: 100.12 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_100m.py --workdir=DIR
Hardware: 4 TPU v5e chips. Compiled ahead of time for v5e:2x2 with the TPU compiler: 4.0 GB a chip (1.2 of state and
          batch, 2.8 of temporaries). 1.3e+18 model FLOPs, 1.1 h at 40 % utilisation: arithmetic, not measured.
Result:   not published.
Source:   arXiv 2412.13795; shape from the released configs; the paper trains none of this size, the schedule
          follows its nearest.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(vocab_size=32_100, embed_dim=640, mlp_dim=1708, num_layers=12, num_heads=10)
  config.model.update(dtype="bfloat16", remat="full")
  config.data.update(C4)
  config.train.num_steps = 20_000
  return config

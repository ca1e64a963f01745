"""LLaMA 3B: 2685.83 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_3b.py --workdir=DIR
Hardware: 64 TPU v5e chips. Compiled ahead of time for v5e:8x8 with the TPU compiler: 2.9 GB a chip (0.6 of state
          and batch, 2.2 of temporaries). 1.0e+20 model FLOPs, 5.7 h at 40 % utilisation: arithmetic, not measured.
Result:   not published.
Source:   arXiv 2412.13795; shape from the released configs; the paper trains none of this size, the schedule
          follows its nearest.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=2560, mlp_dim=6848, num_layers=32, num_heads=32)
  config.model.update(dtype="bfloat16", remat="full")
  config.mesh.update(data=1, fsdp=-1)
  config.data.update(C4)
  config.train.num_steps = 50_000
  config.optimizer.learning_rate = 5e-4
  return config

"""LLaMA 250M: 247.37 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_250m.py --workdir=DIR
Hardware: 8 TPU v5e chips. Compiled ahead of time for v5e:2x4 with the TPU compiler: 6.8 GB a chip (3.0 of state and
          batch, 3.8 of temporaries). 7.2e+18 model FLOPs, 3.2 h at 40 % utilisation: arithmetic, not measured.
Result:   Table 1: perplexity 21.39 with mix:0.25, 21.92 with pre; post does not train. A correct evaluator gives
          about 21.73 and 22.27.
Source:   arXiv 2412.13795; 40K steps, Table 7. The table's width 1024 is a slip (it would be 355 M); the released
          config has 768.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=768, mlp_dim=2560, num_layers=24, num_heads=16)
  config.model.update(dtype="bfloat16", remat="full")
  config.data.update(C4)
  config.train.num_steps = 40_000
  return config

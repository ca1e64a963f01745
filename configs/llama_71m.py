"""LLaMA 71M: 70.58 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_71m.py --workdir=DIR
Hardware: 4 TPU v5e chips. Compiled ahead of time for v5e:2x2 with the TPU compiler: 3.0 GB a chip (0.8 of state and
          batch, 2.1 of temporaries). 4.4e+17 model FLOPs, 23 min at 40 % utilisation: arithmetic, not measured.
Result:   Table 1: perplexity 33.12 with mix:0.25, 34.77 with pre, 35.18 with post; its evaluator reads low, a
          correct one gives about 33.73, 35.42 and 35.84.
Source:   arXiv 2412.13795; 10K steps, Table 7.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=512, mlp_dim=1368, num_layers=12, num_heads=8)
  config.model.update(dtype="bfloat16", remat="full")
  config.data.update(C4)
  return config

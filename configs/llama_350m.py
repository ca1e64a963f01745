"""LLaMA 350M: 367.97 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_350m.py --workdir=DIR
Hardware: 16 TPU v5e chips. Compiled ahead of time for v5e:4x4 with the TPU compiler: 8.0 GB a chip (4.4 of state
          and batch, 3.5 of temporaries). 1.6e+19 model FLOPs, 3.5 h at 40 % utilisation: arithmetic, not measured.
Result:   no figure in the paper. The LayerNorm Scaling paper (arXiv 2502.05795) reports 19.58 with pre and that
          Mix-LN diverges at this size; the authors' log at α = 50 % does so between steps 7K and 8K.
Source:   arXiv 2412.13795; 60K steps, from the authors' run scripts; not in the paper.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=1024, mlp_dim=2736, num_layers=24, num_heads=16)
  config.model.update(dtype="bfloat16", remat="full")
  config.data.update(C4)
  config.train.num_steps = 60_000
  return config

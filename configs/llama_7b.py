"""LLaMA 7B: 6738.42 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_7b.py --workdir=DIR
Hardware: 256 TPU v5e chips. Compiled ahead of time for v5e:16x16 with the TPU compiler (mix:0.25): 1.8 GB a chip (0.3
          of state and batch, 1.4 of temporaries). 6.8e+19 model FLOPs, 56 min at 40 % utilisation: arithmetic, not
          measured.
Result:   only a curve in the paper (Fig. 4: α = 6.25 %, below pre); no figure was published.
Source:   arXiv 2412.13795; 13K steps, Table 7; the released script says 150K with 15K of warm-up, so the published
          curve may lie inside the warm-up.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=4096, mlp_dim=11008, num_layers=32, num_heads=32)
  config.model.placement = "mix:0.0625"
  config.model.update(dtype="bfloat16", remat="full")
  config.mesh.update(data=1, fsdp=-1)
  config.data.update(C4)
  config.train.num_steps = 13_000
  config.optimizer.learning_rate = 5e-4
  return config

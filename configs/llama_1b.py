"""LLaMA 1B: 1339.08 M parameters.

Command:  python -m mixln_jax train --config=configs/llama_1b.py --workdir=DIR
Hardware: 16 TPU v5e chips. Compiled ahead of time for v5e:4x4 with the TPU compiler: 4.7 GB a chip (1.0 of state
          and batch, 3.7 of temporaries). 5.1e+19 model FLOPs, 11.1 h at 40 % utilisation: arithmetic, not measured.
Result:   Table 1: perplexity 18.18 with mix:0.25, 18.65 with pre; post does not train. A correct evaluator gives
          about 18.32 and 18.79. Table 5 has the minimum over α at 25 %.
Source:   arXiv 2412.13795; Table 7 says 100K steps, but 5 B tokens fit 50K steps of 512 × 195, and the authors'
          evaluation script loads step 50001: hence 50K. Their script warms up for 1 %, the table says 10 %.
"""

from mixln_jax.config import C4, base


def get_config():
  config = base()
  config.model.update(embed_dim=2048, mlp_dim=5461, num_layers=24, num_heads=32)
  config.model.update(dtype="bfloat16", remat="full", mlp_pad_to=128)
  config.mesh.update(data=1, fsdp=-1)
  config.data.update(C4)
  config.train.num_steps = 50_000
  config.optimizer.learning_rate = 5e-4
  return config

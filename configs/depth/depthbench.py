"""DepthBench's shapes at 405 M parameters, from 16 layers of 1,216 to 70 of 640, and its protocol.

Command:  python -m mixln_jax train --config=configs/depth/depthbench.py:24 --workdir=DIR (any of SHAPES), or the study:
          python -m mixln_jax sweep --config=configs/depth/depthbench.py --workdir=DIR
Hardware: 16 TPU v5e chips (v5e:4x4); by the compiler 8.7 GB of each chip's 16.9 for 16 layers, 12.8 for 70 (mix:0.25):
          python -m mixln_jax plan --config=configs/depth/depthbench.py:16 --topology=v5e:4x4
Result:   DepthBench's validation losses, one seed: Pre-LN 2.759 at 16 layers to 2.782 at 32, LNS 2.749 to 2.739, HC of
          four streams 2.729 to 2.682 at 70. It has no Post-LN and no Mix-LN. Nothing here was run at this size.
Source:   arXiv 2609.32534 and its code (f807aa2). Not stated there, ours: Adam's betas, the floor of the cosine.
"""

from mixln_jax.config import base

# layers -> width, MLP; 16 heads
SHAPES = {16: (1216, 3248), 20: (1120, 2992), 24: (1024, 2736), 28: (960, 2560), 32: (896, 2400)}
SHAPES |= {42: (800, 2144), 70: (640, 1712)}
RATES = {"pre": (1e-3, 2e-3, 4e-3), "post": (2.5e-4, 5e-4, 1e-3), "mix:0.25": (5e-4, 1e-3, 2e-3)}
RATES |= {"lns": (5e-3, 1e-2, 2e-2), "peri": (1e-3, 2e-3, 4e-3), "hc:4": (1e-3, 2e-3, 4e-3)}


SHAPE = ("model.num_layers", "model.embed_dim", "model.mlp_dim")
POINTS = tuple((layers, *shape) for layers, shape in SHAPES.items())
STUDY = {
  "title": "Loss against depth at 405 M parameters",
  "question": "Does depth pay at 405 M parameters, for placements that DepthBench has and for those that it lacks?",
  "grids": [
    {"seed": (42,), SHAPE: POINTS, "model.placement": (name,), "optimizer.learning_rate": rates}
    for name, rates in RATES.items()
  ],
}


def get_config(layers="24"):
  width, mlp = SHAPES[int(layers)]
  config = base()
  config.seed = 42
  config.model.update(vocab_size=50_280, num_layers=int(layers), embed_dim=width, mlp_dim=mlp, num_heads=16)
  config.model.update(dtype="bfloat16", remat="full", mlp_pad_to=128)
  config.mesh.update(data=1, fsdp=-1)
  config.data.update(source="work/fineweb-edu/sample/10BT/*.parquet", tokenizer="hf:EleutherAI/gpt-neox-20b")
  config.data.update(mode="pack", sequence_length=2048)
  config.train.update(num_steps=0, tokens_per_parameter=20.0, batch_size=512)
  config.optimizer.update(learning_rate=2e-3, weight_decay=0.1, clip_norm=1.0)
  return config

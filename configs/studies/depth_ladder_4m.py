"""The ladder of depth_ladder.py at 3.9 M parameters, with the placements that its question turns on.

Command:  python -m mixln_jax prepare --config=configs/studies/depth_ladder_4m.py, then
          python -m mixln_jax sweep --config=configs/studies/depth_ladder_4m.py --workdir=DIR
Hardware: not run. By its FLOPs about 25 times a run of depth_ladder.py: a night and more for a laptop of 8 cores.
Result:   none yet.
Source:   as depth_ladder.py.
"""

from mixln_jax.configs.studies import depth_ladder

# 10, 20 and 46 layers: 3.95, 3.95 and 3.94 M parameters; width over depth falls by 9.2.
SHAPES = ((10, 160, 472, 4), (20, 120, 320, 4), (46, 80, 220, 4))
STUDY = {
  "title": "Loss against depth at 3.9 M parameters",
  "question": "Are the slopes of loss with depth at 3.9 M parameters and 4.1 M tokens those at 0.55 M?",
  "grids": [
    {
      "seed": (0,),
      depth_ladder.SHAPE: SHAPES,
      "model.placement": ("pre", "mix:0.25", "lns", "hc:4"),
      "optimizer.learning_rate": depth_ladder.RATES,
    }
  ],
  "then": depth_ladder.STUDY["then"],
  "claims": [
    {
      "id": "same sign",
      "claim": "Each placement's slope has the sign that it has at 0.55 M parameters",
      "judged_by": "both intervals on one side of 0",
    }
  ],
}


def get_config():
  config = depth_ladder.get_config()
  layers, width, mlp, heads = SHAPES[1]
  config.model.update(vocab_size=2048, num_layers=layers, embed_dim=width, mlp_dim=mlp, num_heads=heads)
  config.data.sequence_length = 256
  config.train.num_steps = 1000
  config.checkpoint.every_steps = 250
  return config

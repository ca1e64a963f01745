"""The depth track: what a doubling of depth is worth at equal parameters; the score is the slope of the loss.

Command:  as configs/tracks/cpu.py, with this file and another --workdir (the records are the same)
Hardware: one CPU core. Not run. A run takes the time of one of configs/studies/depth_ladder.py (0.11 s a step and 40 s
          around it for pre of 11 layers, 0.44 s and 43 s for hc:4 of 24, in processor time) times 700 / 450 steps:
          1.7 to 6 min. About 63 + 20 runs to tune and 3 seeds of each of 21: 126 runs, 6 to 8 core-hours.
Result:   none yet.
Source:   ours; the design is DepthBench's (arXiv 2609.32534), as configs/studies/depth_ladder.py says.
"""

from mixln_jax.configs.studies import depth_ladder
from mixln_jax.configs.tracks import cpu
from mixln_jax.configs.tracks.cpu import claim

SHAPES = tuple(dict(zip(depth_ladder.SHAPE, shape, strict=True)) for shape in depth_ladder.SHAPES)

TRACK = {
  "name": "depth",
  "title": "What depth is worth at 0.55 M parameters",
  "question": "At equal parameters, by how many nats does the validation loss change with each doubling of depth, "
  "beside Pre-LN's?",
  "rates": cpu.TRACK["rates"],
  "first_rates": cpu.TRACK["first_rates"],
  "placements": depth_ladder.PLACEMENTS,
  "close_seeds": 3,
  "baseline_seeds": 3,
  "fingerprint": cpu.TRACK["fingerprint"],
  "validation_tokens": cpu.TRACK["validation_tokens"],
  "shapes": SHAPES,
  "score": "slope",
  "claims": (
    claim("hc falls", "Hyper-connections gain more by depth than Pre-LN", "arXiv 2609.32534", lower="hc:4", than="pre"),
    claim(
      "lns<pre deep",
      "LayerNorm scaling gains more over Pre-LN the deeper the model",
      "arXiv 2609.32534",
      lower="lns",
      than="pre",
    ),
    claim(
      "mix<pre deep",
      "Mix-LN gains more over Pre-LN the deeper the model",
      "arXiv 2412.13795",
      lower="mix:0.25",
      than="pre",
    ),
    claim(
      "pre<post deep", "Post-LN loses more by depth than Pre-LN", "arXiv 2412.13795, table 1", lower="pre", than="post"
    ),
  ),
}


def get_config():
  config = cpu.get_config()
  config.update_from_flattened_dict(SHAPES[1])
  config.train.num_steps = 700
  config.checkpoint.every_steps = 350
  return config

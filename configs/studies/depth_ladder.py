"""What depth is worth at one small size: three aspect ratios of 0.55 M parameters, each placement at its best rate.

Command:  python -m mixln_jax prepare --config=configs/studies/depth_ladder.py, then
          python -m mixln_jax sweep --config=configs/studies/depth_ladder.py --workdir=DIR
          (the later stages, a higher rate where the best is at the edge and more seeds at each best rate, begin by
          themselves; report draws loss against depth)
Hardware: one CPU core, 8.6 hours for 63 + 14 + 42 runs of 0.92 M tokens on cores that other work shared, with
          MALLOC_ARENA_MAX=1, MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=8589934592.
Result:   docs/studies/depth_ladder.md.
Source:   ours; the design is DepthBench's (arXiv 2609.32534), which keeps parameters equal from 16 layers of 1,216 to
          70 of 640 and takes each architecture at its best rate. Its budget is 20 tokens a parameter, ours 1.7; two
          orders of magnitude below its sizes and more, nothing here says what happens there.
"""

from mixln_jax.config import base

PLACEMENTS = ("pre", "post", "mix:0.25", "lns", "peri", "hc:4", "siamese")
SHAPE = ("model.num_layers", "model.embed_dim", "model.mlp_dim", "model.num_heads")
# 551,920, 549,640 and 548,520 parameters of Pre-LN. Width over depth falls by 9.6, DepthBench's by 8.3.
SHAPES = ((5, 80, 216, 4), (11, 56, 160, 4), (24, 40, 108, 4))
RATES = (1e-3, 3e-3, 1e-2)

JUDGED = "slope of the mean loss over the logarithm of depth, least squares over all runs at the best rate of each "
JUDGED += "shape (three depths, three seeds), with its 95 % Student interval; 'falls' means an interval below 0"

STUDY = {
  "title": "Loss against depth at 0.55 M parameters",
  "question": "At 0.55 M parameters and 0.92 M tokens, does the final validation loss rise or fall with depth, and for "
  "which placements, each at its best learning rate?",
  "grids": [{"seed": (0,), SHAPE: SHAPES, "model.placement": PLACEMENTS, "optimizer.learning_rate": RATES}],
  # The first stage was added when 36 runs were done: 7 of their 12 best rates were the highest of the three.
  "then": [
    {"best": "optimizer.learning_rate", "widen": (*RATES, 3e-2)},
    {"best": "optimizer.learning_rate", "grid": {"seed": (0, 1, 2)}},
  ],
  "claims": [
    {
      "id": "pre rises",
      "claim": "Pre-LN gets worse with depth at equal parameters (DepthBench: +0.023 nats from 16 to 32 layers)",
      "judged_by": JUDGED,
    },
    {
      "id": "hc falls",
      "claim": "Hyper-connections get better with depth (DepthBench: -0.047 nats from 16 to 70 layers)",
      "judged_by": JUDGED,
    },
    {
      "id": "lns<pre deep",
      "claim": "LayerNorm scaling gains more over Pre-LN the deeper the model (DepthBench: 0.010 at 16 layers, 0.043 "
      "at 32)",
      "judged_by": "difference of the slopes of lns and pre: interval below 0",
    },
    {
      "id": "post fails deep",
      "claim": "Post-LN loses the most with depth: at 24 layers it does not leave the unigram entropy (arXiv "
      "2412.13795, table 1)",
      "judged_by": "mean final loss of post at 24 layers within 0.1 nats of the unigram entropy that training prints",
    },
    {
      "id": "mix between",
      "claim": "Mix-LN has a smaller slope than Pre-LN (its claim that deep layers learn more, arXiv 2412.13795)",
      "judged_by": "difference of the slopes of mix:0.25 and pre: interval below 0",
    },
    {
      "id": "edges",
      "claim": "The best rate lies inside the grid",
      "judged_by": "a placement and shape whose best rate is 1e-3 or 3e-2 is at the grid's edge, and its slope is not "
      "judged",
    },
  ],
}


def get_config():
  config = base()
  layers, width, mlp, heads = SHAPES[1]
  config.model.update(vocab_size=1024, num_layers=layers, embed_dim=width, mlp_dim=mlp, num_heads=heads)
  config.data.sequence_length = 128
  config.train.update(num_steps=450, batch_size=16, sample_tokens=0)
  config.optimizer.update(learning_rate=3e-3, weight_decay=0.1)
  config.checkpoint.every_steps = 225
  config.evaluate.update(every_steps=0, batch_size=32, max_tokens=131_072)
  config.diagnostics.every_steps = 0  # the losses are the question
  return config

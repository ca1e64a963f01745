"""What placement does, apart from what the scale of the first norm's input does; deep and thin, for a CPU.

Command:  python -m mixln_jax prepare --config=configs/studies/first_norm.py, then
          python -m mixln_jax sweep --config=configs/studies/first_norm.py --workdir=DIR
Hardware: 2 CPU cores, about three hours for 28 runs of 2.05 M tokens.
Result:   docs/studies/first_norm.md.
Source:   ours; the claims are those of arXiv 2412.13795 and 2502.05795 that this size can test.
"""

from mixln_jax.config import base

PLACEMENTS = ("pre", "mix:0.25")
DEVIATIONS = (0.02, 0.632)  # ours, and the released code's √(2/5)

STUDY = {
  "title": "The first norm: Mix-LN and Pre-LN at two embedding stds",
  "question": "Does mix:0.25 reach a lower validation loss than pre in 12 thin layers, and does the scale of the "
  "embedding, which is the input of the first norm, decide it?",
  "grids": [
    {"seed": (0, 1, 2), "model.placement": PLACEMENTS, "model.embedding_deviation": DEVIATIONS},
    {"seed": (0, 1, 2), "model.placement": ("lns", "pre+scaled_init", "post"), "model.embedding_deviation": (0.02,)},
    {
      "model.placement": PLACEMENTS,
      "model.embedding_deviation": DEVIATIONS,
      "optimizer.learning_rate": (1e-3,),
      "seed": (0,),
    },
    {"model.placement": ("lns", "pre+scaled_init", "post"), "model.embedding_deviation": (0.632,), "seed": (0,)},
  ],
  "claims": [
    {
      "id": "mix<pre",
      "claim": "Mix-LN reaches a lower validation loss than Pre-LN (paper, table 1)",
      "judged_by": "paired difference mix:0.25 − pre over three seeds at rate 3e-3, for each embedding deviation: "
      "95 % Student interval below 0",
    },
    {
      "id": "scale",
      "claim": "The embedding's deviation decides the sign of that difference",
      "judged_by": "the intervals at 0.02 and 0.632 lie on different sides of 0",
    },
    {
      "id": "scaled_init",
      "claim": "Scaled initialisation removes most of the gap between Pre-LN and Mix-LN (paper, table 8)",
      "judged_by": "mean(pre) − mean(pre+scaled_init) is more than half of mean(pre) − mean(mix:0.25), deviation 0.02",
    },
    {
      "id": "order",
      "claim": "lns < pre+scaled_init ≈ mix < pre (arXiv 2502.05795, 130M)",
      "judged_by": "order of the means at deviation 0.02, with the paired intervals between neighbours",
    },
    {
      "id": "gradients",
      "claim": "The gradient norm falls with depth under Pre-LN, rises under Post-LN, and is flatter under Mix-LN "
      "(paper, figures 3 and 5)",
      "judged_by": "mean of the last three layers over mean of the first three, at initialisation and at the end",
    },
    {
      "id": "angles",
      "claim": "Deep layers change the stream more under Mix-LN than under Pre-LN (paper, figure 5)",
      "judged_by": "mean angular distance across one layer, layers 7 to 12, paired by seed",
    },
    {
      "id": "removal",
      "claim": "Removing one deep layer costs more under Mix-LN than under Pre-LN (paper, figure 6b)",
      "judged_by": "mean rise of the validation loss for layers 7 to 12, paired by seed",
    },
    {
      "id": "detectable",
      "claim": "(what three seeds can show) a paired difference of 2.5 times the standard deviation of those; "
      "seeds of configs/tiny.py differ by 0.01 to 0.03 nats, so about 0.05 to 0.1 nats",
      "judged_by": "the width of the intervals",
    },
  ],
}


def get_config():
  config = base()
  config.model.update(vocab_size=1024, embed_dim=48, mlp_dim=128, num_layers=12, num_heads=2, unroll=0)
  config.data.sequence_length = 64
  config.train.update(num_steps=1000, batch_size=32)
  config.optimizer.learning_rate = 3e-3
  config.checkpoint.every_steps = 250
  config.evaluate.update(every_steps=250, batch_size=64, max_tokens=131_072)
  config.logging.tensorboard = False
  return config

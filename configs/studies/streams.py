"""Which wiring of the residual stream trains best at one small size; each at its best of three learning rates.

Command:  python -m mixln_jax prepare --config=configs/studies/streams.py, then
          python -m mixln_jax sweep --config=configs/studies/streams.py --workdir=DIR
Hardware: 2 CPU cores, about four hours for 57 runs of 0.6 M tokens; a quarter less where the C library
          keeps what it frees (MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592).
Result:   docs/studies/streams.md.
Source:   ours; the model of configs/tiny.py. DepthBench (arXiv 2609.32534) compares some of these at 400 M parameters,
          where this says nothing.
"""

from mixln_jax.configs import tiny

BASELINES = ("pre", "post", "mix:0.25", "lns")
ONE_AND_TWO_STREAMS = ("parallel", "b2t", "spannorm", "residual", "siamese", "pre+x0", "pre+value_residual")
COPIES = ("hc:4", "dhc:4", "ihc:4", "mhc:4")
SOURCES = ("attnres", "attnres:4")
RAMPED = ("pre+prores:linear:100", "post+prores:linear:100")
PLACEMENTS = (*BASELINES, *ONE_AND_TWO_STREAMS, *COPIES, *SOURCES, *RAMPED)

STUDY = {
  "title": "Wirings of the residual stream",
  "question": "Which wiring of the residual stream reaches the lowest validation loss after 300 steps of "
  "configs/tiny.py, each at its best of three learning rates?",
  "grids": [{"seed": (0,), "model.placement": PLACEMENTS, "optimizer.learning_rate": (1e-3, 3e-3, 1e-2)}],
  "claims": [
    {
      "id": "copies<pre",
      "claim": "Hyper-connections of four streams reach a lower loss than Pre-LN (arXiv 2409.19606, table 1)",
      "judged_by": "best of three rates, one seed: a difference of less than 0.05 nats is not called one",
    },
    {
      "id": "sources<pre",
      "claim": "Attention residuals reach a lower loss than Pre-LN (arXiv 2603.15031)",
      "judged_by": "the same",
    },
    {
      "id": "ramp rescues post",
      "claim": "A ramp of the branches (ProRes, arXiv 2603.05369) lets Post-LN of 12 layers leave the unigram entropy",
      "judged_by": "post+prores below 6.0 nats where post is not",
    },
  ],
}


def get_config():
  config = tiny.get_config()
  config.train.sample_tokens = 0
  config.diagnostics.every_steps = 0  # the losses are the question
  return config

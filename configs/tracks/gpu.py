"""The gpu track: the paper's 71M shape on 20 tokens of C4 for each parameter, everything but the placement fixed.

Command:  timeout --preserve-status -s TERM 540 python -m mixln_jax sweep --track=configs/tracks/gpu.py --workdir=DIR
          One command for a slot of ten minutes: it saves a checkpoint when the slot ends, with exit status 75 while
          something is left, and the same command resumes it in the next. `--axis=model.placement='pre mix:0.25'` runs
          fewer placements.
Hardware: one GPU of 24 GB or more. Not run: none was available. 4.8e17 model FLOPs a run, 20 min on an H100 at 40 % of
          its bfloat16 peak: arithmetic, not measured. By the protocol a pair of placements takes 6 to 10 runs to tune
          and 5 to 15 for its seeds: 4 to 8 hours of such a card; the whole board five times that.
Result:   none yet. The records are not fixed by a fingerprint until somebody has made them: an entry must have those of
          the baseline that it is compared with.
Source:   arXiv 2412.13795 for shape, batch and schedule; 10,768 steps of 131,072 tokens are 20 tokens for each of the
          70.57 M parameters of the matrices, embedding and head. 20 of C4's 1,024 files hold 7.1 M documents, of which
          5.5 M are read, each once.
"""

from mixln_jax.configs import llama_71m
from mixln_jax.configs.tracks.cpu import claim

TRACK = {
  "name": "gpu",
  "title": "Norm placement at 71 M parameters",
  "question": "Which placement trains LLaMA 71M to the lowest validation loss on 20 tokens a parameter, each at its "
  "own best learning rate?",
  "rates": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
  "first_rates": (1e-3, 2e-3, 4e-3),
  "placements": ("pre", "mix:0.25", "post", "lns", "peri", "hybrid", "hc:4"),
  "close_seeds": 8,
  "baseline_seeds": 8,
  "claims": (
    claim(
      "mix<pre",
      "Mix-LN with α = 0.25 is lower than Pre-LN by 0.049 nats (perplexity 33.12 and 34.77 at this size)",
      "arXiv 2412.13795, table 1",
      lower="mix:0.25",
      than="pre",
    ),
    claim(
      "mix<post",
      "Mix-LN with α = 0.25 is lower than Post-LN (perplexity 33.12 and 35.18)",
      "arXiv 2412.13795, table 1",
      lower="mix:0.25",
      than="post",
    ),
  ),
}


def get_config():
  config = llama_71m.get_config()
  config.model.placement = "pre"
  config.data.source = "work/c4/c4-train.000[01]?-of-01024.json.gz"
  config.train.num_steps = 10_768
  config.checkpoint.every_steps = 500
  config.evaluate.every_steps = 1000
  return config

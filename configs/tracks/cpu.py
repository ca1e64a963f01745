"""The cpu track: norm placement in twelve thin layers, minutes a run, everything else fixed.

Command:  pip install --no-deps -r requirements-text.txt
          python -m mixln_jax prepare --config=configs/tracks/cpu.py
          python -m mixln_jax sweep --track=configs/tracks/cpu.py --workdir=work/tracks/cpu
          python -m mixln_jax report --track=configs/tracks/cpu.py work/tracks/cpu --output=work/tracks/cpu/board
Hardware: 2 CPU cores, an estimated 8 hours (15 core-hours) with two such sweeps side by side, each with
          MALLOC_ARENA_MAX=1, MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=8589934592. 54 runs to tune,
          one more for each best rate at an edge, two seeds more for each of the 18, five more for each that is within
          0.05 nats of pre, 12 for pre: 150 to 205 runs. The first three runs of pre took 5.7 to 6.6 min, on cores that
          others used; mhc:4 takes 0.69 s of processor a step (20 and 120 steps), 12 min a run.
Result:   none yet but six runs (docs/studies/cpu_track_1.tar.xz). docs/track.md says how the board is read;
          --export=FILE.csv of the sweep writes the curves that --compare=FILE.csv holds a new run against.
Source:   ours; 589,176 parameters, 2.05 M tokens a run (3.5 a parameter), 19 % of the corpus. As long as the runs of
          docs/studies/first_norm.md, which differed at 0.5 M tokens by what was gone at 2 M.
"""

from mixln_jax.config import base

ALPHAS = ("pre", "mix:0.083", "mix:0.167", "mix:0.25", "mix:0.333", "mix:0.5", "mix:0.75", "post")
ONE_STREAM = ("lns", "peri", "pre+scaled_init", "hybrid", "keel", "deepnorm")
SEVERAL_STREAMS = ("hc:4", "mhc:4", "siamese", "attnres")


def claim(name, text, source, *, lower, than):
  """One that the board judges: `lower` has a lower score than each of `than`, by paired intervals."""
  judged_by = "paired by seed, each at its best learning rate; 95 % Student interval below 0"
  return {"id": name, "claim": text, "source": source, "lower": lower, "than": than, "judged_by": judged_by}


TRACK = {
  "name": "cpu",
  "title": "Norm placement at 0.6 M parameters",
  "question": "Which placement of the norms trains twelve thin layers to the lowest validation loss in 1,000 steps, "
  "each at its own best learning rate?",
  "rates": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
  "first_rates": (1e-3, 2e-3, 4e-3),
  "placements": (*ALPHAS, *ONE_STREAM, *SEVERAL_STREAMS),
  "fingerprint": "94619d88fbc263543d1f1349abf10f0f61a92a51a849d292f327435bbda1adb1",
  "validation_tokens": 65_659,
  "claims": (
    claim(
      "mix<pre", "Mix-LN with α = 0.25 is lower than Pre-LN", "arXiv 2412.13795, table 1", lower="mix:0.25", than="pre"
    ),
    claim(
      "mix<post",
      "Mix-LN with α = 0.25 is lower than Post-LN",
      "arXiv 2412.13795, table 1",
      lower="mix:0.25",
      than="post",
    ),
    claim(
      "α = 0.25",
      "α = 0.25 is the best fraction of Post-LN layers",
      "arXiv 2412.13795, table 5",
      lower="mix:0.25",
      than=tuple(one for one in ALPHAS if one != "mix:0.25"),
    ),
    claim("lns<pre", "LayerNorm scaling is lower than Pre-LN", "arXiv 2502.05795", lower="lns", than="pre"),
    claim("lns<mix", "LayerNorm scaling is lower than Mix-LN", "arXiv 2502.05795", lower="lns", than="mix:0.25"),
    claim(
      "peri<pre",
      "A norm on both sides of each sublayer is lower than Pre-LN",
      "arXiv 2502.02732",
      lower="peri",
      than="pre",
    ),
    claim("hybrid<pre", "HybridNorm is lower than Pre-LN", "arXiv 2503.04598", lower="hybrid", than="pre"),
    claim("keel<pre", "Keel is lower than Pre-LN", "arXiv 2601.19895", lower="keel", than="pre"),
    claim(
      "scaled_init",
      "Scaled initialisation is lower than plain Pre-LN",
      "arXiv 2412.13795, table 8",
      lower="pre+scaled_init",
      than="pre",
    ),
    claim(
      "hc<pre",
      "Hyper-connections of four streams are lower than Pre-LN",
      "arXiv 2409.19606, table 1",
      lower="hc:4",
      than="pre",
    ),
    claim("siamese<pre", "SiameseNorm is lower than Pre-LN", "arXiv 2602.08064", lower="siamese", than="pre"),
    claim("attnres<pre", "Attention residuals are lower than Pre-LN", "arXiv 2603.15031", lower="attnres", than="pre"),
  ),
}


def get_config():
  config = base()
  config.model.update(vocab_size=1024, embed_dim=56, mlp_dim=160, num_layers=12, num_heads=4, placement="pre")
  config.data.update(source="text:botocore", sequence_length=128)
  config.train.update(num_steps=1000, batch_size=16)
  config.optimizer.update(learning_rate=2e-3, weight_decay=0.1)
  config.checkpoint.every_steps = 500
  config.evaluate.update(every_steps=100, batch_size=32, max_tokens=65_536)
  config.logging.tensorboard = False
  return config

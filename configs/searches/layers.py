"""Which placement? A name for each of 12 layers from pre, post, lns and sandwich: 4^12 tables, of which 64 are tried.

Command:  pip install -r requirements-search.txt and pip install --no-deps -r requirements-text.txt, then
          python -m mixln_jax prepare --config=configs/searches/layers.py, then
          python -m mixln_jax sweep --search=configs/searches/layers.py --workdir=DIR; the same command resumes it
Hardware: not run yet. About 5.9 core-hours: 24,000 steps to search and 14,400 for the finals, at 0.55 s of processor a
          step and run (median of 6 steps of a group of 4, on a core that other work shared; one run at a time took
          0.48 for pre, 0.53 for sandwich and 0.61 for a mixture). The step's program took 12.5 s of processor to
          compile, once; one at a time it would be 7 to 10 s for each candidate. A group takes 1.2 GiB.
Result:   none yet.
Source:   ours. Mix-LN (arXiv 2412.13795) chose one of a family with one parameter; the model is that of the cpu track.
"""

from mixln_jax.config import base

SEARCH = {
  "title": "A name for each of 12 layers",
  "question": "Does a table of pre, post, lns and sandwich layers, chosen layer by layer, reach a lower loss than pre, "
  "post, mix:0.25 and lns with fresh seeds?",
  "layers": ("pre", "post", "lns", "sandwich"),
  "sampler": "tpe",
  "candidates": 64,
  "group": 4,
  # No candidate is judged before half of the run: at step 100 the search over alpha could not tell 12 of 13 apart.
  "rungs": (300, 600),
  "eta": 4,
  "winners": 4,
  "seeds": (1, 2, 3),
  "baselines": ("pre", "post", "mix:0.25", "lns"),  # with four winners, two full groups a seed
}


def get_config():
  config = base()
  config.model.update(vocab_size=1024, embed_dim=56, mlp_dim=160, num_layers=12, num_heads=4)
  config.data.update(source="text:botocore", sequence_length=128)
  config.train.update(num_steps=600, batch_size=16)
  config.optimizer.update(learning_rate=2e-3, weight_decay=0.1)
  config.checkpoint.every_steps = 100
  config.evaluate.update(every_steps=0, batch_size=32, max_tokens=65_536)
  config.diagnostics.every_steps = 0  # the losses are the question
  config.logging.tensorboard = False
  return config

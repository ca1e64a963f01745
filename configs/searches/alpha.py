"""Mix-LN's α alone: all 13 numbers of leading Post-LN layers in 12, each to the end of the rungs that it survives.

Command:  as configs/searches/layers.py, with --search=configs/searches/alpha.py; the prepared data is the same
Hardware: one CPU core, 1.1 hours: 3,600 steps to search and 7,200 for the finals, empty places of groups among them.
Result:   docs/studies/search.md.
Source:   the values of α in arXiv 2412.13795, table 5, as a search.
"""

from mixln_jax.configs.searches import layers

SEARCH = {
  "title": "The fraction of Post-LN layers, of 12",
  "question": "Which α of Mix-LN reaches the lowest loss, and does it hold against pre, post and mix:0.25 with fresh "
  "seeds?",
  "alpha": tuple(number / 12 for number in range(13)),
  "candidates": 13,
  "group": 4,
  "rungs": (100, 300, 600),  # the first is too early: docs/studies/search.md
  "eta": 3,
  "winners": 1,  # with three baselines a full group a seed
  "seeds": layers.SEARCH["seeds"],
  "baselines": ("pre", "post", "mix:0.25"),
}

get_config = layers.get_config

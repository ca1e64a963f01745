"""What a placement is: names, grammar, and the table that the model reads (Python and NumPy only).

A placement is data. A string such as `mix:0.25` becomes a table with a row for each layer and sublayer, and each row
holds the columns of the one sublayer rule (`model/residual.py`) over the residual streams H_0 … H_{n-1}:

    x   = Σ_i read_i M_i(H_i)
    b   = c_out N_mid(f(c_in N_in(x)))
    s   = c_res g(Σ_i mix_i0 R_i) + write_0 b            R_0 = N_in(x) if residual_from_normed else M_0(H_0); R_i = H_i
    H_0 ← N_out(s) where there is an N_out, else g(s)
    H_j ← Σ_i mix_ij R_i + write_j b                     for the further streams

Most rows have one stream (n = 1, read = mix = write = 1). `wiring` says where read, mix and write come from: from the
table itself (`fixed`), or from a function with learned weights (`model/wiring.py`).

Grammar:

    placement := segment ("," segment)*            the segments' counts add up to the number of layers
    segment   := row ["/" row] ["*" count] ("+" modifier)*      `post/pre`: Post-LN attention and a Pre-LN MLP
    row       := name (":" argument)*
    name      := a key of ROWS, or `mix`; a single segment without a count stands for all layers
    modifier  := a key of MODIFIERS (":" argument)*; it applies to its own segment only

To add a placement whose columns fit the rule, add one line to ROWS (`rows.py`), one line of mathematics to the tests'
reference (`tests/model/reference.py`) and one line to a table of docs/placements.md. A test over all ROWS names what is
missing. A row with an argument also needs an example in `tests/model/cases.py`. `bash tests/run.sh -k NAME` runs all
tests of one placement.

The files, in the order to read them:

    table.py       the columns of a row, the table of a model, its residual streams
    rows.py        ROWS: every name, with the columns that it stands for and the paper that it is from
    modifiers.py   MODIFIERS: what `+name` changes in a row
    grammar.py     from a string to its table
"""

from mixln_jax.placement.grammar import MIX, at_step, num_post_layers, parse, without_step
from mixln_jax.placement.modifiers import FIXED_FACTORS, MODIFIERS, RAMPS, Modifier
from mixln_jax.placement.rows import ROWS, Argument, Placement, Position, Rows, identity
from mixln_jax.placement.table import (
  LEARNED,
  NO_RAMP,
  NORMS,
  STREAM_SETS,
  SUBLAYERS,
  Layer,
  Ramp,
  Row,
  Streams,
  StreamSet,
  Table,
  ramp_factor,
)

__all__ = [
  "FIXED_FACTORS",
  "LEARNED",
  "MIX",
  "MODIFIERS",
  "NORMS",
  "NO_RAMP",
  "RAMPS",
  "ROWS",
  "STREAM_SETS",
  "SUBLAYERS",
  "Argument",
  "Layer",
  "Modifier",
  "Placement",
  "Position",
  "Ramp",
  "Row",
  "Rows",
  "StreamSet",
  "Streams",
  "Table",
  "at_step",
  "identity",
  "num_post_layers",
  "parse",
  "ramp_factor",
  "without_step",
]

"""The grammar of placements and the table behind it."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixln_jax.errors import InputError
from mixln_jax.placement import MODIFIERS, ROWS, Row, Table, num_post_layers, parse


@pytest.mark.parametrize(
  ("placement", "num_layers", "layer_list"),
  [
    ("pre", 3, "pre pre pre"),
    ("mix:0.25", 12, "post post post pre pre pre pre pre pre pre pre pre"),
    ("mix", 4, "post pre pre pre"),
    ("mix:0.3333333333333333", 6, "post post pre pre pre pre"),
    ("mix:0.125", 4, "post pre pre pre"),  # 0.5 rounds up, not to even
    ("mix:0.375", 4, "post post pre pre"),  # 1.5 rounds up
    ("mix:0", 2, "pre pre"),
    ("mix:1", 2, "post post"),
    ("post*1,pre*2", 3, "post pre pre"),
    ("pre,post,pre", 3, "pre post pre"),
    ("post*2, pre*2+scaled_init", 4, "post post pre+scaled_init pre+scaled_init"),
    ("mix:0.5+scaled_init", 2, "post+scaled_init pre+scaled_init"),
  ],
)
def test_layer_lists(placement, num_layers, layer_list):
  assert parse(placement, num_layers).layer_list == layer_list


@pytest.mark.parametrize(
  ("alpha", "num_layers", "expected"),
  [(0.25, 12, 3), (0.25, 24, 6), (0.0625, 32, 2), (1 / 6, 24, 4), (0.7, 45, 32), (0.29, 50, 15), (1.0, 7, 7)],
)
def test_the_papers_post_layer_counts(alpha, num_layers, expected):
  assert num_post_layers(alpha, num_layers) == expected


@pytest.mark.parametrize(
  ("placement", "words"),
  [
    ("mixx:0.25", ["unknown placement 'mixx'", "did you mean 'mix'?", "choices: pre, post"]),
    ("mix:1.5", ["'mix:1.5'", "from 0 to 1"]),
    ("mix:nan", ["from 0 to 1"]),
    ("mix:", ["from 0 to 1"]),
    ("pre:0.3", ["'pre' takes no argument", "'0.3'"]),
    ("post*3,pre*8", ["11 layers", "num_layers=12"]),
    ("post*999999999999", ["999999999999 layers", "num_layers=12"]),  # counted, not expanded
    ("post*0,pre*12", ["'post*0'", "above 0"]),
    ("post*x", ["'post*x'", "above 0"]),
    ("pre+scaled_int", ["unknown modifier 'scaled_int'", "did you mean 'scaled_init'?"]),
    ("mix:0.5,pre*6", ["'mix:0.5' is a whole placement"]),
    ("pre+qk_norm+qk_norm_full", ["'pre+qk_norm+qk_norm_full'", "choose one"]),
    ("hybrid*6+qk_norm_full,pre*6", ["'hybrid*6+qk_norm_full'", "choose one"]),
    ("deepnrom", ["unknown placement 'deepnrom'", "did you mean 'deepnorm'?"]),
    ("post*3+gpsa,pre*9", ["unknown modifier 'gpsa'", "did you mean 'gpas'?", "choices: scaled_init, gpas"]),
    ("", ["unknown placement ''"]),
    ("Pre", ["unknown placement 'Pre'", "did you mean 'pre'?"]),
  ],
)
def test_malformed_placements_name_the_part_and_the_choices(placement, words):
  with pytest.raises(InputError) as error:
    parse(placement, 12)
  assert f"config.model.placement={placement!r}" in str(error.value)
  for word in words:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


def test_rows_say_where_norms_stand():
  pre, post = parse("mix:0.5", 2).rows("mlp")[::-1]
  assert (pre.norm_in, pre.norm_mid, pre.norm_out) == (True, False, False)
  assert (post.norm_in, post.norm_mid, post.norm_out) == (False, False, True)
  np.testing.assert_allclose(parse("lns", 4).column("attention", "c_in"), [1, 2**-0.5, 3**-0.5, 0.5])


def test_gains_are_numbered_in_order_of_application():
  row = Row(norm_in=True, norm_mid=True)
  assert (row.gain_index("norm_in"), row.gain_index("norm_mid"), row.gain_index("norm_out")) == (0, 1, None)
  assert Row(norm_out=True).gain_index("norm_out") == 0
  assert parse("sandwich*1,post*3", 4).num_gains("attention") == 2
  assert parse("mix:0.25", 4).num_gains("attention") == 1


def test_scaled_init_is_bound_to_its_segment():
  table = parse("post*3,pre*9+scaled_init", 12)
  np.testing.assert_allclose(table.column("mlp", "output_deviation"), [1] * 3 + [24**-0.5] * 9)


def test_constants_of_the_sources():
  table = parse("deepnorm", 24)  # arXiv 2203.00555, figure 2
  np.testing.assert_allclose(table.column("mlp", "c_res"), [2.6321] * 24, rtol=1e-4)
  np.testing.assert_allclose(table.column("attention", "branch_gain"), [0.2686] * 24, rtol=1e-3)
  published = parse("deepnorm_as_published", 12)
  np.testing.assert_allclose(published.column("mlp", "c_res"), [2.8284271247461903] * 12)
  np.testing.assert_allclose(published.column("mlp", "branch_gain"), [3.1302] * 12, rtol=1e-4)
  keel = parse("keel", 3)
  np.testing.assert_array_equal(keel.column("attention", "c_res"), [1, 6, 6])
  np.testing.assert_array_equal(keel.column("mlp", "c_res"), [1, 6, 6])
  np.testing.assert_array_equal(keel.column("attention", "norm_out"), [False, True, True])
  first = parse("hybrid_first", 3)
  np.testing.assert_array_equal(first.column("attention", "norm_in"), [True, False, False])
  np.testing.assert_array_equal(first.column("mlp", "residual_from_normed"), [False, True, True])
  assert first.column("attention", "v_norm").all()


def test_a_modifier_binds_to_its_segment():
  table = parse("post*2,pre*2+gpas", 4)
  np.testing.assert_array_equal(table.column("mlp", "gpas"), [False, False, True, True])
  assert parse("mix:0.5+gpas", 4).column("attention", "gpas").all()
  assert not parse("pre+qk_norm", 4).column("mlp", "qk_norm").any()


names = st.sampled_from(sorted(ROWS))
segments = st.lists(st.tuples(names, st.integers(1, 4), st.booleans()), min_size=1, max_size=5)


@given(segments)
def test_any_mixture_parses_and_survives_json(parts):
  text = ",".join(f"{name}*{count}" + ("+scaled_init" if scaled else "") for name, count, scaled in parts)
  table = parse(text, sum(count for _, count, _ in parts))
  assert Table.from_json(table.to_json()) == table
  assert hash(Table.from_json(table.to_json())) == hash(table)
  assert [layer.name.split("+")[0] for layer in table.layers] == [
    name for name, count, _ in parts for _ in range(count)
  ]


@given(st.text(alphabet="premixostln:.,*+0123456789 -", max_size=20))
def test_no_text_does_anything_but_parse_or_be_refused(text):
  try:
    table = parse(text, 12)
  except InputError:
    return
  assert len(table.layers) == 12


@pytest.mark.parametrize("name", [*ROWS, *MODIFIERS])
def test_every_row_and_modifier_has_its_line_in_the_readme(name):
  """A placement that nobody can find is not there: README's tables are its documentation."""
  readme = (Path(__file__).parents[1] / "README.md").read_text()
  first_cells = [line.split("|")[1] for line in readme.splitlines() if line.startswith("| `")]
  documented = {word for cell in first_cells for word in re.findall(r"`\+?(\w+)`", cell)}
  assert name in documented, f"README.md: add a line for `{name}` to the table of placements"

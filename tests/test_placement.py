"""The grammar of placements and the table behind it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.placement import (
  FIXED_FACTORS,
  MODIFIERS,
  RAMPS,
  ROWS,
  SUBLAYERS,
  Row,
  Table,
  at_step,
  num_post_layers,
  parse,
  ramp_factor,
)


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
    ("post/pre", 2, "post/pre post/pre"),
    ("post/lns:0.25*1+gpas, mhc:4*2", 3, "post/lns:0.25+gpas mhc:4 mhc:4"),
    ("residual:0.5:2", 1, "residual:0.5:2"),
    ("pre*1+value_residual:2+prores:sqrt:8,post*1", 2, "pre+value_residual:2+prores:sqrt:8 post"),
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
    ("post*999999999", ["999999999 layers", "num_layers=12"]),  # counted, not expanded
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
    ("hc:0", ["number of streams in 'hc:0'", "whole number from 1 to 64"]),
    ("mhc:2.5", ["number of streams in 'mhc:2.5'", "whole number"]),
    ("ihc_v4:1", ["number of streams in 'ihc_v4:1'", "from 2 to 64"]),
    ("attnres:0", ["sublayers in a block in 'attnres:0'", "whole number from 1"]),
    ("residual:1:2:3", ["'residual:1:2:3' has 3 arguments", "takes 2", "factor s", "weight α"]),
    ("hc:4:2", ["'hc:4:2' has 2 arguments", "takes 1"]),
    ("siamese:2", ["'siamese' takes no argument"]),
    ("hc*6,siamese*6", ["'hc'", "'siamese'", "copies of the stream", "choose one"]),
    ("hc:4*6,hc:2*6", ["'hc:4'", "'hc:2'", "the 4 streams", "the 2 of the other", "choose one"]),
    ("dhc*6,dhc_identity*6", ["'dhc'", "'dhc_identity'", "choose one"]),
    ("residual:0.5*6,residual:1*6", ["'residual:0.5'", "'residual:1'", "in different ways"]),
    ("attnres*6,attnres:2*6", ["'attnres'", "'attnres:2'", "choose one"]),
    ("b2t*6,residual*6", ["'b2t'", "'residual'", "choose one"]),
    ("hc/siamese", ["choose one"]),
    ("siamese+x0", ["'siamese+x0'", "leave +x0 out"]),
    ("pre*6+x0,hc*6", ["'pre+x0'", "'hc'", "choose one"]),
    ("hc+gpas", ["'hc+gpas'", "leave it out"]),
    ("mix/pre", ["'mix/pre'", "mix is a whole placement", "by segments"]),
    ("pre/mix:0.5", ["'pre/mix:0.5'", "mix is a whole placement"]),
    ("post/pre/post", ["'post/pre/post' has 3 rows", "one or two"]),
    ("post/", ["unknown placement ''"]),
    ("pre+value_residual:3", ["'value_residual'", "1 or 2"]),
    ("pre+x0:2", ["modifier 'x0' takes no argument"]),
    ("pre+prores:foo", ["'prores' of 'pre+prores:foo'", "linear, linear_equal", "fix_sqrt_l"]),
    ("pre+prores:linear:0", ["'prores'", "the first above 0"]),
    ("pre+prores:linear:100@x", ["'prores'", "both numbers are whole"]),
    ("pre+prores:linear:11", ["has 11 steps for 12 layers"]),
    ("pre+prores:fix_L:100", ["'fix_L'", "never ends", "'+prores:fix_L'"]),
    ("admin+prores", ["'admin+prores'", "leave one of the two out"]),
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


# The rows that go together: those of one stream, and beside them those of one set of streams. attnres's number of
# streams depends on the depth, which all segments of a model share.
STREAMS_OF_ROWS = {name: parse(name, 4).streams for name in ROWS}
GROUPS = [
  sorted(name for name, streams in STREAMS_OF_ROWS.items() if not streams.kind or streams == group)
  for group in sorted(set(STREAMS_OF_ROWS.values()))
]
segments = st.sampled_from(GROUPS).flatmap(
  lambda names: st.lists(st.tuples(st.sampled_from(names), st.integers(1, 4), st.booleans()), min_size=1, max_size=5)
)


@settings(deadline=None)  # a first parse on a busy machine
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
def test_every_row_and_modifier_has_its_line_in_the_docs(name):
  """A placement that nobody can find is not there: the tables of docs/placements.md are its documentation."""
  page = (Path(__file__).parents[1] / "docs" / "placements.md").read_text()
  first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
  documented = {word for cell in first_cells for word in re.findall(r"`\+?(\w+)(?:\[?:[^`]*)?`", cell)}
  assert name in documented, f"docs/placements.md: add a line for `{name}` to a table of placements"


def test_a_row_may_differ_between_its_sublayers():
  """`post/pre`: attention's row from the first name, the MLP's from the second, and a modifier on both."""
  (layer,) = parse("post/lns:1+gpas", 1).layers
  assert (layer.attention.norm_out, layer.attention.norm_in) == (True, False)
  assert (layer.mlp.norm_out, layer.mlp.norm_in) == (False, True)
  assert layer.attention.gpas
  assert layer.mlp.gpas
  second = parse("post/lns:1", 2).layers[1]
  assert (second.attention.c_in, second.mlp.c_in) == (1.0, 0.5)


def test_arguments_reach_their_columns():
  """An argument that is parsed and then left, or two that change places."""
  residual = parse("residual:0.5:2", 1).layers[0].mlp
  assert (residual.write, residual.stream_start, residual.read_out_weight) == ((1.0, 0.5), 0.5, 2.0)
  deepnorm = parse("deepnorm:1.5:0.25", 1).layers[0].mlp
  assert (deepnorm.c_res, deepnorm.branch_gain) == (1.5, 0.25)
  assert parse("mhc:3", 2).streams.num == 3
  assert parse("hc", 2).streams.num == 4
  assert parse("pre+value_residual:2", 2).column("attention", "value_residual_two").tolist() == [False, True]
  assert not parse("pre+value_residual", 2).column("attention", "value_residual_two").any()


def test_sublayers_read_the_streams_in_turn():
  """arXiv 2409.19606, §3: sublayer k starts by reading stream k mod N alone, counted over attention and MLP."""
  rows = [row for layer in parse("hc:3", 2).layers for row in (layer.attention, layer.mlp)]
  assert [row.read.index(1.0) for row in rows] == [0, 1, 2, 0]
  assert all(sum(row.read) == 1 and row.write == (1.0, 1.0, 1.0) for row in rows)


@pytest.mark.parametrize(
  ("block", "there", "slots"), [(1, [1, 2, 3, 4, 5, 6], range(1, 7)), (4, [1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 2, 2])]
)
def test_attention_residuals_read_what_is_begun_and_add_to_their_block(block, there, slots):
  """A block counts sublayers (layers would halve it), and its own partial sum is read once it is begun."""
  rows = [row for layer in parse(f"attnres:{block}", 3).layers for row in (layer.attention, layer.mlp)]
  assert [int(sum(row.read)) for row in rows] == there
  assert [row.write.index(1.0) for row in rows] == list(slots)


def test_one_stream_goes_with_several():
  """A row that knows one stream leaves the others as they are, but where they live within a layer."""
  pre = parse("hc:3*1,pre*1", 2).layers[1].mlp.with_streams(3, kept=True)
  assert (pre.read, pre.write) == ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
  assert pre.mix == ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
  assert parse("hc:3*1,pre*1", 2).streams == parse("mhc:3", 2).streams


GOLDEN_FACTORS = Path(__file__).parent / "data" / "golden" / "topology" / "prores_factors.npz"
SCHEDULES = (*RAMPS, *FIXED_FACTORS)


def test_every_schedule_has_its_golden_factors():
  meta = json.loads(bytes(np.load(GOLDEN_FACTORS)["meta"]))
  assert set(meta["schedules"]) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_factors_of_prores_are_those_of_its_code(schedule):
  """T // L instead of T / L, a floor that is added instead of scaled in, a layer counted from 0."""
  golden = np.load(GOLDEN_FACTORS)
  ends = "" if schedule in FIXED_FACTORS else ":1000"
  ramped = parse(f"pre+prores:{schedule}{ends}", 12)
  for step, expected_L in zip(golden["steps/L12_T1000"], golden[f"alpha/{schedule}/L12_T1000"], strict=True):
    for sublayer in SUBLAYERS:
      factors = [row.c_out * float(ramp_factor(*row.ramp, int(step))) for row in ramped.rows(sublayer)]
      np.testing.assert_allclose(factors, expected_L, atol=1e-6, err_msg=f"{sublayer} after {step}")
    frozen = parse(at_step(f"pre+prores:{schedule}{ends}", 12, int(step)), 12)
    assert frozen.ramp_end == 0.0
    np.testing.assert_allclose(frozen.column("mlp", "c_out"), expected_L, atol=1e-6)
  assert ramped.ramp_end == (0.0 if schedule in FIXED_FACTORS else 1000.0)


@pytest.mark.parametrize(
  ("placement", "expected"),
  [
    ("pre", "pre"),
    ("hc:2*1,pre*3", "hc:2*1,pre*3"),
    ("pre+prores", "pre+prores:linear:1000@40"),
    ("pre+prores:sqrt", "pre+prores:sqrt:1000@40"),
    ("post/pre*2+gpas+prores:linear:100,pre*2", "post/pre*2+gpas+prores:linear:100@40,pre*2"),
    ("pre*2+prores:linear:100@7,pre*2+prores:linear:50", "pre*2+prores:linear:100@7,pre*2+prores:linear:50@40"),
    ("pre*2+prores:fix_L,pre*2+prores", "pre*2+prores:fix_L,pre*2+prores:linear:1000@40"),
    ("pre+prores:fix_L", "pre+prores:fix_L"),
    ("pre+prores:linear:100@7", "pre+prores:linear:100@7"),
  ],
)
def test_a_placement_at_a_step_is_frozen_there(placement, expected):
  """A checkpoint of a run with a warm-up of the residual: what it computes is what it computed at its step."""
  assert at_step(placement, 4, 40) == expected
  assert at_step(expected, 4, 99) == expected  # frozen once and for all
  parse(expected, 4)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"model.placement": "admin", "model.norm": "dyt"}, ["config.model.norm=dyt", "admin", "use rmsnorm or layernorm"]),
    ({"model.placement": "admin", "model.norm": "derf"}, ["config.model.norm=derf", "admin"]),
    ({"model.placement": "pre+prores:linear:100", "train.num_steps": 99}, ["ends after 100", "num_steps=99"]),
  ],
)
def test_configs_that_contradict_their_placement(fields, words):
  """Found at start, not after a run that never had its whole model."""
  config = config_lib.base()
  config.update_from_flattened_dict(fields)
  with pytest.raises(InputError) as error:
    config_lib.validate(config)
  for word in words:
    assert word in str(error.value)


def test_a_warm_up_that_just_fits_is_accepted():
  config = config_lib.base()
  config.update_from_flattened_dict({"model.placement": "pre+prores:linear:100", "train.num_steps": 100})
  config.optimizer.warmup_steps = 10
  config_lib.validate(config)


def test_a_count_of_thousands_of_digits_is_one_line():
  """int() raises a ValueError for more than 4,300 digits."""
  with pytest.raises(InputError, match="whole number above 0") as error:
    parse("post*" + 5000 * "9", 12)
  assert len(str(error.value)) < 400


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("pre+prores:linear:8+prores:linear:9", "'prores' more than once"),
    ("pre+value_residual+value_residual:2", "'value_residual' more than once"),
    ("pre+gpas+x0", r"\+gpas is defined for one residual stream"),
    ("pre+x0+gpas", r"\+gpas is defined for one residual stream"),
    ("hc:4.0", "whole number"),
    ("attnres:1e2", "whole number"),
    ("admin*2,pre*2+prores:linear:8", "admin's scales"),
  ],
)
def test_what_would_mean_two_things_is_rejected(text, words):
  with pytest.raises(InputError, match=words):
    parse(text, 4)


def test_scaled_init_multiplies_what_a_placement_has():
  """Hyper-connections start with their last matrices divided by √N: catches a modifier that forgets it."""
  assert parse("hc:4+scaled_init", 2).layers[0].mlp.output_deviation == pytest.approx(0.5 / np.sqrt(4))

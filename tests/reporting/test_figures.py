"""Every figure as a reviewer reads it: ticks and their texts, empty axes, size, grid, colours; two against pictures."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.testing.compare import compare_images

from mixln_jax.reporting import figures
from mixln_jax.reporting.analysis import analyze
from mixln_jax.reporting.curves import thin
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.panels import LIGHT, Style
from mixln_jax.reporting.ticks import MINUS, SUPERSCRIPTS, chosen, linear_ticks, log_ticks, tick_text
from reporting.conftest import make_whole_runs

PICTURES = Path(__file__).parents[1] / "data" / "figures"
TOLERANCE = 4.0  # RMS of 256 levels: another version's anti-aliasing, not another line (which is above 8)
PLAIN = {small: normal for normal, small in SUPERSCRIPTS.items()}  # ⁻⁰¹² -> -012


def value_of(text):
  """What a tick's text says, as a number."""
  text = text.replace(MINUS, "-").replace(",", "").translate(PLAIN)
  if "·10" in text:
    mantissa, exponent = text.split("·10")
    return float(mantissa) * 10.0 ** int(exponent)
  return float(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return analyze(load(make_whole_runs(tmp_path_factory.mktemp("figures"), name="first")))


@pytest.fixture(scope="module")
def canvases(whole):
  """Every figure, laid out."""
  with figures._style():
    yield {figure.name: (figure, figures.make_canvas(figure)) for figure in whole.figures}


def test_every_tick_is_told_apart_and_says_where_it_stands(canvases):
  """Would catch 3e−03 twice and 2e−03 four times on one axis, as a formatter that rounds to one digit writes them."""
  seen = 0
  for name, (_, canvas) in canvases.items():
    for ax in canvas.axes:
      for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [(tick.get_loc(), tick.label1.get_text()) for tick in axis.get_major_ticks()]
        shown = [(place, text) for place, text in ticks if low - 1e-12 <= place <= high + 1e-12 and text]
        texts = [text for _, text in shown]
        assert len(set(texts)) == len(texts), (name, texts)
        if name == "difference" and axis is ax.yaxis:
          continue  # rows have names
        for place, text in shown:
          assert value_of(text) == pytest.approx(place, rel=1e-6), (name, text)
          seen += 1
  assert seen > 200


def test_no_axes_are_empty_and_each_is_labelled(canvases):
  """Would catch the pair of axes, 0 to 1, that was left over where panels do not fill their rows."""
  for name, (figure, canvas) in canvases.items():
    colourbars = 1 if figure.panels[0].matrix is not None else 0
    lists = 1 if figure.panels[0].estimates else 0  # of layers, beside the estimates
    assert len(canvas.axes) == len(figure.panels) + colourbars + lists, name
    for ax in canvas.axes[: len(figure.panels) + lists]:
      assert ax.lines or ax.collections or ax.images or ax.patches, name
      assert lists or (ax.get_xlabel() and ax.get_ylabel()), name


def test_no_figure_is_higher_than_a_page_or_wider_than_its_text(canvases):
  for name, (_, canvas) in canvases.items():
    width, height = canvas.get_size_inches()
    assert height <= figures.TEXT_HEIGHT, name
    assert width in (figures.COLUMN_WIDTH, figures.TEXT_WIDTH), name


def test_the_grid_lies_under_the_bars(canvases):
  _, canvas = canvases["removal"]
  ax = canvas.axes[0]
  assert ax.get_axisbelow() is True
  assert ax.patches


def test_measured_rates_and_evaluations_are_the_ticks(canvases):
  """Would catch ticks at 120, 160, 200 where evaluations are at 100, 200, 300."""
  _, canvas = canvases["learning_rate"]
  assert [label.get_text() for label in canvas.axes[0].get_xticklabels()] == ["0.001", "0.003"]
  _, canvas = canvases["loss"]
  assert canvas.axes[0].get_xticks().tolist() == canvas.axes[1].get_xticks().tolist() == [10, 20]


@pytest.mark.parametrize("steps", [250, 251, 300, 400, 499, 500, 501, 1001])
def test_a_thinned_curve_is_as_noisy_at_its_end_as_at_its_beginning(steps):
  """Would catch pieces of two sizes: a curve of 300 steps seemed to become noisy at step 100."""
  x = np.arange(1.0, steps + 1)
  thin_x, thin_y = thin(x, x)
  size = -(-steps // 250)
  assert len(thin_x) <= 250
  assert len({round(b - a, 9) for a, b in itertools.pairwise(thin_x[:-1])}) == 1
  assert thin_x[0] == (size + 1) / 2
  assert steps - thin_x[-1] <= size
  assert thin_y == thin_x


@pytest.mark.parametrize(
  ("low", "high"), [(1.9e-3, 3.3e-3), (2e-3, 2.4e-3), (1e-3, 1.0), (0.9, 1.1), (3.0, 4000.0), (7e-9, 2e3), (5, 6)]
)
def test_a_log_axis_has_three_to_seven_ticks_within_it(low, high):
  ticks = log_ticks(low, high)
  assert 3 <= len(ticks) <= 7
  assert all(low <= tick <= high * (1 + 1e-9) for tick in ticks)
  assert len({tick_text(tick) for tick in ticks}) == len(ticks)


def test_ticks_by_hand():
  assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
  assert linear_ticks(-0.14, 0.02, 5) == [-0.1, -0.05, 0]
  assert linear_ticks(3, 3) == [3]
  assert chosen([10, 20, 30, 40, 50, 60, 70], 4) == [10, 30, 50, 70]
  texts = [tick_text(value) for value in (0, 2e-5, 1e-5, 0.003, -0.05, 100, 12000, 2e7)]
  assert texts == ["0", "2·10⁻⁵", "10⁻⁵", "0.003", "−0.05", "100", "12,000", "2·10⁷"]


# As people without green (deuteranopia) and red (protanopia) cones see linear RGB: Machado et al. (2009), severity 1.
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colour, sight=None):
  """CIE Lab of a colour, as it is or as some people see it."""
  channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
  linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
  if sight is not None:
    linear = np.clip(np.array(sight) @ linear, 0, 1)
  xyz = np.array(TO_XYZ) @ linear / np.array([0.95047, 1, 1.08883])
  f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_the_first_four_colours_are_told_apart_in_grey_and_without_red_or_green_cones():
  for first, second in itertools.combinations(LIGHT[:4], 2):
    assert abs(lab(first)[0] - lab(second)[0]) > 10, (first, second)
    for sight in (None, DEUTERANOPIA, PROTANOPIA):
      assert np.linalg.norm(lab(first, sight) - lab(second, sight)) > 13, (first, second)
  dashes = [Style(kind).dash for kind in range(4)]
  assert len(set(dashes)) == 4  # and lines without markers by their dashes


@pytest.mark.parametrize("name", ["difference", "learning_rate"])
def test_a_figure_looks_as_it_did(name, canvases, tmp_path):
  """Would catch a change of what is drawn: a lost interval, mark or strip. UPDATE_PICTURES=1 draws them anew."""
  _, canvas = canvases[name]
  actual = tmp_path / f"{name}.png"
  canvas.savefig(actual, dpi=60)
  expected = PICTURES / f"{name}.png"
  if os.environ.get("UPDATE_PICTURES"):
    PICTURES.mkdir(exist_ok=True)
    expected.write_bytes(actual.read_bytes())
  assert compare_images(str(expected), str(actual), TOLERANCE) is None


def test_a_lost_interval_is_another_picture(whole, tmp_path):
  """Would catch a tolerance under which the test above can't fail."""
  import dataclasses

  panel = whole.difference.panels[0]
  rows = [dataclasses.replace(row, interval=None) for row in panel.estimates]
  figure = dataclasses.replace(whole.difference, panels=[dataclasses.replace(panel, estimates=rows)])
  with figures._style():
    figures.make_canvas(figure).savefig(tmp_path / "other.png", dpi=60)
  assert compare_images(str(PICTURES / "difference.png"), str(tmp_path / "other.png"), TOLERANCE) is not None

"""A drawing of matplotlib as an element of the page: in the page's colours, and its series tagged with their runs."""

import html
import re

from mixln_jax.reporting.panels import LIGHT, Estimate, Series

# Inks of `figures.py` -> the page's variables, which know light and dark.
INKS = {"#1b1f24": "--text", "#57606a": "--quiet", "#d5d9de": "--rule", "#ffffff": "--page"}
INKS |= {colour: f"--c{number}" for number, colour in enumerate(LIGHT)}


class Tags:
  """What the series of a drawing are called in it."""

  def __init__(self) -> None:
    self._tagged: list[Series | Estimate] = []

  def add(self, what: Series | Estimate) -> str:
    """The tag of a series, or of an estimate."""
    self._tagged.append(what)
    return f"tag:{len(self._tagged) - 1}"

  def element(self, tag: str) -> str:
    """How the group that a tag marks begins in the page: with its runs, and a title that the browser shows."""
    what = self._tagged[int(tag.removeprefix("tag:"))]
    name = what.name if isinstance(what, Series) else what.label
    kind = "seed" if isinstance(what, Series) and what.detail else "series"
    runs = " ".join(map(str, what.runs))
    return f'<g class="{kind}" data-runs="{runs}"><title>{html.escape(name)}</title>'


def inline(svg: str, prefix: str, tags: Tags, title: str) -> str:
  """The SVG element of a file that matplotlib wrote.

  Args:
    svg: the file's text.
    prefix: unique in the page; all ids begin with it.
    tags: of its series.
    title: what it is, for who can't see it.
  """
  element = svg[svg.index("<svg") :]
  element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
  element = re.sub(r'<g id="(tag:\d+)">', lambda found: tags.element(found.group(1)), element)
  element = re.sub(r' id="([a-z]+(?:\.[a-z]+)?_\d+)"', "", element)  # figure_1, axes_1, matplotlib.axis_1: never used
  element = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', element)
  element = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", element)
  for ink, variable in INKS.items():
    element = element.replace(ink, f"var({variable})")
  viewbox = re.search(r'viewBox="[^"]*"', element)
  assert viewbox is not None
  end = element.index(">")
  return f'<svg {viewbox.group()} role="img" aria-label="{html.escape(title)}">' + element[end + 1 :].strip()

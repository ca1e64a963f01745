"""Formulas as MathML, which browsers draw themselves: no script and no network, and screen readers can read it."""

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging


def _mathml(node: nodes.Element, *, as_block: bool) -> str:
  try:
    return latex2mathml.tex2mathml(node.astext().strip(), as_block=as_block)
  except MathError as error:
    logging.getLogger(__name__).warning("formula: %s", error, location=node)
    return ""


def _inline(writer: Any, node: nodes.math) -> None:
  writer.body.append(_mathml(node, as_block=False))
  raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
  writer.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>\n')
  raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
  app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
  return {"parallel_read_safe": True, "parallel_write_safe": True}

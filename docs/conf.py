"""The documentation site: `sphinx-build -W -n docs work/site`, with requirements-docs.txt."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from mixln_jax.version import VERSION  # noqa: E402

project = "mixln_jax"
author = "The mixln_jax authors"
copyright = author
version = release = VERSION
language = "en"

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.intersphinx",
  "mathml",
  "generated",
]
html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_title = "mixln_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
  "use_download_button": False,
  "show_toc_level": 2,
  "navigation_with_keys": False,
  "navbar_persistent": [],  # the sidebar has the search field already
}
html_extra_path: list[str] = []
exclude_patterns = ["_ext", "_static", "README.md"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook holds its outputs; a slow test executes it

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
# Names in annotations that have no page of their own to link to.
nitpick_ignore_regex = [(r"py:.*", r"(?!mixln_jax\.(open_run|OpenRun|recipe|train|Transformer|InputError)$).*")]

# Where a network is missing, the links into these stay plain text: see `_reachable`.
_PEERS = {
  "python": "https://docs.python.org/3",
  "jax": "https://docs.jax.dev/en/latest",
  "flax": "https://flax.readthedocs.io/en/latest",
  "optax": "https://optax.readthedocs.io/en/latest",
  "orbax": "https://orbax.readthedocs.io/en/latest",
}


def _reachable() -> dict[str, tuple[str, None]]:
  """The peers whose inventories can be had: one that can't would be a warning, and -W makes it an error."""
  import requests

  found = {}
  for name, address in _PEERS.items():
    try:
      if requests.head(f"{address}/objects.inv", timeout=3, allow_redirects=True).ok:
        found[name] = (address, None)
    except requests.RequestException:
      break  # no network: the others would time out one by one
  return found


intersphinx_mapping = _reachable()


def _list_unlisted(app: Any, docname: str, source: list[str]) -> None:
  """Puts the pages of docs/ that index.md does not name into its last list, so that a new page is never lost."""
  if docname != "index":
    return
  named = set(source[0].split())
  pages = sorted(name for name in app.env.found_docs if "/" not in name and name not in named | {"index"})
  source[0] = source[0].replace("\nunlisted\n", "\n" + "\n".join(pages) + "\n")


def setup(app: Any) -> None:
  app.connect("source-read", _list_unlisted)

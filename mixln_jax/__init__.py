"""mixln_jax: norm placement in transformers, built around Mix-LN (arXiv 2412.13795)."""

from typing import TYPE_CHECKING, Any

from mixln_jax.version import VERSION

if TYPE_CHECKING:
  from mixln_jax.opening import OpenRun as OpenRun
  from mixln_jax.opening import open_run as open_run


__version__ = VERSION


def __getattr__(name: str) -> Any:
  """`mixln_jax.open_run`, imported when it is asked for: JAX takes seconds to import, and few commands need it."""
  if name in ("open_run", "OpenRun"):
    from mixln_jax import opening

    return getattr(opening, name)
  raise AttributeError(f"module 'mixln_jax' has no attribute {name!r}")

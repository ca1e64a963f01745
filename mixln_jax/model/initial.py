"""Initial weights, drawn by name and layer: the same numbers on any mesh, in any order, for any placement."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.config import ModelConfig
from mixln_jax.model.columns import Columns
from mixln_jax.model.parameters import Param, parameters, tree_of


def starting_values(model: ModelConfig, columns: Columns | None = None) -> dict[str, float | np.ndarray]:
  """What each parameter starts from, a number or one for each layer [L]: the std of a drawn one, the value of the rest.

  With the seed it is all that the initial weights of one shape depend on, so that runs of several placements can be
  started as one program, these numbers being data. Arguments as `parameters` has them.
  """
  starts: dict[str, float | np.ndarray] = {}
  for path, param in parameters(model, columns).items():
    starts[path] = param.value if param.std is None else param.std
  return starts


def initial_params(model: ModelConfig, seed: int | jax.Array) -> Any:
  """The initial parameters of config.model: normal matrices, gains of 1, biases of 0, what else a placement learns from
  its table. Call it under jit. (`admin` wants a profiling pass after it: `model/admin.py`.)

  Each leaf is drawn from `fold_in(fold_in(key(seed), crc32(path)), layer)`, so equal seeds give equal numbers whatever
  the placement, the mesh or the order of declaration.
  """
  return draw_params(model, seed, starting_values(model))


def draw_params(
  model: ModelConfig, seed: int | jax.Array, start: Mapping[str, Any], columns: Columns | None = None
) -> Any:
  """`initial_params` with all that it depends on as data.

  Args:
    model: config.model; only its shapes are read.
    seed: of the draws.
    start: `starting_values`, numbers or arrays.
    columns: as `parameters` has them.
  """
  key = jax.random.key(seed)
  leaves = {}
  for path, param in parameters(model, columns).items():
    leaf = _drawn(param, key, start[path]) if param.drawn else _filled(param, start[path])
    leaves[path] = leaf.astype(jnp.dtype(model.param_dtype))
  return tree_of(leaves)


def _filled(param: Param, value: Any) -> jax.Array:
  """A parameter that is not drawn: `value` everywhere, or a value for each layer [L]."""
  value = jnp.asarray(value)
  return jnp.broadcast_to(value.reshape(value.shape + (1,) * (len(param.shape) - value.ndim)), param.shape)


def _drawn(param: Param, key: jax.Array, std: Any) -> jax.Array:
  """A drawn parameter, zeros where it only pads."""
  leaf_key = jax.random.fold_in(key, zlib.crc32(param.path.encode()))
  shape = param.logical_shape
  if not param.in_layers:
    return jax.random.normal(leaf_key, shape) * std
  keys_L = jax.vmap(lambda layer: jax.random.fold_in(leaf_key, layer))(jnp.arange(shape[0]))
  normal = jax.vmap(lambda layer_key: jax.random.normal(layer_key, shape[1:]))(keys_L)
  scale = jnp.reshape(jnp.asarray(std, jnp.float32), (-1,) + (1,) * (len(shape) - 1))
  padding = [(0, stored - logical) for stored, logical in zip(param.shape, shape, strict=True)]
  return jnp.pad(normal * scale, padding)

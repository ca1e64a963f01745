"""Initial weights, drawn by name and layer: the same numbers on any mesh, in any order and for any placement."""

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
  """For each parameter the std of its random initial values, or its initial value: one number, or one per layer [L].

  For a given shape of the model, the initial weights depend only on the seed and on these numbers. Passing them as data
  lets one program initialise runs of several placements. Arguments as in `parameters`.
  """
  starts: dict[str, float | np.ndarray] = {}
  for path, param in parameters(model, columns).items():
    starts[path] = param.value if param.std is None else param.std
  return starts


def initial_params(model: ModelConfig, seed: int | jax.Array) -> Any:
  """The initial parameters of config.model. Call it under jit.

  Matrices are normal, gains are 1, biases are 0, and other parameters of a placement start as `model/parameters.py`
  says. The placement `admin` needs a profiling pass afterwards (`model/admin.py`).

  Each leaf is drawn from `fold_in(fold_in(key(seed), crc32(path)), layer)`, so equal seeds give equal numbers whatever
  the placement, the mesh or the order of declaration.
  """
  return draw_params(model, seed, starting_values(model))


def draw_params(
  model: ModelConfig, seed: int | jax.Array, start: Mapping[str, Any], columns: Columns | None = None
) -> Any:
  """`initial_params` with everything but the shapes as data.

  Args:
    model: config.model; only its shapes are read.
    seed: the seed of the draws.
    start: `starting_values`, as numbers or arrays.
    columns: as in `parameters`.
  """
  key = jax.random.key(seed)
  leaves = {}
  for path, param in parameters(model, columns).items():
    leaf = _drawn(param, key, start[path]) if param.drawn else _filled(param, start[path])
    leaves[path] = leaf.astype(jnp.dtype(model.param_dtype))
  return tree_of(leaves)


def _filled(param: Param, value: Any) -> jax.Array:
  """A parameter that is not random: `value` everywhere, or a value for each layer [L, …]."""
  value = jnp.asarray(value)
  return jnp.broadcast_to(value.reshape(value.shape + (1,) * (len(param.shape) - value.ndim)), param.shape)


def _drawn(param: Param, key: jax.Array, std: Any) -> jax.Array:
  """A random parameter, with zeros in its padding."""
  leaf_key = jax.random.fold_in(key, zlib.crc32(param.path.encode()))
  shape = param.logical_shape
  if not param.in_layers:
    return jax.random.normal(leaf_key, shape) * std
  keys_L = jax.vmap(lambda layer: jax.random.fold_in(leaf_key, layer))(jnp.arange(shape[0]))
  normal = jax.vmap(lambda layer_key: jax.random.normal(layer_key, shape[1:]))(keys_L)
  scale = jnp.reshape(jnp.asarray(std, jnp.float32), (-1,) + (1,) * (len(shape) - 1))
  padding = [(0, stored - logical) for stored, logical in zip(param.shape, shape, strict=True)]
  return jnp.pad(normal * scale, padding)

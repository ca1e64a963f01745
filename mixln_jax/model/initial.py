"""Initial weights, drawn by name and layer: the same numbers on any mesh, in any order, for any placement."""

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixln_jax import placement
from mixln_jax.config import Config
from mixln_jax.model.transformer import Transformer, is_matrix, param_paths
from mixln_jax.parallel import rules
from mixln_jax.parallel.mesh import attach

OUTPUT_SUBLAYERS = {"layers/output": "attention", "layers/down": "mlp"}  # the last matrix of each sublayer
MLP_AXES = {"layers/gate": 2, "layers/up": 2, "layers/down": 1}  # which axis of [L, …] is the MLP's width


def abstract_params(config: Config) -> Any:
  """Shapes, types and logical axes of the parameters of config.model, boxed as linen has them; nothing is computed."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return jax.eval_shape(lambda t: Transformer(config).init(jax.random.key(0), t)["params"], tokens)


def abstract_sharded_params(config: Config, mesh: Mesh) -> Any:
  """Shapes, types and shardings of the parameters on a mesh: what a checkpoint is restored onto."""
  boxed = abstract_params(config)
  return attach(nn.unbox(boxed), rules.shardings(boxed, mesh))


def count_params(config: Config) -> int:
  """Number of parameters that the model has: without columns that only pad the MLP, and gains that no norm uses."""
  shapes = nn.unbox(abstract_params(config))
  pairs = zip(jax.tree.leaves(param_paths(shapes)), jax.tree.leaves(shapes), strict=True)
  stored = sum(int(np.prod(_logical_shape(path, leaf.shape, config))) for path, leaf in pairs)
  table = placement.parse(config.placement, config.num_layers)
  unused = sum(
    table.num_gains(sublayer) - row.num_gains for sublayer in placement.SUBLAYERS for row in table.rows(sublayer)
  )
  return stored - unused * config.embed_dim


def deviations(config: Config) -> dict[str, float | np.ndarray]:
  """Standard deviation of each initial matrix of config.model: a number, or one a layer [L]."""
  table = placement.parse(config.placement, config.num_layers)
  result: dict[str, float | np.ndarray] = {}
  for path in jax.tree.leaves(param_paths(nn.unbox(abstract_params(config)))):
    if not is_matrix(path):
      continue
    result[path] = config.embedding_deviation if path == "embedding" else config.init_deviation
    if path in OUTPUT_SUBLAYERS:
      factors_L = table.column(OUTPUT_SUBLAYERS[path], "output_deviation")
      result[path] = config.init_deviation * factors_L
  return result


def initial_params(config: Config, seed: int | jax.Array) -> Any:
  """The initial parameters of config.model: normal matrices, gains of 1, biases of 0. Call it under jit.

  Each leaf is drawn from `fold_in(fold_in(key(seed), crc32(path)), layer)`, so equal seeds give equal numbers whatever
  the placement, the mesh or the order in which modules declare them.
  """
  shapes = nn.unbox(abstract_params(config))
  scales = deviations(config)
  key = jax.random.key(seed)

  def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if not is_matrix(path):
      return jnp.zeros(leaf.shape, leaf.dtype) if path.endswith("_bias") else jnp.ones(leaf.shape, leaf.dtype)
    shape = _logical_shape(path, leaf.shape, config)
    leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    if not path.startswith("layers/"):
      return (jax.random.normal(leaf_key, shape) * scales[path]).astype(leaf.dtype)
    keys_L = jax.vmap(lambda layer: jax.random.fold_in(leaf_key, layer))(jnp.arange(config.num_layers))
    normal = jax.vmap(lambda layer_key: jax.random.normal(layer_key, shape[1:]))(keys_L)
    scale = jnp.reshape(jnp.asarray(scales[path], jnp.float32), (-1,) + (1,) * (len(shape) - 1))
    padding = [(0, stored - logical) for stored, logical in zip(leaf.shape, shape, strict=True)]
    return jnp.pad((normal * scale).astype(leaf.dtype), padding)

  return jax.tree.map(draw, param_paths(shapes), shapes)


def _logical_shape(path: str, shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
  if path not in MLP_AXES:
    return shape
  return tuple(config.mlp_dim if axis == MLP_AXES[path] else size for axis, size in enumerate(shape))

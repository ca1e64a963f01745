"""Initial weights, drawn by name and layer: the same numbers on any mesh, in any order, for any placement."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixln_jax import placement
from mixln_jax.config import ModelConfig
from mixln_jax.model.columns import Columns, used_by_layer
from mixln_jax.model.transformer import Transformer, is_matrix, param_paths
from mixln_jax.parallel import rules
from mixln_jax.parallel.mesh import attach

SUBLAYER_OF: dict[str, str] = {
  **dict.fromkeys(("query", "key", "value", "output"), "attention"),
  **dict.fromkeys(("gate", "up", "down"), "mlp"),
}
MLP_AXES = {"layers/gate": 2, "layers/up": 2, "layers/down": 1}  # which axis of [L, …] is the MLP's width


def abstract_params(config: ModelConfig, columns: Columns | None = None) -> Any:
  """Shapes, types and logical axes of the parameters of config.model, boxed as linen has them; nothing is computed.

  Args:
    config: config.model.
    columns: of one of several placements that share the tree (`Columns.of_many`), which has what any of them uses; by
      default those of config.placement.
  """
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  init = Transformer(config).init
  return jax.eval_shape(lambda t: init(jax.random.key(0), t, columns=columns)["params"], tokens)


def abstract_sharded_params(config: ModelConfig, mesh: Mesh) -> Any:
  """Shapes, types and shardings of the parameters on a mesh: what a checkpoint is restored onto."""
  boxed = abstract_params(config)
  return attach(nn.unbox(boxed), rules.shardings(boxed, mesh))


def count_params(config: ModelConfig) -> int:
  """Number of parameters that the model has: without columns that only pad the MLP, and what a layer does not use."""
  used = used_by_layer(placement.parse(config.placement, config.num_layers))
  count = 0
  for path, leaf in param_leaves(config):
    shape = logical_shape(path, leaf.shape, config)
    name = path.removeprefix("layers/")
    count += math.prod(shape[1:]) * int(used[name].sum()) if name in used else math.prod(shape)
  return count


def deviations(config: ModelConfig, columns: Columns | None = None) -> dict[str, float | np.ndarray]:
  """Standard deviation of each initial matrix of config.model: a number, or one a layer [L]. `columns`: see
  `abstract_params`."""
  table = placement.parse(config.placement, config.num_layers)
  result: dict[str, float | np.ndarray] = {}
  for path, leaf in param_leaves(config, columns):
    name = path.removeprefix("layers/")
    if name in SUBLAYER_OF:
      fans = config.embed_dim + math.prod(logical_shape(path, leaf.shape, config)[1:]) // config.embed_dim
      result[path] = _matrix_deviations(table, name, config.init_deviation, math.sqrt(2 / fans))
    elif is_matrix(path):
      result[path] = config.embedding_deviation if path == "embedding" else config.init_deviation
  return result


def starting_values(config: ModelConfig, columns: Columns | None = None) -> dict[str, float | np.ndarray]:
  """What each parameter starts from, a number or one a layer [L]: the deviation of a matrix, the value of the rest.

  With `seed` it is all that the initial weights of one shape depend on, so that runs of several placements can be
  started as one program, these numbers being data.
  """
  table = placement.parse(config.placement, config.num_layers)
  others = {path: _first_value(path, table) for path, _ in param_leaves(config, columns) if not is_matrix(path)}
  return others | deviations(config, columns)


def param_leaves(config: ModelConfig, columns: Columns | None = None) -> list[tuple[str, jax.ShapeDtypeStruct]]:
  """Name, shape and type of each parameter of config.model; `columns` as in `abstract_params`."""
  shapes = nn.unbox(abstract_params(config, columns))
  return list(zip(jax.tree.leaves(param_paths(shapes)), jax.tree.leaves(shapes), strict=True))


def _matrix_deviations(table: placement.Table, name: str, normal: float, xavier: float) -> np.ndarray:
  """Deviation of one matrix in each layer [L], as the rows of its sublayer ask for."""
  sublayer = SUBLAYER_OF[name]
  deviations_L = np.where(table.column(sublayer, "xavier"), xavier, normal)
  if name not in ("query", "key"):
    deviations_L = deviations_L * table.column(sublayer, "branch_gain")
  if name in ("output", "down"):
    deviations_L = deviations_L * table.column(sublayer, "output_deviation")
  return deviations_L


def _first_value(path: str, table: placement.Table) -> float | np.ndarray:
  """What a parameter that is not drawn starts from: one number, or one a layer [L]."""
  if path.endswith(("_bias", "gpas")):
    return 0.0
  if path.endswith("_c_out"):
    sublayer = path.removeprefix("layers/").split("_")[0]
    column = path.removeprefix(f"layers/{sublayer}_")
    return np.where(table.column(sublayer, column), table.column(sublayer, "initial_c_out"), 1.0)
  return 1.0


def initial_params(config: ModelConfig, seed: int | jax.Array) -> Any:
  """The initial parameters of config.model: normal matrices, gains of 1, biases of 0, what else a placement learns from
  its table. Call it under jit. (`admin` wants a profiling pass after it: `model/admin.py`.)

  Each leaf is drawn from `fold_in(fold_in(key(seed), crc32(path)), layer)`, so equal seeds give equal numbers whatever
  the placement, the mesh or the order in which modules declare them.
  """
  return draw_params(config, seed, starting_values(config))


def draw_params(
  config: ModelConfig, seed: int | jax.Array, start: Mapping[str, Any], columns: Columns | None = None
) -> Any:
  """`initial_params` with all that it depends on as data.

  Args:
    config: config.model; only its shapes are read.
    seed: of the draws.
    start: `starting_values`, numbers or arrays.
    columns: of one of several placements that share the tree, which has what any of them uses.
  """
  shapes = nn.unbox(abstract_params(config, columns))
  key = jax.random.key(seed)

  def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if not is_matrix(path):
      first = jnp.asarray(start[path], leaf.dtype)
      return jnp.broadcast_to(first.reshape(first.shape + (1,) * (leaf.ndim - first.ndim)), leaf.shape)
    shape = logical_shape(path, leaf.shape, config)
    leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    if not path.startswith("layers/"):
      return (jax.random.normal(leaf_key, shape) * start[path]).astype(leaf.dtype)
    keys_L = jax.vmap(lambda layer: jax.random.fold_in(leaf_key, layer))(jnp.arange(config.num_layers))
    normal = jax.vmap(lambda layer_key: jax.random.normal(layer_key, shape[1:]))(keys_L)
    scale = jnp.reshape(jnp.asarray(start[path], jnp.float32), (-1,) + (1,) * (len(shape) - 1))
    padding = [(0, stored - logical) for stored, logical in zip(leaf.shape, shape, strict=True)]
    return jnp.pad((normal * scale).astype(leaf.dtype), padding)

  return jax.tree.map(draw, param_paths(shapes), shapes)


def logical_shape(path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
  """The shape of a stored parameter without the columns that only pad the MLP."""
  if path not in MLP_AXES:
    return shape
  return tuple(config.mlp_dim if axis == MLP_AXES[path] else size for axis, size in enumerate(shape))

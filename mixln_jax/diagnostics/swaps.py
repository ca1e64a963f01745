"""The loss with two layers exchanged. Which two, and what moves with them, is data: one compiled program for all."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.diagnostics.layer_io import Batch
from mixln_jax.interop.hf import norm_names
from mixln_jax.model import Columns, Transformer
from mixln_jax.model.loss import batch_loss
from mixln_jax.model.parameters import LAYERS, Param, gain_name, parameters
from mixln_jax.placement import SUBLAYERS

READINGS = ("row_moves", "row_stays", "row_stays_matrices_only", "row_stays_by_official_name")
POSITIONAL = ("read", "write")  # columns of attention residuals that refer to sources by position


class Order(NamedTuple):
  """A rearrangement of layers: for each layer, the index of the layer that it takes each of its parts from, [L].

  Attributes:
    rows_L: for its row of the placement.
    matrices_L: for its matrices and their biases.
    others_L: for its other parameters, except the sublayers' norms.
    norms_GL: for its sublayers' norms. Norm g (in `norm_order`) of layer l is taken from norm h of layer k, where the
      entry [g, l] is h · L + k.
  """

  rows_L: np.ndarray
  matrices_L: np.ndarray
  others_L: np.ndarray
  norms_GL: np.ndarray


def norm_order(model: ModelConfig) -> list[str]:
  """The sublayers' norms in the tree of parameters, by the names of their gains."""
  names = []
  for sublayer, count in zip(SUBLAYERS, Columns.of(config_lib.table(model)).num_gains, strict=True):
    names += [gain_name(sublayer, index) for index in range(count)]
  return names


def swap(model: ModelConfig, first: int, second: int, reading: str) -> Order:
  """The order in which layers `first` and `second` are exchanged.

  Args:
    model: config.model.
    first: a layer.
    second: another layer.
    reading: what moves.
      `row_moves`: the whole layer, with its row of the placement.
      `row_stays`: all its parameters; its row stays. A norm's parameters go to the norm of the same sublayer.
      `row_stays_matrices_only`: its matrices with their biases; norms and other parameters stay.
      `row_stays_by_official_name`: all its parameters except norms whose name in LLaMA's layout the other layer lacks.
        That layout gives one name to the norm after attention and to the norm before the MLP.
  """
  num_layers, norms = model.num_layers, norm_order(model)
  stays_L, moves_L = np.arange(num_layers), np.arange(num_layers)
  moves_L[[first, second]] = second, first
  at_G1 = np.arange(len(norms))[:, None] * num_layers
  rows_L = moves_L if reading == "row_moves" else stays_L
  others_L = stays_L if reading == "row_stays_matrices_only" else moves_L
  norms_GL = at_G1 + others_L
  if reading == "row_stays_by_official_name":
    norms_GL = at_G1 + stays_L
    layers = config_lib.table(model).layers
    names_of_first = {official: norms.index(own) for own, official in norm_names(layers[first]).items()}
    names_of_second = {official: norms.index(own) for own, official in norm_names(layers[second]).items()}
    for official in names_of_first.keys() & names_of_second.keys():
      in_first, in_second = names_of_first[official], names_of_second[official]
      norms_GL[in_first, first] = in_second * num_layers + second
      norms_GL[in_second, second] = in_first * num_layers + first
  return Order(rows_L, moves_L, others_L, norms_GL)


def identity(model: ModelConfig) -> Order:
  """The order in which nothing moves."""
  stays_L, norms = np.arange(model.num_layers), len(norm_order(model))
  return Order(stays_L, stays_L, stays_L, np.arange(norms * model.num_layers).reshape(norms, -1))


def all_swaps(model: ModelConfig, readings: Sequence[str]) -> dict[str, list[Order]]:
  """The exchanges of all pairs of layers, in the order of `pairs`, for each reading.

  `row_stays_by_official_name` is left out if LLaMA's layout lacks a name for some parameter of a layer.
  """
  swaps = {}
  for reading in readings:
    if reading == "row_stays_by_official_name" and not has_official_names(model):
      continue
    swaps[reading] = [swap(model, first, second, reading) for first, second in pairs(model.num_layers)]
  return swaps


def has_official_names(model: ModelConfig) -> bool:
  """Whether all parameters of the layers have a name in LLaMA's layout."""
  return all(param.elsewhere is not None for param in parameters(model).values() if param.in_layers)


def key(model: ModelConfig, order: Order) -> tuple[bytes, ...]:
  """A key that is equal for two orders that give the same model: if all rows are the same, moving them does nothing."""
  varying = Columns.of(config_lib.table(model)).varying
  rows_L = order.rows_L if varying else np.arange(model.num_layers)
  return tuple(indices.tobytes() for indices in order._replace(rows_L=rows_L))


def pairs(num_layers: int) -> list[tuple[int, int]]:
  return [(first, second) for first in range(num_layers) for second in range(first + 1, num_layers)]


Step = Callable[[Any, Batch, Any, Order], tuple[jax.Array, jax.Array]]


def make_swap_step(model: ModelConfig) -> Step:
  """`step(params, batch, rows_B, order) -> (loss sum, count)` over the rows where rows_B is 1. Call it under jit."""
  transformer, columns = Transformer(model), Columns.of(config_lib.table(model))

  def step(params: Any, batch: Batch, rows_B: Any, order: Order) -> tuple[jax.Array, jax.Array]:
    moved = params | {"layers": moved_layers(model, params["layers"], order)}
    chosen = {**batch, "weights_BT": batch["weights_BT"] * rows_B[:, None]}
    loss, count, _ = batch_loss(transformer, moved, chosen, columns=moved_columns(columns, order.rows_L))
    return loss, count

  return step


def moved_layers(model: ModelConfig, layers: dict[str, jax.Array], order: Order) -> dict[str, jax.Array]:
  """The stacked parameters of the layers, rearranged."""
  table, norms = parameters(model), norm_order(model)
  moved = {}
  for name, leaf in layers.items():
    param = table[LAYERS + name]
    if param.norm:
      norm_index = norms.index(param.norm)
      suffix = name.removeprefix(param.norm)
      all_norms = jnp.concatenate([layers[norm + suffix] for norm in norms])
      moved[name] = all_norms[order.norms_GL[norm_index]]
    else:
      moved[name] = leaf[order.matrices_L if _is_matrix(param) else order.others_L]
  return moved


def _is_matrix(param: Param) -> bool:
  return param.part in [f"{sublayer}/" for sublayer in SUBLAYERS]


def moved_columns(columns: Columns, rows_L: Any) -> Columns:
  """The placement's columns, rearranged.

  A sublayer of attention residuals that takes the place of another one reads and writes the sources of its new place,
  because the sources of its old place may not have been written yet.
  """
  constant, varying = dict(columns.constant), {}
  for name, column_L in columns.varying.items():
    column_L = jnp.asarray(column_L)
    moved_L = column_L[rows_L]
    sublayer, word = name.split(".")
    wired = f"{sublayer}.wired_attention"
    if word in POSITIONAL and (wired in columns.varying or constant.get(wired)):
      here_L = jnp.asarray(columns.varying.get(wired, np.full(columns.num_layers, True)))
      both_L = (here_L & here_L[rows_L]).reshape(-1, *[1] * (column_L.ndim - 1))
      moved_L = jnp.where(both_L, column_L, moved_L)
    varying[name] = moved_L
  return columns.replace(varying=varying)

"""The loss with two layers exchanged. Which two, and what moves with them, is data: one program for all of it."""

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
POSITIONAL = ("read", "write")  # of attention residuals, whose sources are counted by position


class Order(NamedTuple):
  """From which layer each layer takes what it has, [L]; of the norms of the sublayers, from which norm of which layer.

  Attributes:
    rows_L: the placement's columns.
    matrices_L: what is drawn, and its biases.
    others_L: what else a layer learns.
    norms_GL: of norm g (of `norm_order`) at layer l, entry h · L + k takes norm h of layer k.
  """

  rows_L: np.ndarray
  matrices_L: np.ndarray
  others_L: np.ndarray
  norms_GL: np.ndarray


def norm_order(model: ModelConfig) -> list[str]:
  """The sublayers' norms that the tree of parameters has, by the name of their gains."""
  counts = Columns.of(config_lib.table(model)).num_gains
  return [gain_name(name, index) for name, count in zip(SUBLAYERS, counts, strict=True) for index in range(count)]


def swap(model: ModelConfig, first: int, second: int, reading: str) -> Order:
  """What moves where two layers are exchanged.

  Args:
    model: config.model.
    first: a layer.
    second: another one.
    reading: `row_moves`: all that a layer is, its row of the placement too. `row_stays`: all that it learns; the row
      stays, and a norm's parameters go to the norm of the same sublayer. `row_stays_matrices_only`: its matrices (with
      their biases); norms and what else it learns stay. `row_stays_by_official_name`: what has a name in both layers in
      LLaMA's layout, which calls the norm after attention as it calls the one before the MLP; what else stays.
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
    theirs = [{name: norms.index(ours) for ours, name in norm_names(layers[at]).items()} for at in (first, second)]
    for name in theirs[0].keys() & theirs[1].keys():
      here, there = theirs[0][name], theirs[1][name]
      norms_GL[here, first] = there * num_layers + second
      norms_GL[there, second] = here * num_layers + first
  return Order(rows_L, moves_L, others_L, norms_GL)


def identity(model: ModelConfig) -> Order:
  """Nothing moves."""
  stays_L, norms = np.arange(model.num_layers), len(norm_order(model))
  return Order(stays_L, stays_L, stays_L, np.arange(norms * model.num_layers).reshape(norms, -1))


def all_swaps(model: ModelConfig, readings: Sequence[str]) -> dict[str, list[Order]]:
  """The exchanges of all pairs of layers, in the order of `pairs`, for each reading.

  Official names are left out where LLaMA's layout has none for what a layer learns.
  """
  if not has_official_names(model):
    readings = [reading for reading in readings if reading != "row_stays_by_official_name"]
  return {reading: [swap(model, *pair, reading) for pair in pairs(model.num_layers)] for reading in readings}


def has_official_names(model: ModelConfig) -> bool:
  """Whether all that the layers learn has a name in LLaMA's layout."""
  return all(param.elsewhere is not None for param in parameters(model).values() if param.in_layers)


def key(model: ModelConfig, order: Order) -> tuple[bytes, ...]:
  """Equal for two exchanges that give the same model: rows that are all the same may as well stay."""
  varying = Columns.of(config_lib.table(model)).varying
  rows_L = order.rows_L if varying else np.arange(model.num_layers)
  return tuple(indices.tobytes() for indices in order._replace(rows_L=rows_L))


def pairs(num_layers: int) -> list[tuple[int, int]]:
  return [(first, second) for first in range(num_layers) for second in range(first + 1, num_layers)]


Step = Callable[[Any, Batch, Any, Order], tuple[jax.Array, jax.Array]]


def make_swap_step(model: ModelConfig) -> Step:
  """`step(params, batch, rows_B, order) -> (loss sum, count)` of the rows where rows_B is 1. Call it under jit."""
  transformer, columns = Transformer(model), Columns.of(config_lib.table(model))

  def step(params: Any, batch: Batch, rows_B: Any, order: Order) -> tuple[jax.Array, jax.Array]:
    moved = params | {"layers": moved_layers(model, params["layers"], order)}
    chosen = {**batch, "weights_BT": batch["weights_BT"] * rows_B[:, None]}
    loss, count, _ = batch_loss(transformer, moved, chosen, columns=moved_columns(columns, order.rows_L))
    return loss, count

  return step


def moved_layers(model: ModelConfig, layers: dict[str, jax.Array], order: Order) -> dict[str, jax.Array]:
  """The stacked parameters of the layers in another order."""
  table, norms = parameters(model), norm_order(model)
  moved = {}
  for name, leaf in layers.items():
    param = table[LAYERS + name]
    if param.norm:
      of_norm = norms.index(param.norm)
      suffix = name.removeprefix(param.norm)
      all_norms = jnp.concatenate([layers[norm + suffix] for norm in norms])
      moved[name] = all_norms[order.norms_GL[of_norm]]
    else:
      moved[name] = leaf[order.matrices_L if _is_matrix(param) else order.others_L]
  return moved


def _is_matrix(param: Param) -> bool:
  return param.part in [f"{sublayer}/" for sublayer in SUBLAYERS]


def moved_columns(columns: Columns, rows_L: Any) -> Columns:
  """The placement's columns in another order.

  A sublayer of attention residuals that takes the place of another one reads and writes the sources of its new place:
  the earlier outputs of the place that it came from may not be there yet.
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

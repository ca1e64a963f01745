"""The loss of a model with layers removed: a removed layer's output is its input. Removal is a flag, not surgery."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.config import ModelConfig
from mixln_jax.model import Transformer
from mixln_jax.model.loss import batch_loss

LossOf = Callable[[Any, Mapping[str, jax.Array], Any], tuple[jax.Array, jax.Array]]
Score = Callable[[Any, jax.Array], float]


def make_removal_step(model: ModelConfig) -> LossOf:
  """`step(params, batch, keep_L) -> (loss sum, count)`. keep_L is data, so one compiled program serves all removals."""
  transformer = Transformer(model)

  def step(params: Any, batch: Mapping[str, jax.Array], keep_L: Any) -> tuple[jax.Array, jax.Array]:
    total, count, _ = batch_loss(transformer, params, batch, keep_L=keep_L)
    return total, count

  return step


def without_blocks(num_layers: int, size: int) -> np.ndarray:
  """The flags keep_L that remove layers l … l + size - 1, for each possible l: [L - size + 1, L] int32."""
  first = np.arange(num_layers - size + 1)[:, None]
  layer = np.arange(num_layers)[None]
  return 1 - ((layer >= first) & (layer < first + size)).astype(np.int32)


def removal(
  step: LossOf,
  params: Any,
  batches: Iterable[Mapping[str, jax.Array]],
  num_layers: int,
  sizes: Sequence[int],
  scores: Mapping[str, Score] | None = None,
) -> dict[str, Any]:
  """The loss with all layers, and with each block of layers removed.

  Args:
    step: compiled `make_removal_step`.
    params: the parameters.
    batches: global batches.
    num_layers: L.
    sizes: how many consecutive layers to remove together.
    scores: tasks to score as well, name -> a function of the parameters and the flags keep_L (int32 [L]), which it
      passes to the model.

  Returns:
    `loss`: nats per counted token, with all layers.
    `blocks`: size -> the losses without layers l … l + size - 1, for l from 0.
    `scores`, if given: name -> `score` and `blocks`, which have the task's score in place of the loss.
  """
  flags = {size: without_blocks(num_layers, size) for size in sizes}
  keeps = np.concatenate([np.ones((1, num_layers), np.int32), *flags.values()])
  sums, count = np.zeros(len(keeps)), 0.0
  for batch in batches:
    results = jax.device_get([step(params, batch, keep_L) for keep_L in keeps])
    sums += np.array([total for total, _ in results], np.float64)
    count += float(results[0][1])

  def by_size(values: Sequence[float] | np.ndarray) -> dict[str, list[float]]:
    ends = np.cumsum([1, *map(len, flags.values())])
    blocks = {}
    for size, start, end in zip(sizes, ends[:-1], ends[1:], strict=True):
      blocks[str(size)] = [float(value) for value in values[start:end]]
    return blocks

  losses = sums / count
  result: dict[str, Any] = {"loss": float(losses[0]), "blocks": by_size(losses)}
  if scores:
    result["scores"] = {}
    for name, score in scores.items():
      values = [float(score(params, jnp.asarray(keep_L))) for keep_L in keeps]
      result["scores"][name] = {"score": values[0], "blocks": by_size(values)}
  return result

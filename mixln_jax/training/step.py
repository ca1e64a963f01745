"""The train state and the pure step that updates it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.diagnostics import layers
from mixln_jax.model import Transformer
from mixln_jax.model.columns import Columns
from mixln_jax.model.initial import draw_params, starting_values
from mixln_jax.model.loss import batch_loss
from mixln_jax.model.parameters import param_shardings, parameters
from mixln_jax.model.preference import PairSums, preference_loss
from mixln_jax.parallel import rules
from mixln_jax.training.optimizer import init_moments, learning_rate_schedule, make_optimizer, moment_shardings

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]


class Sums(NamedTuple):
  """What a loss adds up over a (micro-)batch, fp32 scalars.

  Attributes:
    loss: the summed loss.
    number: of what its mean is over: tokens or pairs.
    measures: the other sums, by name; `tokens` where the number is not theirs.
  """

  loss: jax.Array
  number: jax.Array
  measures: dict[str, jax.Array]


class Loss(NamedTuple):
  """A loss that can be trained with.

  Attributes:
    of_batch: `(model, params, batch, columns) -> (sums, taps)`.
    measures: the names of `Sums.measures`.
  """

  of_batch: Callable[[Transformer, Any, Batch, Columns | None], tuple[Sums, dict[str, Any]]]
  measures: tuple[str, ...] = ()


class TrainState(flax.struct.PyTreeNode):
  """All that a step changes.

  Attributes:
    step: updates done, int32.
    params: the parameters.
    opt_state: optax's state.
    skipped: updates that were not made because their loss or gradient was not finite, int32.
    skipped_in_a_row: how many of them came last, consecutively, int32.
  """

  step: Any
  params: Any
  opt_state: optax.OptState
  skipped: Any
  skipped_in_a_row: Any


def init_state(
  config: Config,
  columns: Columns | None = None,
  seed: int | jax.Array | None = None,
  start: Mapping[str, Any] | None = None,
) -> TrainState:
  """The state before the first update. Call it under jit (see `state_shardings`).

  Args:
    config: the run's config.
    columns: of one of several placements that share the tree (`Columns.of_many`); default: of the config's placement.
    seed: of the initial weights, as data; default: config.seed.
    start: `initial.starting_values`, as data; default: those of config.model.
  """
  start = starting_values(config.model, columns) if start is None else start
  params = draw_params(config.model, config.seed if seed is None else seed, start, columns)
  opt_state = init_moments(make_optimizer(config, columns), params, config.optimizer.moment_dtype)
  return start_state(params, opt_state)


def start_state(params: Any, opt_state: optax.OptState) -> TrainState:
  """The state of no updates, with given parameters."""
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, opt_state, zero, zero)


def abstract_state(config: Config, columns: Columns | None = None) -> TrainState:
  """Shapes and types of the state; nothing is computed. `columns` as in `init_state`."""
  return jax.eval_shape(lambda: init_state(config, columns))


def state_shardings(config: Config, mesh: Mesh, columns: Columns | None = None) -> TrainState:
  """The sharding of each tensor of the state: moments lie where their parameters do, the rest is replicated."""
  params = param_shardings(config.model, mesh, columns)
  replicated = rules.replicated(mesh)
  opt_state = moment_shardings(abstract_state(config, columns).opt_state, parameters(config.model, columns), mesh)
  return TrainState(replicated, params, opt_state, replicated, replicated)


def _next_token(model: Transformer, params: Any, batch: Batch, columns: Columns | None) -> tuple[Sums, dict[str, Any]]:
  total, count, taps = batch_loss(model, params, batch, columns=columns)
  return Sums(total, count, {}), taps


NEXT_TOKEN = Loss(_next_token)


def loss_of(config: Config) -> Loss:
  """The loss that a config trains with."""
  if config.preference.loss == "none":
    return NEXT_TOKEN
  measures = tuple(name for name in PairSums._fields if name not in ("loss", "pairs"))

  def of_pairs(model: Transformer, params: Any, batch: Batch, columns: Columns | None) -> tuple[Sums, dict[str, Any]]:
    sums, taps = preference_loss(config.preference, model, params, batch, columns=columns)
    return Sums(sums.loss, sums.pairs, {name: getattr(sums, name) for name in measures}), taps

  return Loss(of_pairs, measures)


def loss_sum(
  model: Transformer, params: Any, batch: Batch, columns: Columns | None = None
) -> tuple[jax.Array, jax.Array]:
  """Summed loss and count of the next tokens of one (micro-)batch."""
  total, count, _ = batch_loss(model, params, batch, columns=columns)
  return total, count


def gradient_sum(
  model: Transformer,
  params: Any,
  batch: Batch,
  micro_batches: int,
  columns: Columns | None,
  loss: Loss = NEXT_TOKEN,
) -> tuple[jax.Array, jax.Array, Any]:
  """Loss sum, count and gradient of the loss sum, in fp32, added over the micro-batches."""
  sums, grads, _ = gradient_and_statistics(loss, model, params, batch, micro_batches, columns)
  return sums.loss, sums.number, grads


def gradient_and_statistics(
  loss: Loss, model: Transformer, params: Any, batch: Batch, micro_batches: int, columns: Columns | None
) -> tuple[Sums, Any, Any]:
  """The sums of a loss and the gradient of its summed loss, in fp32, added over the micro-batches; and the statistics
  by layer of all of them, {} where the model does not observe."""

  def total(params: Any, micro: Batch) -> tuple[jax.Array, tuple[Sums, Any]]:
    sums, taps = loss.of_batch(model, params, micro, columns)
    return sums.loss, (sums, {} if model.observe is None else layers.collect(taps, micro["weights_BT"]))

  def of(micro: Batch) -> tuple[tuple[Sums, Any], Any]:
    (_, (sums, statistics)), grads = jax.value_and_grad(total, has_aux=True)(params, micro)
    return (sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)), statistics

  def add(so_far: Any, micro: Batch) -> tuple[Any, Any]:
    more, statistics = of(micro)
    return jax.tree.map(jnp.add, so_far, more), statistics

  if micro_batches == 1:
    (sums, grads), statistics = of(batch)
    return sums, grads, statistics
  # Row i goes to micro-batch i mod micro_batches, so that each device cuts up the rows it has.
  micros = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), dict(batch))
  zeros = Sums(jnp.zeros(()), jnp.zeros(()), {name: jnp.zeros(()) for name in loss.measures})
  zero_grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  (sums, grads), statistics = jax.lax.scan(add, (zeros, zero_grads), micros)
  return sums, grads, layers.merge(statistics) if statistics else {}


def columns_at(config: Config, columns: Columns | None, step: jax.Array) -> Columns | None:
  """The placement as data after `step` updates: itself (None: config.model's), unless a factor of it is a ramp."""
  table = Columns.of(config_lib.table(config.model)) if columns is None else columns
  return table.at_step(step) if table.has_ramp else columns


def make_train_step(config: Config, *, diagnose: bool = False) -> Callable[..., tuple[TrainState, Metrics]]:
  """The pure step: `train_step(state, batch, columns=None, learning_rate=None) -> (state, metrics)`.

  `columns` is the placement as data (default: config.model.placement), `learning_rate` the peak as data (default:
  config.optimizer.learning_rate). Metrics: `loss` (nats a counted token; of a loss over pairs, of a pair),
  `gradient_norm` (of the mean loss, before clipping), `learning_rate`, `tokens` (counted), `skipped_in_a_row`; of pairs
  also `pairs` and the means `accuracy`, `chosen_reward`, `rejected_reward`, `margin`; with `diagnose` also
  `diagnostics`, the statistics of `diagnostics/layers.py`, from this step's own forward pass, gradient and update.

  Where the loss or the gradient is not finite, the parameters and the optimizer's state stay as they are, bit for bit,
  and the step counts as skipped.
  """
  model = Transformer(config.model, observe=layers.observe if diagnose else None)
  schedule, loss_to_train = learning_rate_schedule(config), loss_of(config)

  def train_step(
    state: TrainState, batch: Batch, columns: Columns | None = None, learning_rate: jax.Array | None = None
  ) -> tuple[TrainState, Metrics]:
    optimizer = make_optimizer(config, columns)
    columns = columns_at(config, columns, state.step)
    sums, grads, statistics = gradient_and_statistics(
      loss_to_train, model, state.params, batch, config.train.micro_batches, columns
    )
    total, count = sums.loss, sums.number
    # Take the norm of the sums, and multiply by 1 / count: a norm of means, or a division, would make a CPU write all
    # gradients to memory once more.
    loss, gradient_norm = total / count, optax.tree.norm(grads) / count
    grads = jax.tree.map(lambda g: g * (1 / count), grads)
    # After too many of them nothing more is updated: the host, which reads a step late, finds all as it was.
    halted = state.skipped_in_a_row >= config.train.max_skipped_in_a_row
    update = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & ~halted
    rate = jnp.asarray(schedule(state.step), jnp.float32)
    if learning_rate is not None:
      rate = rate * (learning_rate / config.optimizer.learning_rate)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, norm=gradient_norm, accept=update)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: -rate * u, updates))
    params = jax.tree.map(lambda new, old: jnp.where(update, new, old), params, state.params)
    in_a_row = jnp.where(update, 0, state.skipped_in_a_row + 1)
    skipped = state.skipped + jnp.where(update, 0, 1)
    metrics: Metrics = {
      "loss": loss,
      "gradient_norm": gradient_norm,
      "learning_rate": rate,
      "tokens": sums.measures.get("tokens", count),
      "skipped_in_a_row": in_a_row,
    }
    if config.preference.loss != "none":
      metrics |= {"pairs": count, **pair_means(sums.measures, count)}
    if diagnose:
      metrics["diagnostics"] = layers.of_step(
        statistics, metrics["tokens"], grads, state.params, params, parameters(config.model, columns)
      )
    return TrainState(state.step + 1, params, opt_state, skipped, in_a_row), metrics

  return train_step


def pair_means(sums: Mapping[str, Any], count: Any) -> dict[str, Any]:
  """What is reported of `count` pairs, as TRL defines it, from sums over them (`PairSums`)."""
  means = {name: sums[name] / count for name in ("accuracy", "chosen_reward", "rejected_reward")}
  return means | {"margin": means["chosen_reward"] - means["rejected_reward"]}


def make_evaluate_step(config: Config, bytes_per_token_V: np.ndarray) -> Callable[..., tuple[jax.Array, ...]]:
  """`evaluate_step(params, batch, step, columns=None) -> (loss sum, count, bytes)`, or `PairSums` of a loss over pairs.

  `step` counts the updates done, bytes are those that the counted labels stand for, and `columns` is as in
  `make_train_step`.
  """
  model = Transformer(config.model)

  def evaluate_pairs(params: Any, batch: Batch, step: jax.Array, columns: Columns | None = None) -> PairSums:
    columns = columns_at(config, columns, step)
    return preference_loss(config.preference, model, params, batch, columns=columns)[0]

  def evaluate_step(
    params: Any, batch: Batch, step: jax.Array, columns: Columns | None = None
  ) -> tuple[jax.Array, ...]:
    total, count = loss_sum(model, params, batch, columns_at(config, columns, step))
    # A float sum is exact: a batch of 2^24 bytes would take a million tokens.
    return total, count, jnp.sum(jnp.asarray(bytes_per_token_V)[batch["labels_BT"]] * batch["weights_BT"])

  return evaluate_step if config.preference.loss == "none" else evaluate_pairs

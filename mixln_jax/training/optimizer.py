"""The optimizers, all from optax, and the recipe's learning-rate schedule.

To add one, add its name to `config.OPTIMIZERS` and a line to `OPTIMIZERS` here: a function of the config and the table
of parameters that returns an optax transformation whose updates point uphill and leave out the learning rate.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from mixln_jax.config import Config, decay_steps, warmup_steps
from mixln_jax.model.columns import Columns
from mixln_jax.model.parameters import LAYERS, Param, param_paths
from mixln_jax.parallel import rules
from mixln_jax.parallel.rules import platform
from mixln_jax.training.groups import optimizer_table
from mixln_jax.training.tuned import clip_with_known_norm, update_from_moments

ParamTable = Mapping[str, Param]
MUON_ITERATIONS = 5  # of Newton and Schulz, optax's default


def learning_rate_schedule(config: Config) -> optax.Schedule:
  """Learning rate of the update that follows `step` updates.

  A linear warm-up from 0 (so the first update is a no-op, as in the official code), then `optimizer.schedule`:
  cosine or linear decay to `final_fraction` of the peak at num_steps, constant, or constant and then a final decay:
  linear (wsd), or as 1 − √t, t its elapsed fraction (trapezoid; arXiv 2405.18392, eq. 1).
  """
  c = config.optimizer
  peak, floor = c.learning_rate, c.final_fraction * c.learning_rate
  warmup, num_steps = warmup_steps(config), config.train.num_steps
  after = num_steps - warmup
  if c.schedule == "cosine":
    main = optax.cosine_decay_schedule(peak, after, alpha=c.final_fraction)
  elif c.schedule == "linear":
    main = optax.linear_schedule(peak, floor, after)
  elif c.schedule == "wsd":
    decay = decay_steps(config)
    main = optax.linear_schedule(peak, floor, decay, transition_begin=after - decay)
  elif c.schedule == "trapezoid":
    main = _root_cool_down(peak, floor, after - decay_steps(config), decay_steps(config))
  else:
    main = optax.constant_schedule(peak)
  if warmup == 0:
    return main
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def _root_cool_down(peak: float, floor: float, begin: int, steps: int) -> optax.Schedule:
  """`peak` up to step `begin`, then falling to `floor` within `steps`, at first fast: 1 − √t."""

  def schedule(count: Any) -> jax.Array:
    elapsed = jnp.clip((count - begin) / steps, 0.0, 1.0)
    return peak - (peak - floor) * jnp.sqrt(elapsed)

  return schedule


def make_optimizer(config: Config, columns: Columns | None = None) -> optax.GradientTransformationExtraArgs:
  """Clip, optimizer, decoupled weight decay, multipliers by group: everything but the learning rate, which the step
  applies.

  `columns` are those of several placements that share the tree (`Columns.of_many`), default: config.model's own; what
  decays depends on them, and the state does not.

  Its `update` needs two arguments more than optax's own: `norm`, the global norm of the gradients; and `accept`, a
  boolean: where it is False the state stays as it is, and the update that is returned means nothing.

  Its state is made by `init` from parameters in `optimizer.moment_dtype` (see `moment_cast`).
  """
  c, table = config.optimizer, optimizer_table(config, columns)
  clip, decay = optax.identity(), optax.identity()
  if c.clip_norm > 0:
    clip = clip_by_norm(c.clip_norm)
  if c.weight_decay > 0:
    decay = add_decay(c.weight_decay, {path: param.decay for path, param in table.items()})
  # Adam with epsilon k ε on gradients g is Adam with ε on g / k: it then needs no epsilon by group.
  inverse_epsilon = {path: 1.0 / np.asarray(param.epsilon) for path, param in table.items()}
  stages = [clip, moment_cast(c.moment_dtype, inverse_epsilon), OPTIMIZERS[c.name](config, table), decay]
  rates = {path: param.rate for path, param in table.items()}
  if any(np.any(rate != 1.0) for rate in rates.values()):
    stages.append(optax.stateless(lambda updates, _: times(updates, rates)))
  return optax.chain(*stages)


# What all of them share.


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm`; on a CPU by the norm that the step has computed already."""
  plain = optax.clip_by_global_norm(limit)

  def update(updates: Any, state: Any, params: Any = None, **extra: jax.Array) -> tuple[Any, Any]:
    if platform() == "cpu":
      return clip_with_known_norm(updates, extra["norm"], limit), state
    return plain.update(updates, state, params)

  return optax.GradientTransformationExtraArgs(plain.init, update)


def moment_cast(dtype: str, factors: Mapping[str, Any]) -> optax.GradientTransformation:
  """Gradients times `factors`, in the type of the moments; after the clip, which is fp32."""
  return optax.stateless(lambda updates, _: jax.tree.map(lambda g: g.astype(dtype), times(updates, factors)))


def times(tree: Any, factors: Mapping[str, Any]) -> Any:
  """Each leaf of a tree of parameters times its factor, a number or one for each layer [L]; 1 is not multiplied."""

  def leaf(path: str, x: jax.Array) -> jax.Array:
    factor = np.asarray(factors[path])
    if np.all(factor == 1.0):
      return x
    return x * jnp.asarray(factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim)), x.dtype)

  return jax.tree.map(leaf, param_paths(tree), tree)


def _paths_with(params: Any, of: Callable[[str], Any]) -> Any:
  """What `of` says of each parameter's path, as a tree."""
  return jax.tree.map(of, param_paths(params))


def add_decay(weight_decay: float, factors: Mapping[str, Any]) -> optax.GradientTransformation:
  """`optax.add_decayed_weights`, times a factor for each parameter; by optax itself where all are 0 or 1."""
  if all(np.ndim(factor) == 0 and factor in (0.0, 1.0) for factor in factors.values()):
    return optax.add_decayed_weights(
      weight_decay, mask=lambda params: _paths_with(params, lambda path: factors[path] == 1.0)
    )

  def update(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, p: u + weight_decay * p, updates, times(params, factors))

  return optax.stateless(update)


def keeping_rejected(plain: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Any optax transformation, as `make_optimizer` needs it: its state stays as it is where `accept` is False.

  It sees the parameters in the type of its updates, so that its state keeps the type that it started with.
  """

  def update(updates: Any, state: Any, params: Any = None, **extra: jax.Array) -> tuple[Any, Any]:
    params = jax.tree.map(lambda p, u: p.astype(u.dtype), params, updates)
    updates, proposed = plain.update(updates, state, params)
    return updates, jax.tree.map(lambda new, old: jnp.where(extra["accept"], new, old), proposed, state)

  return optax.GradientTransformationExtraArgs(plain.init, update)


# The optimizers.


def _adamw(config: Config, table: ParamTable) -> optax.GradientTransformationExtraArgs:
  """Adam (arXiv 1412.6980), whose weight decay is decoupled (arXiv 1711.05101)."""
  del table
  return scale_by_adam(config.optimizer.b1, config.optimizer.b2, config.optimizer.epsilon)


def scale_by_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, whose state stays as it is where `accept` is False."""
  plain = optax.scale_by_adam(b1, b2, epsilon)

  def update(updates: Any, state: Any, params: Any = None, **extra: jax.Array) -> tuple[Any, Any]:
    del params
    updates, proposed = plain.update(updates, state)
    kept: Any = jax.tree.map(lambda new, old: jnp.where(extra["accept"], new, old), proposed, state)
    if platform() == "cpu":
      updates = update_from_moments(kept, b1, b2, epsilon)
    return updates, kept

  return optax.GradientTransformationExtraArgs(plain.init, update)


def _muon(config: Config, table: ParamTable) -> optax.GradientTransformationExtraArgs:
  """Muon of the layers' matrices, Adam (with Nesterov's momentum, as optax has it) of all else."""
  c = config.optimizer

  def dimension_numbers(params: Any) -> Any:  # of a tree that may lack what is Adam's
    return _paths_with(params, lambda path: muon_dimensions(table[path]))

  plain = optax.contrib.muon(
    learning_rate=-1.0,  # the step applies it, and the sign
    ns_steps=MUON_ITERATIONS,
    beta=c.momentum,
    eps=c.epsilon,
    adam_b1=c.b1,
    adam_b2=c.b2,
    muon_weight_dimension_numbers=dimension_numbers,
    consistent_rms=c.muon_rms or None,
  )
  unpadded = {path: _unpadded_scale(param, c.muon_rms) for path, param in table.items()}
  return keeping_rejected(optax.chain(plain, optax.stateless(lambda updates, _: times(updates, unpadded))))


def muon_dimensions(param: Param) -> optax.contrib.MuonDimensionNumbers | None:
  """Which dimensions of a layers' matrix are its inputs and its outputs, heads on one side; the layers are a batch.

  None for what Adam is for: embedding, head, gains, biases, scalars, and the coefficients of several streams.
  """
  if not param.is_layer_matrix:
    return None
  _, inputs, outputs = param.folded_axes
  return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)


def _unpadded_scale(param: Param, rms: float) -> float:
  """What makes Muon's scale of a matrix that is stored wider than it is that of the matrix."""
  if not param.is_layer_matrix:
    return 1.0

  def scale(shape: tuple[int, ...]) -> float:
    fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in param.folded_axes[1:])
    return math.sqrt(max(fan_in, fan_out) if rms else max(1.0, fan_out / fan_in))

  return scale(param.logical_shape) / scale(param.shape)


def update_flops(config: Config) -> float:
  """FLOPs of the matrix products of one update: none but with muon.

  Of a stored matrix whose sides are m ≤ n, each of the five iterations multiplies X Xᵀ and (…) X, 2 m² n each, and a
  square of m, 2 m³.
  """
  if config.optimizer.name != "muon":
    return 0.0
  flops = 0.0
  for param in optimizer_table(config).values():
    if param.is_layer_matrix:
      layers, short, long = folded_shape(param)[0], *sorted(folded_shape(param)[1:])
      flops += layers * MUON_ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)
  return flops


def _lion(config: Config, table: ParamTable) -> optax.GradientTransformationExtraArgs:
  """Lion (arXiv 2302.06675)."""
  del table
  return keeping_rejected(optax.scale_by_lion(config.optimizer.b1, config.optimizer.b2))


def _adafactor(config: Config, table: ParamTable) -> optax.GradientTransformationExtraArgs:
  """Adafactor (arXiv 1804.04235) without momentum, each layer's matrix for itself."""
  del config
  uphill = optax.chain(optax.adafactor(), optax.scale(-1.0))
  return keeping_rejected(by_matrix(uphill, table))


def _sgd(config: Config, table: ParamTable) -> optax.GradientTransformationExtraArgs:
  """Stochastic gradient descent with momentum."""
  del table
  return keeping_rejected(optax.trace(config.optimizer.momentum))


OPTIMIZERS: Mapping[str, Callable[[Config, ParamTable], optax.GradientTransformationExtraArgs]] = {
  "adamw": _adamw,
  "muon": _muon,
  "lion": _lion,
  "adafactor": _adafactor,
  "sgd": _sgd,
}


class ByMatrix(NamedTuple):
  """The state of `by_matrix`: of the stacked tensors, with a leading axis [L], and of the others."""

  stacked: Any
  rest: Any


def by_matrix(plain: optax.GradientTransformation, table: ParamTable) -> optax.GradientTransformation:
  """A transformation that looks at whole tensors, given those of each layer alone, matrices with their heads folded."""

  def parts(tree: Any) -> tuple[Any, Any]:
    folded = jax.tree.map(lambda path, x: x.reshape(folded_shape(table[path])), param_paths(tree), tree)
    return {"layers": folded["layers"]}, {name: leaf for name, leaf in folded.items() if name != "layers"}

  def init(params: Any) -> ByMatrix:
    stacked, rest = parts(params)
    return ByMatrix(jax.vmap(plain.init)(stacked), plain.init(rest))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ByMatrix]:
    stacked: Any
    rest: Any
    (stacked, rest), (stacked_params, rest_params) = parts(updates), parts(params)
    stacked, stacked_state = jax.vmap(plain.update)(stacked, state.stacked, stacked_params)
    rest, rest_state = plain.update(rest, state.rest, rest_params)
    new = dict(rest) | dict(stacked)
    return jax.tree.map(lambda u, old: u.reshape(old.shape), new, updates), ByMatrix(stacked_state, rest_state)

  return optax.GradientTransformation(init, update)


def folded_shape(param: Param) -> tuple[int, ...]:
  """The shape with heads folded: a layers' matrix is [L, inputs, outputs]."""
  return tuple(math.prod(param.shape[axis] for axis in axes) for axes in param.folded_axes)


# Its state.


def init_moments(optimizer: optax.GradientTransformation, params: Any, dtype: str) -> optax.OptState:
  """The optimizer's first state, moments in `dtype` whatever the type of the parameters."""
  return optimizer.init(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))


def moment_shardings(state: Any, table: ParamTable, mesh: Mesh) -> Any:
  """The sharding of each tensor of an optimizer's state: what has a parameter's shape, as it is or with heads folded,
  lies where the parameter does; the rest (counts, sums of rows and columns) is replicated.

  Args:
    state: the abstract state; which parameter a tensor belongs to is what its path ends with.
    table: of the parameters.
    mesh: what it is cut over.
  """

  def axes(path: Any, leaf: Any) -> PartitionSpec:
    keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    param = table.get(LAYERS + keys[-1] if "layers" in keys else keys[-1]) if keys else None
    if param is None:
      return PartitionSpec()
    if leaf.shape == param.shape:
      return PartitionSpec(*param.axes)
    if leaf.shape == folded_shape(param):
      # A dimension that is folded into another is never cut: only the outer one of them can be.
      return PartitionSpec(*(param.axes[axes[0]] for axes in param.folded_axes))
    return PartitionSpec()

  return rules.shardings(state, jax.tree_util.tree_map_with_path(axes, state), mesh)

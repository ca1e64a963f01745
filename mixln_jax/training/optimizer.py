"""AdamW (arXiv 1711.05101) with the recipe's learning-rate schedule, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixln_jax.config import Config, ModelConfig, decay_steps, warmup_steps
from mixln_jax.model.columns import Columns
from mixln_jax.model.parameters import param_paths, parameters
from mixln_jax.parallel.rules import platform
from mixln_jax.training.tuned import clip_with_known_norm, update_from_moments


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
  """Clip, Adam, decoupled weight decay: everything of AdamW but the learning rate, which the step applies.

  `columns` are those of several placements that share the tree (`Columns.of_many`), default: config.model's own; what
  decays depends on them, and the state does not.

  Its `update` needs two arguments more than optax's own: `norm`, the global norm of the gradients; and `accept`, a
  boolean: where it is False the state stays as it is, and the update that is returned means nothing.

  Its state is made by `init` from parameters in `optimizer.moment_dtype` (see `moment_cast`).
  """
  c = config.optimizer
  clip, decay = optax.identity(), optax.identity()
  if c.clip_norm > 0:
    clip = clip_by_norm(c.clip_norm)
  if c.weight_decay > 0:
    decay = optax.add_decayed_weights(c.weight_decay, mask=lambda params: decayed(config.model, params, columns))
  return optax.chain(clip, moment_cast(c.moment_dtype), scale_by_adam(c.b1, c.b2, c.epsilon), decay)


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm`; on a CPU by the norm that the step has computed already."""
  plain = optax.clip_by_global_norm(limit)

  def update(updates: Any, state: Any, params: Any = None, **extra: jax.Array) -> tuple[Any, Any]:
    if platform() == "cpu":
      return clip_with_known_norm(updates, extra["norm"], limit), state
    return plain.update(updates, state, params)

  return optax.GradientTransformationExtraArgs(plain.init, update)


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


def moment_cast(dtype: str) -> optax.GradientTransformation:
  """Casts gradients to Adam's own type, after the clip, which is fp32."""
  return optax.stateless(lambda updates, _: jax.tree.map(lambda g: g.astype(dtype), updates))


def init_moments(optimizer: optax.GradientTransformation, params: Any, dtype: str) -> optax.OptState:
  """The optimizer's first state, moments in `dtype` whatever the type of the parameters."""
  return optimizer.init(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))


def decayed(model: ModelConfig, params: Any, columns: Columns | None = None) -> Any:
  """True for each parameter that weight decay is for; of a tree that several placements share, with its `columns`."""
  decays = {path for path, param in parameters(model, columns).items() if param.decays}
  return jax.tree.map(lambda path: path in decays, param_paths(params))

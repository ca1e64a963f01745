"""AdamW (arXiv 1711.05101) with the recipe's learning-rate schedule, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixln_jax.config import Config, ModelConfig, decay_steps, warmup_steps
from mixln_jax.model.parameters import param_paths, parameters


def learning_rate_schedule(config: Config) -> optax.Schedule:
  """Learning rate of the update that follows `step` updates.

  A linear warm-up from 0 (so the first update is a no-op, as in the official code), then `optimizer.schedule`:
  cosine or linear decay to `final_fraction` of the peak at num_steps, constant, or wsd (constant, then linear decay).
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
  else:
    main = optax.constant_schedule(peak)
  if warmup == 0:
    return main
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
  """Clip, Adam, decoupled weight decay: everything of AdamW but the learning rate, which the step applies.

  Its `update` needs two arguments more than optax's own: `norm`, the global norm of the gradients; and `accept`, a
  boolean: where it is False the state stays as it is, and the update that is returned means nothing.

  Its state is made by `init` from parameters in `optimizer.moment_dtype` (see `moment_cast`).
  """
  c = config.optimizer
  return optax.chain(
    clip_by_norm(c.clip_norm) if c.clip_norm > 0 else optax.identity(),
    moment_cast(c.moment_dtype),
    scale_by_adam(c.b1, c.b2, c.epsilon),
    optax.add_decayed_weights(c.weight_decay, mask=lambda params: decayed(config.model, params))
    if c.weight_decay > 0
    else optax.identity(),
  )


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm` for gradients whose norm is known, as one factor.

  optax divides by the norm. A CPU would not repeat a division in each of the passes that read its result, and so writes
  all gradients once more.
  """

  def update(updates: Any, state: Any, params: Any = None, **extra: jax.Array) -> tuple[Any, Any]:
    del params
    factor = jnp.where(extra["norm"] < limit, 1.0, limit / extra["norm"])
    return jax.tree.map(lambda g: g * factor, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_by_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, whose update is made of the moments that are kept, after `accept` had its say.

  optax's own is made of the new moments before that. XLA on a CPU, whose passes over memory have one output each, then
  makes the new moments once more where it updates the parameters, and for that keeps a copy of all old ones.
  """
  adam = optax.scale_by_adam(b1, b2, epsilon)

  def update(updates: Any, state: Any, params: Any = None, **extra: jax.Array) -> tuple[Any, Any]:
    del params
    _, new = adam.update(updates, state)
    new: Any = jax.tree.map(lambda new, old: jnp.where(extra["accept"], new, old), new, state)
    mean = optax.tree.bias_correction(new.mu, b1, new.count)
    square = optax.tree.bias_correction(new.nu, b2, new.count)
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, square), new

  return optax.GradientTransformationExtraArgs(adam.init, update)


def moment_cast(dtype: str) -> optax.GradientTransformation:
  """Casts gradients to Adam's own type, after the clip, which is fp32."""
  return optax.stateless(lambda updates, _: jax.tree.map(lambda g: g.astype(dtype), updates))


def init_moments(optimizer: optax.GradientTransformation, params: Any, dtype: str) -> optax.OptState:
  """The optimizer's first state, moments in `dtype` whatever the type of the parameters."""
  return optimizer.init(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))


def decayed(model: ModelConfig, params: Any) -> Any:
  """True for each parameter that weight decay is for; `params` may be a tree that several placements share."""
  decays = {path for path, param in parameters(model).items() if param.decays}
  return jax.tree.map(lambda path: path in decays, param_paths(params))

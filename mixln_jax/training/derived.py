"""Fields that other fields decide, filled in before a run begins: config.json then says what was trained.

A field that was filled in is accepted again, so that a run's own config passes unchanged.
"""

import math

from mixln_jax.config import DERIVED, Config, ModelConfig
from mixln_jax.errors import InputError
from mixln_jax.model.parameters import parameters
from mixln_jax.training.groups import implied_by, optimizer_table

COUNTED = ("embedding/", "head/", "attention/", "mlp/")  # parts


def with_derived(config: Config) -> Config:
  """The config as it is trained: with its number of steps, and the multipliers of its parameterization.

  Raises:
    InputError: a field is stated that another one decides otherwise, or multipliers by group can't be read.
  """
  config = with_parameterization(with_num_steps(config))
  optimizer_table(config)  # for its checks
  return config


def with_parameterization(config: Config) -> Config:
  """The config with the multipliers of config.model that `optimizer.parameterization` decides.

  They stand in config.model because a model computes with them wherever it is opened.

  Raises:
    InputError: one of them is stated otherwise.
  """
  implied = implied_by(config)
  for name, value in implied.items():
    stated = config.model[name]
    if stated not in (DERIVED[f"model.{name}"].left_out, value):
      raise InputError(
        f"config.model.{name}={stated:g}: config.optimizer.parameterization={config.optimizer.parameterization} makes "
        f"it {value:g}; leave it out, or use standard"
      )
  if all(config.model[name] == value for name, value in implied.items()):
    return config
  config = config.copy_and_resolve_references()
  config.model.update(implied)
  return config


def matrix_params(model: ModelConfig) -> int:
  """What `train.tokens_per_parameter` counts: the matrices of attention and MLP, embedding and head (tied: once).

  Not what a placement adds (gains, scalars, hyper-connections): every placement of a shape is trained on the same
  number of tokens, and its runs are comparable. Columns that only pad the MLP don't count.
  """
  return sum(param.size for param in parameters(model).values() if param.drawn and param.part in COUNTED)


def with_num_steps(config: Config) -> Config:
  """The config with `train.num_steps` filled in: ⌈tokens_per_parameter × parameters / tokens of a step⌉.

  The tokens of a step are all positions of its batch, padding among them.

  Raises:
    InputError: the length is stated twice, and the two are not the same.
  """
  train = config.train
  if train.tokens_per_parameter == 0:
    return config
  tokens = train.tokens_per_parameter * matrix_params(config.model)
  num_steps = max(1, math.ceil(tokens / (train.batch_size * config.data.sequence_length)))
  if train.num_steps == num_steps:
    return config
  if train.num_steps != DERIVED["train.num_steps"].left_out:
    raise InputError(
      f"config.train.num_steps={train.num_steps} and tokens_per_parameter={train.tokens_per_parameter:g} both state "
      f"the length of the run, and the latter asks for {num_steps} steps; set config.train.num_steps=0, or "
      "tokens_per_parameter=0"
    )
  config = config.copy_and_resolve_references()
  config.train.num_steps = num_steps
  return config

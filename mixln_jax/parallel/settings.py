"""Settings of JAX that affect what a run computes.

A shell can set each of them (JAX_ENABLE_X64=1), which would change initial weights or the losses of a resumed run. So
they are fixed here, to JAX's defaults. XLA's flags, and settings that only tune compilation, are left to the user:
`environment.json` records them, and a resumed run reports if they changed.
"""

import os
import sys
from typing import Any

import jax

from mixln_jax.errors import InputError

STATED: dict[str, Any] = {
  "jax_allow_f16_reductions": True,
  "jax_default_matmul_precision": None,
  "jax_default_prng_impl": "threefry2x32",
  "jax_disable_jit": False,
  "jax_disable_most_optimizations": False,
  "jax_enable_custom_prng": False,
  "jax_enable_x64": False,
  "jax_high_dynamic_range_gumbel": False,
  "jax_numpy_dtype_promotion": "standard",
  "jax_numpy_rank_promotion": "allow",
  "jax_random_seed_offset": 0,
  "jax_threefry_partitionable": True,
}
TUNING = (  # they change results by rounding only; their defaults differ between versions of JAX
  "jax_compiler_enable_remat_pass",
  "jax_custom_vjp3",
  "jax_exec_time_optimization_effort",
  "jax_memory_fitting_effort",
  "jax_memory_fitting_level",
  "jax_optimization_level",
  "jax_remat3",
  "jax_scan3",
  "jax_softmax_custom_jvp",
  "jax_threefry_gpu_kernel_lowering",
  "jax_use_direct_linearize",
  "jax_use_shardy_partitioner",
)
VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")  # read by the compilers, besides XLA_FLAGS


def _others() -> dict[str, Any]:
  """The settings of this process that differ from STATED."""
  current = jax.config.values  # a version of JAX may lack some of them
  others = {}
  for name, stated in STATED.items():
    if name in current and getattr(current[name], "value", current[name]) != stated:  # some are enumeration members
      others[name] = current[name]
  return others


def state_settings() -> None:
  """Resets settings that differ from STATED, with a warning for each; called before anything is computed."""
  for name, value in _others().items():
    variable = name.upper()
    setting = f"{variable}={os.environ[variable]}" if variable in os.environ else f"{name}={value}"
    print(f"warning: {setting} is ignored: it would change what a run computes", file=sys.stderr)
    jax.config.update(name, STATED[name])


def check_settings() -> None:
  """Rejects settings that differ from STATED; for programs that import this package.

  Raises:
    InputError: some settings differ; the message names each of them.
  """
  others = [f"{name}={getattr(value, 'value', value)!r}, not {STATED[name]!r}" for name, value in _others().items()]
  if others:
    raise InputError(
      f"JAX is set to {'; '.join(others)}, which would change what a run computes; call "
      "mixln_jax.parallel.settings.state_settings() to reset it"
    )


def tuning() -> dict[str, Any]:
  """Other settings of this process that may change the rounding of a run's results, for its facts."""
  values = {name: jax.config.values[name] for name in TUNING if name in jax.config.values}
  return values | {name: os.environ[name] for name in VARIABLES if name in os.environ}

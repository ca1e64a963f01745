"""Settings of JAX that decide what a run computes.

A shell can set each of them (JAX_ENABLE_X64=1), and initial weights or a resumed run's losses would be others. They
are stated here instead, each as JAX has it by default. XLA's flags and what only tunes a compilation stay the user's:
`environment.json` says what they were, and a resumed run says that they changed.
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
TUNING = (  # the same numbers up to rounding; what their defaults are differs between versions of JAX
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
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")  # that the compilers read


def _others() -> dict[str, Any]:
  """The settings of this process that are not as stated."""
  found = jax.config.values  # a setting that this version of JAX lacks is none
  return {name: found[name] for name, value in STATED.items() if name in found and not _is(found[name], value)}


def _is(found: Any, stated: Any) -> bool:
  return getattr(found, "value", found) == stated  # some are members of an enumeration


def state_settings() -> None:
  """Sets what is not as stated, and warns of each; the front door does it before anything is computed."""
  for name, value in _others().items():
    said = f"{name.upper()}={os.environ[name.upper()]}" if name.upper() in os.environ else f"{name}={value}"
    print(f"warning: {said} is ignored: a run would compute something else with it", file=sys.stderr)
    jax.config.update(name, STATED[name])


def check_settings() -> None:
  """Rejects settings that are not as stated; for programs that import this package.

  Raises:
    InputError: naming each of them.
  """
  others = [f"{name}={getattr(value, 'value', value)!r}, not {STATED[name]!r}" for name, value in _others().items()]
  if others:
    raise InputError(
      f"JAX is set to {'; '.join(others)}, so that a run would compute something else; "
      "mixln_jax.parallel.settings.state_settings() sets what runs are made with"
    )


def tuning() -> dict[str, Any]:
  """What else of the settings of this process may change how a run's numbers are rounded, for its facts."""
  values = {name: jax.config.values[name] for name in TUNING if name in jax.config.values}
  return values | {name: os.environ[name] for name in VARIABLES if name in os.environ}

"""What a shell sets of JAX can't change what a run computes."""

import os
import subprocess
import sys

import jax
import pytest

from mixln_jax.errors import InputError
from mixln_jax.parallel.settings import STATED, check_settings
from mixln_jax.runs.facts import environment_changes


def test_the_front_door_states_what_a_run_depends_on():
  """JAX_ENABLE_X64=1 drew other initial weights, and a resumed run had other losses."""
  code = (
    "import jax, sys; from mixln_jax.parallel.settings import state_settings; state_settings(); "
    "print(jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision, jax.config.jax_random_seed_offset)"
  )
  shell = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "JAX_RANDOM_SEED_OFFSET": "7"}
  result = subprocess.run(
    [sys.executable, "-c", code], env=os.environ | shell, capture_output=True, text=True, check=True
  )
  assert result.stdout == "False None 0\n"
  for name, value in shell.items():
    assert f"warning: {name}={value} is ignored" in result.stderr


def test_a_program_that_imports_the_package_is_told():
  """A notebook with 64 bits would train something else in silence."""
  check_settings()
  jax.config.update("jax_enable_x64", True)
  try:
    with pytest.raises(InputError, match="jax_enable_x64=True, not False"):
      check_settings()
  finally:
    jax.config.update("jax_enable_x64", STATED["jax_enable_x64"])


def test_what_changed_between_two_starts_is_named():
  """A fact that an older version did not write is no change; another jaxlib or another program is one."""
  old = {"train_step": "a", "xla_flags": "", "packages": {"jax": "1", "jaxlib": "1", "numpy": "1"}}
  now = {"train_step": "b", "xla_flags": "", "tuning": {}, "devices": [], "packages": {"jax": "1", "jaxlib": "2"}}
  assert environment_changes(old, now) == ["train_step 'a' -> 'b'", "jaxlib 1 -> 2"]
  assert environment_changes({"packages": None}, now) == []

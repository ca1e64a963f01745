"""The facts that a run records: its config, the machine and code that ran it, its parameters."""

import hashlib
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mixln_jax import config as config_lib
from mixln_jax.config import Config
from mixln_jax.errors import InputError
from mixln_jax.files import TEXT, json_object
from mixln_jax.parallel.rules import mesh_axes
from mixln_jax.parallel.settings import tuning
from mixln_jax.runs.folder import CONFIG, ENVIRONMENT, RunFolder
from mixln_jax.text import aligned, shown
from mixln_jax.version import VERSION

PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "array-record",
  "ml_collections",
  "numpy",
  "sentencepiece",
)


def read_config(folder: RunFolder) -> Config:
  """The config of a run, which an earlier version may have written.

  Raises:
    InputError: the folder holds no run, its config.json is damaged, or it has a field that this version does not know.
  """
  where = f"{folder.address}/{CONFIG}"
  flat = json_object(folder.read(CONFIG), where)
  try:
    return config_lib.from_flat(flat, written_by(folder))
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def read_environment(folder: RunFolder) -> dict[str, Any]:
  """The environment.json of a run; empty if it is missing or can't be read."""
  try:
    return folder.facts(ENVIRONMENT, {"version": TEXT.optional(), "git": TEXT.optional()}) or {}
  except InputError:
    return {}


def written_by(folder: RunFolder) -> str:
  """The version of this package that last trained a run, in words, from its environment.json."""
  environment = read_environment(folder)
  if not environment:
    return "another version"
  version, revision = environment.get("version", "an earlier version"), environment.get("git")
  return f"{version} (revision {revision})" if revision else version


def environment() -> dict[str, Any]:
  """Versions, devices and code revision of this process."""
  return {
    "version": VERSION,
    "python": platform.python_version(),
    "platform": platform.platform(),
    "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
    "processes": jax.process_count(),
    "cpus": os.cpu_count(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "tuning": tuning(),
    "git": _git_revision(),
    "code": code_hash(),
    "command": sys.argv,
  }


COMPUTES = ("train_step", "devices", "xla_flags")  # facts of an environment that can change a run's bits


def environment_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """The differences between two environments that can change a run's bits, in words. Facts missing in `old` are left
  out."""
  stated = [name for name in COMPUTES if name in old]
  changes = _changes_of(old, new, stated)
  changes += _changes_of(old.get("packages"), new.get("packages", {}), ("jax", "jaxlib"))
  old_tuning, new_tuning = old.get("tuning"), new.get("tuning", {})
  old_names = tuple(old_tuning) if isinstance(old_tuning, Mapping) else ()
  changes += _changes_of(old_tuning, new_tuning, tuple(dict.fromkeys((*old_names, *new_tuning))))
  return changes


def _changes_of(old: Any, new: Mapping[str, Any], names: Sequence[str]) -> list[str]:
  """The differences within a group of facts, in words; none if `old`, which comes from a file, is not a mapping."""
  if not isinstance(old, Mapping):
    return []
  return [f"{name} {shown(old.get(name))} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def code_hash() -> str:
  """A hash of this package's source files, which also identifies code outside a git repository.

  Recipes are left out: an installed package holds copies of them, a clone a link, and a run writes its whole config.
  """
  root = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    if path.is_relative_to(root / "configs"):
      continue
    digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
  return digest.hexdigest()[:16]


def _git_revision() -> str | None:
  root = Path(__file__).parents[2]
  if (root / "REVISION").is_file():  # code that was shipped without git
    return (root / "REVISION").read_text().strip()
  try:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(describe, cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


def parameter_table(params: Any, count: int) -> str:
  """The content of parameters.txt: one line per stored tensor, and the model's own count.

  A line has the tensor's name, shape, type, sharding, shape on one device, and size.

  Args:
    params: a tree of arrays, or of shapes with shardings.
    count: the number of parameters of the model, without padding of the MLP and unused gains.
  """
  rows = [("name", "shape", "dtype", "sharding", "on a device", "size")]
  total = on_one_device = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    shape, piece = tuple(leaf.shape), leaf.sharding.shard_shape(leaf.shape)
    rows.append((name, str(shape), str(leaf.dtype), describe_sharding(leaf.sharding), str(piece), f"{leaf.size:,}"))
    total += leaf.size
    on_one_device += math.prod(piece)
  sizes = f"stored {total:,}, of which a device holds {on_one_device:,}"
  return "\n".join([*aligned(rows), sizes, f"parameters {count:,}"]) + "\n"


def describe_sharding(sharding: Any) -> str:
  """A sharding in words, such as `axis 1 over fsdp 4, axis 2 over tensor 2`, or `whole on every device`."""
  cuts = []
  for number, entry in enumerate(getattr(sharding, "spec", ())):
    sizes = {axis: sharding.mesh.shape[axis] for axis in mesh_axes(entry)}
    over = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    if over:
      cuts.append(f"axis {number} over {' × '.join(over)}")
  return ", ".join(cuts) or "whole on every device"

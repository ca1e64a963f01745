"""A cache of compiled programs that only its owner can write to, since programs in it are executed."""

import os
import stat
import sys
from pathlib import Path

import jax

from mixln_jax.errors import InputError
from mixln_jax.files import local_path


def use_compile_cache() -> Path | None:
  """Caches compiled programs in the user's cache folder, with mode 0700.

  If JAX_COMPILATION_CACHE_DIR is set, that folder is used instead and not changed.

  Returns:
    The folder; None if it is not used.
  """
  if jax.config.values["jax_compilation_cache_dir"]:
    return None
  try:
    home = local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  except InputError:  # e.g. a container's user without a home folder
    print("warning: compiled programs are not cached: there is no home folder; set HOME", file=sys.stderr)
    return None
  folder = home / "mixln_jax" / "compiled"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
      raise PermissionError("it belongs to another user")
    folder.chmod(stat.S_IRWXU)
  except OSError as error:
    print(f"warning: compiled programs are not cached: {folder}: {error.strerror or error}", file=sys.stderr)
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  return folder

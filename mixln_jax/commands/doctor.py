"""Look at this machine: versions, devices, write access, and what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

# Only the standard library up here: this command is for machines on which the rest is missing.

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
OPTIONAL = {
  "wandb": "logging.wandb_project",
  "gcsfs": "gs:// work directories and data",
  "torch": "making the golden values of the tests",
}


def main(argv: list[str]) -> int:
  if any(argument in ("--help", "-h") for argument in argv):
    print(f"{__doc__}\nflags:\n  --workdir=…\n      a folder whose write access is tried (default: work)")
    sys.exit(0)
  print(f"python     {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
  problems = _check_packages()
  if any("not installed" in problem for problem in problems):
    return _conclude(problems)
  from mixln_jax.command_line import CommandLine

  line = CommandLine(__doc__ or "")
  line.string("workdir", "a folder whose write access is tried", default="work")
  values = line.parse(argv)
  problems += [*_check_devices(), *_check_workdir(values.workdir)]
  for name, use in OPTIONAL.items():
    if importlib.util.find_spec(name) is None:
      print(f"optional   {name} is not installed (for {use})")
  return _conclude(problems)


def _conclude(problems: list[str]) -> int:
  for problem in problems:
    print(f"problem    {problem}", file=sys.stderr)
  print(f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "all is well")
  return 1 if problems else 0


def _check_packages() -> list[str]:
  if not REQUIREMENTS.is_file():
    return [f"{REQUIREMENTS} is missing, so packages were not checked; run from a clone of the repository"]
  problems = []
  lines = (re.sub(r"\s*#.*", "", line).strip() for line in REQUIREMENTS.read_text().splitlines())
  for name, specifier in (re.fullmatch(r"([\w.-]+)(.*)", line).groups() for line in lines if line):  # pyright: ignore
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      problems.append(f"{name} is not installed; run `pip install -r requirements.txt`")
      continue
    print(f"package    {name} {version}")
    if not _satisfies(version, specifier):
      problems.append(f"{name} {version} is not {specifier}; run `pip install -r requirements.txt`")
  return problems


def _satisfies(version: str, specifier: str) -> bool:
  try:
    from packaging.specifiers import SpecifierSet
  except ImportError:
    return True  # comes with JAX's own requirements; without it only presence is checked
  return SpecifierSet(specifier).contains(version, prereleases=True)


def _check_devices() -> list[str]:
  import jax

  try:
    devices = jax.devices()
  except RuntimeError as error:
    return [f"JAX finds no device: {error}"]
  from mixln_jax.parallel.devices import peak_flops

  for device in devices:
    peak = peak_flops(device)
    print(
      f"device     {device.platform}:{device.id} {device.device_kind}, peak "
      f"{f'{peak / 1e12:.0f} TFLOP/s' if peak else 'not known, so no utilisation'}"
    )
  return []


def _check_workdir(workdir: str) -> list[str]:
  if "://" not in workdir:
    from mixln_jax.files import local_path

    return _check_folder(local_path(workdir))
  from mixln_jax.errors import InputError
  from mixln_jax.runs.remote import Remote

  try:
    remote = Remote(workdir)
    remote.write(".doctor", b"write access")
    remote.remove(".doctor")
  except InputError as error:
    return [str(error)]
  except Exception as error:  # of the network, in whatever shape
    return [f"--workdir={workdir}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
  print(f"folder     {remote.url} can be written")
  return []


def _check_folder(folder: Path) -> list[str]:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(b"write access")
  except OSError as error:
    return [f"{folder} can't be written ({error.strerror}); give another --workdir"]
  print(f"folder     {folder.absolute()} can be written, {shutil.disk_usage(folder).free / 1e9:.0f} GB free")
  return []

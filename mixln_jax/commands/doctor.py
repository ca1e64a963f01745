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

from packaging.requirements import Requirement

from mixln_jax.command_line import CommandLine

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
OPTIONAL = {"wandb": "logging.wandb_project", "matplotlib": "figures", "torch": "making the golden values of the tests"}


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.string("workdir", "a folder whose write access is tried", default="work")
  values = line.parse(argv)
  print(f"python     {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
  problems = [*_check_packages(), *_check_devices(), *_check_folder(Path(values.workdir).expanduser())]
  for name, use in OPTIONAL.items():
    if importlib.util.find_spec(name) is None:
      print(f"optional   {name} is not installed (for {use})")
  for problem in problems:
    print(f"problem    {problem}", file=sys.stderr)
  print(f"{len(problems)} problems" if problems else "all is well")
  return 1 if problems else 0


def _check_packages() -> list[str]:
  problems = []
  lines = (re.sub(r"\s+#.*", "", text).strip() for text in REQUIREMENTS.read_text().splitlines())
  for requirement in (Requirement(text) for text in lines if text and not text.startswith(("#", "-"))):
    try:
      version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
      problems.append(f"{requirement.name} is not installed; run `pip install -r requirements.txt`")
      continue
    print(f"package    {requirement.name} {version}")
    if not requirement.specifier.contains(version, prereleases=True):
      problems.append(
        f"{requirement.name} {version} is outside {requirement.specifier}; run `pip install -r requirements.txt`"
      )
  return problems


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


def _check_folder(folder: Path) -> list[str]:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(b"write access")
  except OSError as error:
    return [f"{folder} can't be written ({error.strerror}); give another --workdir"]
  print(f"folder     {folder.absolute()} can be written, {shutil.disk_usage(folder).free / 1e9:.0f} GB free")
  return []

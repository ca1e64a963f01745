"""A clone of the launch scripts, and a cloud that is a folder."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def write_executable(path, text):
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
  """A git clone with the committed launch scripts of this tree as they stand."""
  root = tmp_path_factory.mktemp("clone")
  shutil.copytree(ROOT / "launch", root / "launch")
  shutil.copytree(ROOT / "configs", root / "configs", ignore=shutil.ignore_patterns("__pycache__"))
  for file in (ROOT / ".gitignore", *ROOT.glob("requirements*.txt")):
    shutil.copy(file, root)
  git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
  for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
    subprocess.run([*git, *command], cwd=root, check=True)
  return root


class Cloud:
  """The folder of fake_gcloud.py, and the clone that scripts are run in."""

  def __init__(self, folder, clone, hosts=1):
    self.folder, self.clone = folder, clone
    programs = folder / "bin"
    programs.mkdir(parents=True)
    write_executable(programs / "gcloud", f'#!/bin/sh\nexec {sys.executable} -S -E {HERE / "fake_gcloud.py"} "$@"\n')
    write_executable(programs / "hostname", '#!/bin/sh\necho "${FAKE_HOST:-here}"\n')
    for name in ("xpk", "kubectl", "sbatch", "scontrol"):
      write_executable(programs / name, f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >>{folder}/{name}\n')
    write_executable(programs / "python3", (HERE / "fake_python.sh").read_text())
    # A launch script reads VENV too, which tests/run.sh may have been given for its own environment.
    ours = ("JAX_", "SLURM_", "CUDA_", "VENV")
    self.environment = {
      **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
      "PATH": f"{programs}:{os.environ['PATH']}",
      "PYTHON": str(programs / "python3"),
      "FAKE_CLOUD": str(folder),
      "FAKE_HOSTS": str(hosts),
      "MIXLN_TPU_LOCK": str(folder / "lock"),
      "MIXLN_TPU_DEVICES": str(folder / "accel*"),
    }
    self.plan("done")

  def plan(self, *attempts, creations=("ok",), starts=("ok",)):
    """What training does, attempt by attempt, and what creations and starts do."""
    (self.folder / "attempts").write_text("\n".join(attempts))
    (self.folder / "creations").write_text("\n".join(creations))
    (self.folder / "starts").write_text("\n".join(starts))

  def start(self, script, *arguments, **environment):
    return subprocess.Popen(
      ["bash", f"launch/{script}", *arguments],
      cwd=self.clone,
      env={**self.environment, **environment},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def run(self, script, *arguments, **environment):
    """(exit status, stdout and stderr) of a script."""
    process = self.start(script, *arguments, **environment)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output

  @property
  def calls(self):
    """The calls of gcloud so far."""
    file = self.folder / "calls"
    return [line.split("\0") for line in file.read_text().splitlines()] if file.exists() else []

  def count(self, *words):
    return sum(set(words) <= set(call) for call in self.calls)

  def trained_with(self, host="host-0"):
    """What the last training on a host was started with."""
    return (self.folder / f"trained-{host}").read_text().split("\0")[:-1]

  def kill_all(self):
    for file in self.folder.glob("host-*/mixln_jax/work/launch/pid"):
      with contextlib.suppress(ProcessLookupError, ValueError):
        os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path, clone):
  """A cloud whose TPUs have one host."""
  cloud = Cloud(tmp_path / "cloud", clone)
  yield cloud
  cloud.kill_all()


@pytest.fixture
def pod(tmp_path, clone):
  """A cloud whose TPUs have two hosts."""
  pod = Cloud(tmp_path / "pod", clone, hosts=2)
  yield pod
  pod.kill_all()

"""A Slurm cluster of one node, this machine: controller and node daemon on 127.0.0.1, invented GPUs, no accounting."""

import contextlib
import getpass
import os
import platform
import shutil
import socket
import subprocess
import time

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
DEVICES = ("/dev/null", "/dev/zero")
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmctldPort={controller}
SlurmdPort={node}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
ReturnToService=2
SchedulerParameters=sched_interval=5,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:{cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


def missing():
  """The first of Slurm's programs that is not on this machine; None where all are."""
  return next((program for program in PROGRAMS if _find(program) is None), None)


def _find(program):
  return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@contextlib.contextmanager
def serve(folder, cpus=2):
  """Runs the cluster with its state in `folder`; gives the variables with which Slurm's commands find it."""
  for name in ("spool", "state"):
    (folder / name).mkdir()
  values = {"host": platform.node(), "user": getpass.getuser(), "folder": folder, "cpus": cpus}
  conf = folder / "slurm.conf"
  conf.write_text(CONF.format(**values, controller=_free_port(), node=_free_port()))
  # A GPU is a device file, of which Slurm only looks whether it is there.
  (folder / "gres.conf").write_text("".join(f"Name=gpu File={file}\n" for file in DEVICES[:cpus]))
  variables = {"SLURM_CONF": str(conf)}
  daemons = []
  try:
    for program, *options in (("slurmctld", "-D"), ("slurmd", "-D")):
      with (folder / f"{program}.out").open("w") as out:
        daemons.append(subprocess.Popen([_find(program), *options, "-f", str(conf)], stdout=out, stderr=out))
    _wait_until_idle(folder, variables)
    yield variables
  finally:
    _cancel_all(variables)  # of a test that failed: jobs would outlive the daemons
    for daemon in reversed(daemons):
      daemon.terminate()
    for daemon in daemons:
      with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.wait(20)
      daemon.kill()


def _wait_until_idle(folder, variables):
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline:
    command = ["sinfo", "--noheader", "--format=%T"]
    shown = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    if shown.stdout.strip() == "idle":
      return
    time.sleep(0.5)
  logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
  raise RuntimeError(f"the cluster did not start: {shown.stdout}{shown.stderr}\n{logs[-3000:]}")


def _cancel_all(variables):
  environment = os.environ | variables
  subprocess.run(["scancel", f"--user={getpass.getuser()}", "--signal=KILL"], env=environment, check=False)
  subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment, check=False)
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    queued = subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, check=False)
    if not queued.stdout.strip():
      return
    time.sleep(0.5)

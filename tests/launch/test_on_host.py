"""The part that runs on the hosts, and the scripts for one machine, a Slurm cluster and a container."""

import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from launch.conftest import Cloud, write_executable

RUN = ("--config=configs/tiny.py", "--workdir=runs/mine")


@pytest.fixture
def host(tmp_path, clone):
  """A host with the code set up on it: `clone` is a folder of its own."""
  shutil.copytree(clone, tmp_path / "code", ignore=shutil.ignore_patterns("work", ".venv", ".git"))
  host = Cloud(tmp_path / "host", tmp_path / "code")
  host.environment["FAKE_HOST"] = "host-0"
  status, output = host.run("on_host.sh", "setup")
  assert status == 0, output
  yield host
  for file in (tmp_path / "code/work/launch").glob("pid"):
    subprocess.run(["pkill", "-KILL", "-P", file.read_text().strip()], check=False)
    subprocess.run(["kill", "-KILL", file.read_text().strip()], check=False, stderr=subprocess.DEVNULL)


def state(host):
  _, output = host.run("on_host.sh", "state")
  return output.split()[2:]


def wait_for(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def has(host, name):
  return (host.folder / name).exists()


def test_training_outlives_its_starter_and_stops_with_grace(host):
  host.plan("run")
  assert state(host)[0] == "ready"
  status, output = host.run("on_host.sh", "start", *RUN)
  assert status == 0, output
  wait_for(lambda: has(host, "running-host-0"))
  assert state(host)[0] == "running"
  status, output = host.run("on_host.sh", "start", *RUN)
  assert status == 2
  assert "training runs there (process" in output
  assert host.run("on_host.sh", "idle")[0] == 2
  status, output = host.run("on_host.sh", "stop")
  assert status == 0, output
  wait_for(lambda: state(host)[0] == "ended")
  what, ended, _, asked, workdir = state(host)
  assert (what, ended, asked, workdir) == ("ended", "75", "true", "runs/mine")
  assert "got SIGTERM" in host.run("on_host.sh", "tail")[1]


def test_a_stop_while_the_state_is_being_read_is_seen_as_one_by_hand(host):
  """Catches a supervisor that starts again what a person stopped: the end was read, and not who asked for it."""
  folder = host.clone / "work/launch"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "pid").write_text(str(2**22 + 1))  # more than Linux gives
  # It finds neither the process nor a status, and waits for the status: then comes the stop.
  write_executable(host.folder / "bin/sleep", "#!/bin/sh\ntouch work/launch/asked\necho 75 >work/launch/status\n")
  what, status, _, asked, _ = state(host)
  assert (what, status, asked) == ("ended", "75", "true")


def test_a_shutdown_that_signals_all_processes_gives_training_one_signal(host):
  host.plan("run")
  host.run("on_host.sh", "start", *RUN)
  wait_for(lambda: has(host, "running-host-0"))
  pid = int((host.clone / "work/launch/pid").read_text())
  os.killpg(os.getpgid(pid), signal.SIGTERM)
  wait_for(lambda: state(host)[0] == "ended")
  assert state(host)[1] == "75"
  assert (host.clone / "work/launch/train.log").read_text().count("got SIGTERM") == 1


def test_what_does_not_stop_is_killed_after_the_grace(host):
  host.plan("deaf")
  host.run("on_host.sh", "start", *RUN)
  wait_for(lambda: has(host, "running-host-0"))
  status, output = host.run("on_host.sh", "stop", "--grace=0")
  assert status == 0, output
  wait_for(lambda: state(host)[0] == "ended")
  assert state(host)[1] == "137"


def test_a_lost_process_is_told(host):
  host.run("on_host.sh", "start", *RUN)
  wait_for(lambda: state(host)[0] == "ended")
  (host.clone / "work/launch/status").unlink()  # as if the machine had been restarted
  assert state(host)[0] == "lost"


def test_a_stale_lock_is_removed(host):
  (host.folder / "lock").touch()
  status, output = host.run("on_host.sh", "start", *RUN)
  assert status == 0, output
  assert not has(host, "lock")


@pytest.mark.skipif(not shutil.which("fuser"), reason="needs fuser, as TPU images have it")
def test_a_held_tpu_is_refused_by_process_and_freed_when_asked(host):
  device = host.folder / "accel0"
  device.touch()
  with device.open() as file, subprocess.Popen(["sleep", "60"], stdin=file) as holder:
    file.close()
    status, output = host.run("on_host.sh", "start", *RUN)
    assert status == 2, output
    assert f"process {holder.pid} holds the TPU (sleep 60)" in output
    assert not has(host, "count-host-0")
    status, output = host.run("on_host.sh", "free")
    assert status == 0, output
    assert holder.wait(10) == -signal.SIGTERM
  assert host.run("on_host.sh", "start", *RUN)[0] == 0


def test_an_old_python_is_replaced_by_one_of_uv(host):
  """Ubuntu 22.04, which TPU images are made of, has Python 3.10."""
  new = host.environment["PYTHON"]
  uv = host.folder / "home/.local/share/mixln_jax/uv/bin/uv"
  uv.parent.mkdir(parents=True)
  uv.write_text(f'#!/bin/sh\necho "$@" >>{host.folder}/uv\nif [ "$2" = find ]; then echo {new}; fi\n')
  uv.chmod(0o755)
  shutil.rmtree(host.clone / ".venv")
  status, output = host.run("on_host.sh", "setup", PYTHON="/bin/false", HOME=str(host.folder / "home"))
  assert status == 0, output
  assert (host.folder / "uv").read_text().splitlines()[0].startswith("python install")
  assert (host.clone / ".venv/bin/python").exists()


def test_what_is_shipped_is_what_was_committed_unless_asked(tmp_path, clone):
  shutil.copytree(clone, tmp_path / "clone", symlinks=True)
  cloud = Cloud(tmp_path / "cloud", tmp_path / "clone")
  tpu = ("--name=llama", "--zone=us-west4-a", "--type=v4-8")
  revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
  assert cloud.run("tpu.sh", "create", *tpu)[0] == 0
  assert cloud.run("tpu.sh", "setup", *tpu)[0] == 0
  there = cloud.folder / "host-0/mixln_jax"
  assert (there / "REVISION").read_text() == revision.stdout

  (cloud.clone / "configs/mine.py").write_text("new")
  # Which git does not know, so it is not shipped: to be told what would be done is no mistake, to do it may be one.
  assert cloud.run("tpu.sh", "setup", *tpu, "--print")[0] == 0
  assert cloud.run("tpu.sh", "setup", *tpu)[0] == 2
  (cloud.clone / "configs/tiny.py").write_text("changed")
  status, output = cloud.run("tpu.sh", "setup", *tpu)
  assert status == 2, output
  assert "not committed" in output
  (there / "configs/gone.py").touch()
  (there / "work/launch").mkdir(parents=True)
  status, output = cloud.run("tpu.sh", "setup", *tpu, "--dirty")
  assert status == 0, output
  assert (there / "REVISION").read_text().startswith(f"{revision.stdout.strip()}-dirty-")
  assert ((there / "configs/mine.py").read_text(), (there / "configs/tiny.py").read_text()) == ("new", "changed")
  assert not (there / "configs/gone.py").exists()
  assert (there / "work/launch").exists()
  assert (
    "?? configs/mine.py"
    in subprocess.run(
      ["git", "status", "--porcelain"], cwd=cloud.clone, capture_output=True, text=True, check=True
    ).stdout
  )


@pytest.fixture
def fake_srun(host):
  """sbatch's side: runs the batch script from another folder, with an srun that runs one task."""
  srun = host.folder / "bin/srun"
  srun.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
  srun.chmod(0o755)

  def start():
    *_, submit = host.run("slurm.sh", *RUN, "--nodes=2", "--gpus=4", "--time=1:00:00", "--print")[1].splitlines()
    words = shlex.split(submit)
    script = words.index("launch/slurm.sh")
    spooled = host.folder / "slurm_script"
    shutil.copy(host.clone / "launch/slurm.sh", spooled)
    environment = {**host.environment, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(host.clone)}
    return subprocess.Popen(["bash", spooled, *words[script + 1 :]], env=environment, stdout=subprocess.DEVNULL)

  return start


@pytest.mark.parametrize(("plan", "status"), [("done", 0), ("crash", 1), ("refused", 2), ("signal", 75)])
def test_slurm_queues_again_only_what_was_stopped_by_a_signal(host, fake_srun, plan, status):
  host.plan(plan)
  assert fake_srun().wait(30) == status
  assert has(host, "scontrol") == (status == 75)
  assert "--config.parallel.expect_devices=8" in host.trained_with()
  if status == 75:
    assert (host.folder / "scontrol").read_text().split("\0")[:-1] == ["scontrol", "requeue", "7"]


def test_slurm_does_not_queue_again_what_was_cancelled(host, fake_srun):
  host.plan("run")
  job = fake_srun()
  wait_for(lambda: has(host, "running-host-0"))
  job.send_signal(signal.SIGTERM)  # scancel signals the shell as well as the tasks
  time.sleep(0.1)
  subprocess.run(["pkill", "-TERM", "-P", str(job.pid)], check=True)
  assert job.wait(30) == 75
  assert not has(host, "scontrol")


def test_slurm_submits_itself(host):
  status, output = host.run("slurm.sh", *RUN, "--nodes=2", "--gpus=8", "--time=24:00:00", "--partition=gpu")
  assert status == 0, output
  words = (host.folder / "sbatch").read_text().split("\0")
  expected = {
    "--nodes=2",
    "--ntasks-per-node=8",
    "--gpus-per-node=8",
    "--time=24:00:00",
    "--signal=TERM@180",
    "--requeue",
  }
  assert expected <= set(words)
  assert "--partition=gpu" in words


def test_a_signal_to_the_gpu_script_reaches_training(host):
  host.plan("run")
  process = host.start("gpu.sh", *RUN, "--gpus=2")
  wait_for(lambda: has(host, "running-host-0"))
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == 75
  process.communicate()
  assert host.trained_with()[-2:] == ["--config.parallel.expect_platform=gpu", "--config.parallel.expect_devices=2"]
  assert "CUDA_VISIBLE_DEVICES=0,1\n" in (host.folder / "environment-host-0").read_text()


def test_a_container_of_gke_runs_what_was_meant_and_hears_its_signal(host, clone):
  host.plan("run")
  cluster = ("--cluster=c", "--zone=us-west4-a", "--project=project-1", "--name=w", "--type=v6e-16")
  value = '--config.data.source=it\'s $(HOME) $x {y} "z"'
  arguments = ("train", *cluster, RUN[0], "--workdir=gs://bucket/runs/mine", "--capacity=spot", value)
  status, output = Cloud(host.folder / "laptop", clone).run("gke.sh", *arguments)
  assert status == 0, output
  xpk = (host.folder / "laptop/xpk").read_text().split("\0")
  assert {"workload", "--tpu-type=v6e-16", "--restart-on-exit-codes=75", "--max-restarts=50"} <= set(xpk)
  command = next(word.removeprefix("--command=") for word in xpk if word.startswith("--command="))
  # What Kubernetes makes of it, in what xpk wraps around it.
  wrapped = f"({command.replace('$$(', '$(')}) & PID=$!; echo $PID >{host.folder}/container; wait $PID; exit $?"
  container = subprocess.Popen(["bash", "-c", wrapped], cwd=host.clone, env=host.environment)
  wait_for(lambda: has(host, "running-host-0"))
  os.kill(int((host.folder / "container").read_text()), signal.SIGTERM)
  assert container.wait(30) == 75
  assert host.trained_with()[-1] == value
  assert "--config.parallel.expect_devices=16" in host.trained_with()

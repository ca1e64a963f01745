"""Training kept going over preemptions and crashes: real scripts and processes, on hosts that are folders."""

import re
import signal
import time

import pytest

WHERE = ("--name=llama", "--zone=us-west4-a")
TPU = (*WHERE, "--type=v4-8")  # 4 chips, 1 host
POD = (*WHERE, "--type=v4-16")  # 8 chips, 2 hosts
RUN = ("--config=configs/tiny.py", "--workdir=gs://bucket/runs/mine")
QUICK = ("--poll=0", "--wait=0")


def supervise(cloud, *arguments, tpu=TPU, script="tpu.sh", **environment):
  return cloud.run(script, "supervise", *tpu, *RUN, *QUICK, *arguments, **environment)


def attempts(cloud, host="host-0"):
  return int((cloud.folder / f"count-{host}").read_text())


def test_preempted_twice_then_done(pod):
  pod.plan("preempted", "preempted", "done")
  status, output = supervise(pod, "--capacity=spot", tpu=POD)
  assert status == 0, output
  assert "2 preemptions, 0 consecutive crashes" in output
  assert "still there, and billed" in output
  assert pod.count("create", "--spot") == 3
  assert pod.count("delete") == 2
  for host in ("host-0", "host-1"):
    assert attempts(pod, host) == 3
    assert "--workdir=gs://bucket/runs/mine" in pod.trained_with(host)


def test_crash_loop_ends_and_shows_what_it_said(cloud):
  cloud.plan("crash")
  status, output = supervise(cloud, "--max-crashes=3", "--delete-when-done")
  assert status == 1, output
  assert attempts(cloud) == 3
  assert output.rindex("RuntimeError: something broke") > output.rindex("crash 2 of 3")
  assert (cloud.count("create"), cloud.count("delete")) == (1, 1)


@pytest.mark.slow
def test_waits_grow_and_are_bounded(cloud):
  cloud.plan("crash")
  status, output = supervise(cloud, "--wait=1", "--longest-wait=2", "--max-crashes=4")
  assert status == 1
  assert re.findall(r"waiting (\d+) s", output) == ["1", "2", "2"]


@pytest.mark.slow
def test_crashes_far_apart_are_no_loop(cloud):
  cloud.plan("long", "long", "done")
  status, output = supervise(cloud, "--max-crashes=2", "--healthy=1")
  assert status == 0, output
  assert output.count("crash 1 of 2") == 2


def test_starts_that_fail_after_a_long_run_are_a_loop(cloud):
  cloud.plan("long", "done", starts=("ok", "refused", "refused", "refused", "refused", "ok"))
  status, output = supervise(cloud, "--max-crashes=3", "--healthy=1")
  assert status == 1, output
  assert re.findall(r"crash (\d) of 3: (\w+)", output) == [("1", "exit"), ("2", "the"), ("3", "the")]
  assert attempts(cloud) == 1


def test_a_start_that_was_undone_is_not_taken_for_a_stop_by_hand(cloud):
  cloud.plan("run", "done", starts=("cut", "ok"))
  status, output = supervise(cloud)
  assert status == 0, output
  assert "training did not start on all hosts" in output
  assert "0 preemptions, 0 consecutive crashes" in output  # it was in repair
  assert attempts(cloud) == 2


def test_refused_input_is_never_tried_again(cloud):
  cloud.plan("refused")
  status, output = supervise(cloud)
  assert status == 2, output
  assert "unknown placement" in output
  assert attempts(cloud) == 1


def test_stopped_by_a_signal_goes_on(cloud):
  cloud.plan("signal", "done")
  status, output = supervise(cloud)
  assert status == 0, output
  assert "0 preemptions, 0 consecutive crashes" in output


@pytest.mark.slow
def test_one_host_that_dies_takes_the_others_along(pod):
  pod.plan("half", "done")
  status, output = supervise(pod, tpu=POD)
  assert status == 0, output
  assert "crash 1 of 3: exit status 1 on host-1" in output


def test_an_abort_before_the_cloud_tells_of_a_preemption_is_no_crash(pod):
  pod.plan("taken", "done")
  status, output = supervise(pod, "--poll=1", tpu=POD)
  assert status == 0, output
  assert "1 preemptions, 0 consecutive crashes" in output
  assert "crash 1 of" not in output


def test_no_capacity_is_asked_for_again_but_a_refusal_is_not(cloud):
  cloud.plan("done", creations=("capacity", "capacity", "ok"))
  status, output = supervise(cloud, "--how=direct")
  assert status == 0, output
  assert cloud.count("create") == 3

  cloud.plan("done", creations=("denied",))
  cloud.run("tpu.sh", "delete", *TPU)
  status, output = supervise(cloud)
  assert status == 1, output
  assert "PERMISSION_DENIED" in output
  assert cloud.count("create") == 4


@pytest.mark.slow
def test_what_fails_in_the_queue_for_want_of_quota_is_not_queued_again(cloud):
  cloud.plan("done", creations=("failed",))
  status, output = supervise(cloud)
  assert status == 1, output
  assert "could not be made: FAILED Quota limit" in output
  assert (cloud.count("create"), cloud.count("delete")) == (1, 1)


@pytest.mark.slow
def test_gives_up_where_there_is_never_a_tpu(cloud):
  cloud.plan("done", creations=("capacity",))
  status, output = supervise(cloud, "--max-creations=3")
  assert status == 1, output
  assert cloud.count("create") == 3


def wait_for(cloud, *names, seconds=60):
  deadline = time.monotonic() + seconds
  while not all((cloud.folder / name).exists() for name in names):
    assert time.monotonic() < deadline, f"{names} did not come"
    time.sleep(0.05)


def test_a_signal_reaches_training_and_the_same_command_goes_on(pod):
  pod.plan("run", "done")
  process = pod.start("tpu.sh", "supervise", *POD, *RUN, "--poll=1", "--wait=0")
  wait_for(pod, "running-host-0", "running-host-1")
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 75, output
  logs = [log.read_text() for log in pod.folder.glob("host-*/mixln_jax/work/launch/train.log")]
  assert len(logs) == 2
  assert all("got SIGTERM" in log and "ended with exit status 75" in log for log in logs)

  status, output = supervise(pod, tpu=POD)
  assert status == 0, output
  assert pod.count("create") == 1


def test_stopped_by_hand_is_not_started_again(cloud):
  cloud.plan("run")
  process = cloud.start("tpu.sh", "supervise", *TPU, *RUN, "--poll=1", "--wait=0")
  wait_for(cloud, "running-host-0")
  status, output = cloud.run("tpu.sh", "stop", *TPU)
  assert status == 0, output
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 75, output
  assert "stopped by hand" in output


def test_another_run_on_the_tpu_is_left_alone(cloud):
  cloud.plan("run")
  for verb in ("create", "setup", "train"):
    status, output = cloud.run("tpu.sh", verb, *TPU, *RUN[:1], "--workdir=gs://bucket/runs/theirs")
    assert status == 0, output
  status, output = supervise(cloud, "--delete-when-done")
  assert status == 2, output
  assert "gs://bucket/runs/theirs" in output
  assert cloud.count("delete") == 0
  assert attempts(cloud) == 1


def test_managed_instance_group(pod):
  pod.plan("preempted", "done")
  arguments = (*WHERE, "--type=v5p-16", "--capacity=spot", *RUN, *QUICK)
  status, output = pod.run("mig.sh", "supervise", *arguments, FAKE_PREEMPTED="STOPPING")
  assert status == 0, output
  assert "1 preemptions, 0 consecutive crashes" in output
  policy = "--workload-policy=projects/project/regions/us-west4/resourcePolicies/llama"
  assert pod.count("instance-groups", "create", policy) == 2
  assert pod.count("instance-templates", "create", "--provisioning-model=SPOT") == 2

"""What --print prints is what is done; quoting survives every shell on the way; bad input is refused by name."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.conftest import ROOT
from mixln_jax import config as config_lib

WHERE = ("--name=llama", "--zone=us-west4-a")
V5E = (*WHERE, "--type=v5e-16")
V6E = (*WHERE, "--type=v6e-16")
RUN = ("--config=configs/llama_1b.py", "--workdir=gs://bucket/runs/mine")
CLUSTER = ("--cluster=c", "--zone=us-west4-a", "--project=project-1")
SLURM = ("--config=configs/tiny.py", "--workdir=/shared/mine", "--nodes=2", "--gpus=8", "--time=24:00:00")


def printed(cloud, script, *arguments):
  """The commands that a script prints, as words; it must run nothing."""
  before = cloud.calls
  status, output = cloud.run(script, *arguments, "--print")
  assert status == 0, output
  assert cloud.calls == before
  return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


def test_what_types_are_made_of():
  kinds = {
    "v5e-16": "v5litepod-16 v2-alpha-tpuv5-lite 4 16",
    "v5litepod-8": "v5litepod-8 v2-alpha-tpuv5-lite 1 8",
    "v5litepod-256": "v5litepod-256 v2-alpha-tpuv5-lite 64 256",
    "v6e-1": "v6e-1 v2-alpha-tpuv6e 1 1",
    "v6e-64": "v6e-64 v2-alpha-tpuv6e 16 64",
    "v5p-8": "v5p-8 v2-alpha-tpuv5 1 4",
    "v5p-12288": "v5p-12288 v2-alpha-tpuv5 1536 6144",
    "v4-32": "v4-32 tpu-ubuntu2204-base 4 16",
    "v3-32": "v3-32 tpu-ubuntu2204-base 4 32",
    "tpu7x-32": "tpu7x-32  4 32",
  }
  script = """source launch/common.sh; source launch/topology.sh
    for type; do describe_tpu "$type"; echo "$tpu_type $runtime $hosts $devices"; done"""
  output = subprocess.run(["bash", "-c", script, "_", *kinds], cwd=ROOT, capture_output=True, text=True, check=True)
  assert output.stdout.splitlines() == list(kinds.values())


def test_machines_and_shapes_of_compute_engine():
  kinds = {
    "v6e-8": "ct6e-standard-8t 2x4",
    "v6e-16": "ct6e-standard-4t 4x4",
    "v6e-32": "ct6e-standard-4t 4x8",
    "v6e-256": "ct6e-standard-4t 16x16",
    "v5p-8": "ct5p-hightpu-4t 2x2x1",
    "v5p-32": "ct5p-hightpu-4t 2x2x4",
    "v5p-64": "ct5p-hightpu-4t 2x4x4",
    "v5p-1024": "ct5p-hightpu-4t 8x8x8",
    "tpu7x-512": "tpu7x-standard-4t 4x8x8",
  }
  script = """source launch/common.sh; source launch/topology.sh
    for type; do describe_tpu "$type"; describe_machine; echo "$machine_type $topology"; done"""
  output = subprocess.run(["bash", "-c", script, "_", *kinds], cwd=ROOT, capture_output=True, text=True, check=True)
  assert output.stdout.splitlines() == list(kinds.values())


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (("--capacity=spot",), "queued-resources create --node-id=llama --runtime-version=v2-alpha-tpuv5-lite --spot"),
    (("--capacity=reserved", "--valid-until=6h"), "queued-resources create --reserved --valid-until-duration=6h"),
    (("--how=direct", "--capacity=spot", "--project=project-1"), "tpu-vm create --project=project-1 --spot"),
    (("--how=direct",), "tpu-vm create --version=v2-alpha-tpuv5-lite --zone=us-west4-a"),
    (("--slices=2", "--create-flag=--network=mine"), "create --node-count=2 --node-prefix=llama --network=mine"),
    (("--service-account=me@project-1.iam.gserviceaccount.com",), "create --accelerator-type=v5litepod-16"),
  ],
)
def test_create(cloud, arguments, expected):
  ((*words,),) = printed(cloud, "tpu.sh", "create", *V5E, *arguments)
  assert set(expected.split()) <= set(words)
  assert ("--spot" in words) == ("--spot" in expected)
  assert "--scopes=https://www.googleapis.com/auth/cloud-platform" in words


def test_several_slices_expect_all_their_devices(cloud):
  *_, start = printed(cloud, "tpu.sh", "train", *V5E, "--slices=2", *RUN)
  assert start[:5] == ["gcloud", "compute", "tpus", "queued-resources", "ssh"]
  assert {"--node=all", "--worker=all"} <= set(start)
  assert "--config.parallel.expect_devices=32" in start[-1]


VERBS = ("create", "setup", "train", "follow", "tail", "status", "fetch", "stop", "free", "delete")
LOCAL = ("--config=configs/tiny.py", "--workdir=runs/mine")


def guide():
  """The commands of the guides: (what sets variables, a command), lines that a shell reads."""
  text = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in ("tpu", "gpu", "slurm"))
  blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
  lines = [line for block in blocks for line in block.splitlines()]
  variables = [line for line in lines if re.match(r"[A-Z]+=", line)]
  return "; ".join(variables), [line for line in lines if line not in variables]


def test_the_guide_can_be_typed(cloud):
  """Its launch commands print what they would do."""
  variables, lines = guide()
  scripts = [f"{line.removesuffix(' --print')} --print" for line in lines if line.startswith("bash launch/")]
  assert len(scripts) > 15
  command = "set -eu; " + "; ".join([variables, *scripts])
  output = subprocess.run(
    ["bash", "-c", command], cwd=cloud.clone, env=cloud.environment, capture_output=True, text=True
  )
  assert output.returncode == 0, output.stderr
  assert cloud.calls == []
  assert "--accelerator-type=v5litepod-16" in output.stdout
  assert all(line.split()[0] in ("bash", "gcloud", "ssh-add", ".venv/bin/python") for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="needs the Google Cloud CLI")
def test_gcloud_itself_knows_what_is_printed(cloud, tmp_path):
  """Its own linter parses the commands and those of the guide, without an account and without running them."""
  variables, lines = guide()
  echo = "; ".join(
    f"printf '%s\\n' '{line}'" if "'" in line else f"echo {line}" for line in lines if line.startswith("gcloud")
  )
  commands = subprocess.check_output(["bash", "-c", f"{variables}; {echo}"], text=True).splitlines()
  for script, *tpu in (
    ("tpu.sh", *V5E, "--capacity=spot", *RUN),
    ("tpu.sh", *V5E, "--how=direct", "--capacity=reserved", "--internal-ip", "--service-account=a@b", *RUN),
    ("tpu.sh", *V5E, "--slices=2", "--valid-until=6h", "--internal-ip", *RUN),
    ("tpu.sh", *WHERE, "--type=v5e-8", *LOCAL),
    ("mig.sh", *V6E, "--capacity=spot", "--project=project-1", *RUN),
    ("mig.sh", *V6E, "--capacity=reserved", "--reservation=mine", "--internal-ip", *RUN),
    ("mig.sh", *WHERE, "--type=v6e-8", *LOCAL),
  ):
    for verb in VERBS:
      for words in printed(cloud, script, verb, *tpu):
        if words[0] == "gcloud" and not {"INSTANCE-1", "INSTANCE-2", "INSTANCE-3"} & {
          word.split(":")[0] for word in words
        }:
          # The linter takes what follows a switch for its value where that is quoted: switches go last.
          words.sort(key=lambda word: (word.startswith("--"), word.startswith("--") and "=" not in word))
          commands.append(
            shlex.join(words).replace(" --target-size-policy-mode=bulk", "")
          )  # of 2026: newer than gcloud 528
  (tmp_path / "commands.json").write_text(json.dumps([{"command_string": one} for one in sorted(set(commands))]))
  environment = {
    **os.environ,
    "CLOUDSDK_CONFIG": str(tmp_path),
    "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
    "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
    "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
  }
  lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"]
  output = subprocess.run(lint, env=environment, capture_output=True, text=True, check=True).stdout
  found = json.loads(output)
  assert len(found) == len(set(commands)) > 30
  assert [f"{one['command_string']}: {one['error_message']}" for one in found if not one["success"]] == []


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("script", "tpu"), [("tpu.sh", V5E), ("mig.sh", V6E)])
def test_every_command_says_where(cloud, script, tpu, verb):
  commands = [words for words in printed(cloud, script, verb, *tpu, *RUN) if words[:2] == ["gcloud", "compute"]]
  assert commands
  for words in commands:
    assert {"--zone=us-west4-a", "--region=us-west4", "instance-templates"} & set(words)


def test_what_is_printed_is_what_is_done(cloud):
  cloud.plan("done")
  tpu = (*WHERE, "--type=v4-8", "--data=gs://bucket/records", "--env=A=b c", *RUN)
  expected = []
  for verb in ("create", "setup", "train", "status", "tail", "fetch", "stop", "delete"):
    expected += [words[1:] for words in printed(cloud, "tpu.sh", verb, *tpu) if words[0] == "gcloud"]
    status, output = cloud.run("tpu.sh", verb, *tpu)
    assert status == 0, output
    if verb == "train":
      wait_until_trained(cloud)  # it copies the data in the background
  by_host = [call for call in cloud.calls if call[:3] == ["storage", "rsync", "gs://bucket/records"]]
  assert [call for call in cloud.calls if call not in by_host] == expected
  ((_, _, _, records, _),) = by_host
  assert f"--config.data.directory={records}" in cloud.trained_with()
  assert "A=b c\n" in (cloud.folder / "environment-host-0").read_text()
  assert "JAX_COORDINATOR_PORT=8476\n" in (cloud.folder / "environment-host-0").read_text()
  log = (cloud.clone / "work/fetched/llama/logs/0.log").read_text()
  assert "attempt 1: done" in log


words = st.lists(
  st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\n\r")), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(words)
def test_quoting_survives(given_words):
  quote = ["bash", "-c", 'source launch/common.sh; quote "$@"', "_", *given_words]
  quoted = subprocess.run(quote, cwd=ROOT, capture_output=True, text=True, check=True).stdout.removesuffix("\n")
  assert shlex.split(quoted) == given_words
  read = subprocess.run(["sh", "-c", f"printf '%s\\0' {quoted}"], capture_output=True, text=True, check=True)
  assert read.stdout.split("\0")[:-1] == given_words


NASTY = ('it\'s "quoted"', "$HOME `id` $(id) \\ ;&|<>*?~#!", "  two  spaces ", "é→λ", "", "a=b --print")


def test_quoting_survives_gcloud_and_ssh(cloud):
  values = [f"--config.data.source={value}" for value in NASTY]
  for verb in ("create", "setup", "train"):
    status, output = cloud.run("tpu.sh", verb, *WHERE, "--type=v4-8", *RUN, *values)
    assert status == 0, output
  wait_until_trained(cloud)
  expected = ["--config.parallel.expect_platform=tpu", "--config.parallel.expect_devices=4", *values]
  assert cloud.trained_with() == ["-m", "mixln_jax", "train", *RUN, *expected]


def wait_until_trained(cloud, host="host-0"):
  for _ in range(600):
    if list(cloud.folder.glob(f"{host}/mixln_jax/work/launch/status")):
      return
    subprocess.run(["sleep", "0.1"], check=True)
  raise AssertionError("training did not end")


@pytest.mark.xfail(
  "parallel.expect_platform" not in config_lib.FIELDS, reason="fields of the start-up of many processes", strict=True
)
def test_fields_that_the_scripts_set_exist():
  assert {"parallel.expect_platform", "parallel.expect_devices", "data.directory"} <= set(config_lib.FIELDS)


@pytest.mark.parametrize(
  ("arguments", "problem"),
  [
    (("tpu.sh", "crate", *V5E), "unknown verb crate; choices: create, setup"),
    (("tpu.sh", "create", "--name=llama", "--type=v5e-16"), "--zone is required"),
    (("tpu.sh", "create", *WHERE), "--type is required"),
    (("tpu.sh", "create", *WHERE, "--type=v5e"), "must be a TPU generation and a size"),
    (("tpu.sh", "create", *WHERE, "--type=v9-16"), "unknown generation; choices: v2"),
    (("tpu.sh", "create", *WHERE, "--type=v5e-12"), "12 chips are no slice"),
    (("tpu.sh", "create", *WHERE, "--type=tpu7x-16"), "use launch/mig.sh"),
    (("tpu.sh", "create", "--name=Llama", *V5E[1:]), "--name=Llama: must be lower-case"),
    (("tpu.sh", "create", *V5E, "--zone=us-west4"), "--zone=us-west4: must be a zone"),
    (("tpu.sh", "create", *V5E, "--capacity=cheap"), "--capacity=cheap: must be on-demand, spot or reserved"),
    (("tpu.sh", "create", *V5E, "--spott"), "unknown option --spott"),
    (("tpu.sh", "create", *V5E, "--how=direct", "--slices=2"), "only from the queue"),
    (("tpu.sh", "create", *V5E, "spot"), "unexpected argument spot"),
    (("tpu.sh", "create", *V5E, "--capacity"), "--capacity needs a value"),
    (("tpu.sh", "supervise", *V5E, *RUN, "--poll=-1"), "--poll=-1: must be a whole number"),
    (("tpu.sh", "supervise", *V5E, *RUN, "--max-crashes=0"), "--max-crashes=0: must be a whole number from 1"),
    (("tpu.sh", "train", *V5E, "--workdir=gs://b/r"), "--config is required"),
    (("tpu.sh", "train", *V5E, RUN[0]), "--workdir is required"),
    (("tpu.sh", "train", *V5E, "--config=configs/none.py", RUN[1]), "configs/none.py: no such file"),
    (("tpu.sh", "train", *V5E, RUN[0], "--workdir=runs/mine"), "the 4 hosts share no disk"),
    (("tpu.sh", "supervise", *WHERE, "--type=v5e-8", RUN[0], "--workdir=mine"), "takes its disks with it"),
    (("tpu.sh", "train", *V5E, *RUN, "--config.seed"), "--config.seed needs a value"),
    (("tpu.sh", "train", *V5E, *RUN, "--config.seed=1\n2"), "a line break can't be passed on"),
    (("mig.sh", "create", *V5E), "for v5litepod use launch/tpu.sh"),
    (("mig.sh", "create", *V6E, "--capacity=reserved"), "--reservation is required"),
    (("gke.sh", "create", *CLUSTER), "--type is required"),
    (("gke.sh", "train", *CLUSTER, "--type=v5e-16", *RUN), "--name is required"),
    (("gke.sh", "train", *CLUSTER, *V5E, RUN[0], "--workdir=mine"), "a container's disk ends with it"),
    (("slurm.sh", *SLURM[:-1]), "--time is required"),
    (("slurm.sh", *SLURM, "--time=tomorrow"), "--time=tomorrow: must be minutes"),
    (("slurm.sh", *SLURM, "--time=3"), "--time=3: 180 seconds, but training is told to stop 180 s before the end"),
    (("slurm.sh", *SLURM, "--time=2:59"), "--time=2:59: 179 seconds"),
    (("slurm.sh", *SLURM, "--time=00:03:00"), "--time=00:03:00: 180 seconds"),
    (("slurm.sh", *SLURM, "--time=0-0:02"), "--time=0-0:02: 120 seconds"),
    (("slurm.sh", SLURM[0], "--workdir=gs:/bucket/run", *SLURM[2:]), "--workdir=gs:/bucket/run: must be a folder in"),
    (("gpu.sh", *SLURM[:2], "--gpus=none"), "--gpus=none: must be a number of GPUs"),
  ],
)
def test_bad_input_is_refused_by_name(cloud, arguments, problem):
  status, output = cloud.run(*arguments)
  assert status == 2, output
  assert output.startswith("error: ")
  assert problem in output
  assert output.count("\n") == 1 + any("\n" in word for word in arguments)
  assert not [call for call in cloud.calls if call[0] != "storage"]


def test_a_bucket_elsewhere_is_refused(cloud):
  arguments = ("train", "--name=llama", "--zone=europe-west4-b", "--type=v5e-16", *RUN)
  status, output = cloud.run("tpu.sh", *arguments)
  assert status == 2
  assert "gs://bucket is in us-west4, --zone=europe-west4-b in europe-west4" in output
  assert len(cloud.calls) == 1


def test_what_a_box_with_gpus_would_run_is_printed_without_one(cloud):
  """Would catch a look at the commands that needs the machine which they are for."""
  status, output = cloud.run("gpu.sh", *SLURM[:2], "--print")
  assert status == 0, output
  assert "nvidia-smi lists no GPU here" in output
  assert "--config.parallel.expect_devices=1" in output


@pytest.mark.parametrize("script", ["tpu.sh", "mig.sh", "gke.sh", "slurm.sh", "gpu.sh", "local.sh", "on_host.sh"])
def test_help(cloud, script):
  status, output = cloud.run(script, "--help")
  assert status == 0
  assert output.startswith(f"usage: bash launch/{script} ")
  assert "--print" in output

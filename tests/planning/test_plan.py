"""A plan against the run, against a hand count, and against XLA's own counts."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compile_for_tpu
from mixln_jax import config as config_lib
from mixln_jax import signals
from mixln_jax.__main__ import main
from mixln_jax.commands import plan as command
from mixln_jax.model.flops import executed_flops_per_token
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.planning import plan as planning
from mixln_jax.planning import search as search_lib
from mixln_jax.planning import text, topology
from mixln_jax.planning.hlo import Traffic
from mixln_jax.training.program import lower_train_step, program_hash
from mixln_jax.training.step import state_shardings
from planning import on_eight

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (requirements-tpu.txt)"
)


@pytest.fixture(scope="module")
def config(make_config):
  return make_config(
    **{"train.batch_size": 16, "train.micro_batches": 2, "model.mlp_pad_to": 16, "model.vocab_size": 264}
  )


@pytest.fixture
def recipe(config, tmp_path):
  path = tmp_path / "recipe.py"
  text = config_lib.to_json(config)
  path.write_text(f"from mixln_jax.config import from_json\n\n\ndef get_config():\n  return from_json({text!r})\n")
  return path


@pytest.fixture(scope="module")
def on_eight_devices(config):
  script = Path(on_eight.__file__)
  result = subprocess.run(
    [sys.executable, str(script)],
    input=config_lib.to_json(config),
    capture_output=True,
    text=True,
    timeout=300,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    check=False,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(result.stdout.splitlines()[-1])


def test_collectives_equal_a_hand_count_with_trip_counts_written_and_derived(on_eight_devices):
  operand = 2 * 16 * 4
  expected = {
    "all-gather": [5, 5 * operand, 5 * operand * 3],
    "all-reduce": [6 + 3, 9 * operand, 6 * operand * 2 * 3 / 4 + 3 * operand * 2 * 7 / 8],
    "all-to-all": [1, operand, operand / 2],
    "collective-permute": [5, 5 * operand, 5 * operand],
    "reduce-scatter": [5, 5 * 4 * operand, 5 * 4 * operand * 3 / 4],
  }
  for numbers in expected.values():
    numbers.append(numbers[-1])  # on a CPU nothing is asynchronous: all that is sent is waited for
  for version in on_eight_devices["known"]:
    assert version["collectives"] == expected
    assert version["unknown_loops"] == []


@pytest.mark.parametrize("mesh", on_eight.MESHES)
def test_the_arguments_are_the_hand_count_exactly(on_eight_devices, config, mesh):
  plan = on_eight_devices[mesh]
  assert plan["compiled"]["memory_bytes"]["arguments"] == sum(plan["counted_bytes"].values())
  sizes = plan["mesh"]
  rows = config.train.batch_size // (sizes["data"] * sizes["fsdp"])
  columns = 5 if "documents" in mesh else 3
  assert plan["counted_bytes"]["batch"] == columns * 4 * rows * config.data.sequence_length // sizes["sequence"]
  assert plan["counted_bytes"]["moments"] == 2 * plan["counted_bytes"]["parameters"]
  gains, d, layers = 2 * 16 + 16 + 16 + 16, 16, config.model.num_layers  # norms of two layers, and the final one
  matrices = layers * (4 * d * d + 3 * d * 32) + 2 * config.model.vocab_size * d
  assert config_lib.stored_mlp_dim(config.model) == 32
  shards = sizes["fsdp"] * sizes["tensor"]
  assert plan["counted_bytes"]["parameters"] == 4 * (matrices // shards + gains)
  assert plan["compiled"]["collectives"]
  assert plan["compiled"]["unknown_loops"] == []


def test_plan_names_the_program_that_the_run_runs(config, recipe, tmp_path, capsys):
  workdir = tmp_path / "run"
  assert main(["train", f"--config={recipe}", f"--workdir={workdir}", "--config.train.num_steps=3"]) == 0
  announced = re.search(r"^program    training step, hash (\w{16}), compiled in", capsys.readouterr().out, re.MULTILINE)
  assert announced
  assert json.loads((workdir / "environment.json").read_text())["train_step"] == announced.group(1)
  same = ["plan", f"--config={recipe}", "--topology=cpu", "--config.train.num_steps=3"]
  assert main(same) == 0
  shown = capsys.readouterr().out
  assert f"program    training step, hash {announced.group(1)}, compiled in" in shown
  assert "whether it fits is not known: no memory size for 'cpu'" in shown
  other = config.copy_and_resolve_references()
  mesh = make_mesh(other.mesh)
  hashes = set()
  for placement in ("mix:0.5", "pre"):
    other.train.num_steps, other.model.placement = 3, placement
    hashes.add(program_hash(lower_train_step(other, mesh, state_shardings(other, mesh))))
  assert len(hashes) == 2
  assert announced.group(1) in hashes


def test_without_libtpu_it_says_what_to_install_and_gives_the_arithmetic(recipe, capsys, monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name))
  monkeypatch.setattr(command, "_only_compile", lambda: None)
  line = ["plan", f"--config={recipe}", "--topology=v5e:2x2", "--config.mesh.data=2", "--config.mesh.fsdp=2"]
  assert main(line) == command.NOT_COMPILED
  output = capsys.readouterr()
  assert "pip install -r requirements-tpu.txt" in output.err
  for words in ("devices    v5e:2x2: 4 × TPU v5 lite, mesh: data 2 × fsdp 2", "counted: parameters", "step at least"):
    assert words in output.out
  assert main([*line, "--json"]) == command.NOT_COMPILED
  result = json.loads(capsys.readouterr().out)
  assert (result["compiled"], result["fits"]) == (None, None)
  assert result["estimate"]["hours"] > 0


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--topology=v5e"], "error: topology='v5e': must be cpu or gpu"),
    (["--topology=v9:2x2"], "slice of v4, v5e, v5p, v6e"),
    (["--topology=v5p:2x2"], "a slice of v5p has 3 dimensions"),
    (["--topology=gpu"], "error: topology=gpu: this process has no such device"),
    (["--topology=v5e:4x4", "--config.mesh.data=3"], "multiple of 3 devices, but there are 16"),
    (["--topology=v5e:4x4", "--config.mesh.tensor=4"], "config.mesh.tensor=4 does not divide"),
    (["--topology=v5e:8x8"], "config.train.batch_size / micro_batches"),
    (["--topology=v5e:4x4", "--config.mesh.dcn_data=-1", "--config.mesh.data=1"], "say in config.mesh.dcn_*"),
    (["--topology=cpu", "--efficiency=1.5"], "--efficiency=1.5"),
    ([], "--topology is required"),
  ],
)
def test_what_can_not_run_is_refused(arguments, words, recipe, capsys, monkeypatch):
  monkeypatch.setattr(command, "_only_compile", lambda: None)
  assert main(["plan", f"--config={recipe}", *arguments]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert words in error


def test_executed_flops_equal_the_tpu_compilers_count():
  stored = json.loads((ROOT / "benchmarks" / "results" / "placement_cost.json").read_text())
  model = config_lib.base().model
  model.update(embed_dim=2048, mlp_dim=5461, num_layers=24, num_heads=32)  # llama_1b on 16 chips, sequence 256
  for row in stored["rows"]:
    if row["case"] == "pre":
      model.remat = row["remat"]
      sequences = {"full": 512, "dots": 256}[row["remat"]]
      counted = executed_flops_per_token(model, 256) * sequences * 256 / 16 / 1e9
      np.testing.assert_allclose(counted, row["total"]["gflop"], rtol=0.015)  # XLA's has norms and softmax besides


def test_arguments_on_tpus_are_the_hand_count():
  rows = json.loads((ROOT / "benchmarks" / "results" / "tpu_memory.json").read_text())["rows"]
  cases = {(row["recipe"], row["topology"]["name"], row["config_placement"]) for row in rows}
  assert cases >= set(compile_for_tpu.CASES)
  for row in rows:
    made = row["compiled"]
    counted = planning.Counted(**row["counted_bytes"])
    assert row["fits"]
    assert made["unknown_loops"] == []
    assert made["memory_bytes"]["arguments"] >= sum(counted)
    if row["recipe"] in ("1b", "7b"):  # of sizes that tiles divide: all is exact, with a tile of 512 bytes a counter
      assert made["memory_bytes"]["arguments"] == sum(counted._replace(counters=counted.counters // 4 * 512))
    if row["recipe"] == "1b":  # what was compiled then is what this code counts now
      recipe = compile_for_tpu.load("1b")
      now = planning.arithmetic(recipe, topology.parse("v5e:4x4", recipe)).counted
      assert now.counters == 20  # with the learning rate, which was a constant of the older rows' programs
      assert now._replace(counters=counted.counters) == counted


def test_the_compilers_own_estimate_stands_beside_the_arithmetic(config):
  """Catches cycles by the clock of another chip, and an estimate that doesn't say what it leaves out."""
  plan = planning.arithmetic(config, topology.parse("v5e:2x2", config))
  moved = Traffic({}, memory_bytes=1e9, cycles=3e9, kernel_runs=5, unknown_loops=())
  made = planning.Compiled("hash", 1.0, planning.Memory(1, 1, 0, 0), "", moved)
  plan = dataclasses.replace(plan, compiled=made)
  assert plan.compiler_seconds == 2.0
  assert plan.to_json()["estimate"]["by_the_compiler"] == 2.0
  line = "2 s by the compiler's own estimate of all instructions, without collectives and 5 runs of kernels"
  assert line in text.describe(plan)
  assert plan.estimate.step < 2.0  # it is shown, and ranks nothing


def test_a_message_of_too_little_memory_is_read():
  message = "the total memory required for HLO temporaries (480.00G) exceeds available HBM (15.75G)."
  expected = "the compiler needs 515.40 GB of 16.91 GB a device: 498.48 GB too much"
  assert planning.too_much(message) == expected
  assert planning.too_much("Ran out of memory.\nUsed 480.00G of 15.75G hbm. Exceeded hbm capacity by …") == expected
  assert planning.too_much("something else\nmore") == "something else"


def fake_plan(plan, devices):
  """A compiler whose memory is 20 GB without remat and 10 GB with, less with micro-batches; more on `data`."""
  size = {"none": 20, "dots": 15, "dots_no_batch": 12, "full": 10}[plan.config.model.remat] * 10**9
  size = size // plan.config.train.micro_batches * (2 if plan.mesh["data"] > 1 else 1)
  fits = size <= plan.device.memory_bytes
  memory = planning.Memory(0, size, 0, 0) if fits else None
  made = planning.Compiled("hash", 1.0, memory, "" if fits else "3 GB too much", None)
  return dataclasses.replace(plan, compiled=made)


def test_a_search_ranks_what_fits_and_compiles_nothing_that_needs_more_than_what_did_not(config, monkeypatch):
  monkeypatch.setattr(search_lib, "compile_plan", fake_plan)
  here = topology.parse("v5e:2x2", config)
  lines = []
  config = config.copy_and_resolve_references()
  config.train.micro_batches = 1
  config.model.remat = "none"
  tried = search_lib.search(config, here, [], max_compilations=12, efficiency=0.5, report=lines.append)
  fitting = [one for one in tried if not one.reason]
  assert tried[: len(fitting)] == fitting
  assert [one.rank for one in fitting] == sorted(one.rank for one in fitting)
  assert len(lines) == 12
  assert lines[0] == "[1/12] data 4, remat none, micro-batches 1: 3 GB too much"  # the config as it is
  reasons = [one.reason for one in tried if one.reason]
  assert any("does not divide" in reason for reason in reasons)  # two heads over tensor 4
  assert search_lib.NOT_TRIED in reasons
  # Nothing is compiled twice, and nothing that needs more than what was too large.
  compiled = [line.split("] ")[1].split(": ")[0] for line in lines]
  assert len(set(compiled)) == 12
  failed = [one.candidate for one in tried if one.reason == "3 GB too much"]
  skipped = [one for one in tried if one.reason.startswith("needs no less than")]
  assert skipped
  for one in skipped:
    assert one.candidate.label not in compiled
    assert any(one.candidate.needs_at_least(other) for other in failed)
  shown = text.describe_search(tried)
  assert shown.endswith(f"best   {fitting[0].candidate.flags}")
  assert re.search(rf"^1 +{fitting[0].plan.compiled.memory.total / 1e9:.2f} ", shown, re.MULTILINE)


@needs_libtpu
def test_a_tpu_slice_is_compiled_for(recipe):
  arguments = ["plan", f"--config={recipe}", "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4"]
  result = subprocess.run(
    [sys.executable, "-m", "mixln_jax", *arguments, "--json"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  plan = json.loads(result.stdout)
  assert plan["fits"] is True
  assert plan["device_memory_bytes"] == int(15.75 * 2**30)
  counted, made = plan["counted_bytes"], plan["compiled"]
  # A TPU keeps arrays in tiles: small ones take more than they hold.
  assert made["memory_bytes"]["arguments"] >= sum(counted.values())
  assert {"all-gather", "all-reduce"} & set(made["collectives"])
  assert made["unknown_loops"] == []
  assert plan["estimate"]["network"] > 0
  assert plan["estimate"]["by_the_compiler"] > 0


def test_a_search_that_is_stopped_shows_the_ranking_so_far(config, tmp_path, monkeypatch, capsys):
  """Would catch minutes of compilation that a signal throws away."""
  compiled = []

  def plan_or_stop(arithmetic, devices):
    if len(compiled) == 2:
      raise signals.Stopped("SIGTERM")
    compiled.append(arithmetic)
    return fake_plan(arithmetic, devices)

  monkeypatch.setattr(search_lib, "compile_plan", plan_or_stop)
  monkeypatch.setattr(topology, "devices", lambda shape: [])
  monkeypatch.setattr(command, "_only_compile", lambda: None)
  text_of = (
    f"from mixln_jax.config import from_json\n\n\ndef get_config():\n  return from_json({config_lib.to_json(config)!r})"
  )
  (tmp_path / "recipe.py").write_text(text_of + "\n")
  with pytest.raises(signals.Stopped):
    command.main([f"--config={tmp_path / 'recipe.py'}", "--topology=v5e:2x2", "--search"])
  output = capsys.readouterr()
  assert "stopped: the ranking of what was compiled so far" in output.err
  assert output.out.startswith("rank ")

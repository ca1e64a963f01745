"""One program, any mesh: the same initial bits, the same samples, the same losses, really sharded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from model.rounding import NETWORK

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.parallel.mesh import AXES, make_mesh
from mixln_jax.parallel.rules import check_not_replicated, constrain, shardings
from parallel import on_mesh

SCRIPT = Path(on_mesh.__file__)
MHC_COEFFICIENTS = [32, 8]  # [N·D, 2N + N²] of two streams

PLACEMENTS = (
  "post*1+qk_norm_full,sandwich*1+gpas",
  pytest.param("pre", marks=pytest.mark.slow),
  pytest.param("mix:0.25", marks=pytest.mark.slow),
  pytest.param("mhc:2*1,dhc:2*1", marks=pytest.mark.slow),
  pytest.param("attnres", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module", params=PLACEMENTS)
def config_json(make_config, request):
  changes = {
    "model.vocab_size": 264,
    "model.mlp_dim": 21,
    "model.mlp_pad_to": 8,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.placement": request.param,
    "train.batch_size": 16,
    "train.micro_batches": 2,
    "evaluate.batch_size": 16,
  }
  return config_lib.to_json(make_config(**changes))


@pytest.fixture(scope="module")
def on_eight(config_json):
  return of_script(config_json)


def of_script(config_json, *arguments):
  result = subprocess.run(
    [sys.executable, str(SCRIPT), *arguments],
    input=config_json,
    capture_output=True,
    text=True,
    timeout=300,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (SCRIPT.parents[2], SCRIPT.parents[1])))},
    check=False,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_one(config_json):
  return on_mesh.run(config_json, {"data": -1})


@pytest.mark.parametrize("mesh", on_mesh.MESHES)
def test_equal_to_one_device(on_eight, on_one, mesh):
  assert on_eight[mesh]["initial"] == on_one["initial"]
  assert on_eight[mesh]["hash"] == on_one["hash"]
  np.testing.assert_allclose(on_eight[mesh]["losses"], on_one["losses"], rtol=NETWORK)
  assert on_one["losses"][-1] < on_one["losses"][0]
  for name, value in on_one["validation"].items():
    np.testing.assert_allclose(on_eight[mesh]["validation"][name], value, rtol=NETWORK, err_msg=name)
  assert on_eight[mesh]["restored"]
  assert on_eight[mesh]["samples"] == on_one["samples"]


def test_the_state_is_really_sharded(on_eight):
  share = {mesh: on_eight[mesh]["share_of_one_device"] for mesh in on_mesh.MESHES}
  assert share["data 8"] == 1
  # An eighth or a quarter, and what is whole on more devices: gains, queries over sources, and what hyper-connections
  # learn, which no tensor axis cuts. The most are 0.151 and 0.286, of mHC; a plain stack has 0.14 and 0.27 at most.
  assert share["fsdp 8"] < 0.155
  assert share["fsdp 4, tensor 2"] < 0.155
  assert share["data 2, fsdp 2, tensor 2"] < 0.29
  assert share["fsdp 2, sequence 2, tensor 2"] < 0.29
  lines = on_eight["fsdp 4, tensor 2"]["table"].splitlines()
  words = {line.split()[0]: re.split(r"  +", line) for line in lines}
  assert words["layers/gate"][3:5] == ["axis 1 over fsdp 4, axis 2 over tensor 2", "(2, 4, 12)"]
  assert words["final_norm"][3:5] == ["whole on every device", "(16,)"]


def test_weights_are_gathered_and_activations_are_not(on_eight):
  """Only token ids, and keys and values where positions are sharded; a stream would be [4 or 8 rows, 32, 16]."""
  for mesh in on_mesh.MESHES:
    # One weight has a dimension of 32: mHC's matrix of coefficients, of 2 streams of width 16.
    wide = [shape for shape in on_eight[mesh]["gathered"] if 32 in shape and shape != MHC_COEFFICIENTS]
    of_ids = [shape for shape in wide if shape[-1] == 32]
    of_keys = [shape for shape in wide if shape[-1] != 32]
    assert bool(of_ids) == ("fsdp" in mesh and "sequence" not in mesh), mesh
    assert all(len(shape) == 4 and shape[1:] == [32, 1, 4] for shape in of_keys), (mesh, of_keys)
    assert bool(of_keys) == ("sequence" in mesh)


def test_the_embedding_stays_where_it_is(on_eight):
  """Catches a look-up that gathers the whole table [264, 16] onto each device, or its gradient."""
  for mesh in on_mesh.MESHES:
    assert not [shape for shape in on_eight[mesh]["gathered"] if shape[-2:] in ([264, 16], [132, 16])], mesh


def test_what_a_step_sends_on_eight_devices(on_eight, config_json):
  """Catches a weight that is gathered for more than its two products, and a whole table that is sent or summed."""
  placement = config_lib.from_json(config_json).model.placement
  if "mhc" in placement or "attnres" in placement:
    pytest.skip("they have more weights, or compute a layer again")
  micro_batches, layers, weights, table = 2, 2, 7, 264 * 16 * 4  # bytes of the embedding, and of the head
  moved = on_eight["fsdp 8"]["moved"]
  gathers, _, *_ = moved["all-gather"]
  # Each weight forward and backward, the token ids, and the head, which the micro-batches share.
  assert gathers == micro_batches * (layers * weights * 2 + 1) + 1
  # What was looked up, and its gradient: one row of 32 positions a device.
  exchanges, exchanged, *_ = moved["all-to-all"]
  assert (exchanges, exchanged) == (micro_batches * 2, micro_batches * 2 * 32 * 16 * 4)
  # Gradients of the layers' weights and the head, once a micro-batch, and of small things; not of the embedding.
  matrices = layers * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) * 4
  _, summed, *_ = moved["all-reduce"]
  assert micro_batches * (matrices + table) <= summed < micro_batches * (matrices + table) + table


def test_each_device_takes_its_share_of_the_head_and_sends_only_its_gradient(on_eight, config_json):
  """Cut over flattened rows and positions, chunks would lie on other devices than their hidden states."""
  one = on_mesh.head(config_json, {"data": -1})
  assert one["collectives"] == []
  elements = 16 * 264  # of the head
  for mesh, of_mesh in on_eight["head"].items():
    np.testing.assert_allclose(of_mesh["value"], one["value"], rtol=NETWORK)
    np.testing.assert_allclose(of_mesh["flops"], one["flops"] / 8, rtol=0.05, err_msg=mesh)  # and the sums over devices
    gathers = [(inside, size) for kind, inside, size in of_mesh["collectives"] if kind == "all-gather"]
    tensor = 2 if "tensor" in mesh else 1
    assert gathers == ([(False, elements // tensor)] if "fsdp" in mesh else []), mesh  # the head itself, once
    # Where the vocabulary is cut the loop sends what is summed over it, at most the gradient of a device's hidden
    # states, [its rows, 8, 16]; else nothing.
    rows = {"fsdp 4, tensor 2": 4, "data 2, fsdp 2, tensor 2": 4, "fsdp 2, sequence 2, tensor 2": 8}.get(mesh, 0)
    assert max((size for _, inside, size in of_mesh["collectives"] if inside), default=0) == rows * 8 * 16, mesh
    assert {kind for kind, *_ in of_mesh["collectives"]} <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.slow
def test_diagnostics_are_those_of_one_device(config_json):
  expected, actual = on_mesh.diagnosed(config_json, {"data": -1}), of_script(config_json, "diagnosed")
  assert actual["step"].keys() == expected["step"].keys()
  # Ten times NETWORK, as in test_diagnosis.py; twice what fp32 resolves of an angle, as in test_depth.py.
  for name, value in expected["step"].items():
    np.testing.assert_allclose(actual["step"][name], value, rtol=1e-4, atol=1e-7, err_msg=name)
  leaves = zip(
    jax.tree_util.tree_leaves_with_path(expected["checkpoint"]), jax.tree.leaves(actual["checkpoint"]), strict=True
  )
  for (path, value), other in leaves:
    np.testing.assert_allclose(other, value, rtol=1e-4, atol=2e-4, err_msg=jax.tree_util.keystr(path))


def test_what_a_mesh_does_not_divide_is_named(on_eight):
  refused = on_eight["refused"]
  assert "config.mesh.tensor=8 does not divide the dimension 4 of layers/query" in refused["heads"] or (
    "config.mesh.tensor=8 does not divide the dimension 2 of layers/key" in refused["heads"]
  )
  assert "config.mesh.dcn_*: they ask for 2 slices of 4 devices, but there are 1 slices" in refused["slices"]
  assert "config.mesh.data × fsdp=8 does not divide the dimension 12 of config.train.batch_size" in refused["rows"]
  assert (
    "config.mesh.sequence=8 does not divide the dimension 20 of config.train.batch_size (16, 20)"
    in refused["positions"]
  )
  assert "config.mesh (data=3): the axes ask for a multiple of 3 devices, but there are 8" in refused["devices"]


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 1, "fsdp": 2}])
def test_more_devices_than_there_are_is_refused(sizes):
  mesh = config_lib.base().mesh
  mesh.update(sizes)
  with pytest.raises(InputError, match=r"devices, but there are 1"):
    make_mesh(mesh)


def test_a_logical_axis_without_a_rule_is_refused():
  shapes = {"w": jax.ShapeDtypeStruct((4,), "float32")}
  with pytest.raises(ValueError, match="w: axis 'embde' has no rule"):
    shardings(shapes, {"w": jax.sharding.PartitionSpec("embde")}, make_mesh(config_lib.base().mesh))


def test_rules_that_collide_are_refused():
  shapes = {"w": jax.ShapeDtypeStruct((4, 4), "float32")}
  with pytest.raises(ValueError, match=r"w: the rules .* collide: 'vocab' and 'heads' .* mesh axis 'tensor'"):
    shardings(shapes, {"w": jax.sharding.PartitionSpec("vocab", "heads")}, make_mesh(config_lib.base().mesh))
  with pytest.raises(ValueError, match=r"collide: 'batch' and 'embed' .* mesh axis 'fsdp'"):
    constrain(jax.numpy.ones((2, 2)), "batch", "embed")


def test_a_large_parameter_that_stays_whole_is_refused():
  mesh = jax.sharding.AbstractMesh((1, 1, 4, 1, 2), AXES)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  check_not_replicated("w", (2048, 2048), whole)
  with pytest.raises(
    InputError, match=r"w \(2048, 2049\): its 4,196,352 elements .* config.mesh \(fsdp 4 × tensor 2\)"
  ):
    check_not_replicated("w", (2048, 2049), whole)
  check_not_replicated("w", (2048, 2049), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))


class Chip:
  """What mesh_utils asks of a TPU: where it lies in the torus, and in which slice."""

  platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

  def __init__(self, x, y, slice_index):
    self.process_index = 2 * slice_index + y // 2  # two hosts a slice
    self.id, self.coords, self.slice_index = slice_index * 16 + 4 * y + x, (x, y, 0), slice_index


@pytest.mark.parametrize(
  ("sizes", "num_slices", "shape"),
  [
    ({"data": 1, "fsdp": -1}, 1, {"fsdp": 16}),
    ({"data": 1, "fsdp": 8, "tensor": 2}, 1, {"fsdp": 8, "tensor": 2}),  # neither is a side of 4 × 4
    ({"data": 1, "fsdp": -1, "dcn_data": 2}, 2, {"data": 2, "fsdp": 16}),
  ],
)
def test_a_mesh_of_chips(sizes, num_slices, shape):
  chips = [Chip(x, y, number) for number in range(num_slices) for y in range(4) for x in range(4)]
  mesh = config_lib.base().mesh
  mesh.update(sizes)
  made = make_mesh(mesh, chips)
  assert {axis: size for axis, size in made.shape.items() if size > 1} == shape
  for number in range(num_slices):  # the axes within a slice stay in it
    assert {chip.slice_index for chip in made.devices[0, number % made.shape["data"]].flat} == {number}


def test_the_hosts_of_one_slice_of_chips_are_no_slices():
  chips = [Chip(x, y, 0) for y in range(4) for x in range(4)]
  mesh = config_lib.base().mesh
  mesh.update({"data": 1, "fsdp": -1, "dcn_data": 2})
  with pytest.raises(InputError, match=r"they ask for 2 slices of 8 devices, but there are 1 slices and 2 processes"):
    make_mesh(mesh, chips)

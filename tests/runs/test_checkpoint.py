"""Checkpoints: what is kept, what comes back, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax.errors import InputError
from mixln_jax.runs.checkpoint import Checkpoints, DamagedError
from mixln_jax.runs.metrics import Metrics, read_metrics


def trees(step):
  return {"params": {"a": jnp.arange(4.0) * step, "b": jnp.ones(3, jnp.bfloat16)}, "rest": {"step": jnp.int32(step)}}


def abstract(tree):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.fixture
def checkpoints(tmp_path):
  opened = []

  def make(**options):
    opened.append(Checkpoints(tmp_path / "checkpoints", **{"keep_last": 2, "keep_best": 1, **options}))
    return opened[-1]

  yield make
  for one in opened:
    one.close()


def test_the_newest_the_best_and_the_named_are_kept_across_processes(checkpoints):
  first = checkpoints(keep_steps=[3])
  for step, loss in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, 4.1), (6, None)):
    first.save(step, trees(step), {"step": step}, loss)
  first.wait()
  assert first.all_steps() == [2, 3, 5, 6]
  again = checkpoints(keep_steps=[3])
  again.save(7, trees(7), {}, 2.9)
  again.wait()
  assert again.all_steps() == [3, 6, 7]


def test_trees_and_facts_come_back_whole_or_in_part(checkpoints):
  one = checkpoints()
  one.save(1, trees(1), {"config": {"seed": 3}})
  one.wait()
  assert one.facts(1)["config"] == {"seed": 3}
  params = one.restore(1, {"params": abstract(trees(1)["params"])})["params"]
  np.testing.assert_array_equal(params["a"], np.arange(4.0))
  assert params["b"].dtype == jnp.bfloat16
  with pytest.raises(RuntimeError, match="did not save the checkpoint of step 1"):
    one.save(1, trees(1), {})


def test_a_damaged_or_foreign_checkpoint_is_named(checkpoints, tmp_path):
  one = checkpoints()
  # One array: where one of several parallel reads fails, orbax drops the others, which Python reports as unraisable.
  params = {"a": jnp.arange(1000.0)}
  one.save(1, {"params": params}, {})
  one.wait()
  with pytest.raises(InputError, match=r"checkpoints/1: the checkpoint is damaged"):
    one.restore(1, {"params": abstract({"a": jnp.zeros(5)})})
  for path in (tmp_path / "checkpoints" / "1" / "params" / "d").iterdir():
    path.write_bytes(b"")
  with pytest.raises(InputError, match=r"checkpoints/1: the checkpoint is damaged"):
    one.restore(1, {"params": abstract(params)})


@pytest.mark.parametrize(
  ("error", "damaged"),
  [
    (ValueError("UNAVAILABLE: Error reading gs://bucket/run/params: HTTP 503"), False),
    (ValueError("PERMISSION_DENIED: Error reading gs://bucket/run/params"), False),
    (ValueError("UNAVAILABLE: CURL error: Couldn't resolve host name"), False),
    (ConnectionResetError("connection reset by peer"), False),
    (ValueError("DATA_LOSS: Error decoding chunk"), True),
    (KeyError("a"), True),
  ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_storage_that_fails_is_no_damage(checkpoints, monkeypatch, error, damaged, wrapped):
  one = checkpoints()
  one.save(1, trees(1), {})
  one.wait()

  def fail(*_, **__):
    if wrapped:
      raise RuntimeError("Failed to restore") from error
    raise error

  monkeypatch.setattr(one._manager, "restore", fail)
  with pytest.raises(Exception) as raised:  # noqa: PT011 - which one it is is the question
    one.facts(1)
  assert isinstance(raised.value, DamagedError) == damaged


def test_a_bit_that_orbax_does_not_miss_is_missed_here(checkpoints, tmp_path):
  """Other numbers, another type and other facts, written by orbax itself: nothing but the sums can tell."""
  import orbax.checkpoint as ocp

  one = checkpoints()
  params = {"a": jnp.arange(1000.0), "b": jnp.ones(3)}
  one.save(1, {"params": params}, {"config": {"seed": 3}})
  one.wait()
  place = tmp_path / "checkpoints" / "1"

  def rewrite(tree):
    with ocp.StandardCheckpointer() as writer:
      writer.save(place / "params", tree, force=True)

  flipped = params["a"].view(jnp.uint32).at[7].set(params["a"].view(jnp.uint32)[7] ^ 1).view(jnp.float32)
  for tree, name in (({"a": flipped, "b": params["b"]}, "a"), ({"a": params["a"], "b": jnp.zeros(3)}, "b")):
    rewrite(tree)
    with pytest.raises(DamagedError, match=rf"params/{name} differs from what was written"):
      one.restore(1, {"params": abstract(params)})
  rewrite(params)
  one.restore(1, {"params": abstract(params)})
  with pytest.raises(DamagedError, match="params/a differs from what was written"):  # orbax would cast
    one.restore(1, {"params": abstract({"a": jnp.zeros(1000, jnp.bfloat16), "b": params["b"]})})
  facts = next(path for path in (place / "facts").iterdir() if '"seed": 3' in path.read_text())
  facts.write_text(facts.read_text().replace('"seed": 3', '"seed": 4'))
  with pytest.raises(DamagedError, match="its facts differ from what was written"):
    one.facts(1)


def test_later_checkpoints_are_moved_not_lost(checkpoints, tmp_path):
  one = checkpoints(keep_last=9)
  for step in (1, 2, 3):
    one.save(step, trees(step), {})
  one.wait()
  (tmp_path / "moved").mkdir()
  one.move([2, 3], tmp_path / "moved")
  assert one.all_steps() == [1]
  assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["2", "3"]
  one.save(2, trees(5), {})
  one.wait()
  restored = one.restore(2, {"params": abstract(trees(2)["params"])})["params"]
  np.testing.assert_array_equal(restored["a"], np.arange(4.0) * 5)


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  metrics = Metrics(path, 0)
  for step in (1, 2, 3):
    metrics.write(step, "train", {"loss": 1 / step})
  metrics.write(3, "validation", {"loss": float("inf")})
  metrics.close()
  with path.open("a") as file:
    file.write('{"step": 4')
  assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 3]
  assert read_metrics(path)[-1]["loss"] == "inf"
  metrics = Metrics(path, 2)
  metrics.write(3, "train", {"loss": 0.1})
  metrics.close()
  assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 0.1)]
  path.write_text('{"step": 1, "split": "train", "loss": 1}\nnonsense\n{"step": 2}\n')
  with pytest.raises(InputError, match="line 2: damaged, not JSON"):
    read_metrics(path)
  path.write_text('{"step": 1, "split": "train", "loss": 1}\n3\n')
  with pytest.raises(InputError, match="line 2 is not an object"):
    read_metrics(path)
  path.write_bytes(b'{"step": 1, "split": "train", "loss": 1}\n\xff\xfe\n{}\n')
  with pytest.raises(InputError, match="line 2: damaged, not UTF-8"):
    read_metrics(path)
  Metrics(path, 0).close()
  assert path.read_text() == ""


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("metrics/metrics", b"[" * 100_000),
    ("metrics/metrics", b"\xff\xfe"),
    ("_CHECKPOINT_METADATA", b"[" * 100_000),
  ],
)
def test_what_a_checkpoint_says_of_itself_may_be_damaged(checkpoints, tmp_path, name, content):
  """orbax reads these files of every checkpoint to list them: a traceback, and no way to open the run."""
  one = checkpoints()
  one.save(1, trees(1), {"config": {}}, 3.0)
  one.close()
  (tmp_path / "checkpoints" / "1" / name).write_bytes(content)
  with pytest.raises(InputError, match=rf"1/{name}: damaged, not .* move the folder .*/1 away"):
    checkpoints()

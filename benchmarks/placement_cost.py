"""Cost of norm placements on TPUs, from the real TPU compiler on a machine without a TPU.

    pip install -r requirements-tpu.txt
    python -m benchmarks.placement_cost [--out=benchmarks/results/placement_cost.json] [--only=NAME ...]

Compiles loss and gradient of llama_1b (sequence 256) for v5e:4x4, sharded as in the recipe, with remat full (batch 512)
and dots (batch 256). XLA counts a loop's body once, so each case is compiled with one and with two layers per
iteration: the difference is the cost of the body, and the total is the cost outside plus L bodies. Memory is that of
the real program. Cases:

  pre, post, mix            the model of this repository
  pre by hand, post by hand the two classical layers, written out, as a baseline of the general rule
  mix: …                    other ways to make a layer's norms data, and two static scans (Post-LN, then Pre-LN)
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import topologies

from benchmarks.output import output_file
from benchmarks.recipes import load
from mixln_jax.model import transformer
from mixln_jax.model.columns import Columns, traced_rows
from mixln_jax.model.norm import rms_norm
from mixln_jax.model.parameters import abstract_sharded_params, gain_name
from mixln_jax.model.residual import Stream, Streams
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.parallel.rules import logical_rules
from mixln_jax.training.program import abstract_batch
from mixln_jax.training.step import gradient_sum

TOPOLOGY = "v5e:4x4"
# remat policy -> sequences a batch; with dots, 512 do not fit a v5e chip whatever the placement (16.9 of 15.75 GB).
REMAT = {"full": 512, "dots": 256}
# XLA would turn products with sharded weights into loops of their own, whose bodies it counts once as well.
NO_INNER_LOOPS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
COUNTS = {"gflop": ("flops", 1e9), "gb_accessed": ("bytes accessed", 1e9)}


class Written(transformer.Layer):
  """A layer without the general rule; subclasses define one sublayer."""

  def apply_one(
    self, x_BTD: jax.Array, branch: Callable[[jax.Array], jax.Array], gain_D: jax.Array, on: Any
  ) -> jax.Array:
    raise NotImplementedError

  def norm(self, x_BTD: jax.Array, gain_D: jax.Array, **options: Any) -> jax.Array:
    return rms_norm(x_BTD, gain_D, epsilon=self.config.norm_epsilon, **options)

  @nn.compact
  def __call__(
    self, carry: tuple[Any, Any], varying: transformer.Varying, shared: transformer.Shared
  ) -> tuple[tuple[Any, Any], Any]:
    before, cache = carry
    rows = traced_rows(self.constant, varying.columns)
    weights = {}
    for name, shape, axes in self.declared:
      weights[name] = transformer.declare(self, self.config, name, shape, axes)

    def attend(h_BTD: jax.Array) -> jax.Array:
      return self.attend(h_BTD, weights, rows.attention, None, varying.layer, shared)[0]

    def mlp(h_BTD: jax.Array) -> jax.Array:
      return transformer.swiglu(h_BTD, weights, self.config.dtype)

    x_BTD = before.first.sum_BTD
    for name, branch, row in (("attention", attend, rows.attention), ("mlp", mlp, rows.mlp)):
      x_BTD = self.apply_one(x_BTD, branch, weights[gain_name(name, 0)], row.norm_out)
      x_BTD = nn.with_logical_constraint(x_BTD, transformer.STREAM)
    return (Streams(Stream(x_BTD)), cache), {"stream_BTD": x_BTD}


class Pre(Written):
  def apply_one(self, x_BTD: jax.Array, branch: Any, gain_D: jax.Array, on: Any) -> jax.Array:
    del on
    out_BTD = branch(self.norm(x_BTD, gain_D).astype(self.config.dtype))
    return (x_BTD.astype(jnp.float32) + out_BTD.astype(jnp.float32)).astype(x_BTD.dtype)


class Post(Written):
  def apply_one(self, x_BTD: jax.Array, branch: Any, gain_D: jax.Array, on: Any) -> jax.Array:
    del on
    sum_BTD = x_BTD.astype(jnp.float32) + branch(x_BTD).astype(jnp.float32)
    return self.norm(sum_BTD, gain_D).astype(x_BTD.dtype)


class Select(Written):
  """Computes both tensors and selects one."""

  def apply_one(self, x_BTD: jax.Array, branch: Any, gain_D: jax.Array, on: Any) -> jax.Array:
    normed_BTD = self.norm(x_BTD, gain_D).astype(self.config.dtype)
    out_BTD = branch(jnp.where(on, x_BTD, normed_BTD))
    sum_BTD = x_BTD.astype(jnp.float32) + out_BTD.astype(jnp.float32)
    return jnp.where(on, self.norm(sum_BTD, gain_D), sum_BTD).astype(x_BTD.dtype)


class Gate(Written):
  """Gates the norm's factor and gain, as model/norm.py does."""

  name_sum = False

  def apply_one(self, x_BTD: jax.Array, branch: Any, gain_D: jax.Array, on: Any) -> jax.Array:
    out_BTD = branch(self.norm(x_BTD, gain_D, on=jnp.logical_not(on)).astype(self.config.dtype))
    sum_BTD = x_BTD.astype(jnp.float32) + out_BTD.astype(jnp.float32)
    if self.name_sum:
      sum_BTD = checkpoint_name(sum_BTD.astype(x_BTD.dtype), "sum")
    return self.norm(sum_BTD, gain_D, on=on).astype(x_BTD.dtype)


class GateSaved(Gate):
  """Like `Gate`, with the sums saved for the backward pass."""

  name_sum = True


class Cond(Written):
  """A branch of the program for each kind of layer."""

  def apply_one(self, x_BTD: jax.Array, branch: Any, gain_D: jax.Array, on: Any) -> jax.Array:
    def cond(x: jax.Array, on_true: Any, on_false: Any) -> jax.Array:
      return jax.lax.cond(on, on_true, on_false, x)

    out_BTD = branch(cond(x_BTD, lambda x: x, lambda x: self.norm(x, gain_D).astype(x.dtype)))
    sum_BTD = (x_BTD.astype(jnp.float32) + out_BTD.astype(jnp.float32)).astype(x_BTD.dtype)
    return cond(sum_BTD, lambda x: self.norm(x, gain_D).astype(x.dtype), lambda x: x)


class Model(transformer.Transformer):
  """The transformer with another layer class."""

  layer: Any = transformer.Layer

  def layer_class(self) -> Any:
    if self.layer is GateSaved and self.config.remat == "full":
      return nn.remat(GateSaved, policy=jax.checkpoint_policies.save_only_these_names("sum"), prevent_cse=False)
    return nn.remat(self.layer, policy=transformer.REMAT_POLICIES[self.config.remat], prevent_cse=False)

  def first_streams(self, x_BTD: jax.Array, columns: Columns) -> Streams:
    del columns  # these layers apply their own norms
    return Streams(Stream(x_BTD))


class TwoScans(Model):
  """Post-LN layers in one static scan, Pre-LN layers in another. It costs as much as the layers written by hand."""

  def scan(self, carry: Any, columns: Columns, keep_L: Any, shared: transformer.Shared) -> tuple[Any, Any]:
    del keep_L
    num_post = int(columns.varying["mlp.norm_out"].sum())
    stacked = nn.unbox(self.variables["params"]["layers"])
    for layer, part in ((Post, slice(0, num_post)), (Pre, slice(num_post, None))):
      # A static scan knows which norms its layers have; nothing else of the columns is read.
      constant = (*columns.constant, ("attention.norm_out", None), ("mlp.norm_out", None))

      module = self.make_layer(layer, columns.replace(constant=constant), parent=None)

      def body(carry: Any, params: Any, module: Any = module) -> tuple[Any, None]:
        return module.apply({"params": params}, carry, transformer.Varying({}, 0, None), shared)[0], None

      body = jax.checkpoint(body, policy=transformer.REMAT_POLICIES[self.config.remat], prevent_cse=False)
      params = jax.tree.map(lambda p, part=part: p[part], stacked)
      carry, _ = jax.lax.scan(body, carry, params, unroll=max(1, self.config.unroll))
    return carry, {"stream_BTD": jnp.zeros(())}


CASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
  "pre": ("pre", transformer.Transformer),
  "pre by hand": ("pre", lambda model: Model(model, layer=Pre)),
  "post": ("post", transformer.Transformer),
  "post by hand": ("post", lambda model: Model(model, layer=Post)),
  "mix": ("mix:0.25", transformer.Transformer),
  "mix: select the tensor": ("mix:0.25", lambda model: Model(model, layer=Select)),
  "mix: gate the scale": ("mix:0.25", lambda model: Model(model, layer=Gate)),
  "mix: gate, sums saved": ("mix:0.25", lambda model: Model(model, layer=GateSaved)),
  "mix: cond": ("mix:0.25", lambda model: Model(model, layer=Cond)),
  "mix: two static scans": ("mix:0.25", TwoScans),
}


def compiled(make: Callable[[Any], Any], config: Any, compiler_options: Any = None) -> jax.stages.Compiled:
  mesh = make_mesh(config.mesh, topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices)
  params = abstract_sharded_params(config.model, mesh)
  shardings = jax.tree.map(lambda p: p.sharding, params)
  model = make(config.model)
  step = jax.jit(lambda p, batch: gradient_sum(model, p, batch, 1, None), out_shardings=(None, None, shardings))
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
    return step.lower(params, abstract_batch(config, mesh)).compile(compiler_options)


def measure(name: str, remat: str) -> dict[str, Any]:
  """Counted cost of one case per chip: a loop body, the whole program, and its temporary memory."""
  placement, make = CASES[name]
  config = load("1b")
  config.model.update(placement=placement, remat=remat)
  config.train.batch_size = REMAT[remat]
  memory: Any = compiled(make, config).memory_analysis()
  row = {"case": name, "remat": remat, "temporary_gb": memory.temp_size_in_bytes / 1e9}
  if make is TwoScans:  # two loops: what they cost is 6 and 18 times a body by hand
    return row
  counts = []
  for unroll in (1, 2):
    config.model.unroll = unroll
    analysis: Any = compiled(make, config, NO_INNER_LOOPS).cost_analysis()
    counts.append({key: analysis[source] / unit for key, (source, unit) in COUNTS.items()})
  once, twice = counts
  body = {key: twice[key] - once[key] for key in COUNTS}
  total = {key: once[key] + (config.model.num_layers - 1) * body[key] for key in COUNTS}
  return row | {"body": body, "total": total}


def show(rows: list[dict[str, Any]]) -> None:
  """One line per case; ratios are to `pre` with the same remat."""
  base = {row["remat"]: row for row in rows if row["case"] == "pre"}
  line = "{:<6}{:<26}{:>12}{:>9}{:>14}{:>9}{:>8}{:>11}"
  print(line.format("remat", "case", "GFLOP/layer", "GB/layer", "temporary GB", "FLOPs ×", "bytes ×", "temporary ×"))
  for row in rows:
    pre = base.get(row["remat"], row)
    memory = f"{row['temporary_gb']:.2f}", f"{row['temporary_gb'] / pre['temporary_gb']:.3f}"
    body, ratios = ("-", "-"), ("-", "-")
    if "body" in row:
      body = f"{row['body']['gflop']:.0f}", f"{row['body']['gb_accessed']:.2f}"
      ratios = [f"{row['total'][key] / pre['total'][key]:.3f}" for key in COUNTS]
    print(line.format(row["remat"], row["case"], *body, memory[0], *ratios, memory[1]))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", nargs="*", choices=list(CASES))
  parser.add_argument("--remat", nargs="*", choices=list(REMAT), default=list(REMAT))
  parser.add_argument("--out", type=output_file)
  arguments = parser.parse_args()
  stored = json.loads(arguments.out.read_text())["rows"] if arguments.out and arguments.out.is_file() else []
  rows = {(row["remat"], row["case"]): row for row in stored}  # measured before: a run that was stopped goes on
  versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
  if rows and json.loads(arguments.out.read_text())["versions"] != versions:
    sys.exit(f"{arguments.out} was measured with other versions than {versions}; give another --out")
  for key in ((remat, name) for remat in arguments.remat for name in arguments.only or CASES):
    if key in rows:
      continue
    started = time.perf_counter()
    rows[key] = measure(key[1], key[0])
    print(f"{key[0]}, {key[1]}: {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.out:
      result = {"versions": versions, "topology": TOPOLOGY, "rows": list(rows.values())}
      arguments.out.write_text(json.dumps(result, indent=1) + "\n")
  show(list(rows.values()))


if __name__ == "__main__":
  main()

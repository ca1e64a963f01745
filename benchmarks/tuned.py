"""Gain of each tuned form over its plain form: on this CPU, and according to the TPU compiler.

    pip install -r requirements-tpu.txt     # for --on=tpu; no TPU is needed
    python -m benchmarks.tuned [--on cpu tpu] [--only product loss attention update step]
                               [--shapes tiny 9m 71m 71m:1024 1b] [--against FORM ...] [--repeats=9]
                               [--out=benchmarks/results/tuned.json]

  product    an MLP's two products and their gradients: einsum, versus the narrower operand first
  loss       the head's loss and its gradients: all logits, and rematerialised chunks, versus chunks in one pass
  attention  and its gradients: jax.nn.dot_product_attention, versus blocks (CPU) or splash (TPU)
  update     of the parameters, from summed gradients: with one part plain, versus all parts tuned
  step       of training: with one part plain, versus all parts tuned (CPU only)

CPU: fp32, no remat, 8 rows of 256 tokens (tiny: its own shape). Forms are interleaved; a ratio is the median over
repetitions of the processor time of all threads, tuned divided by plain, which other work on the machine hardly
affects. TPU: bfloat16, 512 rows, sharded over v5e:4x4 as in the recipe; FLOPs, bytes accessed and temporaries of a
chip, compiled and not timed. XLA counts a loop's body once, so FLOPs and bytes are those of a program without the loop
over chunks; temporaries are those of the real program.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.output import output_file
from benchmarks.parts import Step, for_cpu, normal, turns
from benchmarks.recipes import CONFIGS, load_file
from mixln_jax.config import Config, head_dim
from mixln_jax.model import loss, product
from mixln_jax.model.attention_kernels import self_attention
from mixln_jax.model.tuned import loss as tuned_loss
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.parallel.rules import RULES, on_mesh
from mixln_jax.training import optimizer
from mixln_jax.training import step as step_lib

TOPOLOGY = "v5e:4x4"
SHAPES = {"cpu": ("tiny", "9m", "71m"), "tpu": ("71m", "1b")}
STREAM = ("batch", "length", None)  # the logical axes of B, T, D
TUNED = "tuned"
TUNED_ATTENTION = {"cpu": "blocks", "tpu": "splash"}
Form = Callable[..., Any]
Patch = tuple[Any, str, Any]  # module, name, what stands there while a form is traced


class Piece(NamedTuple):
  """One computation in several forms.

  Attributes:
    arguments: a function that makes the tuple of arguments of every form.
    shardings: a function that returns the arguments' shardings on a mesh, as the same tree.
    outputs: a form returns one scalar, and then arrays like this many of its first arguments.
    forms: the forms by name; one of them is TUNED.
    carried: whether the outputs are the first arguments of the next call, which are donated.
  """

  arguments: Callable[[], tuple[Any, ...]]
  shardings: Callable[[Mesh], tuple[Any, ...]]
  outputs: int
  forms: dict[str, Form]
  carried: bool = False


@contextlib.contextmanager
def patched(patches: tuple[Patch, ...]) -> Iterator[None]:
  with contextlib.ExitStack() as stack:
    for module, name, value in patches:
      stack.enter_context(mock.patch.object(module, name, value))
    yield


def pretend(module: Any, name: str) -> Patch:
  """An entry point that believes to run on another platform."""
  return module, "platform", lambda: name


def with_patches(form: Form, *patches: Patch) -> Form:
  """The form, traced while the patches are active."""

  def traced(*arguments: Any) -> Any:
    with patched(patches):
      return form(*arguments)

  return traced


def by_axes(*axes: tuple[str | None, ...]) -> Callable[[Mesh], tuple[Any, ...]]:
  """Shardings of arrays with the given logical axes."""

  def on(mesh: Mesh) -> tuple[Any, ...]:
    specs = [PartitionSpec(*(None if axis is None else RULES[axis] for axis in names)) for names in axes]
    return tuple(NamedSharding(mesh, spec) for spec in specs)

  return on


def product_piece(config: Config) -> Piece:
  model, batch, length = config.model, config.train.batch_size, config.data.sequence_length
  width, inner = model.embed_dim, model.mlp_dim

  def arguments() -> tuple[Any, ...]:
    shapes = (batch, length, width), (width, inner), (inner, width), (batch, length, width)
    return tuple(normal(seed, *shape).astype(model.dtype) for seed, shape in enumerate(shapes))

  def form(*arguments: jax.Array) -> Any:
    def mlp(x_BTD: jax.Array, up_DF: jax.Array, down_FD: jax.Array, gradient_BTD: jax.Array) -> jax.Array:
      hidden_BTF = product.multiply("btd,df->btf", x_BTD, up_DF)
      return jnp.vdot(product.multiply("btf,fd->btd", hidden_BTF, down_FD), gradient_BTD)

    return jax.value_and_grad(mlp, argnums=(0, 1, 2))(*arguments)

  forms = {
    "einsum": with_patches(form, pretend(product, "tpu")),
    TUNED: with_patches(form, pretend(product, "cpu")),
  }
  return Piece(arguments, by_axes(STREAM, ("embed", "mlp"), ("mlp", "embed"), STREAM), 3, forms)


def rematerialised_chunks(
  hidden_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
  """The alternative without a custom gradient: a scan over chunks, each of which is rematerialised."""

  def chunk(hidden_BCD: jax.Array, labels_BC: jax.Array, weights_BC: jax.Array, head_DV: jax.Array) -> jax.Array:
    return loss.all_logits_loss(hidden_BCD, head_DV, labels_BC, weights_BC)

  def add(total: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
    # Without `prevent_cse` XLA would find the second computation in a program without a loop, and leave it out.
    return total + jax.checkpoint(chunk)(*arrays, head_DV), None

  batch, length = labels_BT.shape
  rows = batch // tuned_loss.shards("batch")
  allowed = tuned_loss.CHUNK_LOGITS.get(tuned_loss.platform(), tuned_loss.CHUNK_LOGITS["accelerator"])
  num_chunks = min(length, -(-rows * length * head_DV.shape[1] // allowed))
  while length % num_chunks:
    num_chunks += 1

  def cut(x_BT: jax.Array) -> jax.Array:
    return jnp.moveaxis(x_BT.reshape(batch, num_chunks, length // num_chunks, *x_BT.shape[2:]), 1, 0)

  arrays = cut(hidden_BTD), cut(labels_BT), cut(weights_BT)
  return tuned_loss._scan(add, jnp.zeros(()), arrays)[0]


def loss_piece(config: Config, where: str) -> Piece:
  model, batch, length = config.model, config.train.batch_size, config.data.sequence_length

  def arguments() -> tuple[Any, ...]:
    hidden_BTD = normal(0, batch, length, model.embed_dim).astype(model.dtype)
    head_DV = normal(1, model.embed_dim, model.vocab_size) * 0.02
    labels_BT = jax.random.randint(jax.random.key(2), (batch, length), 0, model.vocab_size)
    return hidden_BTD, head_DV, labels_BT, jnp.ones((batch, length))

  def form(*arguments: jax.Array) -> Any:
    return jax.value_and_grad(lambda *a: loss.next_token_loss(*a)[0], argnums=(0, 1))(*arguments)

  def with_loss(loss_of: Form) -> Form:
    return with_patches(form, (loss, "chunked_loss", lambda *arguments: loss_of(*arguments[:4])))

  # How the label's place is treated: the form that the platform does not have.
  label = {"cpu": tuned_loss._compare_and_subtract, "tpu": tuned_loss._scatter_subtract}[where]
  forms = {
    "all logits": with_loss(loss.all_logits_loss),
    "rematerialised chunks": with_loss(rematerialised_chunks),
    label.__name__.strip("_"): with_patches(form, (tuned_loss, "_subtract_at", label)),
    TUNED: form,
  }
  axes = STREAM, ("embed", "vocab"), ("batch", "length"), ("batch", "length")
  return Piece(arguments, by_axes(*axes), 2, forms)


def attention_piece(config: Config, where: str) -> Piece:
  model, batch, length = config.model, config.train.batch_size, config.data.sequence_length
  shape = batch, length, model.num_heads, head_dim(model)

  def arguments() -> tuple[Any, ...]:
    return tuple(normal(seed, *shape).astype(model.dtype) for seed in range(4))

  def form(name: str) -> Form:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> jax.Array:
      return jnp.vdot(self_attention(name, q, k, v, None, None), gradient).astype(jnp.float32)

    return jax.value_and_grad(attend, argnums=(0, 1, 2))

  queries = ("batch", "length", "heads", None)
  return Piece(arguments, by_axes(*[queries] * 4), 3, {"xla": form("xla"), TUNED: form(TUNED_ATTENTION[where])})


def update_piece(config: Config) -> Piece:
  def arguments() -> tuple[Any, ...]:
    state = step_lib.init_state(config)
    moments = jax.tree.map(lambda x: x + jnp.asarray(1e-4).astype(x.dtype), state.opt_state)
    sums = jax.tree.map(lambda p: 100 * p.astype(jnp.float32), state.params)
    return state.params, moments, sums, jnp.float32(100)

  def shardings(mesh: Mesh) -> tuple[Any, ...]:
    state = step_lib.state_shardings(config, mesh)
    return state.params, state.opt_state, state.params, NamedSharding(mesh, PartitionSpec())

  def update(params: Any, opt_state: Any, sums: Any, count: jax.Array, *, by_factor: bool = True) -> Any:
    if by_factor:
      norm = optax.tree.norm(sums) / count
      grads = jax.tree.map(lambda g: g * (1 / count), sums)
    else:
      grads = jax.tree.map(lambda g: g / count, sums)
      norm = optax.tree.norm(grads)
    accept = jnp.isfinite(norm)
    updates, opt_state = optimizer.make_optimizer(config).update(grads, opt_state, params, norm=norm, accept=accept)
    new = optax.apply_updates(params, jax.tree.map(lambda u: -1e-3 * u, updates))
    params = jax.tree.map(lambda new, old: jnp.where(accept, new, old), new, params)
    return norm, (params, opt_state)

  def plain_clip(grads: Any, norm: jax.Array, limit: float) -> Any:
    del norm
    return optax.clip_by_global_norm(limit).update(grads, optax.EmptyState())[0]

  def optax_adam(b1: float, b2: float, epsilon: float) -> Any:
    plain = optax.scale_by_adam(b1, b2, epsilon)

    def run(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
      updates, proposed = plain.update(updates, state, params)
      return updates, jax.tree.map(lambda new, old: jnp.where(extra["accept"], new, old), proposed, state)

    return optax.GradientTransformationExtraArgs(plain.init, run)

  as_cpu = pretend(optimizer, "cpu")
  forms = {
    "optax's clip": with_patches(update, as_cpu, (optimizer, "clip_with_known_norm", plain_clip)),
    "optax's Adam": with_patches(update, as_cpu, (optimizer, "scale_by_adam", optax_adam)),
    "both": with_patches(update, pretend(optimizer, "tpu")),
    "mean by a division": with_patches(partial(update, by_factor=False), as_cpu),
    TUNED: with_patches(update, as_cpu),
  }
  return Piece(arguments, shardings, 2, forms, carried=True)


def steps(config: Config) -> dict[str, Callable[[], Step]]:
  """Makes the training step as it is, and with one part plain; each has its own state."""
  plain_product, plain_update = pretend(product, "tpu"), pretend(optimizer, "tpu")
  plain_loss: Patch = (loss, "chunked_loss", lambda *arguments: loss.all_logits_loss(*arguments[:4]))
  plain_attention = config.copy_and_resolve_references()
  plain_attention.model.attention = "xla"

  def step(config: Config, *patches: Patch) -> Callable[[], Step]:
    def make() -> Step:
      with patched(patches):
        return Step(config)

    return make

  return {
    "product plain": step(config, plain_product),
    "loss plain": step(config, plain_loss),
    "attention plain": step(plain_attention),
    "clip and Adam plain": step(config, plain_update),
    "all of them plain": step(plain_attention, plain_product, plain_loss, plain_update),
    TUNED: step(config),
  }


class Call:
  """A compiled form of a piece with its own arguments, on this machine."""

  def __init__(self, piece: Piece, form: Form):
    self.arguments = jax.jit(piece.arguments)()
    self.carried = piece.outputs if piece.carried else 0
    self.form = jax.jit(form, donate_argnums=tuple(range(self.carried)))

  def __call__(self) -> Any:
    scalar, outputs = self.form(*self.arguments)
    if self.carried:
      self.arguments = (*outputs, *self.arguments[self.carried :])
    return scalar, outputs


PIECES = ("product", "loss", "attention", "update", "step")


def make_piece(name: str, config: Config, where: str) -> Piece:
  if name == "attention":
    return attention_piece(config, where)
  if name == "loss":
    return loss_piece(config, where)
  return {"product": product_piece, "update": update_piece}[name](config)


def configured(shape: str, where: str) -> Config:
  """The config of a shape: `tiny` or a LLaMA recipe (`71m`), with tokens a row and rows where they differ from the
  recipe's (`71m:1024`, `7b:256:32`)."""
  recipe, *sizes = shape.split(":")
  path = CONFIGS / ("tiny.py" if recipe == "tiny" else f"llama_{recipe}.py")
  config = load_file(path)
  if where == "cpu" and recipe != "tiny":
    for_cpu(config)
  if sizes:
    config.data.sequence_length = int(sizes[0])
  if len(sizes) > 1:
    config.train.batch_size = int(sizes[1])
  return config


def measure_on_cpu(name: str, shape: str, repeats: int, against: list[str] | None) -> list[dict[str, Any]]:
  """A row for each form except the tuned one, or for those of `against`: processor seconds of both, and the ratio."""
  config = configured(shape, "cpu")
  if name == "step":
    makers: dict[str, Callable[[], Callable[[], Any]]] = {**steps(config)}
  else:
    piece = make_piece(name, config, "cpu")
    makers = {form: partial(Call, piece, piece.forms[form]) for form in piece.forms}
  calls = {form: make() for form, make in makers.items() if form == TUNED or against is None or form in against}
  seconds = {form: found["processor"] for form, found in turns(calls, repeats).items()}
  rows = []
  for form in calls:
    if form == TUNED:
      continue
    ratios = [tuned / plain for tuned, plain in zip(seconds[TUNED], seconds[form], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    rows.append({
      "piece": name, "shape": shape, "against": form,
      "plain_seconds": statistics.median(seconds[form]), "tuned_seconds": statistics.median(seconds[TUNED]),
      "ratio": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]],
    })  # fmt: skip
  return rows


def unrolled(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
  """A scan without a loop, so that XLA counts every iteration."""
  outs = []
  for i in range(len(jax.tree.leaves(xs)[0])):
    carry, out = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    outs.append(out)
  return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def compile_for_tpu(piece: Piece, form: Form, mesh: Mesh) -> jax.stages.Compiled:
  shardings = piece.shardings(mesh)
  abstract = jax.eval_shape(piece.arguments)
  arguments = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
  )
  donated = tuple(range(piece.outputs)) if piece.carried else ()
  out_shardings = (None, shardings[: piece.outputs])
  with on_mesh(mesh):
    # A function of its own for each call: JAX would find an earlier trace of the same one, made under other patches.
    traced = jax.jit(lambda *a: form(*a), donate_argnums=donated, out_shardings=out_shardings)
    return traced.lower(*arguments).compile()


def measure_on_tpu(name: str, shape: str) -> list[dict[str, Any]]:
  """A row for each form except the tuned one: FLOPs, bytes accessed and bytes of temporaries of both."""
  config = configured(shape, "tpu")
  mesh = make_mesh(config.mesh, topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices)
  piece = make_piece(name, config, "tpu")
  costs = {}
  for form in piece.forms:
    memory: Any = compile_for_tpu(piece, piece.forms[form], mesh).memory_analysis()
    with patched(((tuned_loss, "_scan", unrolled),)):
      counted: Any = compile_for_tpu(piece, piece.forms[form], mesh).cost_analysis()
    costs[form] = {
      "flops": counted["flops"],
      "bytes": counted["bytes accessed"],
      "temporaries": memory.temp_size_in_bytes,
    }
  return [
    {"piece": name, "shape": shape, "against": form, "plain": costs[form], "tuned": costs[TUNED]}
    for form in costs
    if form != TUNED
  ]


def show_cpu(rows: list[dict[str, Any]]) -> None:
  print(f"\n{'CPU':<11}{'shape':<12}{'plain form':<24}{'plain ms':>10}{'tuned ms':>10}{'ratio':>8}   quartiles")
  for row in rows:
    low, high = row["quartiles"]
    print(
      f"{row['piece']:<11}{row['shape']:<12}{row['against']:<24}{row['plain_seconds'] * 1e3:>10.1f}"
      f"{row['tuned_seconds'] * 1e3:>10.1f}{row['ratio']:>8.3f}   {low:.3f} to {high:.3f}"
    )


def show_tpu(rows: list[dict[str, Any]]) -> None:
  print(f"\n{TOPOLOGY:<11}{'shape':<12}{'plain form':<24}{'GFLOP':>19}{'GB accessed':>17}{'temporaries MB':>19}")
  for row in rows:
    plain, tuned = row["plain"], row["tuned"]
    cells = []
    for key, unit, digits in (("flops", 1e9, 1), ("bytes", 1e9, 3), ("temporaries", 1e6, 0)):
      cells.append(f"{plain[key] / unit:.{digits}f} → {tuned[key] / unit:.{digits}f}")
    print(f"{row['piece']:<11}{row['shape']:<12}{row['against']:<24}{cells[0]:>19}{cells[1]:>17}{cells[2]:>19}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--on", nargs="+", choices=["cpu", "tpu"], default=["cpu"])
  parser.add_argument("--only", nargs="+", choices=PIECES, default=PIECES)
  parser.add_argument("--shapes", nargs="+", help="by default tiny, 9m and 71m on a CPU, 71m and 1b on a TPU")
  parser.add_argument("--against", nargs="+", metavar="FORM", help="on a CPU, these plain forms alone")
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--out", type=output_file, help="rows that it has already stay, unless they are measured again")
  arguments = parser.parse_args()
  stored = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {}
  for where in arguments.on:
    found = {"jax": jax.__version__}
    if where == "cpu":
      found |= {"cpus": os.cpu_count(), "processor": processor(), "platform": platform.platform()}
    else:
      found |= {"libtpu": importlib.metadata.version("libtpu"), "topology": TOPOLOGY}
    part = stored.setdefault(where, {"rows": []})
    part["machine"] = found
    for name in arguments.only:
      if where == "tpu" and name == "step":
        continue
      for shape in arguments.shapes or SHAPES[where]:
        if where == "cpu":
          measured = measure_on_cpu(name, shape, arguments.repeats, arguments.against)
          show_cpu(measured)
        else:
          measured = measure_on_tpu(name, shape)
          show_tpu(measured)
        again = {(row["piece"], row["shape"], row["against"]) for row in measured}
        kept = [row for row in part["rows"] if (row["piece"], row["shape"], row["against"]) not in again]
        part["rows"] = kept + measured
        if arguments.out:
          arguments.out.write_text(json.dumps(stored, indent=1) + "\n")


def processor() -> str:
  """The name of the processor, from Linux."""
  path = Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.is_file() else []
  return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
  main()

"""Every parameter of the model, one declaration each: shape, logical axes, where it starts, whether it decays, who
uses it, what it is called elsewhere.

The module's declarations, initial draws, the mask of weight decay, counts, FLOPs, the parts of the diagnostics and the
names in other layouts are read from this table. Dimensions are those of `model/transformer.py`.

`python -c "from mixln_jax.model.parameters import describe; print(describe())"` prints it for the default config.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.model.columns import Columns
from mixln_jax.parallel import rules
from mixln_jax.parallel.mesh import attach
from mixln_jax.placement import LEARNED, SUBLAYERS, Table
from mixln_jax.text import aligned

LAYERS = "layers/"
GAIN = "gain_"  # what the part of a norm's gain ends with


@dataclasses.dataclass(frozen=True)
class Param:
  """One parameter. Those below `layers/` hold all layers, stacked along their first axis.

  Attributes:
    path: its name in the tree, `layers/query`. It seeds the draw, so it never changes.
    shape: as stored.
    axes: the logical axis of each dimension (`parallel/rules.py`).
    std: standard deviation that it is drawn with, one number or one for each layer [L]; None: it is not drawn.
    value: what one that is not drawn starts from, one number or one for each layer [L].
    used_L: which layers use it, bool [L]; None: all do, or it lies outside the layers.
    part: what it belongs to in the diagnostics, as a prefix of a statistic's name: `attention/` and `mlp/` (weights and
      biases), `attention/gain_` and `mlp/gain_` (gains of norms, those of heads among them), `embedding/`, `head/`,
      `final_norm/`; None for what else a placement learns.
    elsewhere: its name in LLaMA's layout, without the layer's `model.layers.0.`; "" where it depends on the placement
      (gains of norms); None where it has none.
    input_axes: of a matrix in a layer, how many of its leading dimensions are summed over; 0 for all else.
    logical_shape: the shape without columns that only pad the MLP.
  """

  path: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  std: float | np.ndarray | None = None
  value: float | np.ndarray = 1.0
  used_L: np.ndarray | None = None
  part: str | None = None
  elsewhere: str | None = None
  input_axes: int = 0
  logical_shape: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    if not self.logical_shape:
      object.__setattr__(self, "logical_shape", self.shape)

  @property
  def name(self) -> str:
    """Its name within the layer, or within the model."""
    return self.path.removeprefix(LAYERS)

  @property
  def in_layers(self) -> bool:
    return self.path.startswith(LAYERS)

  @property
  def drawn(self) -> bool:
    """Whether it is a matrix, the embedding or the head: drawn at random, and multiplied with activations."""
    return self.std is not None

  @property
  def decays(self) -> bool:
    """Whether weight decay is for it: never for gains, biases and scalars."""
    return self.drawn

  @property
  def size(self) -> int:
    """Numbers that the model has of it: without padding, and without layers that do not use it."""
    if self.used_L is None:
      return math.prod(self.logical_shape)
    return math.prod(self.logical_shape[1:]) * int(self.used_L.sum())


def parameters(model: ModelConfig, columns: Columns | None = None) -> dict[str, Param]:
  """The table of config.model's parameters, by path.

  Args:
    model: config.model; where the parameters start, and who uses them, is what its placement says.
    columns: of one of several placements that share a tree (`Columns.of_many`), which has what any of them uses; by
      default of config.placement alone.
  """
  table = config_lib.table(model)
  columns = Columns.of(table) if columns is None else columns
  vocab, width = model.vocab_size, model.embed_dim
  embedding_std, std = model.embedding_deviation, model.init_deviation
  declared = [
    Param(
      "embedding",
      (vocab, width),
      ("vocab", "embed"),
      embedding_std,
      part="embedding/",
      elsewhere="model.embed_tokens.weight",
    ),
    Param("final_norm", (width,), ("norm",), part="final_norm/", elsewhere="model.norm.weight"),
  ]
  if not model.tied_embeddings:
    head = Param(
      "head", (width, vocab), ("embed", "vocab"), std, part="head/", elsewhere="lm_head.weight", input_axes=1
    )
    declared.append(head)
  stacked = [*_matrices(model, table), *_biases(model), *_gains(model, table, columns)]
  stacked += [*_head_norms(model, table, columns), *_learned(model, table, columns)]
  for param in stacked:
    declared.append(_stack(param, model.num_layers))
  return {param.path: param for param in declared}


def _stack(param: Param, num_layers: int) -> Param:
  """A parameter of one layer as that of all of them."""
  return dataclasses.replace(
    param,
    path=LAYERS + param.path,
    shape=(num_layers, *param.shape),
    axes=("layers", *param.axes),
    logical_shape=(num_layers, *param.logical_shape),
  )


def _matrices(model: ModelConfig, table: Table) -> Iterable[Param]:
  """The seven matrices of a layer. Only the MLP's width may be stored wider than it is."""
  width, heads, kv_heads = model.embed_dim, model.num_heads, config_lib.num_kv_heads(model)
  head, hidden, stored = config_lib.head_dim(model), model.mlp_dim, config_lib.stored_mlp_dim(model)

  def matrix(name: str, sublayer: str, shape: Any, axes: Any, elsewhere: str, **more: Any) -> Param:
    logical = more.get("logical_shape", shape)
    # Xavier's fans, of the matrix as LLaMA has it: the model's width on one side, all the rest on the other.
    xavier = math.sqrt(2 / (width + math.prod(logical) // width))
    std_L = np.where(table.column(sublayer, "xavier"), xavier, model.init_deviation)
    if name not in ("query", "key"):
      std_L = std_L * table.column(sublayer, "branch_gain")
    if name in ("output", "down"):
      std_L = std_L * table.column(sublayer, "output_deviation")
    return Param(name, shape, axes, std_L, part=f"{sublayer}/", elsewhere=elsewhere, **{"input_axes": 1, **more})

  queries, keys = (width, heads, head), (width, kv_heads, head)
  yield matrix("query", "attention", queries, ("embed", "heads", "head_dim"), "self_attn.q_proj.weight")
  yield matrix("key", "attention", keys, ("embed", "kv_heads", "head_dim"), "self_attn.k_proj.weight")
  yield matrix("value", "attention", keys, ("embed", "kv_heads", "head_dim"), "self_attn.v_proj.weight")
  output_axes = ("heads", "head_dim", "embed")
  yield matrix("output", "attention", (heads, head, width), output_axes, "self_attn.o_proj.weight", input_axes=2)
  wide = {"logical_shape": (width, hidden)}
  yield matrix("gate", "mlp", (width, stored), ("embed", "mlp"), "mlp.gate_proj.weight", **wide)
  yield matrix("up", "mlp", (width, stored), ("embed", "mlp"), "mlp.up_proj.weight", **wide)
  narrow = {"logical_shape": (hidden, width)}
  yield matrix("down", "mlp", (stored, width), ("mlp", "embed"), "mlp.down_proj.weight", **narrow)


def _biases(model: ModelConfig) -> Iterable[Param]:
  if not model.qkv_bias:
    return
  kv_heads, head = config_lib.num_kv_heads(model), config_lib.head_dim(model)
  for name, heads, axis in (
    ("query", model.num_heads, "heads"),
    ("key", kv_heads, "kv_heads"),
    ("value", kv_heads, "kv_heads"),
  ):
    elsewhere = f"self_attn.{name[0]}_proj.bias"
    yield Param(f"{name}_bias", (heads, head), (axis, "head_dim"), value=0.0, part="attention/", elsewhere=elsewhere)


def _gains(model: ModelConfig, table: Table, columns: Columns) -> Iterable[Param]:
  """Gains of a sublayer's norms, in order of application: `attention_norm`, `attention_norm_2`, …"""
  for sublayer, num_gains in zip(SUBLAYERS, columns.num_gains, strict=True):
    num_gains_L = np.array([row.num_gains for row in table.rows(sublayer)])
    for number in range(1, num_gains + 1):
      yield Param(
        gain_name(sublayer, number - 1),
        (model.embed_dim,),
        ("norm",),
        used_L=num_gains_L >= number,
        part=f"{sublayer}/{GAIN}",
        elsewhere="",
      )


def gain_name(sublayer: str, index: int) -> str:
  """Name of a sublayer's gain, `index` counted from 0 in order of application."""
  return f"{sublayer}_norm" if index == 0 else f"{sublayer}_norm_{index + 1}"


def _head_norms(model: ModelConfig, table: Table, columns: Columns) -> Iterable[Param]:
  """Gains of the norms of queries, keys and values: of each head alone, or (`_full`) of all heads together."""
  kv_heads, head = config_lib.num_kv_heads(model), config_lib.head_dim(model)
  each = ((head,), ("head_dim",))
  all_queries = ((model.num_heads, head), ("heads", "head_dim"))
  all_keys = ((kv_heads, head), ("kv_heads", "head_dim"))
  for name, column, (shape, axes), elsewhere in (
    ("query_norm", "qk_norm", each, "self_attn.q_norm.weight"),
    ("key_norm", "qk_norm", each, "self_attn.k_norm.weight"),
    ("query_norm_full", "qk_norm_full", all_queries, "self_attn.q_norm.weight"),
    ("key_norm_full", "qk_norm_full", all_keys, "self_attn.k_norm.weight"),
    ("value_norm", "v_norm", each, "self_attn.v_norm.weight"),
  ):
    if columns.uses("attention", column):
      used_L = table.column("attention", column)
      yield Param(name, shape, axes, used_L=used_L, part=f"attention/{GAIN}", elsewhere=elsewhere)


def _learned(model: ModelConfig, table: Table, columns: Columns) -> Iterable[Param]:
  """What else a placement learns: GPAS's gate, and factors of the sublayer rule."""
  if any(columns.uses(sublayer, "gpas") for sublayer in SUBLAYERS):
    used_L = table.column("attention", "gpas") | table.column("mlp", "gpas")
    yield Param("gpas", (), (), value=0.0, used_L=used_L, elsewhere="gpas_block.gate")
  places = {"attention": "self_attn", "mlp": "mlp"}
  for sublayer in SUBLAYERS:
    for name, (factor, kind) in LEARNED.items():
      if not columns.uses(sublayer, name):
        continue
      used_L = table.column(sublayer, name)
      shape, axes = ((model.embed_dim,), ("norm",)) if kind == "vector" else ((), ())
      value: float | np.ndarray = 1.0
      if factor == "c_out":
        value = np.where(used_L, table.column(sublayer, "initial_c_out"), 1.0)
      elsewhere = f"{places[sublayer]}.{name}"
      yield Param(f"{sublayer}_{name}", shape, axes, value=value, used_L=used_L, elsewhere=elsewhere)


# What is read from the table.


def abstract_params(model: ModelConfig, columns: Columns | None = None) -> Any:
  """The tree of the parameters' shapes and types; nothing is traced. Arguments as `parameters` has them."""
  dtype, table = jnp.dtype(model.param_dtype), parameters(model, columns)
  return tree_of({path: jax.ShapeDtypeStruct(param.shape, dtype) for path, param in table.items()})


def param_shardings(model: ModelConfig, mesh: Mesh, columns: Columns | None = None) -> Any:
  """The tree of the parameters' shardings on a mesh.

  Raises:
    InputError: the mesh does not divide a tensor, or leaves a large one replicated.
  """
  axes = {path: PartitionSpec(*param.axes) for path, param in parameters(model, columns).items()}
  return rules.shardings(abstract_params(model, columns), tree_of(axes), mesh)


def tree_of(by_path: Mapping[str, Any]) -> dict[str, Any]:
  """`{"layers/query": x, "head": y}` as the tree of parameters."""
  tree: dict[str, Any] = {"layers": {}}
  for path, value in by_path.items():
    node = tree["layers"] if path.startswith(LAYERS) else tree
    node[path.removeprefix(LAYERS)] = value
  return tree


def abstract_sharded_params(model: ModelConfig, mesh: Mesh) -> Any:
  """Shapes, types and shardings of the parameters on a mesh: what a checkpoint is restored onto."""
  return attach(abstract_params(model), param_shardings(model, mesh))


def count_params(model: ModelConfig) -> int:
  """Number of parameters that the model has: without columns that only pad the MLP, and what a layer does not use."""
  return sum(param.size for param in parameters(model).values())


def used_by_layer(model: ModelConfig) -> dict[str, np.ndarray]:
  """Which layers use each parameter of `layers/` that not every placement has: name in the layer -> bool [L]."""
  table = parameters(model).values()
  return {param.name: param.used_L for param in table if param.used_L is not None}


def param_paths(params: Mapping[str, Any]) -> Any:
  """The tree of the parameters' names, `layers/query`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
  )


def describe(model: ModelConfig | None = None) -> str:
  """The table as text, a line a parameter."""
  model = config_lib.base().model if model is None else model
  rows = [("path", "shape", "axes", "starts at", "decays", "layers", "elsewhere")]
  for param in parameters(model).values():
    start = f"std {np.mean(param.std):.4g}" if param.std is not None else f"{np.mean(param.value):.4g}"
    layers = "" if param.used_L is None else f"{int(param.used_L.sum())} of {len(param.used_L)}"
    decays = "yes" if param.decays else "no"
    rows.append(
      (param.path, str(param.shape), " ".join(param.axes), start, decays, layers, param.elsewhere or "by its placement")
    )
  return "\n".join(aligned(rows))

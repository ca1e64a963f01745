"""The table of all parameters of the model, one declaration each: shape, logical axes, initial value, weight decay,
the layers that use it, and its name in LLaMA's layout.

Linen's declarations, initial draws, the weight-decay mask, counts, FLOPs, the parts of the diagnostics and the names in
other layouts all come from this table. Dimensions are those of `model/transformer.py`.

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
from mixln_jax.model.columns import WIRED, Columns
from mixln_jax.model.norm import EXTRA_PARAMETERS
from mixln_jax.parallel import rules
from mixln_jax.parallel.mesh import attach
from mixln_jax.placement import LEARNED, SUBLAYERS, Row, Table
from mixln_jax.text import aligned

LAYERS = "layers/"
GAIN = "gain_"  # what the part of a norm's gain ends with

# The groups of parameters that can have a learning rate, weight decay or epsilon of their own. `attention` and `mlp`
# are the matrices of the two sublayers, `gains` all parameters of the norms inside the layers, `biases` those of
# projections, and `scalars` all other parameters that a placement adds.
GROUPS = ("embedding", "head", "attention", "mlp", "gains", "final_norm", "biases", "scalars")


@dataclasses.dataclass(frozen=True)
class Param:
  """One parameter. Those below `layers/` hold all layers, stacked along their first axis.

  Attributes:
    path: its name in the tree, such as `layers/query`. It seeds the draw, so it never changes.
    shape: as stored.
    axes: the logical axis of each dimension (`parallel/rules.py`).
    std: the standard deviation of its random initial values, one number or one per layer [L]; None if it is not random.
    value: its initial value if it is not random, one number or one per layer [L, …].
    used_L: the layers that use it, bool [L]; None if all do, or if it lies outside the layers.
    part: the diagnostics' statistics that it counts towards, as the prefix of their names: `attention/` and `mlp/` for
      weights and biases, `attention/gain_` and `mlp/gain_` for gains of norms (those of heads too), `embedding/`,
      `head/`, `final_norm/`; None for all other parameters that a placement adds.
    elsewhere: its name in LLaMA's layout, without the prefix `model.layers.0.` of its layer. A sublayer's norm has a
      name there that depends on the placement, and `elsewhere` is only the part after that name. None if LLaMA's
      layout has no such parameter.
    norm: for a parameter of a sublayer's norm, the name of that norm's gain; else "".
    input_L: for the same parameters, the layers where the norm stands before its branch and not after it, bool [L].
    input_axes: for a matrix that LLaMA's layout stores transposed, how many of the leading dimensions here are inputs;
      0 for all other parameters.
    shape_elsewhere: for a tensor that LLaMA's layout stores without transposing, its shape there (of one layer); None
      if it is flattened.
    logical_shape: the shape without the columns that only pad the MLP.
    rate, decay, epsilon: factors on config.optimizer's learning rate, weight decay and Adam epsilon for this parameter,
      one number or one per layer [L] (`training/groups.py` sets them).
  """

  path: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  std: float | np.ndarray | None = None
  value: float | np.ndarray = 1.0
  used_L: np.ndarray | None = None
  part: str | None = None
  elsewhere: str | None = None
  norm: str = ""
  input_L: np.ndarray | None = None
  input_axes: int = 0
  shape_elsewhere: tuple[int, ...] | None = None
  logical_shape: tuple[int, ...] = ()
  rate: float | np.ndarray = 1.0
  decay: float | np.ndarray | None = None
  epsilon: float | np.ndarray = 1.0

  def __post_init__(self) -> None:
    if not self.logical_shape:
      object.__setattr__(self, "logical_shape", self.shape)
    if self.decay is None:
      object.__setattr__(self, "decay", float(self.drawn))  # gains, biases and scalars do not decay

  @property
  def name(self) -> str:
    """Its name within the layer, or within the model."""
    return self.path.removeprefix(LAYERS)

  @property
  def in_layers(self) -> bool:
    return self.path.startswith(LAYERS)

  @property
  def drawn(self) -> bool:
    """Whether its initial values are random: it is a matrix, the embedding or the head."""
    return self.std is not None

  @property
  def decays(self) -> bool:
    """Whether weight decay applies to it in any layer."""
    return bool(np.any(self.decay))

  @property
  def is_layer_matrix(self) -> bool:
    """Whether it is one of the seven matrices of a layer, stacked."""
    return self.in_layers and self.input_axes > 0

  @property
  def group(self) -> str:
    """Which of GROUPS it belongs to."""
    if self.path in ("embedding", "head"):
      return self.path
    if self.is_layer_matrix:
      return str(self.part).removesuffix("/")
    if self.part == "final_norm/":
      return "final_norm"
    if str(self.part).endswith(GAIN):
      return "gains"
    return "scalars" if self.part is None else "biases"

  @property
  def folded_axes(self) -> tuple[tuple[int, ...], ...]:
    """Dimensions grouped as those of a matrix.

    For the layers' matrices the groups are ((layers), (inputs), (outputs)), with heads and head_dim in one group; for
    all other parameters each dimension is a group.
    """
    ndim = len(self.shape)
    if not self.is_layer_matrix:
      return tuple((axis,) for axis in range(ndim))
    first_output = 1 + self.input_axes
    return (0,), tuple(range(1, first_output)), tuple(range(first_output, ndim))

  @property
  def size(self) -> int:
    """How many of its numbers the model uses: without padding, and without layers that do not use it."""
    if self.used_L is None:
      return math.prod(self.logical_shape)
    return math.prod(self.logical_shape[1:]) * int(self.used_L.sum())


def parameters(model: ModelConfig, columns: Columns | None = None) -> dict[str, Param]:
  """The table of config.model's parameters, by path.

  Args:
    model: config.model. Its placement decides the initial values and the layers that use a parameter.
    columns: for a tree that several placements share (`Columns.of_many`), which has all parameters that any of them
      uses; by default those of this placement alone.
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
      shape_elsewhere=(vocab, width),
    ),
  ]
  if model.final_norm:
    declared += _norm(model, "final_norm", "model.norm.", "final_norm/")
  declared += _of_embedding(model)
  if model.norm == "dyt":
    declared.append(Param("embedding_scale", (1,), ("norm",), value=math.sqrt(width), elsewhere="model.embed_scale"))
  declared += _of_read_out(model, columns)
  if not model.tied_embeddings:
    head = Param(
      "head", (width, vocab), ("embed", "vocab"), std, part="head/", elsewhere="lm_head.weight", input_axes=1
    )
    declared.append(head)
  declared += _of_head(model)
  stacked = [*_matrices(model, table), *_biases(model), *_gains(model, table, columns)]
  stacked += [*_head_norms(model, table, columns), *_learned(model, table, columns), *_wired(model, table, columns)]
  for param in stacked:
    declared.append(_stack(param, model.num_layers))
  return {param.path: param for param in declared}


def _of_embedding(model: ModelConfig) -> list[Param]:
  """The tables that are added to the embedding, and its norm (BERT, arXiv 1810.04805)."""
  width, std = model.embed_dim, model.embedding_deviation
  params = []
  for name, rows in (("position", model.learned_positions), ("token_type", model.token_types)):
    if rows:
      shape, elsewhere = (rows, width), f"model.embed_{name}s.weight"
      axes = ("norm", "embed")
      params.append(
        Param(f"{name}_embedding", shape, axes, std, part="embedding/", elsewhere=elsewhere, shape_elsewhere=shape)
      )
  if model.embedding_norm:
    params += _norm(model, "embedding_norm", "model.embed_norm.", "embedding/")
  return params


def _of_head(model: ModelConfig) -> list[Param]:
  """The parameters of BERT's masked-token head besides its matrix: a dense layer with a norm, and logit biases."""
  if not model.head_transform:
    return []
  width, part = model.embed_dim, "head/"
  matrix = Param("head_dense", (width, width), ("embed", "norm"), model.init_deviation, part=part, input_axes=1)
  return [
    dataclasses.replace(matrix, elsewhere="head_transform.weight"),
    Param("head_dense_bias", (width,), ("norm",), value=0.0, part=part, elsewhere="head_transform.bias"),
    *_norm(model, "head_norm", "head_norm.", part),
    Param("head_bias", (model.vocab_size,), ("vocab",), value=0.0, part=part, elsewhere="lm_head.bias"),
  ]


def _stack(param: Param, num_layers: int) -> Param:
  """The stacked parameter of all layers, from that of one layer."""
  return dataclasses.replace(
    param,
    path=LAYERS + param.path,
    shape=(num_layers, *param.shape),
    axes=("layers", *param.axes),
    logical_shape=(num_layers, *param.logical_shape),
  )


def _matrices(model: ModelConfig, table: Table) -> Iterable[Param]:
  """The matrices of a layer: seven, or six with `activation=gelu`. Only the MLP's width may be padded."""
  width, heads, kv_heads = model.embed_dim, model.num_heads, config_lib.num_kv_heads(model)
  head, hidden, stored = config_lib.head_dim(model), model.mlp_dim, config_lib.stored_mlp_dim(model)

  def matrix(name: str, sublayer: str, shape: Any, axes: Any, elsewhere: str, **more: Any) -> Param:
    logical = more.get("logical_shape", shape)
    # Xavier's fans are those of LLaMA's two-dimensional matrix: the model's width, and all other dimensions together.
    xavier = math.sqrt(2 / (width + math.prod(logical) // width))
    std_L = np.where(table.column(sublayer, "xavier"), xavier, model.init_deviation) * model.matrix_std_multiplier
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
  if model.activation == "swiglu":
    yield matrix("gate", "mlp", (width, stored), ("embed", "mlp"), "mlp.gate_proj.weight", **wide)
  yield matrix("up", "mlp", (width, stored), ("embed", "mlp"), "mlp.up_proj.weight", **wide)
  narrow = {"logical_shape": (hidden, width)}
  yield matrix("down", "mlp", (stored, width), ("mlp", "embed"), "mlp.down_proj.weight", **narrow)


def _biases(model: ModelConfig) -> Iterable[Param]:
  if model.qkv_bias:
    yield from _qkv_biases(model)
  if model.biases:
    out = Param("output_bias", (model.embed_dim,), ("norm",), value=0.0, part="attention/")
    yield dataclasses.replace(out, elsewhere="self_attn.o_proj.bias")
    up = Param("up_bias", (config_lib.stored_mlp_dim(model),), ("mlp",), value=0.0, part="mlp/")
    yield dataclasses.replace(up, elsewhere="mlp.up_proj.bias", logical_shape=(model.mlp_dim,))
    down = Param("down_bias", (model.embed_dim,), ("norm",), value=0.0, part="mlp/")
    yield dataclasses.replace(down, elsewhere="mlp.down_proj.bias")


def _qkv_biases(model: ModelConfig) -> Iterable[Param]:
  kv_heads, head = config_lib.num_kv_heads(model), config_lib.head_dim(model)
  for name, heads, axis in (
    ("query", model.num_heads, "heads"),
    ("key", kv_heads, "kv_heads"),
    ("value", kv_heads, "kv_heads"),
  ):
    elsewhere = f"self_attn.{name[0]}_proj.bias"
    yield Param(f"{name}_bias", (heads, head), (axis, "head_dim"), value=0.0, part="attention/", elsewhere=elsewhere)


# Initial alpha of the point-wise norms. DyT's depends on the part of the model, as in its code for a LLaMA of 7B
# (arXiv 2503.10622, §7 and appendix); the kinds with a bias start at 0.5 everywhere.
DYT_ALPHA = {"attention/": 0.8, "mlp/": 0.2, "final_norm/": 0.2}
ALPHA = 0.5


def _norm(model: ModelConfig, name: str, elsewhere: str, part: str, **more: Any) -> list[Param]:
  """The parameters of one norm of config.model.norm's kind; `name` is that of its gain."""
  params = [Param(name, (model.embed_dim,), ("norm",), part=part, elsewhere=f"{elsewhere}weight", **more)]
  for extra, is_vector in EXTRA_PARAMETERS[model.norm].items():
    first = 0.0
    if extra == "alpha":
      first = DYT_ALPHA[part.removesuffix(GAIN)] if model.norm == "dyt" else ALPHA
    shape = (model.embed_dim,) if is_vector else (1,)
    params.append(
      Param(f"{name}_{extra}", shape, ("norm",), value=first, part=part, elsewhere=f"{elsewhere}{extra}", **more)
    )
  return params


def _gains(model: ModelConfig, table: Table, columns: Columns) -> Iterable[Param]:
  """The sublayers' norms, in order of application: `attention_norm`, `attention_norm_2`, …"""
  for sublayer, num_gains in zip(SUBLAYERS, columns.num_gains, strict=True):
    num_gains_L = np.array([row.num_gains for row in table.rows(sublayer)])
    for number in range(1, num_gains + 1):
      name = gain_name(sublayer, number - 1)
      input_L = np.array([row.gain_index("norm_in") == number - 1 for row in table.rows(sublayer)])
      used_L = num_gains_L >= number
      yield from _norm(model, name, "", f"{sublayer}/{GAIN}", norm=name, used_L=used_L, input_L=input_L)


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
  """The other parameters of a placement with one stream: GPAS's gate, and learned factors of the sublayer rule."""
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


# Parameters of several residual streams. `elsewhere` and `shape_elsewhere` follow the methods' own code.

STREAM_AXES = ("stream_from", "stream_to")
HYPER = {"attention": "attn_hc.", "mlp": "mlp_hc."}


def _wired(model: ModelConfig, table: Table, columns: Columns) -> Iterable[Param]:
  """The parameters of the wirings of a layer's two sublayers, of the streams' norms and of value residuals."""
  if columns.uses("attention", f"{WIRED}x0"):
    used_L = np.array([row.wiring == "x0" for row in table.rows("attention")])
    yield Param(
      "x0_lambdas", (2,), ("norm",), value=_for_each(used_L, [1.0, 0.0]), used_L=used_L, elsewhere="x0_lambdas"
    )
  for column, shape in (("value_residual", ()), ("value_residual_two", (2,))):
    if columns.uses("attention", column):
      name = "value_lambda" if column == "value_residual" else "value_lambdas"
      used_L, axes = table.column("attention", column), ("norm",) * len(shape)
      elsewhere = f"self_attn.{name}"
      yield Param(name, shape, axes, value=0.5, used_L=used_L, elsewhere=elsewhere, shape_elsewhere=shape)
  for sublayer in SUBLAYERS:
    short = "attn" if sublayer == "attention" else "mlp"
    if columns.uses(sublayer, "norm_streams"):
      used_L = table.column(sublayer, "norm_streams")
      for index, letter in enumerate("xy"):
        name, part = f"{sublayer}_stream_norm_{index}", f"{sublayer}/{GAIN}"
        yield from _norm(model, name, f"{short}_{letter}_norm.", part, used_L=used_L)
    if columns.uses(sublayer, f"{WIRED}attention"):
      # The first sublayer has only the embedding to read.
      used_L = np.array([row.wiring == "attention" and sum(row.read) > 1 for row in table.rows(sublayer)])
      yield from _sources(model, f"{sublayer}_source", f"{short}_res", used_L)
    yield from _of_wirings(model, sublayer, table.rows(sublayer), columns)


def _of_wirings(model: ModelConfig, sublayer: str, rows: list[Row], columns: Columns) -> Iterable[Param]:
  """The parameters of a sublayer's hyper-connections. Static and dynamic ones share tensors; so do iHC and mHC."""
  declared: dict[str, Param] = {}
  users: dict[str, set[str]] = {}
  for wiring, declare in _WIRINGS.items():
    if columns.uses(sublayer, f"{WIRED}{wiring}"):
      for param in declare(model, rows, columns.streams.num):
        declared[param.path] = param
        users.setdefault(param.path, set()).add(wiring)
  for name, param in declared.items():
    yield dataclasses.replace(
      param,
      path=f"{sublayer}_{name}",
      used_L=np.array([row.wiring in users[name] for row in rows]),
      elsewhere=f"{HYPER[sublayer]}{param.elsewhere}",
      shape_elsewhere=param.shape,
    )


def _for_each(used_L: np.ndarray, value: Any) -> np.ndarray:
  """An initial value for each layer, [L, …]: `value` where the layer uses the parameter, else 1."""
  value = np.asarray(value, float)
  return np.where(used_L.reshape((-1,) + (1,) * value.ndim), value, 1.0)


def _sources(model: ModelConfig, name: str, elsewhere: str, used_L: np.ndarray | None) -> list[Param]:
  """The query and the gain of a softmax over sources; every query starts at 0 (arXiv 2603.15031, §3)."""
  width = model.embed_dim
  query = Param(f"{name}_query", (width,), ("norm",), value=0.0, used_L=used_L, elsewhere=f"{elsewhere}_proj.weight")
  gain = Param(f"{name}_norm", (width,), ("norm",), used_L=used_L, elsewhere=f"{elsewhere}_norm.weight")
  return [dataclasses.replace(query, shape_elsewhere=(1, width)), gain]


def _static(_model: ModelConfig, rows: list[Row], num: int) -> list[Param]:
  """Hyper-connections (arXiv 2409.19606, eq. 2 to 5): A [N, N + 1], its first column read and the others mix; B [N]."""
  alpha_L = []
  for row in rows:
    row = row.with_streams(num, kept=True)
    alpha_L.append(np.concatenate([np.array(row.read)[:, None], np.array(row.mix)], axis=1))
  write_L = np.array([row.with_streams(num, kept=True).write for row in rows])
  return [
    Param("hc_alpha", (num, num + 1), STREAM_AXES, value=np.stack(alpha_L), elsewhere="static_alpha"),
    Param("hc_beta", (num,), ("norm",), value=write_L, elsewhere="static_beta"),
  ]


def _dynamic(norm: str, scale_shape: tuple[int, ...]) -> Any:
  """Dynamic hyper-connections (eq. 10 to 13). `norm`: `rmsnorm`, `layernorm`, or "" for an RMSNorm without a gain."""

  def declare(model: ModelConfig, rows: list[Row], num: int) -> list[Param]:
    width, scale_axes = model.embed_dim, ("norm",) * len(scale_shape)
    params = [
      *_static(model, rows, num),
      Param("hc_dynamic_alpha", (width, num + 1), ("embed", "norm"), 0.0, elsewhere="dynamic_alpha_fn"),
      Param("hc_dynamic_beta", (width,), ("embed",), 0.0, elsewhere="dynamic_beta_fn"),
      Param("hc_dynamic_alpha_scale", scale_shape, scale_axes, value=0.01, elsewhere="dynamic_alpha_scale"),
      Param("hc_dynamic_beta_scale", scale_shape, scale_axes, value=0.01, elsewhere="dynamic_beta_scale"),
    ]
    if norm:
      params.append(Param("hc_norm", (width,), ("norm",), elsewhere="norm.weight"))
    if norm == "layernorm":
      params.append(Param("hc_norm_bias", (width,), ("norm",), value=0.0, elsewhere="norm.bias"))
    return params

  return declare


def _manifold(*names: str) -> Any:
  """iHC and mHC (arXiv 2512.24880, eq. 7 and 8): φ, b and α for each of pre (read), post (write) and res (mix)."""

  def declare(model: ModelConfig, rows: list[Row], num: int) -> list[Param]:
    std_L = np.array([row.dynamic_std for row in rows])
    params = []
    for name in names:
      shape = (num, num) if name == "res" else (num,)
      bias_L = []
      for row in rows:
        bias = np.zeros(shape)
        target = {"pre": row.read, "res": row.mix, "post": None}[name]
        if target is not None and row.static_size != 0.0:
          # The sigmoid, and the balanced exponential, of +size and -size are close to 1 and 0.
          bias = row.static_size * (2.0 * np.array(target) - 1.0)
        bias_L.append(bias)
      size, axes = math.prod(shape), STREAM_AXES[: len(shape)]
      params += [
        Param(f"hc_phi_{name}", (num * model.embed_dim, size), ("embed", "norm"), std_L, elsewhere=f"phi_{name}"),
        Param(f"hc_b_{name}", shape, axes, value=np.stack(bias_L), elsewhere=f"b_{name}"),
        Param(f"hc_scale_{name}", (), (), value=0.01, elsewhere=f"alpha_{name}"),
      ]
    return params

  return declare


def _v4(parts: int, scale: float) -> Any:
  """iHC and mHC as DeepSeek-V4 stores them: one matrix and one base for all parts, and a scale for each part."""

  def declare(model: ModelConfig, rows: list[Row], num: int) -> list[Param]:
    size = 2 * num if parts == 2 else 2 * num + num * num
    base = np.zeros(size)
    if parts == 2:
      base[:num] = -math.log(num - 1)
    std_L = np.array([row.dynamic_std for row in rows])
    base_L = np.stack([base] * len(rows))
    return [
      Param("hc_fn", (size, num * model.embed_dim), ("norm", "embed"), std_L, elsewhere="fn"),
      Param("hc_base", (size,), ("norm",), value=base_L, elsewhere="base"),
      Param("hc_scale", (parts,), ("norm",), value=scale, elsewhere="scale"),
    ]

  return declare


# wiring -> function(config.model, the sublayer's rows, number of streams) -> its parameters, named without the
# sublayer.
_WIRINGS = {
  "hc": _static,
  "dhc": _dynamic("rmsnorm", (1,)),
  "dhc_layernorm": _dynamic("layernorm", (1,)),
  "dhc_identity": _dynamic("", ()),
  "ihc": _manifold("pre", "post"),
  "mhc": _manifold("pre", "post", "res"),
  "ihc_v4": _v4(2, 0.01),
  "mhc_v4": _v4(3, 1.0),
}


def _of_read_out(model: ModelConfig, columns: Columns) -> list[Param]:
  """The parameters of the read-out of several streams."""
  streams, width = columns.streams, model.embed_dim
  if streams.read_out == "siamese":
    params = []
    for index, letter in enumerate("xy"):
      params += _norm(model, f"stream_norm_{index}", f"model.{letter}_norm.", "final_norm/")
    return params
  if streams.read_out == "attention":
    return _sources(model, "source", "model.res", None)
  if streams.read_out == "weighted_sum":
    base, scale = (-math.log(streams.num - 1), 0.01) if streams.kind == "ihc_v4" else (0.0, 1.0)
    shape = (streams.num, streams.num * width)
    fn = Param("hc_head_fn", shape, ("norm", "embed"), 0.02, elsewhere="model.hc_head.hc_fn", shape_elsewhere=shape)
    return [
      fn,
      Param("hc_head_base", (streams.num,), ("norm",), value=base, elsewhere="model.hc_head.hc_base"),
      Param("hc_head_scale", (1,), ("norm",), value=scale, elsewhere="model.hc_head.hc_scale"),
    ]
  return []


# Functions that read the table.


def abstract_params(model: ModelConfig, columns: Columns | None = None) -> Any:
  """The tree of the parameters' shapes and types, without tracing the model. Arguments as in `parameters`."""
  dtype, table = jnp.dtype(model.param_dtype), parameters(model, columns)
  return tree_of({path: jax.ShapeDtypeStruct(param.shape, dtype) for path, param in table.items()})


def param_shardings(model: ModelConfig, mesh: Mesh, columns: Columns | None = None) -> Any:
  """The tree of the parameters' shardings on a mesh.

  Raises:
    InputError: the mesh does not divide a tensor evenly, or leaves a large one replicated.
  """
  axes = {path: PartitionSpec(*param.axes) for path, param in parameters(model, columns).items()}
  return rules.shardings(abstract_params(model, columns), tree_of(axes), mesh)


def tree_of(by_path: Mapping[str, Any]) -> dict[str, Any]:
  """The tree of parameters from values by path, such as `{"layers/query": x, "head": y}`."""
  tree: dict[str, Any] = {"layers": {}}
  for path, value in by_path.items():
    node = tree["layers"] if path.startswith(LAYERS) else tree
    node[path.removeprefix(LAYERS)] = value
  return tree


def abstract_sharded_params(model: ModelConfig, mesh: Mesh) -> Any:
  """Shapes, types and shardings of the parameters on a mesh: the target that a checkpoint is restored onto."""
  return attach(abstract_params(model), param_shardings(model, mesh))


def count_params(model: ModelConfig) -> int:
  """Number of parameters of the model, without columns that only pad the MLP and without what a layer does not use."""
  return sum(param.size for param in parameters(model).values())


def used_by_layer(model: ModelConfig) -> dict[str, np.ndarray]:
  """The layers that use each parameter that not every placement has: name in the layer -> bool [L]."""
  table = parameters(model).values()
  return {param.name: param.used_L for param in table if param.used_L is not None}


def param_paths(params: Mapping[str, Any]) -> Any:
  """The tree of the parameters' names, `layers/query`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
  )


def describe(model: ModelConfig | None = None) -> str:
  """The table as text, one line per parameter."""
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

"""The LLaMA transformer with a norm placement for each layer, as one scan over stacked layers.

Dimensions, worn as suffixes:
  B batch            D width of the residual stream      H query heads         L layers
  T query position   F width of the MLP, as stored       G key-value heads     V vocabulary
  S key position     K width of a head                   N residual streams

The parameters are declared in `model/parameters.py`, the rule by which a sublayer meets the stream in
`model/residual.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.model import append_only
from mixln_jax.model import attention as attention_lib
from mixln_jax.model.attention_kernels import choose_attention, self_attention
from mixln_jax.model.columns import Columns, TracedRow, traced_rows
from mixln_jax.model.embedding import look_up
from mixln_jax.model.norm import norm, norm_params, rms_norm
from mixln_jax.model.parameters import gain_name, parameters
from mixln_jax.model.product import multiply
from mixln_jax.model.residual import Sources, Stream, Streams, Sublayer
from mixln_jax.model.wiring import READ_OUTS, ReadOut, weighted_sum
from mixln_jax.parallel.rules import constrain
from mixln_jax.placement import Streams as StreamsOfModel

Cache = dict[str, jax.Array]
Weights = dict[str, jax.Array]  # one layer's parameters by name
Observe = Callable[[dict[str, jax.Array], Any], Any]  # (a layer's taps, weights [B, T]) -> what to return of them
# Logical axes of the activations (parallel/rules.py says what they are sharded over).
STREAM = ("batch", "length", "activation_embed")  # B, T, D
QUERIES = ("batch", "length", "heads", "head_dim")  # B, T, H, K
KEYS = ("batch", "key_length", "kv_heads", "head_dim")  # B, S, G, K; values as well
HIDDEN = ("batch", "length", "mlp")  # B, T, F
LOGITS = ("batch", "length", "vocab")  # B, T, V

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Declared(NamedTuple):
  """What linen is told of a parameter."""

  name: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]


class Shared(NamedTuple):
  """What all layers read."""

  mask_BTS: jax.Array | None
  positions_BT: jax.Array
  rope: tuple[jax.Array, jax.Array] | None  # None: positions are learned
  segment_ids_BT: jax.Array | None
  weights_BT: jax.Array | None  # which positions count; read by `observe` alone
  first_values_BSGK: jax.Array | None = None  # of the first layer, where others mix them with their own
  alone: jax.Array | np.ndarray | None = None  # `Columns.alone`


class Varying(NamedTuple):
  """What differs from layer to layer, besides parameters."""

  columns: dict[str, Any]  # of the placement
  layer: jax.Array | int
  keep: jax.Array | None  # 0 removes the layer


class ByLayer(NamedTuple):
  """A model as a function of one layer.

  Attributes:
    first: the streams before the first layer.
    layers: what differs from layer to layer, stacked: parameters, and what `Varying` has.
    apply: (one layer of `layers`, the streams before it) -> the streams after it.
  """

  first: Streams | Sources
  layers: tuple[Any, Varying]
  apply: Callable[[tuple[Any, Varying], Streams | Sources], Streams | Sources]


class Attended(NamedTuple):
  """What attention says besides its output."""

  cache: Cache | None  # after this layer
  statistics: dict[str, jax.Array]  # of its softmax, where somebody observes


class Layer(nn.Module):
  """One transformer layer: two sublayers under the sublayer rule.

  Attributes:
    config: config.model.
    declared: the parameters of one layer.
    constant: the placement columns that are the same for all layers (`Columns.constant`).
    streams: the model's residual streams.
    observe: as `Transformer` has it.
    hides: as `Sublayer` has it.
  """

  config: Any  # FrozenConfigDict
  declared: tuple[Declared, ...]
  constant: tuple[tuple[str, Any], ...]
  streams: StreamsOfModel = StreamsOfModel()
  observe: Observe | None = None
  hides: bool = True

  @nn.compact
  def __call__(
    self, carry: tuple[Streams | Sources, Cache | None], varying: Varying, shared: Shared
  ) -> tuple[tuple[Streams | Sources, Cache | None], Any]:
    """Applies the layer.

    Args:
      carry: the streams before the layer, and the key-value cache of all layers or None.
      varying: this layer's own.
      shared: what all layers read.

    Returns:
      The carry after the layer, and its taps, or what `observe` makes of them.
    """
    before, cache = carry
    rows = traced_rows(self.constant, varying.columns)
    weights = {name: declare(self, self.config, name, shape, axes) for name, shape, axes in self.declared}

    def attend(h_BTD: jax.Array) -> tuple[jax.Array, Attended]:
      return self.attend(h_BTD, weights, rows.attention, cache, varying.layer, shared)

    def mlp(h_BTD: jax.Array) -> tuple[jax.Array, None]:
      return MLPS[self.config.activation](h_BTD, weights, self.config.dtype), None

    inputs = self.values(before)
    middle, attended, attention_taps = self.sublayer("attention", attend, inputs, weights, rows.attention)
    after, _, mlp_taps = self.sublayer("mlp", mlp, self.values(middle), weights, rows.mlp)

    if isinstance(after, Streams):
      after = after.replace(further=after.further[: self.streams.num_carried - 1])
      if isinstance(before, Streams) and before.first.owed is not None:
        after = after.replace(first=after.first.carried(self.config.norm))
    if varying.keep is not None:
      after = jax.tree.map(lambda new, old: jnp.where(varying.keep != 0, new, old), after, before)
    outputs = separate(after, self.config)
    taps = attention_taps | mlp_taps | {"stream_BTD": the_stream(outputs, self.streams, shared.alone)}
    if len(outputs) > 1:
      taps |= {f"stream_{index}_BTD": output_BTD for index, output_BTD in enumerate(outputs)}
    if self.observe is not None:
      # Of a constant: a statistic that is differentiated would be one more thing that the backward pass keeps.
      input_BTD = the_stream(separate(before, self.config), self.streams, shared.alone)
      seen = jax.lax.stop_gradient(taps | attended.statistics | {"input_BTD": input_BTD})
      taps = self.observe(seen, shared.weights_BT)
    return (after, attended.cache), taps

  def values(self, streams: Streams | Sources) -> list[jax.Array] | Sources:
    """All n streams at one point of the layer, also those that do not go from layer to layer."""
    if isinstance(streams, Sources):
      return streams
    values = separate(streams, self.config)
    return values + [jnp.zeros_like(values[0])] * (self.streams.num - len(values))

  def sublayer(
    self,
    name: str,
    branch: Callable[[jax.Array], tuple[jax.Array, Any]],
    streams: list[jax.Array] | Sources,
    weights: Weights,
    row: TracedRow,
  ) -> tuple[Any, Any, dict[str, jax.Array]]:
    """The sublayer rule with this layer's row and parameters: the streams after it, what the branch said, its taps."""
    kind, prefix = self.config.norm, f"{name}_"
    gain_names = [gain_name(name, 0), gain_name(name, 1), gain_name(name, 2)]
    of_streams = [f"{name}_stream_norm_0", f"{name}_stream_norm_1"]
    learned = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
    for of_layer in ("gpas", "x0_lambdas"):
      if of_layer in weights:
        learned[of_layer] = weights[of_layer]
    rule = Sublayer(
      norms=[norm_params(weights, gain, kind) for gain in gain_names if gain in weights],
      stream_norms=[norm_params(weights, gain, kind) for gain in of_streams if gain in weights],
      learned=learned,
      row=row,
      kind=kind,
      epsilon=self.config.norm_epsilon,
      dtype=self.config.dtype,
      hides=self.hides,
    )
    with jax.named_scope(name):
      if isinstance(streams, Sources):
        after, said, terms = rule.append(branch, streams)
      else:
        after, said, terms = rule.apply(branch, streams)
    taps = {f"{name}_{term}": value for term, value in terms.items()}
    return jax.tree.map(_constrain_stream, after), said, taps

  def first_values(self, before: Streams | Sources, weights: Weights, varying: Varying, shared: Shared) -> jax.Array:
    """The values [B, S, G, K] that the layer's attention would read: those that later layers mix with their own."""
    rows = traced_rows(self.constant, varying.columns)
    found = []

    def values_alone(h_BTD: jax.Array) -> tuple[jax.Array, None]:
      found.append(self.project_values(h_BTD, weights, rows.attention, shared))
      return h_BTD, None

    self.sublayer("attention", values_alone, self.values(before), weights, rows.attention)
    return found[0]

  def attend(
    self,
    x_BTD: jax.Array,
    weights: Weights,
    row: TracedRow,
    cache: Cache | None,
    layer: jax.Array | int,
    shared: Shared,
  ) -> tuple[jax.Array, Attended]:
    """Attention: over the row's own positions, or over a cache, which it then updates."""
    c = self.config

    def norm_all_heads(name: str, x_BTHK: jax.Array, on: Any) -> jax.Array:
      if on is False:
        return x_BTHK
      x_BTE = x_BTHK.reshape(*x_BTHK.shape[:-2], -1)
      normed_BTE = rms_norm(x_BTE, weights[f"{name}_norm_full"].reshape(-1), epsilon=c.norm_epsilon, on=on)
      return normed_BTE.reshape(x_BTHK.shape).astype(x_BTHK.dtype)

    def project_and_rotate(name: str, axis: str) -> jax.Array:
      x_BTHK = norm_all_heads(name, self.project(name, axis, x_BTD, weights), row.qk_norm_full)
      x_BTHK = self.norm_each_head(name, x_BTHK, weights, row.qk_norm)
      return x_BTHK if shared.rope is None else attention_lib.rotate(x_BTHK, shared.rope)

    q_BTHK = project_and_rotate("query", "heads")
    if c.attention_multiplier != 1.0:
      q_BTHK = q_BTHK * c.attention_multiplier
    k_BSGK = project_and_rotate("key", "kv_heads")
    v_BSGK = self.project_values(x_BTD, weights, row, shared)
    q_BTHK, k_BSGK, v_BSGK = constrain(q_BTHK, *QUERIES), constrain(k_BSGK, *KEYS), constrain(v_BSGK, *KEYS)
    if cache is not None:
      cache, k_BSGK, v_BSGK = attention_lib.update_cache(cache, layer, k_BSGK, v_BSGK, shared.positions_BT)
      k_BSGK, v_BSGK = k_BSGK.astype(q_BTHK.dtype), v_BSGK.astype(q_BTHK.dtype)
      out_BTHK = attention_lib.attention(q_BTHK, k_BSGK, v_BSGK, shared.mask_BTS)
    else:
      segments = shared.segment_ids_BT
      implementation = choose_attention(c, q_BTHK.shape[1], segments=segments is not None)
      out_BTHK = self_attention(implementation, q_BTHK, k_BSGK, v_BSGK, shared.mask_BTS, segments)
    statistics = {}
    if self.observe is not None:
      for name, value in attention_lib.attention_statistics(q_BTHK, k_BSGK, shared.mask_BTS).items():
        statistics[f"attention_{name}"] = value
    out_BTD = multiply("bthk,hkd->btd", constrain(out_BTHK, *QUERIES), weights["output"].astype(c.dtype))
    if c.biases:
      out_BTD = out_BTD + weights["output_bias"].astype(c.dtype)
    return constrain(out_BTD, *STREAM), Attended(cache, statistics)

  def project(self, name: str, axis: str, x_BTD: jax.Array, weights: Weights) -> jax.Array:
    """Queries, keys or values of x."""
    c = self.config
    out_BTHK = multiply("btd,dhk->bthk", x_BTD, weights[name].astype(c.dtype))
    out_BTHK = constrain(out_BTHK, "batch", "length", axis, "head_dim")
    return out_BTHK + weights[f"{name}_bias"].astype(c.dtype) if c.qkv_bias else out_BTHK

  def norm_each_head(self, name: str, x_BTHK: jax.Array, weights: Weights, on: Any) -> jax.Array:
    if on is False:
      return x_BTHK
    return rms_norm(x_BTHK, weights[f"{name}_norm"], epsilon=self.config.norm_epsilon, on=on).astype(x_BTHK.dtype)

  def project_values(self, x_BTD: jax.Array, weights: Weights, row: TracedRow, shared: Shared) -> jax.Array:
    """The values of x, mixed with those of the first layer where the row says so (arXiv 2410.17897)."""
    v_BSGK = self.norm_each_head("value", self.project("value", "kv_heads", x_BTD, weights), weights, row.v_norm)
    if shared.first_values_BSGK is None:
      return v_BSGK
    own, first = v_BSGK.astype(jnp.float32), shared.first_values_BSGK.astype(jnp.float32)
    mixed = own
    if row.value_residual is not False:
      share = weights["value_lambda"].astype(jnp.float32)
      mixed = jnp.where(row.value_residual, (1.0 - share) * own + share * first, mixed)
    if row.value_residual_two is not False:
      of_first, of_own = weights["value_lambdas"].astype(jnp.float32)
      mixed = jnp.where(row.value_residual_two, of_first * first + of_own * own, mixed)
    return mixed.astype(v_BSGK.dtype)


def _constrain_stream(leaf: Any) -> Any:
  """Lays out a stream, or a buffer of them; what a stream owes has no layout."""
  dimensions = getattr(leaf, "ndim", 0)
  if dimensions < len(STREAM):
    return leaf
  return constrain(leaf, *[None] * (dimensions - len(STREAM)), *STREAM)


def separate(streams: Streams | Sources, config: Any) -> list[jax.Array]:
  """The streams that go from layer to layer, each [B, T, D]."""
  if isinstance(streams, Sources):
    return list(streams.buffer_SBTD)
  return streams.values(config.norm, config.norm_epsilon)


def the_stream(streams: list[jax.Array], of_model: StreamsOfModel, alone: Any) -> jax.Array:
  """What a diagnostic takes for "the residual stream" where there are several: their sum, or the first."""
  if not of_model.sums:
    return streams[0]
  sum_BTD = weighted_sum([1.0] * len(streams), streams).astype(streams[0].dtype)
  return sum_BTD if alone is None else jnp.where(alone, streams[0], sum_BTD)


def swiglu(x_BTD: jax.Array, weights: Weights, dtype: Any) -> jax.Array:
  """The MLP of LLaMA: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

  def widen(name: str) -> jax.Array:
    return constrain(multiply("btd,df->btf", x_BTD, weights[name].astype(dtype)), *HIDDEN)

  hidden_BTF = nn.silu(widen("gate")) * widen("up")
  return constrain(multiply("btf,fd->btd", hidden_BTF, weights["down"].astype(dtype)), *STREAM)


def gelu_mlp(x_BTD: jax.Array, weights: Weights, dtype: Any) -> jax.Array:
  """The MLP of BERT: down(gelu(up(x))), with the exact GELU (arXiv 1606.08415) and biases where there are any."""

  def biased(name: str, out: jax.Array) -> jax.Array:
    return out + weights[f"{name}_bias"].astype(dtype) if f"{name}_bias" in weights else out

  hidden_BTF = biased("up", multiply("btd,df->btf", x_BTD, weights["up"].astype(dtype)))
  hidden_BTF = nn.gelu(constrain(hidden_BTF, *HIDDEN), approximate=False)
  out_BTD = biased("down", multiply("btf,fd->btd", hidden_BTF, weights["down"].astype(dtype)))
  return constrain(out_BTD, *STREAM)


MLPS = {"swiglu": swiglu, "gelu": gelu_mlp}  # by config.model.activation


def declare(module: nn.Module, config: Any, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
  """Declares a parameter to linen. As zeros: initial weights are drawn by name and layer (`model/initial.py`)."""
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
  return module.param(name, zeros, shape, jnp.dtype(config.param_dtype))


class Transformer(nn.Module):
  """A decoder-only LLaMA; with the fields from `bidirectional` to `head_transform` an encoder, BERT.

  `Transformer(config.model).apply({"params": params}, tokens_BT) -> logits_BTV`. The config is frozen, so that the
  module hashes and can be a static argument.

  Attributes:
    config: config.model.
    observe: what to return of each layer in place of its taps: called inside the scan with them, the layer's input
      `input_BTD`, and the `attention_statistics`, so that numbers [L, …] stand where arrays [L, B, T, D] would.
  """

  config: Any  # Config, frozen when the module is made
  observe: Observe | None = None

  def __post_init__(self) -> None:
    object.__setattr__(self, "config", FrozenConfigDict(self.config))
    super().__post_init__()

  def setup(self) -> None:
    for param in parameters(self.config).values():
      if not param.in_layers:
        setattr(self, param.name, declare(self, self.config, param.name, param.shape, param.axes))

  def head_weights(self) -> jax.Array:
    """The output projection [D, V]: the head, or the embedding transposed.

    With `head_transform` it has one row more, the bias of each logit: `read_out` gives a 1 for it.
    """
    head_DV = self.embedding.T if self.config.tied_embeddings else self.head
    if self.config.head_transform:
      head_DV = jnp.concatenate([head_DV, self.head_bias[None].astype(head_DV.dtype)])
    return head_DV

  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    columns: Columns | None = None,
    keep_L: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> Any:
    """Logits [B, T, V] in fp32; with a cache, (logits, updated cache). Arguments as `hidden`."""
    hidden_BTD, taps = self.hidden(
      tokens_BT, columns=columns, keep_L=keep_L, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT, cache=cache
    )
    logits_BTV = project_to_logits(hidden_BTD, self.head_weights())
    return logits_BTV if cache is None else (logits_BTV, taps["cache"])

  @nn.compact
  def hidden(
    self,
    tokens_BT: jax.Array,
    *,
    columns: Columns | None = None,
    keep_L: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    cache: Cache | None = None,
    weights_BT: jax.Array | None = None,
    token_types_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The stack without its head.

    Args:
      tokens_BT: token ids.
      columns: the placement as data; by default the table of config.model.placement.
      keep_L: 0 where a layer is removed (its output is its input), else 1.
      segment_ids_BT: attention stays inside equal ids (give positions that restart with them).
      positions_BT: position of each token; by default 0 … T-1.
      cache: keys and values of earlier positions (`empty_cache`); needs positions_BT.
      weights_BT: which positions count; read by `observe` alone.
      token_types_BT: of a model with token types; by default all 0.

    Returns:
      The final hidden states [B, T, D] in config.model.dtype, as `read_out` gives them; and the taps: `embedded_BTD`,
      the residual stream before the first layer; `stream_LBTD`, after each layer (before the final norm), of several
      the sum or the first (`placement.StreamSet.sums`), and `stream_0_LBTD`, … each of several; for attention
      and MLP the two terms of the sublayer rule's sum, `attention_residual_LBTD`, `attention_branch_LBTD`,
      `mlp_residual_LBTD`, `mlp_branch_LBTD`; `cache`, where one was given. What nobody reads is not computed. With
      `observe`, `embedded_BTD`, and of the layers what that returns, stacked [L, …].
    """
    c = self.config
    if cache is not None:
      _check_cache(cache, tokens_BT, positions_BT, segment_ids_BT)
    columns = Columns.of(config_lib.table(c)) if columns is None else columns
    x_BTD, streams, shared = self.begin(
      tokens_BT, columns, segment_ids_BT, positions_BT, cache, weights_BT, token_types_BT
    )
    taps: dict[str, Any] = {"embedded_BTD": x_BTD}
    run_stack = self.scan
    if not self.is_initializing():
      run_stack = self.loop if c.unroll == 0 else run_stack
      run_stack = self.append_only if isinstance(streams, Sources) and cache is None and c.unroll else run_stack
    (streams, new_cache), layer_taps = run_stack((streams, cache), columns, keep_L, shared)
    taps |= {name.replace("_BTD", "_LBTD"): tap for name, tap in layer_taps.items()}
    if cache is not None:
      taps["cache"] = new_cache
    hidden_BTD = self.read_out(separate(streams, c), columns.streams)
    if columns.alone is not None:
      hidden_BTD = jnp.where(columns.alone, self.read_out(separate(streams, c), StreamsOfModel()), hidden_BTD)
    return constrain(hidden_BTD, *STREAM), taps

  def begin(
    self,
    tokens_BT: jax.Array,
    columns: Columns,
    segment_ids_BT: jax.Array | None,
    positions_BT: jax.Array | None,
    cache: Cache | None = None,
    weights_BT: jax.Array | None = None,
    token_types_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, Streams | Sources, Shared]:
    """What the stack begins with: the embedded tokens, the streams made of them, and what all layers read.

    Arguments as `hidden`.
    """
    c = self.config
    if positions_BT is None:
      positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    if columns.has_ramp:
      raise ValueError(
        f"placement {c.placement!r} depends on the step: give columns=Columns.of(table).at_step(step), or a "
        "config.model whose placement is `placement.at_step(…)`"
      )
    shared = Shared(
      rope=self.rope(positions_BT),
      mask_BTS=attention_lib.attention_mask(positions_BT, segment_ids_BT, cache, bidirectional=c.bidirectional),
      segment_ids_BT=segment_ids_BT,
      positions_BT=positions_BT,
      weights_BT=weights_BT,
      alone=columns.alone,
    )
    x_BTD = constrain(self.embed(tokens_BT, positions_BT, token_types_BT), *STREAM)
    streams = self.first_streams(x_BTD, columns)
    if columns.uses("attention", "value_residual") or columns.uses("attention", "value_residual_two"):
      shared = shared._replace(first_values_BSGK=self.first_values(streams, columns, shared))
    return x_BTD, streams, shared

  def by_layer(
    self,
    tokens_BT: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
  ) -> ByLayer:
    """The stack as a function of one layer, for a scan that does more with a layer than apply it once.

    What it computes can be differentiated as it is: `gpas`, which hides a part of its sum from the gradient, doesn't
    hide it here.
    """
    columns = Columns.of(config_lib.table(self.config))
    _, streams, shared = self.begin(tokens_BT, columns, segment_ids_BT, positions_BT)
    layer = self.make_layer(Layer, columns, parent=None, hides=False)
    varying_L = Varying(columns.varying, jnp.arange(self.config.num_layers), None)
    params_L = nn.unbox(self.variables["params"]["layers"])

    def apply(of_layer: tuple[Any, Varying], streams: Streams | Sources) -> Streams | Sources:
      params, varying = of_layer
      (after, _), _ = layer.apply({"params": params}, (streams, None), varying, shared)
      return after

    return ByLayer(streams, (params_L, varying_L), apply)

  def rope(self, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """The cosines and sines that queries and keys are rotated by; None where positions are learned."""
    if self.config.learned_positions:
      return None
    return attention_lib.rope_table(positions_BT, attention_lib.rope_frequencies(self.config))

  def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, token_types_BT: jax.Array | None) -> jax.Array:
    """The residual stream before the first layer, [B, T, D] in its type."""
    c = self.config
    dtype = config_lib.residual_dtype(c)
    adds_to_it = c.norm == "dyt" or c.learned_positions or c.token_types or c.embedding_norm
    # What is added to it, or done with it, is in the table's own type, and the sum is rounded once.
    x_BTD = look_up(self.embedding, tokens_BT, self.embedding.dtype if adds_to_it else dtype)
    if c.norm == "dyt":
      x_BTD = x_BTD * self.embedding_scale
    if c.learned_positions:
      # Clipped: rows are padded to lengths that may have no vector; nobody reads what stands there, unless it is NaN.
      x_BTD = x_BTD + jnp.take(self.position_embedding, positions_BT, axis=0, mode="clip")
    if c.token_types:
      types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
      x_BTD = x_BTD + jnp.take(self.token_type_embedding, types_BT, axis=0)
    if c.embedding_norm:
      x_BTD = self.normed("embedding_norm", x_BTD)
    return x_BTD.astype(dtype)

  def normed(self, name: str, x_BTD: jax.Array) -> jax.Array:
    """A norm outside the layers, in fp32."""
    c = self.config
    return norm(c.norm, x_BTD, norm_params(self.weights_outside(), name, c.norm), epsilon=c.norm_epsilon)

  def weights_outside(self) -> Weights:
    """The parameters outside the layers.

    As they are, and not by the table: of runs that share a tree, another one's read-out may learn more.
    """
    return nn.unbox({name: leaf for name, leaf in self.variables["params"].items() if name != "layers"})

  def first_streams(self, x_BTD: jax.Array, columns: Columns) -> Streams | Sources:
    """The streams before the first layer, made of the embedded tokens, in the form that the scan carries."""
    if columns.only_sources:
      later = jnp.zeros((columns.streams.num - 1, *x_BTD.shape), x_BTD.dtype)
      return Sources(constrain(jnp.concatenate([x_BTD[None], later]), None, *STREAM))
    first, start = Stream(x_BTD), columns.streams.start
    if columns.uses("mlp", "norm_out"):
      first = first.carried(self.config.norm)
    further = (start * x_BTD).astype(x_BTD.dtype) if start != 1.0 else x_BTD
    return Streams(first, (further,) * (columns.streams.num_carried - 1))

  def read_out(
    self, streams: list[jax.Array], of_model: StreamsOfModel, there_N: Sequence[float] | jax.Array = ()
  ) -> jax.Array:
    """What the head reads, after the final norm: [B, T, D] in config.model.dtype; with `head_transform` [B, T, D + 1],
    the last of which are 1.

    Args:
      streams: each [B, T, D].
      of_model: what they are.
      there_N: of attention residuals, 0 for a source that is not there yet; by default all are.
    """
    c = self.config

    def final_norm(x_BTD: jax.Array) -> jax.Array:
      return self.normed("final_norm", x_BTD) if c.final_norm else x_BTD

    by = ReadOut(
      self.weights_outside(),
      final_norm=final_norm,
      stream_norm=lambda index, x_BTD: self.normed(f"stream_norm_{index}", x_BTD),
      epsilon=c.norm_epsilon,
      weight=of_model.read_out_weight,
      there=there_N if len(there_N) else (1.0,) * len(streams),
    )
    out_BTD = READ_OUTS[of_model.read_out](streams, by)
    if c.logit_multiplier != 1.0:
      out_BTD = out_BTD * c.logit_multiplier
    out_BTD = out_BTD.astype(c.dtype)
    return self.transformed(out_BTD) if c.head_transform else out_BTD

  def transformed(self, x_BTD: jax.Array) -> jax.Array:
    """BERT's head for masked tokens before its matrix: norm(GELU(W x + b)), and a 1 that its bias is multiplied by."""
    dtype = self.config.dtype
    hidden_BTD = multiply("btd,de->bte", x_BTD, self.head_dense.astype(dtype)) + self.head_dense_bias.astype(dtype)
    hidden_BTD = self.normed("head_norm", nn.gelu(hidden_BTD, approximate=False)).astype(dtype)
    return jnp.concatenate([hidden_BTD, jnp.ones((*hidden_BTD.shape[:-1], 1), dtype)], axis=-1)

  def first_values(self, streams: Streams | Sources, columns: Columns, shared: Shared) -> jax.Array | None:
    """The first layer's values, once for all layers that mix them with their own."""
    if self.is_initializing():
      return None
    params = jax.tree.map(lambda stacked: stacked[0], nn.unbox(self.variables["params"]["layers"]))
    layer = self.make_layer(Layer, columns, parent=None)
    return layer.first_values(streams, params, Varying(columns.of_layer(0), 0, None), shared)

  def layer_class(self) -> Any:
    """The layer's module, with remat as config.model says."""
    if self.config.remat == "none":
      return Layer
    # In a scan XLA can't merge the recomputed operations with the first ones; in a plain loop it would.
    return nn.remat(Layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=self.config.unroll == 0)

  def make_layer(self, layer_class: Any, columns: Columns, **attributes: Any) -> Any:
    """A module for these columns, of the layer's class or of what `nn.scan` makes of it."""
    declared = []
    for param in parameters(self.config, columns).values():
      if param.in_layers:
        declared.append(Declared(param.name, param.shape[1:], param.axes[1:]))
    return layer_class(self.config, tuple(declared), columns.constant, columns.streams, self.observe, **attributes)

  def scan(self, carry: Any, columns: Columns, keep_L: jax.Array | None, shared: Shared) -> tuple[Any, Any]:
    """One scan over the stacked layers, `config.model.unroll` of them a step."""

    scanned = nn.scan(
      self.layer_class(),
      variable_axes={"params": 0},
      split_rngs={"params": False},
      in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
      out_axes=0,
      length=self.config.num_layers,
      unroll=max(1, self.config.unroll),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    varying = Varying(columns.varying, jnp.arange(self.config.num_layers), keep_L)
    return self.make_layer(scanned, columns, name="layers")(carry, varying, shared)

  def append_only(self, carry: Any, columns: Columns, keep_L: jax.Array | None, shared: Shared) -> tuple[Any, Any]:
    """The same layers over sources that are only added to (`model/append_only.py`)."""
    stacked = nn.unbox(self.variables["params"]["layers"])
    layer = self.make_layer(Layer, columns, parent=None)

    def step(buffer: jax.Array, params: Any, varying: Varying, read: Any) -> tuple[jax.Array, Any]:
      values, rest = read
      shared = rest._replace(first_values_BSGK=values)
      (after, _), taps = layer.apply({"params": params}, (Sources(buffer), None), varying, shared)
      return after.buffer_SBTD, taps

    varying = Varying(columns.varying, jnp.arange(self.config.num_layers), keep_L)
    buffer, taps = append_only.scan_layers(
      step,
      columns.slots(),
      self.config.unroll,
      carry[0].buffer_SBTD,
      stacked,
      varying,
      shared.first_values_BSGK,
      shared._replace(first_values_BSGK=None),
    )
    return (Sources(buffer), None), taps

  def loop(self, carry: Any, columns: Columns, keep_L: jax.Array | None, shared: Shared) -> tuple[Any, Any]:
    """The same layers as a plain Python loop over the same stacked parameters."""
    stacked = nn.unbox(self.variables["params"]["layers"])
    layer = self.make_layer(self.layer_class(), columns, parent=None)
    taps = []
    for index in range(self.config.num_layers):
      params = jax.tree.map(lambda p, i=index: p[i], stacked)
      keep = None if keep_L is None else keep_L[index]
      carry, layer_taps = layer.apply({"params": params}, carry, Varying(columns.of_layer(index), index, keep), shared)
      taps.append(layer_taps)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *taps)


def _check_cache(cache: Cache, tokens_BT: jax.Array, positions_BT: Any, segment_ids_BT: Any) -> None:
  if positions_BT is None:
    raise ValueError("positions_BT is needed with a cache: the position of each token says where its key is written")
  if segment_ids_BT is not None:
    raise ValueError("segment_ids_BT can't be given with a cache: a cache holds one document a row")
  if tokens_BT.shape[1] > cache["k"].shape[2]:
    raise ValueError(f"{tokens_BT.shape[1]} tokens don't fit into a cache of {cache['k'].shape[2]} slots")


def project_to_logits(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
  """Logits [B, T, V], accumulated and returned in fp32; the product is taken in the hidden states' type."""
  head_DV = head_DV.astype(hidden_BTD.dtype)
  return constrain(jnp.einsum("btd,dv->btv", hidden_BTD, head_DV, preferred_element_type=jnp.float32), *LOGITS)


def empty_cache(config: ModelConfig, batch: int, num_slots: int) -> Cache:
  """An empty key-value cache for `batch` rows of up to `num_slots` tokens, in config.dtype."""
  return attention_lib.init_cache(
    config.num_layers, batch, num_slots, config_lib.num_kv_heads(config), config_lib.head_dim(config), config.dtype
  )

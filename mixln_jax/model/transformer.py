"""The LLaMA transformer with its norm placement chosen per layer, as one scan over stacked layers.

Dimensions, used as name suffixes:
  B batch            D width of the residual stream      H query heads         L layers
  T query position   F width of the MLP, as stored       G key-value heads     V vocabulary
  S key position     K width of a head                   N residual streams

`model/parameters.py` declares the parameters; `model/residual.py` has the rule by which a sublayer reads and updates
the residual streams.
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
from mixln_jax.model.wiring import READ_OUTS, ReadOutContext, weighted_sum
from mixln_jax.parallel.rules import constrain
from mixln_jax.placement import Streams as StreamsOfModel

Cache = dict[str, jax.Array]
Weights = dict[str, jax.Array]  # one layer's parameters by name
Observe = Callable[[dict[str, jax.Array], Any], Any]  # (a layer's taps, weights [B, T]) -> what replaces the taps
# Logical axes of the activations; `parallel/rules.py` maps them to mesh axes.
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
  """A parameter as it is declared to linen."""

  name: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]


class Shared(NamedTuple):
  """The inputs that are the same for all layers."""

  mask_BTS: jax.Array | None
  positions_BT: jax.Array
  rope: tuple[jax.Array, jax.Array] | None  # None: positions are learned
  segment_ids_BT: jax.Array | None
  weights_BT: jax.Array | None  # 1 where a position counts; only `observe` reads it
  first_values_BSGK: jax.Array | None = None  # the first layer's values, if other layers mix them with their own
  alone: jax.Array | np.ndarray | None = None  # see `Columns.alone`


class Varying(NamedTuple):
  """The inputs that differ from layer to layer, besides the parameters."""

  columns: dict[str, Any]  # `Columns.varying`, of this layer or stacked
  layer: jax.Array | int
  keep: jax.Array | None  # 0 removes the layer


class ByLayer(NamedTuple):
  """The stack in pieces, for callers that iterate over the layers themselves.

  Attributes:
    first: the streams before the first layer.
    layers: (parameters, other inputs) of all layers, stacked along their first axis.
    apply: (one layer's slice of `layers`, the streams before it) -> the streams after it.
  """

  first: Streams | Sources
  layers: tuple[Any, Varying]
  apply: Callable[[tuple[Any, Varying], Streams | Sources], Streams | Sources]


class Attended(NamedTuple):
  """What attention returns besides its output."""

  cache: Cache | None  # after this layer
  statistics: dict[str, jax.Array]  # of its softmax; empty without `observe`


class Layer(nn.Module):
  """One transformer layer: two sublayers under the sublayer rule.

  Attributes:
    config: config.model.
    declared: the parameters of one layer.
    constant: the placement columns that are the same for all layers (`Columns.constant`).
    streams: the model's residual streams.
    observe: see `Transformer`.
    gpas_stops_gradient: see `Sublayer`.
  """

  config: Any  # FrozenConfigDict
  declared: tuple[Declared, ...]
  constant: tuple[tuple[str, Any], ...]
  streams: StreamsOfModel = StreamsOfModel()
  observe: Observe | None = None
  gpas_stops_gradient: bool = True

  @nn.compact
  def __call__(
    self, carry: tuple[Streams | Sources, Cache | None], varying: Varying, shared: Shared
  ) -> tuple[tuple[Streams | Sources, Cache | None], Any]:
    """Applies the layer.

    Args:
      carry: the streams before the layer, and the key-value cache of all layers or None.
      varying: the inputs of this layer alone.
      shared: the inputs that are the same for all layers.

    Returns:
      The carry after the layer, and its taps or, with `observe`, what `observe` returns for them.
    """
    before, cache = carry
    rows = traced_rows(self.constant, varying.columns)
    weights = {name: declare(self, self.config, name, shape, axes) for name, shape, axes in self.declared}

    def attend(h_BTD: jax.Array) -> tuple[jax.Array, Attended]:
      return self.attend(h_BTD, weights, rows.attention, cache, varying.layer, shared)

    def mlp(h_BTD: jax.Array) -> tuple[jax.Array, None]:
      return MLPS[self.config.activation](h_BTD, weights, self.config.dtype), None

    middle, attended, attention_taps = self.sublayer("attention", attend, before, weights, rows.attention)
    after, _, mlp_taps = self.sublayer("mlp", mlp, middle, weights, rows.mlp)

    if isinstance(after, Streams):
      after = after.replace(further=after.further[: self.streams.num_carried - 1])
      if isinstance(before, Streams) and before.first.pending is not None:
        after = after.replace(first=after.first.as_scan_carry(self.config.norm))
    if varying.keep is not None:
      after = jax.tree.map(lambda new, old: jnp.where(varying.keep != 0, new, old), after, before)
    outputs = separate(after, self.config)
    taps = attention_taps | mlp_taps | {"stream_BTD": the_stream(outputs, self.streams, shared.alone)}
    if len(outputs) > 1:
      taps |= {f"stream_{index}_BTD": output_BTD for index, output_BTD in enumerate(outputs)}
    if self.observe is not None:
      # No gradient flows through statistics; otherwise the backward pass would have to save more activations.
      input_BTD = the_stream(separate(before, self.config), self.streams, shared.alone)
      observed = jax.lax.stop_gradient(taps | attended.statistics | {"input_BTD": input_BTD})
      taps = self.observe(observed, shared.weights_BT)
    return (after, attended.cache), taps

  def values(self, streams: Streams) -> list[jax.Array]:
    """All n streams inside the layer. Those that are not carried between layers start as zeros."""
    values = separate(streams, self.config)
    return values + [jnp.zeros_like(values[0])] * (self.streams.num - len(values))

  def sublayer(
    self,
    name: str,
    branch: Callable[[jax.Array], tuple[jax.Array, Any]],
    streams: Streams | Sources,
    weights: Weights,
    row: TracedRow,
  ) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Applies the sublayer rule with this layer's row and parameters.

    Returns:
      The streams after the sublayer, the auxiliary output of `branch`, and the sublayer's taps.
    """
    kind, prefix = self.config.norm, f"{name}_"
    gain_names = [gain_name(name, 0), gain_name(name, 1), gain_name(name, 2)]
    stream_gain_names = [f"{name}_stream_norm_0", f"{name}_stream_norm_1"]
    learned = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
    for shared_by_sublayers in ("gpas", "x0_lambdas"):
      if shared_by_sublayers in weights:
        learned[shared_by_sublayers] = weights[shared_by_sublayers]
    rule = Sublayer(
      norms=[norm_params(weights, gain, kind) for gain in gain_names if gain in weights],
      stream_norms=[norm_params(weights, gain, kind) for gain in stream_gain_names if gain in weights],
      learned=learned,
      row=row,
      kind=kind,
      epsilon=self.config.norm_epsilon,
      dtype=self.config.dtype,
      gpas_stops_gradient=self.gpas_stops_gradient,
    )
    with jax.named_scope(name):
      if isinstance(streams, Sources):
        after, auxiliary, terms = rule.append(branch, streams)
      else:
        after, auxiliary, terms = rule.apply(branch, self.values(streams), streams.first)
    taps = {f"{name}_{term}": value for term, value in terms.items()}
    return jax.tree.map(_constrain_stream, after), auxiliary, taps

  def first_values(self, before: Streams | Sources, weights: Weights, varying: Varying, shared: Shared) -> jax.Array:
    """The values [B, S, G, K] that this layer's attention computes, for later layers to mix with their own."""
    rows = traced_rows(self.constant, varying.columns)
    recorded = []

    def record_values(h_BTD: jax.Array) -> tuple[jax.Array, None]:
      recorded.append(self.project_values(h_BTD, weights, rows.attention, shared))
      return h_BTD, None

    self.sublayer("attention", record_values, before, weights, rows.attention)
    return recorded[0]

  def attend(
    self,
    x_BTD: jax.Array,
    weights: Weights,
    row: TracedRow,
    cache: Cache | None,
    layer: jax.Array | int,
    shared: Shared,
  ) -> tuple[jax.Array, Attended]:
    """Attention over the positions of the row or, with a cache, over the cache, which it updates first."""
    config = self.config

    def norm_all_heads(name: str, x_BTHK: jax.Array, on: Any) -> jax.Array:
      if on is False:
        return x_BTHK
      x_BTE = x_BTHK.reshape(*x_BTHK.shape[:-2], -1)
      normed_BTE = rms_norm(x_BTE, weights[f"{name}_norm_full"].reshape(-1), epsilon=config.norm_epsilon, on=on)
      return normed_BTE.reshape(x_BTHK.shape).astype(x_BTHK.dtype)

    def project_and_rotate(name: str, axis: str) -> jax.Array:
      x_BTHK = norm_all_heads(name, self.project(name, axis, x_BTD, weights), row.qk_norm_full)
      x_BTHK = self.norm_each_head(name, x_BTHK, weights, row.qk_norm)
      if shared.rope is None:
        return x_BTHK
      return attention_lib.rotate(x_BTHK, shared.rope)

    q_BTHK = project_and_rotate("query", "heads")
    if config.attention_multiplier != 1.0:
      q_BTHK = q_BTHK * config.attention_multiplier
    k_BSGK = project_and_rotate("key", "kv_heads")
    v_BSGK = self.project_values(x_BTD, weights, row, shared)
    q_BTHK, k_BSGK, v_BSGK = constrain(q_BTHK, *QUERIES), constrain(k_BSGK, *KEYS), constrain(v_BSGK, *KEYS)
    if cache is not None:
      cache, k_BSGK, v_BSGK = attention_lib.update_cache(cache, layer, k_BSGK, v_BSGK, shared.positions_BT)
      k_BSGK, v_BSGK = k_BSGK.astype(q_BTHK.dtype), v_BSGK.astype(q_BTHK.dtype)
      out_BTHK = attention_lib.attention(q_BTHK, k_BSGK, v_BSGK, shared.mask_BTS)
    else:
      segments = shared.segment_ids_BT
      implementation = choose_attention(config, q_BTHK.shape[1], segments=segments is not None)
      out_BTHK = self_attention(implementation, q_BTHK, k_BSGK, v_BSGK, shared.mask_BTS, segments)
    statistics = {}
    if self.observe is not None:
      for name, value in attention_lib.attention_statistics(q_BTHK, k_BSGK, shared.mask_BTS).items():
        statistics[f"attention_{name}"] = value
    out_BTD = multiply("bthk,hkd->btd", constrain(out_BTHK, *QUERIES), weights["output"].astype(config.dtype))
    if config.biases:
      out_BTD = out_BTD + weights["output_bias"].astype(config.dtype)
    return constrain(out_BTD, *STREAM), Attended(cache, statistics)

  def project(self, name: str, axis: str, x_BTD: jax.Array, weights: Weights) -> jax.Array:
    """The queries, keys or values of x."""
    dtype = self.config.dtype
    out_BTHK = multiply("btd,dhk->bthk", x_BTD, weights[name].astype(dtype))
    out_BTHK = constrain(out_BTHK, "batch", "length", axis, "head_dim")
    if self.config.qkv_bias:
      out_BTHK = out_BTHK + weights[f"{name}_bias"].astype(dtype)
    return out_BTHK

  def norm_each_head(self, name: str, x_BTHK: jax.Array, weights: Weights, on: Any) -> jax.Array:
    """RMSNorm over each head of the queries, keys or values where `on`, else x."""
    if on is False:
      return x_BTHK
    return rms_norm(x_BTHK, weights[f"{name}_norm"], epsilon=self.config.norm_epsilon, on=on).astype(x_BTHK.dtype)

  def project_values(self, x_BTD: jax.Array, weights: Weights, row: TracedRow, shared: Shared) -> jax.Array:
    """The values of x, mixed with those of the first layer if the row says so (arXiv 2410.17897)."""
    v_BSGK = self.norm_each_head("value", self.project("value", "kv_heads", x_BTD, weights), weights, row.v_norm)
    if shared.first_values_BSGK is None:
      return v_BSGK
    own, first = v_BSGK.astype(jnp.float32), shared.first_values_BSGK.astype(jnp.float32)
    mixed = own
    if row.value_residual is not False:
      weight = weights["value_lambda"].astype(jnp.float32)
      mixed = jnp.where(row.value_residual, (1.0 - weight) * own + weight * first, mixed)
    if row.value_residual_two is not False:
      first_weight, own_weight = weights["value_lambdas"].astype(jnp.float32)
      mixed = jnp.where(row.value_residual_two, first_weight * first + own_weight * own, mixed)
    return mixed.astype(v_BSGK.dtype)


def _constrain_stream(leaf: Any) -> Any:
  """Constrains the sharding of a stream, or of a buffer of streams; a pending norm's parameters are left alone."""
  dimensions = getattr(leaf, "ndim", 0)
  if dimensions < len(STREAM):
    return leaf
  return constrain(leaf, *[None] * (dimensions - len(STREAM)), *STREAM)


def separate(streams: Streams | Sources, config: Any) -> list[jax.Array]:
  """The streams that are carried from layer to layer, each [B, T, D]."""
  if isinstance(streams, Sources):
    return list(streams.buffer_SBTD)
  return streams.values(config.norm, config.norm_epsilon)


def the_stream(streams: list[jax.Array], model_streams: StreamsOfModel, alone: Any) -> jax.Array:
  """The array that diagnostics treat as "the residual stream": of several streams their sum, or the first one."""
  if not model_streams.sums:
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
  """The MLP of BERT: down(gelu(up(x))), with the exact GELU (arXiv 1606.08415), and biases if the config has them."""

  def biased(name: str, out: jax.Array) -> jax.Array:
    return out + weights[f"{name}_bias"].astype(dtype) if f"{name}_bias" in weights else out

  hidden_BTF = biased("up", multiply("btd,df->btf", x_BTD, weights["up"].astype(dtype)))
  hidden_BTF = nn.gelu(constrain(hidden_BTF, *HIDDEN), approximate=False)
  out_BTD = biased("down", multiply("btf,fd->btd", hidden_BTF, weights["down"].astype(dtype)))
  return constrain(out_BTD, *STREAM)


MLPS = {"swiglu": swiglu, "gelu": gelu_mlp}  # by config.model.activation


def declare(module: nn.Module, config: Any, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
  """Declares a parameter to linen, as zeros: `model/initial.py` draws the initial weights."""
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
  return module.param(name, zeros, shape, jnp.dtype(config.param_dtype))


class Transformer(nn.Module):
  """A decoder-only LLaMA, or a BERT encoder with the config's fields from `bidirectional` to `head_transform`.

  `Transformer(config.model).apply({"params": params}, tokens_BT) -> logits_BTV`. The config is frozen, so that the
  module is hashable and can be a static argument.

  Attributes:
    config: config.model.
    observe: a function whose result replaces each layer's taps. It is called inside the scan with the taps, the layer's
      input `input_BTD` and the `attention_statistics`, so that the stack returns small statistics [L, …] instead of
      arrays [L, B, T, D].
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

    With `head_transform` it has one more row, the biases of the logits; `read_out` appends the 1 that multiplies it.
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
    """Logits [B, T, V] in fp32; with a cache, (logits, updated cache). Arguments as in `hidden`."""
    hidden_BTD, taps = self.hidden(
      tokens_BT, columns=columns, keep_L=keep_L, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT, cache=cache
    )
    logits_BTV = project_to_logits(hidden_BTD, self.head_weights())
    if cache is None:
      return logits_BTV
    return logits_BTV, taps["cache"]

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
      keep_L: 0 removes a layer (its output is its input), 1 keeps it.
      segment_ids_BT: a token attends only to tokens of the same id; give positions that restart with each segment.
      positions_BT: position of each token; by default 0 … T-1.
      cache: keys and values of earlier positions (`empty_cache`); requires positions_BT.
      weights_BT: 1 where a position counts, else 0; only `observe` reads it.
      token_types_BT: for a model with token types; by default all 0.

    Returns:
      The final hidden states [B, T, D] in config.model.dtype, as `read_out` returns them, and the taps:

      * `embedded_BTD`: the residual stream before the first layer.
      * `stream_LBTD`: the residual stream after each layer, before the final norm. Of several streams it is the sum or
        the first (`placement.StreamSet.sums`), and `stream_0_LBTD`, `stream_1_LBTD`, … are the single streams.
      * `attention_residual_LBTD`, `attention_branch_LBTD`, `mlp_residual_LBTD`, `mlp_branch_LBTD`: the two terms of
        each sublayer's sum.
      * `cache`: the updated cache, if one was given.

      XLA does not compute taps that nobody reads. With `observe`, the taps are `embedded_BTD` and what `observe`
      returns, stacked [L, …].

    Raises:
      ValueError: the arguments do not go with a cache, or the placement depends on the step (see `begin`).
    """
    config = self.config
    if cache is not None:
      _check_cache(cache, tokens_BT, positions_BT, segment_ids_BT)
    columns = Columns.of(config_lib.table(config)) if columns is None else columns
    x_BTD, streams, shared = self.begin(
      tokens_BT, columns, segment_ids_BT, positions_BT, cache, weights_BT, token_types_BT
    )
    taps: dict[str, Any] = {"embedded_BTD": x_BTD}
    if self.is_initializing():
      run_stack = self.scan  # the only one of the three that declares the layers' parameters
    elif config.unroll == 0:
      run_stack = self.loop
    elif isinstance(streams, Sources) and cache is None:
      run_stack = self.append_only
    else:
      run_stack = self.scan
    (streams, new_cache), layer_taps = run_stack((streams, cache), columns, keep_L, shared)
    taps |= {name.replace("_BTD", "_LBTD"): tap for name, tap in layer_taps.items()}
    if cache is not None:
      taps["cache"] = new_cache
    hidden_BTD = self.read_out(separate(streams, config), columns.streams)
    if columns.alone is not None:
      hidden_BTD = jnp.where(columns.alone, self.read_out(separate(streams, config), StreamsOfModel()), hidden_BTD)
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
    """The inputs of the stack: the embedded tokens, the streams made of them, and what all layers share.

    Arguments as in `hidden`.

    Raises:
      ValueError: the placement depends on the step, and `columns` are not those of one step.
    """
    config = self.config
    if positions_BT is None:
      positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    if columns.has_ramp:
      raise ValueError(
        f"placement {config.placement!r} depends on the step: give columns=Columns.of(table).at_step(step), or a "
        "config.model whose placement is `placement.at_step(…)`"
      )
    shared = Shared(
      rope=self.rope(positions_BT),
      mask_BTS=attention_lib.attention_mask(positions_BT, segment_ids_BT, cache, bidirectional=config.bidirectional),
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
    """The stack in pieces, for a scan that does more with each layer than apply it once.

    Derivatives are those of the function that the layers compute: the `stop_gradient` of `gpas` is left out.
    """
    columns = Columns.of(config_lib.table(self.config))
    _, streams, shared = self.begin(tokens_BT, columns, segment_ids_BT, positions_BT)
    layer = self.make_layer(Layer, columns, parent=None, gpas_stops_gradient=False)
    varying_L = Varying(columns.varying, jnp.arange(self.config.num_layers), None)
    params_L = nn.unbox(self.variables["params"]["layers"])

    def apply(layer_inputs: tuple[Any, Varying], streams: Streams | Sources) -> Streams | Sources:
      params, varying = layer_inputs
      (after, _), _ = layer.apply({"params": params}, (streams, None), varying, shared)
      return after

    return ByLayer(streams, (params_L, varying_L), apply)

  def rope(self, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """The cosines and sines that rotate queries and keys; None if positions are learned."""
    if self.config.learned_positions:
      return None
    return attention_lib.rope_table(positions_BT, attention_lib.rope_frequencies(self.config))

  def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, token_types_BT: jax.Array | None) -> jax.Array:
    """The residual stream before the first layer, [B, T, D] in the residual stream's type."""
    config = self.config
    dtype = config_lib.residual_dtype(config)
    has_more_steps = config.norm == "dyt" or config.learned_positions or config.token_types or config.embedding_norm
    # The steps below work in the table's own type, so that their result is rounded only once.
    x_BTD = look_up(self.embedding, tokens_BT, self.embedding.dtype if has_more_steps else dtype)
    if config.norm == "dyt":
      x_BTD = x_BTD * self.embedding_scale
    if config.learned_positions:
      # Padding may reach beyond the last learned position. Nobody reads the result there, but a NaN would spread.
      x_BTD = x_BTD + jnp.take(self.position_embedding, positions_BT, axis=0, mode="clip")
    if config.token_types:
      types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
      x_BTD = x_BTD + jnp.take(self.token_type_embedding, types_BT, axis=0)
    if config.embedding_norm:
      x_BTD = self.normed("embedding_norm", x_BTD)
    return x_BTD.astype(dtype)

  def normed(self, name: str, x_BTD: jax.Array) -> jax.Array:
    """Applies the norm `name`, one outside the layers, in fp32."""
    kind = self.config.norm
    return norm(kind, x_BTD, norm_params(self.weights_outside(), name, kind), epsilon=self.config.norm_epsilon)

  def weights_outside(self) -> Weights:
    """The parameters outside the layers.

    They are read from the tree and not from the table of this config: where several runs share a tree, another run's
    read-out may have parameters that this config does not know.
    """
    return nn.unbox({name: leaf for name, leaf in self.variables["params"].items() if name != "layers"})

  def first_streams(self, x_BTD: jax.Array, columns: Columns) -> Streams | Sources:
    """The streams before the first layer, made of the embedded tokens, in the form that the scan carries."""
    if columns.only_sources:
      empty = jnp.zeros((columns.streams.num - 1, *x_BTD.shape), x_BTD.dtype)
      return Sources(constrain(jnp.concatenate([x_BTD[None], empty]), None, *STREAM))
    first, start = Stream(x_BTD), columns.streams.start
    if columns.uses("mlp", "norm_out"):
      first = first.as_scan_carry(self.config.norm)
    further = (start * x_BTD).astype(x_BTD.dtype) if start != 1.0 else x_BTD
    return Streams(first, (further,) * (columns.streams.num_carried - 1))

  def read_out(
    self, streams: list[jax.Array], model_streams: StreamsOfModel, available_N: Sequence[float] | jax.Array = ()
  ) -> jax.Array:
    """What the head multiplies: the streams after the final norm, combined into one array.

    Args:
      streams: each [B, T, D].
      model_streams: what the streams are for, and how the head reads them.
      available_N: for attention residuals, 0 for a source that has not been written yet, else 1; by default all are 1.

    Returns:
      [B, T, D] in config.model.dtype; with `head_transform` [B, T, D + 1], whose last entry is 1.
    """
    config = self.config

    def final_norm(x_BTD: jax.Array) -> jax.Array:
      return self.normed("final_norm", x_BTD) if config.final_norm else x_BTD

    context = ReadOutContext(
      self.weights_outside(),
      final_norm=final_norm,
      stream_norm=lambda index, x_BTD: self.normed(f"stream_norm_{index}", x_BTD),
      epsilon=config.norm_epsilon,
      weight=model_streams.read_out_weight,
      available=available_N if len(available_N) else (1.0,) * len(streams),
    )
    out_BTD = READ_OUTS[model_streams.read_out](streams, context)
    if config.logit_multiplier != 1.0:
      out_BTD = out_BTD * config.logit_multiplier
    out_BTD = out_BTD.astype(config.dtype)
    if config.head_transform:
      return self.transformed(out_BTD)
    return out_BTD

  def transformed(self, x_BTD: jax.Array) -> jax.Array:
    """BERT's layer before the masked-token head, norm(GELU(W x + b)), and a 1 that multiplies the head's bias."""
    dtype = self.config.dtype
    hidden_BTD = multiply("btd,de->bte", x_BTD, self.head_dense.astype(dtype)) + self.head_dense_bias.astype(dtype)
    hidden_BTD = self.normed("head_norm", nn.gelu(hidden_BTD, approximate=False)).astype(dtype)
    return jnp.concatenate([hidden_BTD, jnp.ones((*hidden_BTD.shape[:-1], 1), dtype)], axis=-1)

  def first_values(self, streams: Streams | Sources, columns: Columns, shared: Shared) -> jax.Array | None:
    """The first layer's values, computed once for all layers that mix them with their own."""
    if self.is_initializing():
      return None
    params = jax.tree.map(lambda stacked: stacked[0], nn.unbox(self.variables["params"]["layers"]))
    layer = self.make_layer(Layer, columns, parent=None)
    return layer.first_values(streams, params, Varying(columns.of_layer(0), 0, None), shared)

  def layer_class(self) -> Any:
    """The layer's module class, wrapped in the remat policy of config.model.remat."""
    if self.config.remat == "none":
      return Layer
    # In a plain loop XLA would merge the recomputed operations with the original ones; in a scan it can't.
    return nn.remat(Layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=self.config.unroll == 0)

  def make_layer(self, layer_class: Any, columns: Columns, **attributes: Any) -> Any:
    """A layer module for these columns; `layer_class` is `Layer`, or `Layer` wrapped in remat or `nn.scan`."""
    declared = []
    for param in parameters(self.config, columns).values():
      if param.in_layers:
        declared.append(Declared(param.name, param.shape[1:], param.axes[1:]))
    return layer_class(self.config, tuple(declared), columns.constant, columns.streams, self.observe, **attributes)

  def scan(self, carry: Any, columns: Columns, keep_L: jax.Array | None, shared: Shared) -> tuple[Any, Any]:
    """Runs the stack as one scan over the stacked layers, with config.model.unroll layers per iteration."""
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
    """Runs the stack over append-only sources, with the memory-saving backward pass of `model/append_only.py`."""
    stacked = nn.unbox(self.variables["params"]["layers"])
    layer = self.make_layer(Layer, columns, parent=None)

    def step(buffer: jax.Array, params: Any, varying: Varying, inputs: Any) -> tuple[jax.Array, Any]:
      first_values_BSGK, constant = inputs
      shared = constant._replace(first_values_BSGK=first_values_BSGK)
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
    """Runs the stack as a plain Python loop over the stacked parameters."""
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
    raise ValueError("positions_BT is required with a cache: the key of a token is written to the slot of its position")
  if segment_ids_BT is not None:
    raise ValueError("segment_ids_BT can't be given with a cache: each row of a cache holds one document")
  if tokens_BT.shape[1] > cache["k"].shape[2]:
    raise ValueError(f"{tokens_BT.shape[1]} tokens do not fit into a cache of {cache['k'].shape[2]} slots")


def project_to_logits(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
  """Logits [B, T, V]: operands in the hidden states' type, accumulated and returned in fp32."""
  head_DV = head_DV.astype(hidden_BTD.dtype)
  return constrain(jnp.einsum("btd,dv->btv", hidden_BTD, head_DV, preferred_element_type=jnp.float32), *LOGITS)


def empty_cache(config: ModelConfig, batch: int, num_slots: int) -> Cache:
  """An empty key-value cache for `batch` rows of up to `num_slots` tokens, in config.dtype."""
  return attention_lib.init_cache(
    config.num_layers, batch, num_slots, config_lib.num_kv_heads(config), config_lib.head_dim(config), config.dtype
  )

"""The LLaMA transformer with a norm placement per layer, as one scan over stacked layers.

Dimensions, worn as suffixes:
  B batch            D width of the residual stream      H query heads         L layers
  T query position   F width of the MLP, as stored       G key-value heads     V vocabulary
  S key position     K width of a head

The parameter tree, whatever the placement (what stands in brackets exists only where a layer of the placement uses it):
  embedding [V, D]
  layers/  attention_norm[_2] [L, D]   query [L, D, H, K]   key, value [L, D, G, K]   output [L, H, K, D]
           mlp_norm[_2] [L, D]         gate, up [L, D, F]   down [L, F, D]            [(query|key|value)_bias]
           [(query|key|value)_norm [L, K]]  [query_norm_full [L, H, K], key_norm_full [L, G, K]]  [gpas [L]]
           [(attention|mlp)_vector_c_res, …_vector_c_out [L, D], …_scalar_c_out [L]]
  final_norm [D]   head [D, V] (absent where embeddings are tied)
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from mixln_jax import config as config_lib
from mixln_jax import placement
from mixln_jax.config import ModelConfig
from mixln_jax.model import attention as attention_lib
from mixln_jax.model.attention_kernels import choose_attention, self_attention
from mixln_jax.model.columns import LEARNED, Columns
from mixln_jax.model.norm import rms_norm
from mixln_jax.model.product import multiply
from mixln_jax.model.residual import OutNorm, settle, sublayer
from mixln_jax.parallel.rules import constrain

Cache = dict[str, jax.Array]
Observe = Callable[[dict[str, jax.Array], jax.Array], Any]  # (a layer's taps, weights [B, T]) -> what to return of them
# Logical axes of the activations (parallel/rules.py says what they are sharded over).
STREAM = ("batch", "length", "activation_embed")  # B, T, D
QUERIES = ("batch", "length", "heads", "head_dim")  # B, T, H, K
KEYS = ("batch", "key_length", "kv_heads", "head_dim")  # B, S, G, K; values as well
HIDDEN = ("batch", "length", "mlp")  # B, T, F
LOGITS = ("batch", "length", "vocab")  # B, T, V
MATRICES = ("embedding", "head", "query", "key", "value", "output", "gate", "up", "down")

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Layer(nn.Module):
  """One transformer layer: two sublayers under the sublayer rule.

  Attributes:
    config: config.model.
    constant: the placement columns that are the same for all layers (`Columns.constant`).
    observe: as `Transformer` has it.
  """

  config: Any  # FrozenConfigDict
  constant: tuple[tuple[str, Any], ...]
  observe: Observe | None = None

  def tensor(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    # Zeros: initial weights are drawn by name and layer (model/initial.py), not from linen's keys.
    init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
    return self.param(name, init, shape, jnp.dtype(self.config.param_dtype))

  def matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    return self.tensor(name, shape, axes).astype(self.config.dtype)

  def gains(self, sublayer_name: str, columns: dict[str, Any]) -> list[jax.Array]:
    names = [f"{sublayer_name}_norm" + (f"_{i + 1}" if i else "") for i in range(columns[f"{sublayer_name}.num_gains"])]
    return [self.tensor(name, (self.config.embed_dim,), ("norm",)) for name in names]

  def learned(self, sublayer_name: str, columns: dict[str, Any]) -> dict[str, jax.Array]:
    """What the sublayer rule learns besides gains."""
    shapes = {name: (self.config.embed_dim,) if name.startswith("vector") else () for name in LEARNED}
    return {
      name: self.tensor(f"{sublayer_name}_{name}", shape, ("norm",) * len(shape))
      for name, shape in shapes.items()
      if columns[f"{sublayer_name}.{name}"] is not False
    }

  @nn.compact
  def __call__(
    self, carry: tuple[tuple[jax.Array, OutNorm], Cache | None], varying: dict[str, Any], shared: dict[str, Any]
  ) -> tuple[Any, Any]:
    """Applies the layer.

    The carry is the last sum [B, T, D] with the N_out that it still lacks: a layer's last norm is applied at the start
    of the next one. The backward pass needs what stood before a norm, which is then what the scan keeps of a layer
    anyway: a layer that ends with a norm costs neither memory nor recomputation more than one that does not.

    Args:
      carry: ((sum, the N_out that it lacks or None), the key-value cache of all layers or None).
      varying: this layer's `columns` that vary, its `index`, and `keep` (or None): 0 removes the layer.
      shared: what all layers read: `rope`, `mask`, `segments`, `positions`, `weights`.

    Returns:
      The carry after the layer, and its taps, or what `observe` makes of them.
    """
    last, cache = carry
    columns = dict(self.constant) | varying["columns"]
    epsilon = self.config.norm_epsilon
    new_cache, seen = cache, {}

    def attend(h_BTD: jax.Array) -> jax.Array:
      nonlocal new_cache, seen
      out_BTD, new_cache, seen = self.attend(h_BTD, cache, columns, varying["index"], shared)
      return out_BTD

    uses_gpas = any(columns[f"{name}.gpas"] is not False for name in placement.SUBLAYERS)
    gpas = {"gpas": self.tensor("gpas", (), ())} if uses_gpas else {}
    input_BTD = settle(*last, epsilon=epsilon)
    sum_BTD, out_norm, attention_taps = self.sublayer("attention", attend, input_BTD, columns, gpas)
    x_BTD = settle(sum_BTD, out_norm, epsilon=epsilon)
    sum_BTD, out_norm, mlp_taps = self.sublayer("mlp", self.mlp, x_BTD, columns, gpas)
    after: Any = (sum_BTD, None if last[1] is None else self.as_data(out_norm))
    if (keep := varying["keep"]) is not None:
      after = jax.tree.map(lambda new, old: jnp.where(keep != 0, new, old), after, last)
    taps = attention_taps | mlp_taps | {"stream_BTD": settle(*after, epsilon=epsilon)}
    if self.observe is not None:
      # Of a constant: a statistic that is differentiated would be one more thing that the backward pass keeps.
      taps = self.observe(jax.lax.stop_gradient(taps | seen | {"input_BTD": input_BTD}), shared["weights"])
    return (after, new_cache), taps

  def as_data(self, out_norm: OutNorm) -> OutNorm:
    """An N_out, or none, in the shape that the carry has; the gain in fp32, whatever the parameters come in."""
    if out_norm is None:
      return jnp.ones(self.config.embed_dim, jnp.float32), jnp.asarray(False)
    return out_norm[0].astype(jnp.float32), jnp.asarray(out_norm[1])

  def sublayer(
    self,
    name: str,
    branch: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    columns: dict[str, Any],
    gpas: dict[str, jax.Array],
  ) -> tuple[jax.Array, OutNorm, dict[str, jax.Array]]:
    """The sublayer rule with this layer's columns and parameters: the sum, the N_out that it lacks, its taps."""
    row = {key.removeprefix(f"{name}."): value for key, value in columns.items() if key.startswith(f"{name}.")}
    gains, learned = self.gains(name, columns), self.learned(name, columns) | gpas
    with jax.named_scope(name):
      sum_BTD, out_norm, terms = sublayer(
        x_BTD, branch, gains, learned, row, epsilon=self.config.norm_epsilon, dtype=self.config.dtype
      )
    taps = {f"{name}_{term}": value for term, value in terms.items()}
    return constrain(sum_BTD, *STREAM), out_norm, taps

  def attend(
    self,
    x_BTD: jax.Array,
    cache: Cache | None,
    columns: dict[str, Any],
    layer: jax.Array | int,
    shared: dict[str, Any],
  ) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
    """Attention, the cache after it, and where somebody observes, what `attention_statistics` says of it."""
    c = self.config
    kv_heads, width = config_lib.num_kv_heads(c), config_lib.head_dim(c)

    def project(name: str, heads: int, axis: str) -> jax.Array:
      weight_DHK = self.matrix(name, (c.embed_dim, heads, width), ("embed", axis, "head_dim"))
      out_BTHK = constrain(multiply("btd,dhk->bthk", x_BTD, weight_DHK), "batch", "length", axis, "head_dim")
      return out_BTHK + self.matrix(f"{name}_bias", (heads, width), (axis, "head_dim")) if c.qkv_bias else out_BTHK

    def norm(name: str, x_BTHK: jax.Array, column: str) -> jax.Array:
      """RMSNorm of each head alone, or with a `_full` column over all heads together; where the column has it."""
      if (on := columns[f"attention.{column}"]) is False:
        return x_BTHK
      heads = x_BTHK.shape[-2]
      if not column.endswith("_full"):
        gain_K = self.tensor(f"{name}_norm", (width,), ("head_dim",))
        return rms_norm(x_BTHK, gain_K, epsilon=c.norm_epsilon, on=on).astype(x_BTHK.dtype)
      axes = ("heads" if name == "query" else "kv_heads", "head_dim")
      gain_HK = self.tensor(f"{name}_norm_full", (heads, width), axes)
      flat = rms_norm(x_BTHK.reshape(*x_BTHK.shape[:-2], -1), gain_HK.reshape(-1), epsilon=c.norm_epsilon, on=on)
      return flat.reshape(x_BTHK.shape).astype(x_BTHK.dtype)

    def normed(name: str, x_BTHK: jax.Array) -> jax.Array:
      return norm(name, norm(name, x_BTHK, "qk_norm_full"), "qk_norm")

    q_BTHK = attention_lib.rotate(normed("query", project("query", c.num_heads, "heads")), shared["rope"])
    k_BSGK = attention_lib.rotate(normed("key", project("key", kv_heads, "kv_heads")), shared["rope"])
    v_BSGK = norm("value", project("value", kv_heads, "kv_heads"), "v_norm")
    q_BTHK, k_BSGK, v_BSGK = constrain(q_BTHK, *QUERIES), constrain(k_BSGK, *KEYS), constrain(v_BSGK, *KEYS)
    if cache is not None:
      cache, k_BSGK, v_BSGK = attention_lib.update_cache(cache, layer, k_BSGK, v_BSGK, shared["positions"])
      k_BSGK, v_BSGK = k_BSGK.astype(q_BTHK.dtype), v_BSGK.astype(q_BTHK.dtype)
      out_BTHK = attention_lib.attention(q_BTHK, k_BSGK, v_BSGK, shared["mask"])
    else:
      segments = shared["segments"]
      implementation = choose_attention(c, q_BTHK.shape[1], segments=segments is not None)
      out_BTHK = self_attention(implementation, q_BTHK, k_BSGK, v_BSGK, shared["mask"], segments)
    seen = {}
    if self.observe is not None:
      statistics = attention_lib.attention_statistics(q_BTHK, k_BSGK, shared["mask"])
      seen = {f"attention_{name}": value for name, value in statistics.items()}
    weight_HKD = self.matrix("output", (c.num_heads, width, c.embed_dim), ("heads", "head_dim", "embed"))
    out_BTD = constrain(multiply("bthk,hkd->btd", constrain(out_BTHK, *QUERIES), weight_HKD), *STREAM)
    return out_BTD, cache, seen

  def mlp(self, x_BTD: jax.Array) -> jax.Array:
    embed, hidden = self.config.embed_dim, config_lib.stored_mlp_dim(self.config)

    def widen(name: str) -> jax.Array:
      weight_DF = self.matrix(name, (embed, hidden), ("embed", "mlp"))
      return constrain(multiply("btd,df->btf", x_BTD, weight_DF), *HIDDEN)

    hidden_BTF = nn.silu(widen("gate")) * widen("up")
    weight_FD = self.matrix("down", (hidden, embed), ("mlp", "embed"))
    return constrain(multiply("btf,fd->btd", hidden_BTF, weight_FD), *STREAM)


class Transformer(nn.Module):
  """A decoder-only LLaMA.

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
    c = self.config
    param_dtype = jnp.dtype(c.param_dtype)

    def tensor(name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
      return self.param(name, nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, param_dtype)

    self.embedding = tensor("embedding", (c.vocab_size, c.embed_dim), ("vocab", "embed"))
    self.final_norm = tensor("final_norm", (c.embed_dim,), ("norm",))
    if not c.tied_embeddings:
      self.head = tensor("head", (c.embed_dim, c.vocab_size), ("embed", "vocab"))

  def head_weights(self) -> jax.Array:
    """The output projection [D, V]: the head, or the embedding transposed."""
    return self.embedding.T if self.config.tied_embeddings else self.head

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

    Returns:
      The final hidden states [B, T, D] in config.model.dtype, after the final norm; and the taps: `embedded_BTD`, the
      residual stream before the first layer; `stream_LBTD`, after each layer (before the final norm); for attention
      and MLP the two terms of the sublayer rule's sum, `attention_residual_LBTD`, `attention_branch_LBTD`,
      `mlp_residual_LBTD`, `mlp_branch_LBTD`; `cache`, where one was given. What nobody reads is not computed. With
      `observe`, `embedded_BTD`, and of the layers what that returns, stacked [L, …].
    """
    c = self.config
    if cache is not None:
      _check_cache(cache, tokens_BT, positions_BT, segment_ids_BT)
    if positions_BT is None:
      positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    columns = Columns.of(placement.parse(c.placement, c.num_layers)) if columns is None else columns
    shared = {
      "rope": attention_lib.rope_table(positions_BT, attention_lib.rope_frequencies(c)),
      "mask": attention_lib.attention_mask(positions_BT, segment_ids_BT, cache),
      "segments": segment_ids_BT,
      "positions": positions_BT,
      "weights": weights_BT,
    }
    # The table's width is gathered first: looked up in pieces of it, the whole batch would be gathered on each device.
    table_VD = constrain(self.embedding, "vocab", "activation_embed")
    x_BTD = constrain(jnp.take(table_VD, tokens_BT, axis=0).astype(config_lib.residual_dtype(c)), *STREAM)
    taps: dict[str, Any] = {"embedded_BTD": x_BTD}
    run_stack = self.loop if c.unroll == 0 and not self.is_initializing() else self.scan
    (last, new_cache), layer_taps = run_stack(((x_BTD, self.nothing_owed(columns)), cache), columns, keep_L, shared)
    x_BTD = settle(*last, epsilon=c.norm_epsilon)
    taps |= {name.replace("_BTD", "_LBTD"): tap for name, tap in layer_taps.items()}
    if cache is not None:
      taps["cache"] = new_cache
    hidden_BTD = rms_norm(x_BTD, self.final_norm, epsilon=c.norm_epsilon).astype(c.dtype)
    return constrain(hidden_BTD, *STREAM), taps

  def nothing_owed(self, columns: Columns) -> OutNorm:
    """The N_out that the embedding lacks: none, in the shape that the carry has."""
    if dict(columns.constant).get("mlp.norm_out") is False:
      return None
    return jnp.ones(self.config.embed_dim, jnp.float32), jnp.asarray(False)

  def layer_class(self) -> type[Layer]:
    if self.config.remat == "none":
      return Layer
    return nn.remat(Layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=self.config.unroll == 0)

  def scan(self, carry: Any, columns: Columns, keep_L: jax.Array | None, shared: dict[str, Any]) -> tuple[Any, Any]:
    """One scan over the stacked layers, `config.model.unroll` of them a step."""
    num_layers = self.config.num_layers
    varying = {"columns": columns.varying, "keep": keep_L, "index": jnp.arange(num_layers)}
    layers = nn.scan(
      self.layer_class(),
      variable_axes={"params": 0},
      split_rngs={"params": False},
      in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
      out_axes=0,
      length=num_layers,
      unroll=max(1, self.config.unroll),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(self.config, columns.constant, self.observe, name="layers")
    return layers(carry, varying, shared)

  def loop(self, carry: Any, columns: Columns, keep_L: jax.Array | None, shared: dict[str, Any]) -> tuple[Any, Any]:
    """The same layers as a plain Python loop over the same stacked parameters."""
    stacked = nn.unbox(self.variables["params"]["layers"])
    layer = self.layer_class()(self.config, columns.constant, self.observe, parent=None)
    taps = []
    for index in range(self.config.num_layers):
      params = jax.tree.map(lambda p, i=index: p[i], stacked)
      varying = {
        "columns": columns.of_layer(index),
        "keep": None if keep_L is None else keep_L[index],
        "index": index,
      }
      carry, layer_taps = layer.apply({"params": params}, carry, varying, shared)
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


def is_matrix(path: str) -> bool:
  """Whether a parameter is a matrix, the embedding or the head: drawn at random, and what weight decay is for."""
  return path.split("/")[-1] in MATRICES


def param_paths(params: Mapping[str, Any]) -> Any:
  """The tree of the parameters' names, `layers/query`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
  )

"""A model with one layer replaced: by the identity (removal, the causal score), or by an affine map (usefulness).

One scan over the layers computes the model and its variants, one variant for each replaced layer. Up to its own layer a
variant equals the model, and nothing is computed for it, so L variants cost half as much as L forward passes.

Dimensions: C variants of one call, E and F as in `layer_io.py`, the others as in the model.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mixln_jax.config import ModelConfig
from mixln_jax.diagnostics.layer_io import AnyStreams, Batch, LayerIO, by_layer, present
from mixln_jax.model import Transformer, next_token_loss
from mixln_jax.model.transformer import separate

SMALLEST = 1e-8  # lower bound of the denominator ‖u_l‖ of a ratio, as in DepthBench's code


class Affine(flax.struct.PyTreeNode):
  """y = x · map + offset, for each layer."""

  map_LEF: Any
  offset_LF: Any


class Sums(flax.struct.PyTreeNode):
  """Sums over a batch. u_l is the change that layer l of the model makes to the stream, u'_l that in a variant.

  Attributes:
    tokens: positions that hold a token.
    size_L: ‖u_l‖, summed over those positions.
    ratio_CL: ‖u'_l − u_l‖ / ‖u_l‖, summed over those positions.
    change_CL: ‖u'_l − u_l‖, summed over those positions.
    loss: loss of the model, summed over counted positions.
    loss_C: losses of the variants, summed over counted positions.
    count: counted positions.
  """

  tokens: jax.Array
  size_L: jax.Array
  ratio_CL: jax.Array
  change_CL: jax.Array
  loss: jax.Array
  loss_C: jax.Array
  count: jax.Array


Step = Callable[[Any, Batch, Any, Any], Sums]


def make_substitution_step(model: ModelConfig) -> Step:
  """`step(params, batch, layer_C, affine) -> Sums`. Call it under jit.

  `layer_C` says which layer each variant replaces. `affine` has the map that replaces each layer. If it is None, the
  layer is removed: its output is its input, and with attention residuals it adds nothing to its sources.
  """

  def substitute(transformer: Transformer, batch: Batch, layer_C: Any, affine: Affine | None) -> Sums:
    io, layers = LayerIO(transformer), by_layer(transformer, batch)
    present_BT = present(batch)

    def total(values_BT: jax.Array) -> jax.Array:
      return jnp.sum(values_BT * present_BT)

    def body(carry: tuple[AnyStreams, AnyStreams], inputs: Any) -> tuple[Any, Any]:
      before, variants = carry
      layer_inputs, slots, own_affine = inputs
      index = layer_inputs[1].layer
      after = layers.apply(layer_inputs, before)
      change_BTD = io.stream(after) - io.stream(before)
      size_BT = jnp.linalg.norm(change_BTD, axis=-1)

      def replaced() -> AnyStreams:
        if own_affine is None:
          return before
        written_BTF = jnp.einsum("bte,ef->btf", io.read(before), own_affine.map_LEF, precision="highest")
        return io.write(before, written_BTF + own_affine.offset_LF, slots)

      def advance(variant_and_layer: tuple[AnyStreams, jax.Array]) -> tuple[AnyStreams, Any]:
        variant, replaced_layer = variant_and_layer
        # Before the replaced layer, at it, or after it.
        phase = jnp.sign(index - replaced_layer) + 1
        advanced = jax.lax.switch(phase, [lambda: after, replaced, lambda: layers.apply(layer_inputs, variant)])
        difference_BT = jnp.linalg.norm(io.stream(advanced) - io.stream(variant) - change_BTD, axis=-1)
        return advanced, (total(difference_BT / jnp.maximum(size_BT, SMALLEST)), total(difference_BT))

      variants, (ratio_C, change_C) = jax.lax.map(advance, (variants, layer_C))
      return (after, variants), (total(size_BT), ratio_C, change_C)

    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(layer_C), *leaf.shape)), layers.first)
    inputs_L = (layers.layers, io.slots(), affine)
    (last, variants), (size_L, ratio_LC, change_LC) = jax.lax.scan(body, (layers.first, copies), inputs_L)

    def loss(streams: AnyStreams) -> tuple[jax.Array, jax.Array]:
      hidden_BTD = transformer.read_out(separate(streams, transformer.config), io.columns.streams)
      return next_token_loss(hidden_BTD, transformer.head_weights(), batch["labels_BT"], batch["weights_BT"])

    model_loss, count = loss(last)
    loss_C, _ = jax.lax.map(loss, variants)
    return Sums(jnp.sum(present_BT), size_L, ratio_LC.T, change_LC.T, model_loss, loss_C, count)

  def step(params: Any, batch: Batch, layer_C: Any, affine: Affine | None) -> Sums:
    return nn.apply(lambda transformer: substitute(transformer, batch, layer_C, affine), Transformer(model))(
      {"params": params}
    )

  return step

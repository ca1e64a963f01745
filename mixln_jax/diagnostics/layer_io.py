"""What a layer reads and writes, as two vectors per position, so that another function can take the layer's place.

With one stream, they are the stream before and after the layer; with several, the concatenation of the streams that are
carried from layer to layer. With attention residuals, whose sources are the earlier outputs, a layer reads the sum of
the sources (the stream of a model without them) and writes its two outputs.

Dimensions: E numbers that a layer reads per position, F numbers that it writes; the others as in the model.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixln_jax import config as config_lib
from mixln_jax.config import ModelConfig
from mixln_jax.model import Columns, Transformer
from mixln_jax.model.residual import Sources, Stream, Streams
from mixln_jax.model.transformer import ByLayer, separate, the_stream

Batch = Mapping[str, jax.Array]
AnyStreams = Streams | Sources


class Sizes(NamedTuple):
  """E and F of a model."""

  read: int
  written: int


class Slots(NamedTuple):
  """The source that each sublayer adds to, [L] or of one layer; zeros for a model without sources."""

  attention: jax.Array
  mlp: jax.Array


class LayerIO(NamedTuple):
  """Converts the streams of a model to vectors and back.

  Attributes:
    transformer: the model.
  """

  transformer: Transformer

  @property
  def columns(self) -> Columns:
    return Columns.of(config_lib.table(self.transformer.config))

  def sizes(self) -> Sizes:
    columns, width = self.columns, self.transformer.config.embed_dim
    if columns.only_sources:
      return Sizes(width, 2 * width)
    return Sizes(width * columns.streams.num_carried, width * columns.streams.num_carried)

  def slots(self) -> Slots:
    columns = self.columns
    if not columns.only_sources:
      none_L = jnp.zeros(columns.num_layers, jnp.int32)
      return Slots(none_L, none_L)
    slots = columns.slots()
    return Slots(slots.attention_L, slots.mlp_L)

  def stream(self, streams: AnyStreams) -> jax.Array:
    """The residual stream as diagnostics define it (`the_stream`), [B, T, D] in fp32."""
    columns = self.columns
    values = [value.astype(jnp.float32) for value in separate(streams, self.transformer.config)]
    return the_stream(values, columns.streams, columns.alone)

  def read(self, streams: AnyStreams) -> jax.Array:
    """What a layer reads, [B, T, E] in fp32."""
    if isinstance(streams, Sources):
      return self.stream(streams)
    values = separate(streams, self.transformer.config)
    return jnp.concatenate(values, axis=-1).astype(jnp.float32)

  def written(self, before: AnyStreams, after: AnyStreams, slots: Slots) -> jax.Array:
    """What a layer wrote, [B, T, F] in fp32. If both outputs went to the same source, the second half is 0."""
    if not isinstance(before, Sources) or not isinstance(after, Sources):
      return self.read(after)
    added_SBTD = after.buffer_SBTD.astype(jnp.float32) - before.buffer_SBTD.astype(jnp.float32)
    mlp_BTD = jnp.where(slots.attention == slots.mlp, 0.0, added_SBTD[slots.mlp])
    return jnp.concatenate([added_SBTD[slots.attention], mlp_BTD], axis=-1)

  def write(self, before: AnyStreams, written_BTF: jax.Array, slots: Slots) -> AnyStreams:
    """The streams after a layer that reads `before` and writes `written_BTF`, in the same form as `before`."""
    if isinstance(before, Sources):
      attention_BTD, mlp_BTD = jnp.split(written_BTF, 2, axis=-1)
      return before.added(slots.attention, attention_BTD).added(slots.mlp, mlp_BTD)
    parts = jnp.split(written_BTF, 1 + len(before.further), axis=-1)
    first_BTD, *further = [part.astype(before.first.sum_BTD.dtype) for part in parts]
    first = Stream(first_BTD)
    if before.first.pending is not None:
      first = first.as_scan_carry(self.transformer.config.norm)
    return Streams(first, tuple(further))


def by_layer(transformer: Transformer, batch: Batch) -> ByLayer:
  """`Transformer.by_layer` of a batch."""
  return transformer.by_layer(
    batch["tokens_BT"], segment_ids_BT=batch.get("segment_ids_BT"), positions_BT=batch.get("positions_BT")
  )


def present(batch: Batch) -> jax.Array:
  """1 at the positions that hold a token of a record, else 0, [B, T]: counted positions and the ones after them."""
  counted_BT = batch["weights_BT"] > 0
  predicted_BT = jnp.pad(counted_BT[:, :-1], ((0, 0), (1, 0)))
  return (counted_BT | predicted_BT).astype(jnp.float32)


def num_variants(model: ModelConfig) -> int:
  """How many variants of the model are computed at once: as many as fit in the memory of L copies of one stream."""
  carried = Columns.of(config_lib.table(model)).streams.num_carried
  return max(1, model.num_layers // carried)

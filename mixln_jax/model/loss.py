"""The language-modelling loss, as a sum and a count."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax.model.columns import Columns
from mixln_jax.model.transformer import Transformer
from mixln_jax.parallel.rules import constrain, platform, shards

# Logits that a device forms at once. On a CPU 256 tokens of a vocabulary of 32,000 (33 MB) were among the fastest of 64
# to 2,048, at widths 128 and 512. On an accelerator 512 MB, to make products long enough to fill it: not measured.
CHUNK_LOGITS = {"cpu": 2**23, "accelerator": 2**27}
PIECE = ("batch", "length", None, None)  # the logical axes of P, Q, B / P, C (see `_cut`)


def next_token_loss(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  labels_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy, summed over counted positions; the division happens once, at the end of all sums.

  Logits exist for a chunk of positions at a time, and once: where a gradient is wanted it is made of them in the same
  pass, and kept instead. So memory does not grow with tokens × vocabulary, and the head is multiplied three times, as
  if all logits were kept. A chunk is cut along the sequence out of the positions that a device has: no hidden state
  leaves it, and the head's gradient is added over devices once. It can be differentiated once, in reverse.

  Args:
    hidden_BTD: final hidden states.
    head_DV: output projection; multiplied in the hidden states' type, with fp32 logits.
    labels_BT: the token to predict at each position.
    weights_BT: 1 where a position counts, else 0.
    chunk: positions of a row whose logits exist at once; by default what `CHUNK_LOGITS` allows.

  Returns:
    (sum of the losses in nats, number of counted positions), fp32 scalars.
  """
  weights_BT = weights_BT.astype(jnp.float32)
  rows, columns = (_pieces(*pair) for pair in zip(labels_BT.shape, ("batch", "length"), strict=True))
  if chunk is None:
    position = labels_BT.shape[0] // rows * -(-head_DV.shape[1] // shards("vocab"))
    chunk = max(1, CHUNK_LOGITS.get(platform(), CHUNK_LOGITS["accelerator"]) // position)
  cut = partial(_cut, rows=rows, columns=columns, chunk=chunk)
  # Gathered over fsdp here, once, and not by each chunk.
  head_DV = constrain(head_DV.astype(hidden_BTD.dtype), "activation_embed", "vocab")
  return _summed_loss(cut(hidden_BTD), head_DV, cut(labels_BT), cut(weights_BT)), jnp.sum(weights_BT)


def _pieces(size: int, axis: str) -> int:
  """Into how many pieces the mesh cuts a dimension; one where it can't cut it evenly."""
  return 1 if size % shards(axis) else shards(axis)


def _cut(x_BT: jax.Array, rows: int, columns: int, chunk: int) -> jax.Array:
  """[B, T, …] as [N, P, Q, B / P, C, …]: N chunks of each of the P × Q pieces that lie on different devices.

  C is at most `chunk`; where N·C positions are more than a piece has, the last ones are zeros.
  """
  batch, length, *rest = x_BT.shape
  num_chunks = -(-(length // columns) // chunk)
  size = -(-(length // columns) // num_chunks)
  x = x_BT.reshape(rows, batch // rows, columns, length // columns, *rest)
  x = jnp.pad(x, [(0, num_chunks * size - length // columns) if axis == 3 else (0, 0) for axis in range(x.ndim)])
  x = jnp.moveaxis(x.reshape(*x.shape[:3], num_chunks, size, *rest), (3, 0, 2), (0, 1, 2))
  return constrain(x, None, *PIECE, *[None] * len(rest))


@jax.custom_vjp
def _summed_loss(
  hidden_NPQBCD: jax.Array, head_DV: jax.Array, labels_NPQBC: jax.Array, weights_NPQBC: jax.Array
) -> jax.Array:
  def add(sum_PQ: jax.Array, of_chunk: Any) -> tuple[jax.Array, None]:
    return sum_PQ + _chunk(head_DV, *of_chunk)[0], None

  sum_PQ = jnp.zeros(labels_NPQBC.shape[1:3])
  return jnp.sum(_scan(add, sum_PQ, (hidden_NPQBCD, labels_NPQBC, weights_NPQBC))[0])


def _loss_and_gradients(
  hidden_NPQBCD: jax.Array, head_DV: jax.Array, labels_NPQBC: jax.Array, weights_NPQBC: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  def add(sums: Any, of_chunk: Any) -> tuple[Any, jax.Array]:
    sum_PQ, head_gradient_PQDV = sums
    more_PQ, gradient_PQBCV, factor_PQBC1 = _chunk(head_DV, *of_chunk)
    gradient_PQBCV = gradient_PQBCV.astype(head_DV.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    hidden_gradient_PQBCD = product("pqbcv,dv->pqbcd", gradient_PQBCV, head_DV) * factor_PQBC1
    hidden_PQBCD = (of_chunk[0] * factor_PQBC1).astype(head_DV.dtype)
    head_gradient_PQDV += product("pqbcd,pqbcv->pqdv", hidden_PQBCD, gradient_PQBCV)
    hidden_gradient_PQBCD = constrain(hidden_gradient_PQBCD.astype(head_DV.dtype), *PIECE, None)
    return (sum_PQ + more_PQ, head_gradient_PQDV), hidden_gradient_PQBCD

  pieces = labels_NPQBC.shape[1:3]
  # A sum for each piece: with a single one, all devices would have to agree on it after every chunk.
  head_gradient_PQDV = constrain(jnp.zeros((*pieces, *head_DV.shape)), "batch", "length", "activation_embed", "vocab")
  (sum_PQ, head_gradient_PQDV), hidden_gradient_NPQBCD = _scan(
    add, (jnp.zeros(pieces), head_gradient_PQDV), (hidden_NPQBCD, labels_NPQBC, weights_NPQBC)
  )
  return jnp.sum(sum_PQ), (hidden_gradient_NPQBCD, jnp.sum(head_gradient_PQDV, axis=(0, 1)))


def _times_gradients(gradients: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[Any, ...]:
  hidden_gradient_NPQBCD, head_gradient_DV = gradients
  dtype = hidden_gradient_NPQBCD.dtype
  return (hidden_gradient_NPQBCD * factor).astype(dtype), (head_gradient_DV * factor).astype(dtype), None, None


_summed_loss.defvjp(_loss_and_gradients, _times_gradients)


def _chunk(
  head_DV: jax.Array, hidden_PQBCD: jax.Array, labels_PQBC: jax.Array, weights_PQBC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The summed loss of each piece, [P, Q], and its gradient by the logits, up to a factor of each position; all fp32.

  The gradient is weight · (softmax − one-hot) = weight / sum · (powers − sum · one-hot). What is in front is left to
  the much smaller arrays before and after the products: one pass fewer over all logits.
  """
  logits_PQBCV = jnp.einsum("pqbcd,dv->pqbcv", hidden_PQBCD, head_DV, preferred_element_type=jnp.float32)
  logits_PQBCV = constrain(logits_PQBCV, *PIECE, "vocab")
  largest_PQBC1 = jnp.max(logits_PQBCV, axis=-1, keepdims=True)
  powers_PQBCV = jnp.exp(logits_PQBCV - largest_PQBC1)
  sums_PQBC1 = jnp.sum(powers_PQBCV, axis=-1, keepdims=True)
  label_logits_PQBC1 = jnp.take_along_axis(logits_PQBCV, labels_PQBC[..., None], axis=-1)
  losses_PQBC = (jnp.log(sums_PQBC1) + largest_PQBC1 - label_logits_PQBC1)[..., 0]
  gradient_PQBCV = _subtract_at(labels_PQBC, powers_PQBCV, sums_PQBC1)
  return jnp.sum(losses_PQBC * weights_PQBC, axis=(2, 3)), gradient_PQBCV, weights_PQBC[..., None] / sums_PQBC1


def _subtract_at(labels_PQBC: jax.Array, x_PQBCV: jax.Array, amount_PQBC1: jax.Array) -> jax.Array:
  """x less the amount where the label stands."""
  if platform() == "cpu" and shards("vocab") == 1:
    # In place, a number a position; elsewhere the comparison is part of what makes the products' operand.
    ahead = (0, 1, 2, 3)
    numbers = jax.lax.ScatterDimensionNumbers(
      update_window_dims=(),
      inserted_window_dims=(4,),
      scatter_dims_to_operand_dims=(4,),
      operand_batching_dims=ahead,
      scatter_indices_batching_dims=ahead,
    )
    indices, amount_PQBC = labels_PQBC[..., None], amount_PQBC1[..., 0]
    return jax.lax.scatter_sub(x_PQBCV, indices, amount_PQBC, numbers, unique_indices=True)
  is_label_PQBCV = jnp.arange(x_PQBCV.shape[-1]) == labels_PQBC[..., None]
  return jnp.where(is_label_PQBCV, x_PQBCV - amount_PQBC1, x_PQBCV)


def _scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
  """`jax.lax.scan`, without a loop where there is one chunk."""
  if len(jax.tree.leaves(xs)[0]) > 1:
    return jax.lax.scan(body, carry, xs)
  carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
  return carry, jax.tree.map(lambda x: x[None], y)


def batch_loss(
  model: Transformer,
  params: Any,
  batch: Mapping[str, jax.Array],
  *,
  columns: Columns | None = None,
  keep_L: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
  """The loss of a batch, and what the model saw on the way.

  Args:
    model: the model; with its `observe`, the taps are what that makes of them.
    params: its parameters.
    batch: `tokens_BT`, `labels_BT`, `weights_BT`, and with documents kept apart `segment_ids_BT`, `positions_BT`.
    columns: the placement as data.
    keep_L: 0 where a layer is removed.

  Returns:
    The summed loss, the number of counted positions (as `next_token_loss`), and the taps (as `Transformer.hidden`).
  """

  def apply(model: Transformer) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    hidden_BTD, taps = model.hidden(
      batch["tokens_BT"],
      columns=columns,
      keep_L=keep_L,
      segment_ids_BT=batch.get("segment_ids_BT"),
      positions_BT=batch.get("positions_BT"),
      weights_BT=None if model.observe is None else batch["weights_BT"],
    )
    return *next_token_loss(hidden_BTD, model.head_weights(), batch["labels_BT"], batch["weights_BT"]), taps

  return nn.apply(apply, model)({"params": params})

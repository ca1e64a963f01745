"""The head's loss in chunks of positions, so that not all logits exist at once; value and gradient in one pass.

Dimensions (D, V, and T as in the model):
  N  chunks, in the order in which they are computed
  P  shards of the batch, one for each group of devices that holds different rows
  Q  shards of the length, likewise
  B  rows of a shard
  C  positions of a chunk
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.parallel.rules import constrain, platform, shards

# Logits that a device computes at once. On a CPU, of 64 to 2,048 tokens of a vocabulary of 32,000, 256 tokens (33 MB)
# were among the fastest at widths 128 and 512. On an accelerator it is 1 GB: of 2^25 to 2^29 logits, the TPU compiler
# reports little more traffic and memory for it than the lowest of each (docs/tpu_programs.md). No chip was timed.
CHUNK_LOGITS = {"cpu": 2**23, "accelerator": 2**28}
PIECE = ("batch", "length", None, None)  # the logical axes of P, Q, B, C


def chunked_loss(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  labels_BT: jax.Array,
  weights_BT: jax.Array,
  chunk: int | None = None,
) -> jax.Array:
  """`all_logits_loss` in the memory of one chunk of logits.

  The logits of a chunk are computed once. If a gradient is needed, it is computed from them in the same pass and saved
  instead of them. So memory does not grow with tokens × vocabulary, and there are three products with the head, as
  there are when all logits are saved (rematerialising a chunk would need a fourth). Chunks are cut along the sequence
  from the positions that a device holds, so no hidden state leaves its device, and the head's gradient is summed over
  devices once. The result can be differentiated once, in reverse mode.

  Args:
    hidden_BTD: final hidden states.
    head_DV: output projection, in the hidden states' type.
    labels_BT: the token to predict at each position.
    weights_BT: fp32, the weight of each position's loss.
    chunk: positions per row whose logits exist at the same time; by default what `CHUNK_LOGITS` allows.

  Returns:
    The weighted sum of the losses in nats, an fp32 scalar.
  """
  cut, head_DV = _prepared(labels_BT, head_DV, chunk)
  return _summed_loss(cut(hidden_BTD), head_DV, cut(labels_BT), cut(weights_BT))


def chunked_losses(
  hidden_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, chunk: int | None = None
) -> jax.Array:
  """The loss of each position, [B, T] in nats, in the memory of one chunk of logits; arguments as `chunked_loss`.

  What is made of them decides how much each position's gradient weighs, and is not known before: the backward pass
  forms the logits a second time, so that the head takes part in four products.
  """
  cut, head_DV = _prepared(labels_BT, head_DV, chunk)
  losses_NPQBC = _losses(cut(hidden_BTD), head_DV, cut(labels_BT))
  return _uncut(losses_NPQBC, labels_BT.shape[1])


def _prepared(
  labels_BT: jax.Array, head_DV: jax.Array, chunk: int | None
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
  """How arrays [B, T, …] are cut into chunks, and the head as the chunks read it."""
  batch, length = labels_BT.shape
  rows = _num_pieces(batch, "batch")
  columns = _num_pieces(length, "length")
  if chunk is None:
    logits_per_column = batch // rows * -(-head_DV.shape[1] // shards("vocab"))
    allowed = CHUNK_LOGITS.get(platform(), CHUNK_LOGITS["accelerator"])
    chunk = max(1, allowed // logits_per_column)
  if shards("embed") == 1:
    head_DV = constrain(head_DV, "activation_embed", "vocab")
  return partial(_cut, rows=rows, columns=columns, chunk=chunk), head_DV


def _num_pieces(size: int, axis: str) -> int:
  """How many shards the mesh makes of a dimension; one if it can't divide it evenly."""
  return 1 if size % shards(axis) else shards(axis)


def _cut(x_BT: jax.Array, rows: int, columns: int, chunk: int) -> jax.Array:
  """[B, T, …] as [N, P, Q, B / P, C, …]: N chunks of each of the P × Q shards that lie on different devices.

  C is at most `chunk`. If N·C exceeds the positions of a shard, the last ones are padded with zeros, also their
  weights.
  """
  batch, length, *rest = x_BT.shape
  piece_length = length // columns
  num_chunks = -(-piece_length // chunk)
  size = -(-piece_length // num_chunks)
  x = x_BT.reshape(rows, batch // rows, columns, piece_length, *rest)
  padding = [(0, 0)] * x.ndim
  padding[3] = (0, num_chunks * size - piece_length)
  x = jnp.pad(x, padding)
  x_PBQNC = x.reshape(*x.shape[:3], num_chunks, size, *rest)
  x_NPQBC = jnp.moveaxis(x_PBQNC, (3, 0, 2), (0, 1, 2))
  return constrain(x_NPQBC, None, *PIECE, *[None] * len(rest))


def _uncut(x_NPQBC: jax.Array, length: int) -> jax.Array:
  """The inverse of `_cut`: [B, T], without what it padded a piece with."""
  num_chunks, rows, columns, batch, size = x_NPQBC.shape
  x_PBQNC = jnp.moveaxis(x_NPQBC, (0, 1, 2), (3, 0, 2))
  pieces = x_PBQNC.reshape(rows, batch, columns, num_chunks * size)[..., : length // columns]
  return constrain(pieces.reshape(rows * batch, length), "batch", "length")


@jax.custom_vjp
def _losses(hidden_NPQBCD: jax.Array, head_DV: jax.Array, labels_NPQBC: jax.Array) -> jax.Array:
  """The loss of each position, [N, P, Q, B, C]."""
  head_DV = _gathered(head_DV)

  def of_chunk(carry: None, chunk: Any) -> tuple[None, jax.Array]:
    losses_PQBC, _, _ = _chunk_losses(head_DV, *chunk)
    return carry, losses_PQBC

  return _scan(of_chunk, None, (hidden_NPQBCD, labels_NPQBC))[1]


def _losses_forward(
  hidden_NPQBCD: jax.Array, head_DV: jax.Array, labels_NPQBC: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  return _losses(hidden_NPQBCD, head_DV, labels_NPQBC), (hidden_NPQBCD, head_DV, labels_NPQBC)


def _losses_backward(
  saved: tuple[jax.Array, jax.Array, jax.Array], gradient_NPQBC: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  """The gradient of a sum in which each loss is times its own gradient."""
  hidden_NPQBCD, head_DV, labels_NPQBC = saved
  _, (hidden_gradient_NPQBCD, head_gradient_DV) = _loss_and_gradients(
    hidden_NPQBCD, head_DV, labels_NPQBC, gradient_NPQBC
  )
  return hidden_gradient_NPQBCD, head_gradient_DV.astype(head_DV.dtype), None


_losses.defvjp(_losses_forward, _losses_backward)


@jax.custom_vjp
def _summed_loss(
  hidden_NPQBCD: jax.Array, head_DV: jax.Array, labels_NPQBC: jax.Array, weights_NPQBC: jax.Array
) -> jax.Array:
  """The loss alone, when no gradient is needed."""
  head_DV = _gathered(head_DV)

  def add(sum_PQ: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
    loss_PQ, _, _ = _chunk_loss(head_DV, *chunk)
    return sum_PQ + loss_PQ, None

  sum_PQ = jnp.zeros(labels_NPQBC.shape[1:3])
  sum_PQ, _ = _scan(add, sum_PQ, (hidden_NPQBCD, labels_NPQBC, weights_NPQBC))
  return jnp.sum(sum_PQ)


def _loss_and_gradients(
  hidden_NPQBCD: jax.Array, head_DV: jax.Array, labels_NPQBC: jax.Array, weights_NPQBC: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """The loss, and its gradients by the hidden states and the head, which the backward pass only scales."""
  head_DV = _gathered(head_DV)
  product = partial(jnp.einsum, preferred_element_type=jnp.float32)
  # Each shard has its own sum of the head's gradient; a single one would need an all-reduce after every chunk. With
  # only one chunk the sum is reduced right away, into the shards of the head: a whole fp32 sum would be among the
  # largest arrays of a step.
  is_sharded = shards("embed") > 1 and len(labels_NPQBC) == 1
  sum_term = "dv" if is_sharded else "pqdv"
  sum_axes = ("embed", "vocab") if is_sharded else ("batch", "length", "activation_embed", "vocab")

  def add(sums: Any, chunk: Any) -> tuple[Any, jax.Array]:
    sum_PQ, head_gradient = sums
    hidden_PQBCD, labels_PQBC, weights_PQBC = chunk
    loss_PQ, gradient_PQBCV, factor_PQBC1 = _chunk_loss(head_DV, hidden_PQBCD, labels_PQBC, weights_PQBC)
    gradient_PQBCV = gradient_PQBCV.astype(head_DV.dtype)
    hidden_gradient_PQBCD = product("pqbcv,dv->pqbcd", gradient_PQBCV, head_DV) * factor_PQBC1
    scaled_hidden_PQBCD = (hidden_PQBCD * factor_PQBC1).astype(head_DV.dtype)
    chunk_gradient = product(f"pqbcd,pqbcv->{sum_term}", scaled_hidden_PQBCD, gradient_PQBCV)
    head_gradient += constrain(chunk_gradient, *sum_axes) if is_sharded else chunk_gradient
    hidden_gradient_PQBCD = constrain(hidden_gradient_PQBCD.astype(head_DV.dtype), *PIECE, None)
    return (sum_PQ + loss_PQ, head_gradient), hidden_gradient_PQBCD

  pieces = labels_NPQBC.shape[1:3]
  sum_shape = head_DV.shape if is_sharded else (*pieces, *head_DV.shape)
  head_gradient = constrain(jnp.zeros(sum_shape), *sum_axes)
  sums = (jnp.zeros(pieces), head_gradient)
  sums, hidden_gradient_NPQBCD = _scan(add, sums, (hidden_NPQBCD, labels_NPQBC, weights_NPQBC))
  sum_PQ, head_gradient = sums
  total = jnp.sum(sum_PQ)
  head_gradient_DV = head_gradient if is_sharded else jnp.sum(head_gradient, axis=(0, 1))
  if shards("embed") > 1:
    head_gradient_DV = constrain(head_gradient_DV, "embed", "vocab")
  return total, (hidden_gradient_NPQBCD, head_gradient_DV)


def _gathered(head_DV: jax.Array) -> jax.Array:
  """The head, gathered over fsdp once and not for each chunk.

  It is called inside the custom derivative rule. Outside of it, its own derivative would gather the head's gradient.
  """
  return head_DV if shards("embed") == 1 else constrain(head_DV, "activation_embed", "vocab")


def _scaled_gradients(gradients: tuple[jax.Array, jax.Array], scale: jax.Array) -> tuple[Any, ...]:
  hidden_gradient_NPQBCD, head_gradient_DV = gradients
  dtype = hidden_gradient_NPQBCD.dtype
  return (hidden_gradient_NPQBCD * scale).astype(dtype), (head_gradient_DV * scale).astype(dtype), None, None


_summed_loss.defvjp(_loss_and_gradients, _scaled_gradients)


def _chunk_loss(
  head_DV: jax.Array, hidden_PQBCD: jax.Array, labels_PQBC: jax.Array, weights_PQBC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The summed loss of each piece, and its gradient by the logits in two factors; all fp32.

  That gradient is weight · (softmax − one-hot) = weight / sum · (powers − sum · one-hot), where powers are the
  exponentials of the logits and sum is their sum. The caller applies the first factor to the much smaller arrays before
  and after the products with the head, which saves one pass over all logits.

  Returns:
    (loss_PQ, powers_PQBCV − sum · one-hot, weight / sum [P, Q, B, C, 1]).
  """
  losses_PQBC, powers_PQBCV, sums_PQBC1 = _chunk_losses(head_DV, hidden_PQBCD, labels_PQBC)
  gradient_PQBCV = _subtract_at(labels_PQBC, powers_PQBCV, sums_PQBC1)
  return jnp.sum(losses_PQBC * weights_PQBC, axis=(2, 3)), gradient_PQBCV, weights_PQBC[..., None] / sums_PQBC1


def _chunk_losses(
  head_DV: jax.Array, hidden_PQBCD: jax.Array, labels_PQBC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The loss of each position, the exponentials of its logits less the largest, and their sum [P, Q, B, C, 1]; fp32."""
  logits_PQBCV = jnp.einsum("pqbcd,dv->pqbcv", hidden_PQBCD, head_DV, preferred_element_type=jnp.float32)
  logits_PQBCV = constrain(logits_PQBCV, *PIECE, "vocab")
  largest_PQBC1 = jnp.max(logits_PQBCV, axis=-1, keepdims=True)
  powers_PQBCV = jnp.exp(logits_PQBCV - largest_PQBC1)
  sums_PQBC1 = jnp.sum(powers_PQBCV, axis=-1, keepdims=True)
  label_logits_PQBC1 = jnp.take_along_axis(logits_PQBCV, labels_PQBC[..., None], axis=-1)
  losses_PQBC = (jnp.log(sums_PQBC1) + largest_PQBC1 - label_logits_PQBC1)[..., 0]
  return losses_PQBC, powers_PQBCV, sums_PQBC1


def _subtract_at(labels_PQBC: jax.Array, x_PQBCV: jax.Array, amount_PQBC1: jax.Array) -> jax.Array:
  """x with the amount subtracted at the label's index."""
  if platform() == "cpu" and shards("vocab") == 1:
    return _scatter_subtract(labels_PQBC, x_PQBCV, amount_PQBC1)
  return _compare_and_subtract(labels_PQBC, x_PQBCV, amount_PQBC1)


def _compare_and_subtract(labels_PQBC: jax.Array, x_PQBCV: jax.Array, amount_PQBC1: jax.Array) -> jax.Array:
  """The plain form, which an accelerator fuses into the computation of the products' operand."""
  is_label_PQBCV = jnp.arange(x_PQBCV.shape[-1]) == labels_PQBC[..., None]
  return jnp.where(is_label_PQBCV, x_PQBCV - amount_PQBC1, x_PQBCV)


def _scatter_subtract(labels_PQBC: jax.Array, x_PQBCV: jax.Array, amount_PQBC1: jax.Array) -> jax.Array:
  """In place, one number per position."""
  batch_dims = (0, 1, 2, 3)
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(),
    inserted_window_dims=(4,),
    scatter_dims_to_operand_dims=(4,),
    operand_batching_dims=batch_dims,
    scatter_indices_batching_dims=batch_dims,
  )
  return jax.lax.scatter_sub(x_PQBCV, labels_PQBC[..., None], amount_PQBC1[..., 0], numbers, unique_indices=True)


def _scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
  """`jax.lax.scan`, without a loop if there is only one chunk."""
  if len(jax.tree.leaves(xs)[0]) > 1:
    return jax.lax.scan(body, carry, xs)
  carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
  return carry, jax.tree.map(lambda y: y[None], y)

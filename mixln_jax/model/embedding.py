"""The one entry point to the embedding's look-up.

Where the mesh shards the table over fsdp, the table is not gathered. Each device looks up all tokens in its own columns
and sends the results to the devices that hold the tokens. So the bytes sent grow with the tokens of a device and not
with the table, and no device holds the gradient of the whole table.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.parallel.rules import constrain, shards

COLUMNS = ("data_batch", "length", "embed")  # B, T, D: all tokens of a replica, some columns of each
ROWS = ("batch", "length", "activation_embed")  # B, T, D: some tokens, all columns of each


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
  """The row of each token, [B, T, D] in `dtype`; NaN for an id outside the vocabulary.

  Where the mesh shards D, the result can be differentiated once, in reverse mode.
  """
  if shards("embed") == 1:
    table_VD = constrain(table_VD, "vocab", "activation_embed")
    return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
  return _look_up_in_columns(table_VD.shape[0], dtype, table_VD, tokens_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up_in_columns(vocabulary: int, dtype: Any, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  del vocabulary
  tokens_BT = constrain(tokens_BT, *COLUMNS[:2])
  x_BTD = jnp.take(table_VD.astype(dtype), tokens_BT, axis=0)
  return constrain(constrain(x_BTD, *COLUMNS), *ROWS)


def _forward(
  vocabulary: int, dtype: Any, table_VD: jax.Array, tokens_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  # An empty slice of the table carries its type, which the gradient must have.
  return _look_up_in_columns(vocabulary, dtype, table_VD, tokens_BT), (tokens_BT, table_VD[:0])


def _backward(
  vocabulary: int, dtype: Any, saved: tuple[jax.Array, jax.Array], gradient_BTD: jax.Array
) -> tuple[jax.Array, None]:
  del dtype
  tokens_BT, empty_table = saved
  tokens_BT = constrain(tokens_BT, *COLUMNS[:2])
  # Devices exchange the gradient in its own type, then sum it in fp32: a frequent token has thousands of terms.
  gradient_BTD = constrain(gradient_BTD, *COLUMNS).astype(jnp.float32)
  zeros_VD = constrain(jnp.zeros((vocabulary, gradient_BTD.shape[-1]), jnp.float32), "vocab", "embed")
  table_gradient_VD = constrain(zeros_VD.at[tokens_BT].add(gradient_BTD), "vocab", "embed")
  return table_gradient_VD.astype(empty_table.dtype), None


_look_up_in_columns.defvjp(_forward, _backward)

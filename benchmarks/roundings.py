"""Error from rounding the partial sums of a product: gradients in bfloat16 compared with fp32, on this machine.

    python -m benchmarks.roundings [--pieces=8] [--seeds=3]

The TPU compiler splits a product whose weight is sharded over chips into steps, each of which adds its partial sum to a
bfloat16 array: eight roundings instead of the one of a whole product (`model/product.py`). This script does the same to
the forward products that sum over the width, in a small model. The table has the median over all matrices of the
relative error of the gradient, |g - g32| / |g32|, where g32 is computed in fp32 from the same weights and tokens.
"""

import argparse
import statistics
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as config_lib
from mixln_jax.model import Transformer, next_token_loss, product
from mixln_jax.model.initial import initial_params


def in_pieces(pieces: int, equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """The product, with its sum over D split into pieces that are added in the type of x."""
  x_term, weight_term = equation.split("->")[0].split(",")
  if "d" not in x_term:
    return jnp.einsum(equation, x, weight)
  x_pieces = jnp.split(x, pieces, axis=x_term.index("d"))
  weight_pieces = jnp.split(weight, pieces, axis=weight_term.index("d"))
  total = jnp.einsum(equation, x_pieces[0], weight_pieces[0])
  for x_piece, weight_piece in zip(x_pieces[1:], weight_pieces[1:], strict=True):
    # Or the compiler would keep the sum in fp32.
    total = jax.lax.optimization_barrier(total + jnp.einsum(equation, x_piece, weight_piece))
  return total


def gradients(model: Any, params: Any, tokens: jax.Array, form: Any) -> Any:
  def loss(params: Any) -> jax.Array:
    transformer = Transformer(model)
    hidden, _ = transformer.apply({"params": params}, tokens[:, :-1], method="hidden")  # pyright: ignore
    head = params["head"]
    return next_token_loss(hidden, head, tokens[:, 1:], jnp.ones(tokens[:, 1:].shape))[0]

  with mock.patch.object(product, "_product", form):
    return jax.jit(jax.grad(loss))(params)


def errors(gradient: Any, exact: Any) -> list[float]:
  pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True)
  return [float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in pairs if one.ndim > 2]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--pieces", type=int, default=8)
  parser.add_argument("--seeds", type=int, default=3)
  arguments = parser.parse_args()
  model = config_lib.base().model
  model.update(vocab_size=512, embed_dim=128, mlp_dim=352, num_layers=6, num_heads=4, placement="pre")
  found: dict[str, list[float]] = {"one rounding a product": [], f"{arguments.pieces} roundings": []}
  forms = (jnp.einsum, partial(in_pieces, arguments.pieces))
  for seed in range(arguments.seeds):
    params = initial_params(model, seed)
    tokens = jax.random.randint(jax.random.key(seed), (2, 65), 0, model.vocab_size)
    model.dtype = "float32"
    exact = gradients(model, params, tokens, jnp.einsum)
    model.dtype = "bfloat16"
    for name, form in zip(found, forms, strict=True):
      found[name] += errors(gradients(model, params, tokens, form), exact)
  for name, values in found.items():
    print(f"{name:<24}{statistics.median(values):>10.4f}")


if __name__ == "__main__":
  main()

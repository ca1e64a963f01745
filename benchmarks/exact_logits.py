"""How far a GGUF model's logits in fp32 are from exact ones, here and in transformers, and where the distance is from.

    python tests/data/make_gguf_golden.py FILE.gguf         # where torch is installed: what transformers computes
    python -m benchmarks.exact_logits --gguf=FILE.gguf --run=RUN [--terms=192]

RUN is what `convert --input=FILE.gguf` made. Exact is a forward pass in float64, written out below in NumPy in the
file's own layout. The last line adds up the products of the model in pieces of --terms terms: XLA's product on a CPU is
one running sum over the whole width, whose rounding grows with it, and other libraries add up pieces.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import mixln_jax
from mixln_jax.data.gguf_file import GgufFile
from mixln_jax.interop.gguf_weights import GgufWeights
from mixln_jax.model import product
from mixln_jax.text import aligned


def exact_logits(file: GgufFile, tokens_BT: np.ndarray) -> np.ndarray:
  """LLaMA's logits [B, T, V] in float64. llama.cpp's order of a head has the rotated pairs side by side."""
  facts = GgufWeights(file).config()
  heads, kv_heads = facts["num_attention_heads"], facts["num_key_value_heads"]
  epsilon = facts["rms_norm_eps"]

  def weight(name: str) -> np.ndarray:
    return file[f"{name}.weight"].astype(np.float64)

  def norm(x: np.ndarray, name: str) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight(name)

  embedding_VD = weight("token_embd")
  x_BTD = embedding_VD[tokens_BT]
  batch, length, width = x_BTD.shape
  head_dim = width // heads
  frequencies = facts["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
  angles_T1K = np.arange(length)[:, None, None] * frequencies
  cosine, sine = np.cos(angles_T1K), np.sin(angles_T1K)
  is_earlier_TS = np.tril(np.ones((length, length), bool))

  def rotated(x: np.ndarray) -> np.ndarray:
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack((even * cosine - odd * sine, odd * cosine + even * sine), axis=-1).reshape(x.shape)

  def split(x: np.ndarray, count: int) -> np.ndarray:
    return x.reshape(batch, length, count, head_dim)

  for layer in range(facts["num_hidden_layers"]):
    block = f"blk.{layer}"
    normed = norm(x_BTD, f"{block}.attn_norm")
    q_BTHK = rotated(split(normed @ weight(f"{block}.attn_q").T, heads))
    k_BSGK = rotated(split(normed @ weight(f"{block}.attn_k").T, kv_heads))
    v_BSGK = split(normed @ weight(f"{block}.attn_v").T, kv_heads)
    k_BSHK, v_BSHK = (np.repeat(x, heads // kv_heads, axis=2) for x in (k_BSGK, v_BSGK))
    scores = np.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / math.sqrt(head_dim)
    scores = np.where(is_earlier_TS, scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    attended = np.einsum("bhts,bshk->bthk", scores, v_BSHK).reshape(batch, length, -1)
    x_BTD = x_BTD + attended @ weight(f"{block}.attn_output").T
    normed = norm(x_BTD, f"{block}.ffn_norm")
    gate, up = normed @ weight(f"{block}.ffn_gate").T, normed @ weight(f"{block}.ffn_up").T
    x_BTD = x_BTD + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{block}.ffn_down").T
  head_VD = weight("output") if "output.weight" in file else embedding_VD
  return norm(x_BTD, "output_norm") @ head_VD.T


def in_pieces(terms: int, equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """The product `equation`, whose sum is added up in pieces of `terms` terms."""
  x_term, weight_term = equation.split("->")[0].split(",")
  summed = len(set(x_term) & set(weight_term))  # letters, the last ones of x and the first ones of the weight
  size = math.prod(weight.shape[:summed])
  rows, columns = x.reshape(*x.shape[: x.ndim - summed], size), weight.reshape(size, -1)
  total = jnp.zeros((), x.dtype)
  for begin in range(0, size, terms):
    total = total + rows[..., begin : begin + terms] @ columns[begin : begin + terms]
  return total.reshape(*rows.shape[:-1], *weight.shape[summed:])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gguf", type=Path, required=True, help="with the values of transformers beside it, as .npz")
  parser.add_argument("--run", type=Path, required=True, help="what `convert --input` made of the file")
  parser.add_argument("--terms", type=int, default=192, help="of a piece of a sum")
  given = parser.parse_args()
  read = dict(np.load(given.gguf.with_suffix(".npz")))
  tokens_BT, theirs = read["tokens"], read["logits"]
  found = {"transformers": theirs}
  with mixln_jax.open_run(given.run) as run:
    found["this code"] = np.asarray(run.logits(tokens_BT))
    jax.clear_caches()  # or the program above would be used again
    with mock.patch.object(product, "_product", partial(in_pieces, given.terms)):
      found[f"this code, sums of {given.terms} terms"] = np.asarray(run.logits(tokens_BT))
  exact = exact_logits(GgufFile(given.gguf), tokens_BT)
  rows = [("fp32", "largest from exact", "rms from exact", "largest from transformers")]
  for name, logits in found.items():
    from_exact = logits - exact
    largest, rms = np.abs(from_exact).max(), math.sqrt(np.mean(from_exact**2))
    rows.append((name, f"{largest:.1e}", f"{rms:.1e}", f"{np.abs(logits - theirs).max():.1e}"))
  print(f"{tokens_BT.size} tokens, largest logit {np.abs(exact).max():.1f}")
  print("\n".join(aligned(rows, right=(1, 2, 3))))


if __name__ == "__main__":
  main()

"""What several tests need: small configs and random parameters."""

import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

import mixln_jax
from mixln_jax import config as config_lib
from mixln_jax.data.tokenizer import SentencePieceTokenizer
from mixln_jax.model.parameters import abstract_params

# Options of a compilation whose bits are compared with those of another program (see conftest.py). None are needed, or
# known, where XLA has only the generator that users have.
EXACT = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}


class Killed(BaseException):
  """Stands for SIGKILL: nothing catches it."""


def small_model(**fields):
  """config.model of a small LLaMA."""
  model = config_lib.base().model
  model.update(vocab_size=61, embed_dim=24, mlp_dim=40, num_layers=4, num_heads=2)
  model.update(**fields)
  return model


def random_params(model, seed=0, columns=None):
  """Parameters at which nothing is small: what is learned far from its initial value, matrices of std 0.16.

  The MLP's stored columns beyond its width are 0, as the model keeps them.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if "gpas" in name:
      return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    if "norm" in name or "_c_" in name:
      return jnp.asarray(rng.uniform(0.6, 1.4, leaf.shape), leaf.dtype)
    if name.endswith(("hc_alpha']", "hc_beta']")):  # positive: streams that cancel would leave a norm their rounding
      return jnp.asarray(rng.uniform(0.3, 1.2, leaf.shape), leaf.dtype)
    if "hc_" in name and "scale" in name:
      return jnp.asarray(rng.uniform(0.1, 0.4, leaf.shape), leaf.dtype)
    if "lambda" in name or "hc_b" in name or "hc_head_base" in name:
      return jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype)
    shape = list(leaf.shape)
    for part, axis in (("gate", 2), ("up", 2), ("down", 1)):
      if part in name and leaf.ndim == 3:
        shape[axis] = model.mlp_dim
    values = rng.normal(size=shape) * (1.0 if "bias" in name else 0.16)
    return jnp.asarray(np.pad(values, [(0, a - b) for a, b in zip(leaf.shape, shape, strict=True)]), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract_params(model, columns))


def random_tokens(model, batch=3, length=12, seed=1):
  return jnp.asarray(np.random.default_rng(seed).integers(0, model.vocab_size, (batch, length)), jnp.int32)


def saved_params(workdir, step="newest"):
  """The parameters of a run's checkpoint."""
  with mixln_jax.open_run(getattr(workdir, "address", workdir), step or "newest") as run:
    return run.params


def tokenizer_with_dummy_prefix(text, vocab_size):
  """A SentencePiece model as T5's and LLaMA 2's: a blank is put before every text, and dropped when it is decoded."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text.split("\n")),
    model_writer=model,
    vocab_size=vocab_size,
    model_type="bpe",
    byte_fallback=True,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
    num_threads=1,
  )
  return SentencePieceTokenizer(model.getvalue(), "with a dummy prefix")

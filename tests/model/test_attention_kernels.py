"""Each implementation of attention against one that is written out, and which one is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.model import attention_kernels
from mixln_jax.model.attention import attention_mask
from mixln_jax.model.attention_kernels import choose_attention, self_attention
from mixln_jax.model.tuned import attention_splash
from mixln_jax.parallel.mesh import make_mesh
from mixln_jax.training.program import lower_train_step
from mixln_jax.training.step import state_shardings
from model.rounding import UNIT, assert_within, sum_error


def written_out(q, k, v, segments):
  """Head by head and query by query, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  segments = None if segments is None else np.asarray(segments)
  out = np.zeros_like(q)
  for row, query, head in np.ndindex(q.shape[:3]):
    group = head // (q.shape[2] // k.shape[2])
    seen = [s for s in range(query + 1) if segments is None or segments[row, s] == segments[row, query]]
    logits = k[row, seen, group] @ q[row, query, head] / np.sqrt(q.shape[-1])
    powers = np.exp(logits - logits.max())
    out[row, query, head] = powers @ v[row, seen, group] / powers.sum()
  return out


@pytest.mark.parametrize(
  ("implementation", "length", "groups", "documents"),
  [
    ("xla", 40, 2, True),
    ("blocks", 150, 2, False),
    ("blocks", 150, 4, True),
    ("splash", 256, 2, True),
    ("splash_length_minor", 256, 2, True),
  ],
)
def test_equals_attention_written_out(implementation, length, groups, documents):
  """Catches a block that reads keys beyond its end, a mask or a group of heads that is off, and a wrong scale."""
  rng = np.random.default_rng(0)
  heads, width = 4, 8
  q, k, v = (jnp.asarray(rng.normal(size=(2, length, n, width)) * 2, jnp.float32) for n in (heads, groups, groups))
  segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, length)), axis=1), jnp.int32) if documents else None
  mask = attention_mask(jnp.arange(length)[None], segments, None)

  def attend(q, k, v):
    return self_attention(implementation, q, k, v, mask, segments)

  expected = written_out(q, k, v, segments)
  # What fp32 may be off, whatever the order of its sums: an error δ of the logits is a relative one of 2δ in the
  # softmax, whose weights and products with v are sums of `length` terms.
  logit_error = sum_error(width, "bthk,bshk->bhts", q, jnp.repeat(k, heads // groups, axis=2)).max() / np.sqrt(width)
  relative = 2 * logit_error + 2 * length * UNIT
  assert_within(jax.jit(attend)(q, k, v), expected, relative * np.abs(v).max())
  # Gradients: those of the plain one, which is differentiated by JAX. A gradient by q or k is a difference of two
  # sums over `length` terms times the softmax, each with the error above: four of them for two programs.
  weight = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
  plain = lambda q, k, v: self_attention("xla", q, k, v, mask, segments)  # noqa: E731
  gradients = [
    jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weight), argnums=(0, 1, 2)))(q, k, v) for f in (attend, plain)
  ]
  for one, other in zip(*gradients, strict=True):
    assert_within(one, np.asarray(other, np.float64), 4 * relative * np.abs(other).max())


@pytest.mark.parametrize(
  ("platform", "fields", "length", "segments", "chosen"),
  [
    ("cpu", {}, 256, True, "blocks"),
    ("tpu", {}, 256, False, "xla"),  # short rows need no kernel
    ("tpu", {}, 2048, True, "splash"),
    ("tpu", {}, 2000, False, "xla"),
    ("gpu", {"dtype": "bfloat16", "head_dim": 64}, 256, False, "cudnn"),
    ("gpu", {"dtype": "bfloat16", "head_dim": 64}, 256, True, "xla"),
    ("gpu", {"head_dim": 64}, 256, False, "xla"),
    ("tpu", {"attention": "xla"}, 2048, False, "xla"),
  ],
)
def test_auto_takes_what_the_platform_does_best(monkeypatch, platform, fields, length, segments, chosen):
  """Catches a platform that gets a form it can't run, or not its own."""
  monkeypatch.setattr(attention_kernels, "platform", lambda: platform)
  assert choose_attention(small_model(**fields), length, segments=segments) == chosen


def test_what_can_not_be_done_is_refused_by_name():
  """Catches a forced implementation that would fail in the compiler, where nobody is told the field to change."""
  with pytest.raises(InputError, match=r"attention='splash'.*length 100"):
    choose_attention(small_model(attention="splash"), 100)
  with pytest.raises(InputError, match=r"attention='cudnn'.*bfloat16.*document_mask.*platform cpu"):
    choose_attention(small_model(attention="cudnn"), 128, segments=True)


def test_a_forced_implementation_is_held_to_the_length_of_the_run():
  """Catches shapes that are traced with rows of another length: splash would be rejected whatever the run's length."""
  config = config_lib.base()
  config.model.update(vocab_size=32, embed_dim=8, mlp_dim=8, num_layers=1, num_heads=1, attention="splash")
  config.data.sequence_length, config.train.batch_size = attention_splash.LANES, 2
  mesh = make_mesh(config.mesh)
  lower_train_step(config, mesh, state_shardings(config, mesh))
  config.data.sequence_length = 100
  with pytest.raises(InputError, match=r"attention='splash'.*length 100"):
    lower_train_step(config, mesh, state_shardings(config, mesh))
